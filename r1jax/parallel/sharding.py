"""Logical axes and their mesh axes; every sharding of the project.

Parameters name logical axes where they are created (`param`); a table says
which mesh axis shards each. Programs are written for one device and run by
`per_device`: they see their own rows and their own part of each parameter.
Along `fsdp` a layer gathers its parameters when it needs them (`param`), along
`expert` those that are no expert's, along `pipe` where no pipeline runs. Along
`tensor` it computes with its part between `fan_out` and `fan_in`, to the
devices of `expert` tokens travel (expert.py). Every exchange is written out;
outside `per_device`, or on one device, each of them does nothing.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.losses import token

# Mesh axes that together shard the rows of a microbatch in a pipeline, and
# those of any other batch.
ROW_AXES = ('data', 'fsdp', 'expert')
BATCH_AXES = ('pipe', *ROW_AXES)

# Mesh axes that share parameters which are gathered to be used. What is no
# expert's is shared by the devices of `expert` as well. A pipeline moves what
# its stages need to them, `pipe` away, and the rest works on: how many parts
# there are says along which axes a parameter is gathered. `pipe` comes last, so
# that what its devices share lies side by side.
_FSDP = ('fsdp', 'pipe')
_FSDP_AND_EXPERT = ('fsdp', 'expert', 'pipe')

RULES: dict[str, str | tuple[str, ...] | None] = {
  # Weights.
  'embed': _FSDP_AND_EXPERT,
  'expert_embed': _FSDP,  # Of weights with an axis of experts.
  'expert_mlp': ('tensor', *_FSDP),  # Where `embed` is their last axis.
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'head_vocab': ('fsdp', 'tensor', 'pipe'),
  'experts': 'expert',
  'latent': None,
  'rank': _FSDP,  # A latent that a matrix is applied to.
  'layers': None,
}


class Parameter(nn.LogicallyPartitioned):
  """A parameter with the names of its axes.

  Attributes:
    used_as: The dtype that whatever reads it casts it to; None for its own.
  """

  used_as: Any = flax.struct.field(default=None, pytree_node=False)


def param(
  module: nn.Module,
  name: str,
  shape: Sequence[int],
  axes: Sequence[str | None],
  *,
  std: float | None,
  dtype: jnp.dtype | None = None,
  whole: bool = True,
) -> jax.Array:
  """Creates (or reads) a float32 parameter with logical axes.

  Inside `per_device` it is this device's part, gathered as this file's top
  says: of heads, widths and experts each device has its own.

  Args:
    module: The linen module that owns it.
    name: Its name there.
    shape: One size per axis, of the whole.
    axes: Logical axis names, None for an axis that is never sharded.
    std: Of the normal initialisation; None initialises with ones.
    dtype: Of the result, and of what is gathered; as it is if None.
    whole: Gather; False returns the part.
  """
  init = nn.initializers.ones if std is None else nn.initializers.normal(std)
  shape = tuple(shape)
  local_shape = shape
  if module.has_variable('params', name):
    local_shape = jnp.shape(module.get_variable('params', name))
  used_as = jnp.dtype(dtype) if whole and dtype is not None else None
  box = lambda *args: Parameter(init(*args), tuple(axes), used_as=used_as)
  x = module.param(name, box, local_shape, jnp.float32)
  return gather(x, shape, axes, dtype) if whole else x


def gather(
  x: jax.Array,
  shape: Sequence[int],
  axes: Sequence[str | None],
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """A parameter from each device's part along `fsdp`.

  Its gradient is summed in float32 over the devices, each of which keeps its
  part.

  Args:
    x: The part.
    shape: Of the whole.
    axes: Logical axes.
    dtype: Of the result, and of what is exchanged; that of x if None.
  """
  dtype = x.dtype if dtype is None else jnp.dtype(dtype)
  spec = to_spec(axes)
  for i, (local, whole) in enumerate(zip(x.shape, shape, strict=True)):
    mesh_axes = _mesh_axes(spec[i])
    if 'tensor' in mesh_axes:  # Each of its devices has a part of its own.
      whole //= axis_size('tensor')
    if local != whole and 'fsdp' in mesh_axes:
      mesh_axes = tuple(a for a in mesh_axes if a != 'tensor')
      x = _gather_axis(x, _axes_of(mesh_axes, whole // local), i, dtype)
  return x.astype(dtype)


def _axes_of(axes: tuple[str, ...], num_parts: int) -> tuple[str, ...]:
  """Those of a spec's mesh axes that so many parts of a parameter lie on."""
  inside = tuple(a for a in axes if a != 'pipe')
  return inside if num_parts == math.prod(map(axis_size, inside)) else axes


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather_axis(x, mesh_axes, axis, dtype):
  # One mesh axis at a time, the last first: a TPU's compiler turns a gather
  # over several into an all-reduce of the whole.
  x = x.astype(dtype)
  for name in _several(reversed(mesh_axes)):
    x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
  return x


def _gather_axis_fwd(x, mesh_axes, axis, dtype):
  return _gather_axis(x, mesh_axes, axis, dtype), jnp.zeros((), x.dtype)


def _gather_axis_bwd(mesh_axes, axis, dtype, like, grad):
  del dtype
  grad = grad.astype(jnp.float32)
  for name in _several(mesh_axes):
    grad = jax.lax.psum_scatter(grad, name, scatter_dimension=axis, tiled=True)
  return (grad.astype(like.dtype),)


_gather_axis.defvjp(_gather_axis_fwd, _gather_axis_bwd)


def _several(mesh_axes: Iterable[str]) -> list[str]:
  return [a for a in mesh_axes if axis_size(a) > 1]


def look_up(
  embedding: jax.Array, tokens_BT: jax.Array, vocab_size: int, dim: int
) -> jax.Array:
  """Rows of an embedding, [B, T, dim].

  Each device may have some of its rows, along `tensor`, and of these some
  columns, along `fsdp` and `expert`; for the latter tokens are gathered and
  columns exchanged, so that no device ever has all of it.
  """
  num_rows, num_columns = embedding.shape
  if num_rows == vocab_size:
    take = lambda tokens: jnp.take(embedding, tokens, axis=0)
  else:

    def take(tokens):
      row = tokens - jax.lax.axis_index('tensor') * num_rows
      is_here = (row >= 0) & (row < num_rows)
      rows = jnp.take(embedding, row, axis=0, mode='clip')
      return fan_in(jnp.where(is_here[..., None], rows, 0))

  if num_columns == dim:
    return take(tokens_BT)
  axes = _axes_of(_FSDP_AND_EXPERT, dim // num_columns)
  part_nBTd = take(jax.lax.all_gather(tokens_BT, axes))
  return jax.lax.all_to_all(
    part_nBTd, axes, split_axis=0, concat_axis=3, tiled=True
  )[0]


@jax.custom_vjp
def fan_out(x: Any) -> Any:
  """Before each device of `tensor` computes with its part of a layer.

  Nothing on the way there; gradients are added up on the way back.

  Source: Shoeybi et al., 'Megatron-LM', arXiv:1909.08053, §3.
  """
  return x


@jax.custom_vjp
def fan_in(x: Any) -> Any:
  """After it: adds up what the devices of `tensor` computed.

  Nothing on the way back.
  """
  return _sum_tensor(x)


def mean_tensor(x: jax.Array) -> jax.Array:
  """The mean over the devices of `tensor` of a constant."""
  return _sum_tensor(x) / axis_size('tensor')


def _sum_tensor(x):
  return jax.lax.psum(x, 'tensor') if axis_size('tensor') > 1 else x


fan_out.defvjp(lambda x: (x, None), lambda _, grad: (_sum_tensor(grad),))
fan_in.defvjp(lambda x: (_sum_tensor(x), None), lambda _, grad: (grad,))


def own_length(x_BT: jax.Array) -> jax.Array:
  """This device's part of sequences, along `context`: [B, T, …].

  Raises:
    ValueError: The mesh axis does not divide T.
  """
  parts = axis_size('context')
  if parts == 1:
    return x_BT
  if x_BT.shape[1] % parts:
    raise ValueError(
      f'mesh axis context={parts} does not divide {x_BT.shape[1]} tokens'
    )
  length = x_BT.shape[1] // parts
  return jax.lax.dynamic_slice_in_dim(
    x_BT, first_of_length(length), length, axis=1
  )


def first_of_length(length: int) -> int | jax.Array:
  """Where this device's part of sequences begins, of `length` tokens each."""
  if axis_size('context') == 1:
    return 0
  return jax.lax.axis_index('context') * length


def gather_length(x_BT: jax.Array) -> jax.Array:
  """Whole sequences of what each device of `context` computed a part of.

  For keys: each device goes on with something else, gradients are added up.
  """
  if axis_size('context') == 1:
    return x_BT
  return jax.lax.all_gather(x_BT, 'context', axis=1, tiled=True)


@jax.custom_vjp
def join_length(x_BT: jax.Array) -> jax.Array:
  """The same, where all devices go on with the same: no sum on the way back.

  The loss is computed from whole rows on each device of `context`.
  """
  return gather_length(x_BT)


@jax.custom_vjp
def sum_length(x: Any) -> Any:
  """Adds up over the devices of `context`, which all go on with the sum."""
  return jax.lax.psum(x, 'context') if axis_size('context') > 1 else x


join_length.defvjp(
  lambda x: (join_length(x), None), lambda _, grad: (own_length(grad),)
)
sum_length.defvjp(lambda x: (sum_length(x), None), lambda _, grad: (grad,))


def share_columns(w_DV: jax.Array, num_columns: int) -> token.Head:
  """The output projection, whose columns may be spread over devices.

  Over `fsdp` and `tensor`, or `tensor` alone. Devices of `fsdp` have other
  tokens each, so that every one scores all their tokens with its columns.
  """
  parts = num_columns // w_DV.shape[1]
  whole_rows = {'own_length': own_length, 'join_length': join_length}
  if parts == 1:
    return token.Head(w_DV, **whole_rows)
  over_tensor = axis_size('tensor')
  over_fsdp = parts // over_tensor
  fsdp, axes = (), ('tensor',)
  if over_fsdp > 1:
    fsdp = _axes_of(_FSDP, over_fsdp)
    axes = ('fsdp', 'tensor', *fsdp[1:])
  index = jax.lax.axis_index(axes)

  def spread(x):
    if fsdp:
      x = jax.lax.all_gather(x, fsdp, tiled=True)
    return fan_out(x)

  def total(x):
    x = fan_in(x)
    if fsdp:
      x = jax.lax.psum_scatter(x, fsdp, tiled=True)
    return x

  def join(x):
    x = jax.lax.all_gather(x, 'tensor', axis=-1, tiled=True)
    if fsdp:
      x = jax.lax.all_to_all(x, fsdp, 0, x.ndim - 1, tiled=True)
    if len(fsdp) > 1:  # From the order fsdp, pipe, tensor to that of columns.
      sizes = (axis_size('fsdp'), axis_size('pipe'), over_tensor, -1)
      x = x.reshape(len(x), *sizes).swapaxes(2, 3).reshape(x.shape)
    return x

  return token.Head(
    w_DV,
    first=index * w_DV.shape[1],
    spread=spread,
    num_spread=over_fsdp,
    total=total,
    largest=lambda x: jax.lax.pmax(x, axes),
    join=join,
    **whole_rows,
  )


def to_spec(axes: Sequence[str | None]) -> P:
  """Turns logical axes into a PartitionSpec.

  Raises:
    ValueError: An unknown logical axis, or two axes of one array that would
      be sharded over the same mesh axis.
  """
  spec, used = [], {}
  for axis in axes:
    if axis is not None and axis not in RULES:
      raise ValueError(
        f'unknown logical axis {axis!r}; known: {", ".join(RULES)}'
      )
    target = RULES[axis] if axis is not None else None
    for mesh_axis in _mesh_axes(target):
      if mesh_axis in used:
        raise ValueError(
          f'logical axes {used[mesh_axis]!r} and {axis!r} of {tuple(axes)} '
          f'both map to mesh axis {mesh_axis!r}'
        )
      used[mesh_axis] = axis
    spec.append(target)
  return P(*spec)


def _mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def tree_shardings(mesh: Mesh, boxed: Any) -> Any:
  """Shardings of a tree of (abstract) variables as `module.init` returns it.

  Raises:
    ValueError: A sharded dimension that its mesh axis does not divide; the
      message names the parameter.
  """

  def one(path, leaf):
    if not _is_parameter(leaf):
      return NamedSharding(mesh, P())
    spec, shape = to_spec(leaf.names), leaf.value.shape
    for size, axis in zip(shape, spec, strict=True):
      parts = {a: mesh.shape[a] for a in _mesh_axes(axis)}
      if size % math.prod(parts.values()):
        shown = ' x '.join(f'{a}={n}' for a, n in parts.items())
        raise ValueError(
          f'parameter {jax.tree_util.keystr(path)} {shape}: mesh axis '
          f'{shown} does not divide {size}, a divisor of it would do'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=_is_parameter)


def _is_parameter(x: Any) -> bool:
  return isinstance(x, Parameter)


def used_dtypes(boxed: Any) -> Any:
  """Dtypes in which (abstract) variables of `module.init` are read."""
  own = jax.tree.map(lambda x: x.dtype, unbox(boxed))
  used = lambda x, own: (_is_parameter(x) and x.used_as) or own
  return jax.tree.map(used, boxed, own, is_leaf=_is_parameter)


def for_sampling(shardings: Any) -> Any:
  """Where variables lie to be sampled from: nothing is gathered to be used.

  A step of decoding is too short to do so in each layer.
  """

  def own(entry):
    axes = _mesh_axes(entry)
    if 'fsdp' not in axes:
      return entry
    return 'tensor' if 'tensor' in axes else None

  return jax.tree.map(
    lambda target: NamedSharding(target.mesh, P(*map(own, target.spec))),
    shardings,
  )


def share_copies(x: jax.Array) -> jax.Array:
  """Spreads an array that all devices of `data` have over them.

  Along its first axis if they divide it, and outside `per_device`: for work on
  parts that are independent.
  """
  mesh = jax.sharding.get_abstract_mesh()
  copies = mesh.shape.get('data', 1)
  if copies == 1 or 'data' in mesh.manual_axes or x.shape[0] % copies:
    return x
  rest = [P.UNCONSTRAINED] * (x.ndim - 1)
  return jax.lax.with_sharding_constraint(x, P('data', *rest))


def without(target: NamedSharding, mesh_axes: Sequence[str]) -> NamedSharding:
  """A sharding that leaves some mesh axes out."""
  axes = [
    tuple(a for a in _mesh_axes(entry) if a not in mesh_axes)
    for entry in target.spec
  ]
  spec = P(*(a[0] if len(a) == 1 else a or None for a in axes))
  return NamedSharding(target.mesh, spec)


def of_stages(stack: NamedSharding) -> NamedSharding:
  """From a stack of layers [L, …] to that of stages [stages, layers, …].

  Each device of `pipe` has its stages, of which the others share nothing.
  """
  _, *rest = without(stack, ('pipe',)).spec
  return NamedSharding(stack.mesh, P('pipe', None, *rest))


def join_pipe(x: jax.Array, target: NamedSharding) -> jax.Array:
  """What the devices of `pipe` share of a parameter, on each of them."""
  axis = _shared_axis(target)
  if axis is None:
    return x
  return jax.lax.all_gather(x, 'pipe', axis=axis, tiled=True)


def share_pipe(x: jax.Array, target: NamedSharding) -> jax.Array:
  """The inverse: this device's part."""
  axis = _shared_axis(target)
  return x if axis is None else _own_part(x, axis)


def spread_stages(x: jax.Array, stack: NamedSharding) -> jax.Array:
  """From a part of each stage, [stages, layers, …], to all of its own.

  Args:
    x: What the device has of all stages.
    stack: How the devices share the stack of layers, [L, …].
  """
  axis = _shared_axis(stack)
  if axis is None:
    return _own_part(x, 0)
  return jax.lax.all_to_all(x, 'pipe', 0, axis + 1, tiled=True)


def collect_stages(x: jax.Array, stack: NamedSharding) -> jax.Array:
  """The inverse."""
  axis = _shared_axis(stack)
  if axis is None:
    return jax.lax.all_gather(x, 'pipe', tiled=True)
  return jax.lax.all_to_all(x, 'pipe', axis + 1, 0, tiled=True)


def _shared_axis(target: NamedSharding) -> int | None:
  """Which axis of an array the devices of `pipe` share, the last to do so."""
  for i, entry in enumerate(target.spec):
    if 'pipe' in _mesh_axes(entry):
      return i
  return None


def _own_part(x: jax.Array, axis: int) -> jax.Array:
  size = x.shape[axis] // axis_size('pipe')
  start = jax.lax.axis_index('pipe') * size
  return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def unbox(tree: Any) -> Any:
  """Strips the axis names that `param` put around the arrays."""
  return nn.meta.unbox(tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def replicate(mesh: Mesh, x: np.ndarray) -> jax.Array:
  """A host array that every process has, on all devices of a mesh."""
  return jax.make_array_from_callback(
    x.shape, replicated(mesh), lambda index: x[index]
  )


def replicated_like(target: jax.sharding.Sharding) -> jax.sharding.Sharding:
  """Replicated over the devices of another sharding."""
  if isinstance(target, NamedSharding):
    return replicated(target.mesh)
  return target


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
  """Rows over pipe x data x fsdp x expert; scalars are replicated."""
  return NamedSharding(mesh, P(BATCH_AXES) if rank else P())


def put_batch(mesh: Mesh, batch: Any) -> Any:
  """Moves a host batch (numpy leaves, rows first) onto the mesh."""
  return jax.tree.map(
    lambda x: jax.device_put(x, batch_sharding(mesh, jnp.ndim(x))), batch
  )


def put_local_batch(mesh: Mesh, batch: Any) -> Any:
  """Moves this process's rows of a batch onto the mesh; scalars are global."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      batch_sharding(mesh, np.ndim(x)), np.asarray(x)
    ),
    batch,
  )


def sum_over_processes(x: np.ndarray) -> np.ndarray:
  """Adds a host array over all processes; each gets the sum."""
  if jax.process_count() == 1:
    return x
  return multihost_utils.process_allgather(x).sum(axis=0)


def first_says(value: int) -> int:
  """The value that process 0 has, on all of them; all must ask."""
  if jax.process_count() == 1:
    return value
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def to_host(tree: Any) -> Any:
  """Whole arrays on the host of every process; all must ask."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return multihost_utils.process_allgather(tree, tiled=True)


def num_batch_shards(mesh: Mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def per_device(
  function: Callable[..., Any],
  mesh: Mesh,
  in_shardings: Sequence[Any],
  out_shardings: Any,
) -> Callable[..., Any]:
  """Runs a program written for one device on all of them; see this file's top.

  Args:
    function: Takes and returns parts.
    mesh: The devices.
    in_shardings: For each argument a tree of shardings, or 'rows' for arrays
      whose rows are the batch's (scalars are whole), or 'whole'.
    out_shardings: The same for the result; a tree whose leaves are those.
  """
  if mesh.size == 1:
    return function

  def run(*args):
    in_specs = tuple(
      _local_specs(kind, arg)
      for kind, arg in zip(in_shardings, args, strict=True)
    )
    # check_vma: loop carries start unvarying and become varying.
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=_local_specs(out_shardings),
      check_vma=False,
    )(*args)

  return run


def _local_specs(kind: Any, arg: Any = None) -> Any:
  if kind == 'rows' and arg is not None:
    return jax.tree.map(lambda x: P(BATCH_AXES) if jnp.ndim(x) else P(), arg)
  names = {'rows': P(BATCH_AXES), 'whole': P()}
  return jax.tree.map(
    lambda x: names[x] if isinstance(x, str) else x.spec, kind
  )


def axis_size(axis: str) -> int:
  """Devices along a mesh axis, inside `per_device`; 1 outside."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[axis] if axis in mesh.manual_axes else 1


def batch_index() -> int | jax.Array:
  """Number of this device among those that share a batch; 0 outside."""
  return jax.lax.axis_index(BATCH_AXES) if _is_local() else 0


def sum_rows(tree: Any) -> Any:
  """Adds up over the devices that share a batch, inside `per_device`."""
  return jax.lax.psum(tree, BATCH_AXES) if _is_local() else tree


def is_everywhere(flag: jax.Array) -> jax.Array:
  """True if it is on all devices that share the experts."""
  if axis_size('expert') == 1:
    return flag
  return jax.lax.pmin(flag.astype(jnp.int32), 'expert') > 0


def max_rows(tree: Any) -> Any:
  """The maximum over the devices that share a batch, inside `per_device`."""
  return jax.lax.pmax(tree, BATCH_AXES) if _is_local() else tree


def sum_gradients(grads: Any, shardings: Any) -> Any:
  """Adds up gradients over the devices that computed parts of them.

  Where a parameter is sharded, `gather` and expert parallelism have done so.
  """
  if not _is_local():
    return grads
  leaves, treedef = jax.tree.flatten(grads)
  groups = {}
  for i, target in enumerate(treedef.flatten_up_to(shardings)):
    used = [a for entry in target.spec for a in _mesh_axes(entry)]
    axes = tuple(a for a in (*BATCH_AXES, 'context') if a not in used)
    groups.setdefault(axes, []).append(i)
  for axes, members in groups.items():
    # One exchange for all of them.
    summed = jax.lax.psum([leaves[i] for i in members], axes)
    for i, x in zip(members, summed, strict=True):
      leaves[i] = x
  return treedef.unflatten(leaves)


def _is_local() -> bool:
  return bool(jax.sharding.get_abstract_mesh().manual_axes)
