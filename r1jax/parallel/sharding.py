"""Logical axes and their mesh axes; every sharding of the project.

Parameters name logical axes where they are created (`param`); a table says
which mesh axis shards each. Activations are constrained at block edges only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Mesh axes that together shard the rows of a batch.
BATCH_AXES = ('data', 'fsdp', 'expert')

RULES: dict[str, str | tuple[str, ...] | None] = {
  # Weights.
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'experts': 'expert',
  'latent': None,
  'layers': None,
  # Activations.
  'batch': BATCH_AXES,
  'length': 'context',
  'act_embed': None,
  'act_heads': 'tensor',
  'act_mlp': 'tensor',
}


def param(
  module: nn.Module,
  name: str,
  shape: Sequence[int],
  axes: Sequence[str | None],
  *,
  std: float | None,
) -> jax.Array:
  """Creates (or reads) a float32 parameter with logical axes.

  Args:
    module: The linen module that owns it.
    name: Its name there.
    shape: One size per axis.
    axes: Logical axis names, None for an axis that is never sharded.
    std: Of the normal initialisation; None initialises with ones.
  """
  init = nn.initializers.ones if std is None else nn.initializers.normal(std)
  return module.param(
    name,
    nn.with_logical_partitioning(init, tuple(axes)),
    tuple(shape),
    jnp.float32,
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
    for mesh_axis in (target,) if isinstance(target, str) else target or ():
      if mesh_axis in used:
        raise ValueError(
          f'logical axes {used[mesh_axis]!r} and {axis!r} of {tuple(axes)} '
          f'both map to mesh axis {mesh_axis!r}'
        )
      used[mesh_axis] = axis
    spec.append(target)
  return P(*spec)


def tree_shardings(mesh: Mesh, boxed: Any) -> Any:
  """Shardings of a tree of (abstract) variables as `module.init` returns it.

  Raises:
    ValueError: A sharded dimension that its mesh axis does not divide; the
      message names the parameter.
  """

  def one(path, leaf):
    if not isinstance(leaf, nn.LogicallyPartitioned):
      return NamedSharding(mesh, P())
    spec, shape = to_spec(leaf.names), leaf.value.shape
    for size, axis in zip(shape, spec, strict=True):
      if axis is not None and size % mesh.shape[axis]:
        raise ValueError(
          f'parameter {jax.tree_util.keystr(path)} {shape}: mesh axis '
          f'{axis}={mesh.shape[axis]} does not divide {size}'
        )
    return NamedSharding(mesh, spec)

  is_box = lambda x: isinstance(x, nn.LogicallyPartitioned)
  return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=is_box)


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
  """Rows over data x fsdp x expert; scalars are replicated."""
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


def num_batch_shards(mesh: Mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
  """Constrains an activation; does nothing outside `jax.set_mesh`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    return x
  return jax.lax.with_sharding_constraint(x, to_spec(axes))


def per_shard(
  function: Callable[..., Any], mesh: Mesh, batched: Sequence[bool]
) -> Callable[..., Any]:
  """Runs `function` on each shard of the batch, with no communication.

  Args:
    function: Its array results all have rows first.
    mesh: Where the batch lives.
    batched: For each argument, whether its arrays have rows first; the others
      are replicated.
  """
  if num_batch_shards(mesh) == 1:
    return function
  specs = tuple(P(BATCH_AXES) if b else P() for b in batched)
  # check_vma: loop carries start unvarying and become varying.
  return jax.shard_map(
    function,
    mesh=mesh,
    in_specs=specs,
    out_specs=P(BATCH_AXES),
    check_vma=False,
  )


def per_shard_here(
  function: Callable[..., Any], batched: Sequence[bool]
) -> Callable[..., Any]:
  """`per_shard` on the mesh of the surrounding `jax.set_mesh`, if any."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    return function
  return per_shard(function, mesh, batched)


def num_shards_here() -> int:
  """Shards of a batch on the mesh of the surrounding `jax.set_mesh`, or 1."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.manual_axes:
    return 1
  return num_batch_shards(mesh)
