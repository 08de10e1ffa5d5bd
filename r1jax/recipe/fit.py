"""Which mesh, recomputation and microbatches suit a run on a pod: estimates.

Every candidate is priced by formulas, in milliseconds and without a compiler:
what surely does not fit is left out, the rest comes in order of its estimated
time. They rank; what fits and what bounds a step is for the compiler to say
(`experiments.compile_for_tpu --fit`).

The state is exact: bytes of each parameter's shard, times what the optimizer
keeps. Added to it, times a factor that compilers taught, are the gradients,
what blocks save, one block's intermediates and its gathered weights. Time is
the largest of matrix products (six FLOPs a parameter and token, eight with
recomputation), memory traffic, and what is sent: weights gathered for each pass
of each microbatch and gradients scattered, tokens exchanged with experts, sums
over `tensor`.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from r1jax import config as config_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import chips, sharding
from r1jax.parallel import expert as expert_parallel
from r1jax.parallel import mesh as mesh_lib
from r1jax.train import optimizer

# Temporaries of a compiled step by what must live at once: seen 1.4 for 671B on
# 1,024 v5p chips, where this file's sum is 20 GiB.
_TEMPORARIES = 1.5
# How often a number of a block passes HBM in a pass over it: seen 12 and 14 for
# 671B (pretraining and GRPO on 1,024 v5p chips), 6 for Moonlight on 8.
_THROUGH_HBM = 10
_TENSOR = (1, 2, 4, 8)
_CONTEXT = (1, 2, 4, 8)
# Tokens of a row's part, below which splitting it is no use.
_LEAST_PART = 1024


@dataclasses.dataclass(frozen=True)
class Run:
  """What is to be placed.

  Attributes:
    model: The model's shape.
    optim: The optimizer's config.
    rows: Of a global batch.
    length: Tokens of a row.
    copies: Of the parameters beside the trained ones, such as a reference.
    num_slices: Over which `data` runs, and `fsdp` where it is less.
  """

  model: model_config.ModelConfig
  optim: optimizer.OptimConfig
  rows: int
  length: int
  copies: int = 0
  num_slices: int = 1


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One way to place a run, with its estimates for a device.

  Attributes:
    mesh: Sizes of the axes.
    remat: Whether blocks are computed again in the backward pass.
    num_microbatches: Of a step.
    hbm_bytes: Estimated.
    seconds: Of a step at least, estimated; by resource, and the 'bound'.
  """

  mesh: dict[str, int]
  remat: bool
  num_microbatches: int
  hbm_bytes: float
  seconds: dict[str, float]

  @property
  def rank(self) -> float:
    """Seconds of which a tenth of what might overlap does not."""
    bound = self.seconds['bound']
    return bound + 0.1 * (sum(self.seconds.values()) - 2 * bound)

  def flags(self, model_key: str | None = 'model') -> str:
    """The flags that make a config this.

    Args:
      model_key: Where the config has its model; None if it has none, whose
        model recomputes its blocks on TPUs.
    """
    changes = {f'mesh.{axis}': size for axis, size in self.mesh.items()}
    if model_key is not None:
      changes[f'{model_key}.remat'] = str(self.remat).lower()
    changes['train.num_microbatches'] = self.num_microbatches
    return ' '.join(f'--config.{key}={v}' for key, v in changes.items())


def candidates(
  run: Run, chip: chips.Chip, num_devices: int, *, remats=(False, True)
) -> list[Candidate]:
  """Every placement that may fit, the fastest by estimate first.

  Args:
    run: What is to be placed.
    chip: What one device has.
    num_devices: How many there are.
    remats: What may be chosen.

  Raises:
    UserError: None may fit; says what the smallest would take.
  """
  boxed = transformer.abstract(run.model)
  active = _active(run.model, boxed)
  found = [
    _estimate(run, active, weights, chip, mesh, remat, num_microbatches)
    for mesh, weights in _meshes(run, boxed, num_devices)
    for num_microbatches in _divisors(_rows_a_device(run, mesh))
    for remat in remats
  ]
  if not found:
    raise config_lib.UserError(
      f'no mesh of {num_devices} devices divides {run.rows} rows of '
      f'{run.length} tokens and the weights; more rows may'
    )
  fitting = [c for c in found if c.hbm_bytes < chip.hbm_bytes]
  if not fitting:
    least = min(found, key=lambda c: c.hbm_bytes)
    raise config_lib.UserError(
      f'nothing fits: the smallest placement takes about '
      f'{least.hbm_bytes / 2**30:.2g} GiB a device, it has '
      f'{chip.hbm_bytes / 2**30:.2g} ({least.flags()})'
    )
  return sorted(fitting, key=lambda c: c.rank)


def of_different_meshes(found: list[Candidate]) -> list[Candidate]:
  """The first of each mesh."""
  best: dict[tuple[int, ...], Candidate] = {}
  for candidate in found:
    best.setdefault(tuple(candidate.mesh.values()), candidate)
  return list(best.values())


def _meshes(run, boxed, num_devices):
  """Meshes that rows, experts and weights divide over, with their weights."""
  moe = run.model.moe
  experts = _divisors(moe.num_experts) if moe is not None else (1,)
  # Copies of the state only where the network is slow.
  for data, expert, tensor, context in itertools.product(
    _divisors(run.num_slices), experts, _TENSOR, _CONTEXT
  ):
    used = data * expert * tensor * context
    if num_devices % used or run.length % context:
      continue
    if context > 1 and run.length // context < _LEAST_PART:
      continue
    sizes = {
      'pipe': 1,
      'data': data,
      'fsdp': num_devices // used,
      'context': context,
      'expert': expert,
      'tensor': tensor,
    }
    if not _rows_a_device(run, sizes):
      continue
    if sizes['fsdp'] % (run.num_slices // data):
      continue
    try:
      yield sizes, _weights(boxed, sizes)
    except ValueError:  # Some parameter does not divide.
      continue


def _abstract_mesh(sizes: dict[str, int]) -> jax.sharding.AbstractMesh:
  return jax.sharding.AbstractMesh(tuple(sizes.values()), mesh_lib.AXES)


def _rows_a_device(run: Run, mesh: dict[str, int]) -> int:
  """Rows of a step; 0 if they do not divide."""
  shards = math.prod(mesh[axis] for axis in sharding.BATCH_AXES)
  return 0 if run.rows % shards else run.rows // shards


def _divisors(n: int) -> tuple[int, ...]:
  return tuple(d for d in range(1, n + 1) if n % d == 0)


def _estimate(
  run, active, weights, chip, mesh, remat, num_microbatches
) -> Candidate:
  c, passes = run.model, 3 + remat
  tokens = _rows_a_device(run, mesh) * run.length / mesh['context']
  local = tokens / num_microbatches  # Of one microbatch.
  width = jnp.dtype(c.dtype).itemsize
  layer = _intermediates(c, mesh, local) * width  # Bytes a token in one block.

  # What blocks save, and the block that is at work.
  saved = c.num_layers * local * (c.embed_dim * width if remat else layer)
  state = weights.own * 4 * (1 + _moments(run.optim) + run.copies)
  gradients = weights.own * 4 * (1 + (num_microbatches > 1))
  temporaries = (
    gradients
    + saved
    + 2 * local * layer
    + 2 * weights.largest * width  # This block's, and the next one's.
    + weights.largest * 4  # Its gradient.
  )
  hbm = state + _TEMPORARIES * temporaries

  flops = 2 * passes * active * tokens / mesh['tensor']
  flops += passes * _attention_flops(c, run.length) * tokens / mesh['tensor']
  gathered = weights.gathered * num_microbatches
  rate = 2 * chip.link_bytes_per_second  # Both ways round one ring.
  sent = gathered * ((passes - 1) * width + 4) / rate
  sent += _exchanged(c, mesh) * tokens * width * (passes + 1) / rate
  shares = (mesh['tensor'] - 1) / mesh['tensor']
  sent += (
    2 * (passes - 1) * c.num_layers * tokens * c.embed_dim * width
    * 2 * shares / rate
  )  # fmt: skip
  traffic = num_microbatches * passes * weights.whole * width
  traffic += 12 * 4 * weights.own
  # All of a token's rows, however few of them are held at once.
  layer = _intermediates(c, mesh, 1) * width
  traffic += _THROUGH_HBM * passes * tokens * c.num_layers * layer
  seconds = {
    'mxu': flops / chip.bf16_flops,
    'hbm': traffic / chip.hbm_bytes_per_second,
    'ici': sent,
  }
  if run.num_slices > 1:
    across = mesh_lib.across_slices(mesh, run.num_slices)
    gradients = 2 * 4 * weights.own * (across['data'] > 1)
    # What the other slices have of a layer, once; the rest travels inside.
    others = (across['fsdp'] - 1) * weights.own * num_microbatches
    gathered = others * ((passes - 1) * width + 4)
    seconds['dcn'] = (gradients + gathered) / chip.dcn_bytes_per_second
  seconds['bound'] = max(seconds.values())
  return Candidate(dict(mesh), remat, num_microbatches, hbm, seconds)


@dataclasses.dataclass(frozen=True)
class _Weights:
  """Numbers of parameters on one device.

  Attributes:
    own: Those that it keeps.
    whole: Those that it computes with, one layer after the other.
    gathered: Those of them that others keep.
    largest: Those of the largest layer.
  """

  own: float
  whole: float
  gathered: float
  largest: float


def _weights(boxed: Any, mesh: dict[str, int]) -> _Weights:
  shardings = sharding.tree_shardings(_abstract_mesh(mesh), boxed)['params']
  used = sharding.for_sampling(shardings)  # Where all that is gathered is.
  own = whole = 0.0
  layers: dict[str, float] = {}
  leaves = jax.tree_util.tree_leaves_with_path(sharding.unbox(boxed)['params'])
  for (path, leaf), kept, computed in zip(
    leaves, jax.tree.leaves(shardings), jax.tree.leaves(used), strict=True
  ):
    kept_size = math.prod(kept.shard_shape(leaf.shape))
    name = jax.tree_util.keystr((path[0],), simple=True)
    is_table = name in ('embedding', 'head')  # Nobody ever has all of it.
    size = (
      kept_size if is_table else math.prod(computed.shard_shape(leaf.shape))
    )
    own, whole = own + kept_size, whole + size
    is_stack = name in ('dense', 'moe')
    count = leaf.shape[0] if is_stack else 1
    layers[name] = layers.get(name, 0.0) + size / count
  return _Weights(own, whole, whole - own, max(layers.values()))


def _intermediates(
  c: model_config.ModelConfig, mesh: dict[str, int], num_tokens: float
) -> float:
  """Numbers a token that the largest block keeps for its backward pass."""
  D, tensor = c.embed_dim, mesh['tensor']
  a = c.attention
  match a:
    case model_config.MlaConfig():
      heads = a.num_heads * (
        2 * (a.nope_head_dim + a.rope_head_dim) + 2 * a.v_head_dim
      )
    case _:
      heads = 4 * a.num_heads * a.head_dim
  dense = 3 * c.dense_dim * (c.num_dense_layers > 0)
  if c.moe is None:
    return 4 * D + (heads + dense) / tensor
  m = c.moe
  room = 1.0
  if mesh['expert'] > 1 and m.exchange.receive_factor != 'worst':
    room = m.exchange.receive_factor
  routed = m.top_k * (2 * D + 3 * m.expert_dim / tensor) * room
  if mesh['expert'] > 1:
    routed /= m.exchange.num_parts(max(int(num_tokens), 1))
  shared = 3 * m.num_shared * m.expert_dim / tensor
  return 4 * D + heads / tensor + max(dense / tensor, routed + shared)


def _exchanged(c: model_config.ModelConfig, mesh: dict[str, int]) -> float:
  """Numbers a token that go to experts and back, in one pass, all layers."""
  if c.moe is None or mesh['expert'] == 1:
    return 0.0
  m, ranks = c.moe, mesh['expert']
  most = expert_parallel.limits(
    1,
    num_ranks=ranks,
    num_experts=m.num_experts,
    top_k=m.top_k,
    num_groups=m.num_groups,
    top_groups=m.top_groups,
    receive_factor='worst',
  ).most_ranks
  layers = c.num_layers - c.num_dense_layers
  # All with all: an n-th of a ring's links is on the way, see roofline.py.
  detour = max(min(ranks, 16), 4) / 4
  return layers * most * c.embed_dim * (ranks - 1) / ranks * detour


def _active(c: model_config.ModelConfig, boxed: Any) -> float:
  """Parameters that one token meets."""
  total = 0.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    sharding.unbox(boxed)['params']
  ):
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    if names[0] == 'embedding':
      continue
    share = 1.0
    if c.moe is not None and names[-2:-1] == ['moe'] and names[-1] in (
      'gate', 'up', 'down'
    ):  # fmt: skip
      share = c.moe.top_k / c.moe.num_experts
    total += share * math.prod(leaf.shape)
  return total


def _attention_flops(c: model_config.ModelConfig, length: int) -> float:
  """Of one token's scores and sums, half of all keys, in all layers."""
  a = c.attention
  match a:
    case model_config.MlaConfig():
      width = a.nope_head_dim + a.rope_head_dim + a.v_head_dim
    case _:
      width = 2 * a.head_dim
  return c.num_layers * 2 * a.num_heads * width * length / 2


@functools.cache
def _moments(optim: optimizer.OptimConfig) -> float:
  """Numbers that the optimizer keeps for each of a matrix."""
  params = {'kernel': jax.ShapeDtypeStruct((8, 8), jnp.float32)}
  state = jax.eval_shape(optimizer.make_optimizer(optim, 1).init, params)
  sizes = [x.size for x in jax.tree.leaves(state) if x.ndim]
  return sum(sizes) / 64
