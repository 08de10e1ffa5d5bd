"""The TPU kernel of index logits of whole sequences."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla import blocks as blocks_lib

_LANES = 128
_VMEM_LIMIT_BYTES = 48 * 2**20  # Of 64 MiB of v5p and tpu7x.


def index_logits(
  span_n: jax.Array,
  q_BJTI: jax.Array,
  k_BSI: jax.Array,
  scale_B1S: jax.Array,
  weight_BTJ: jax.Array,
  start_BT1: jax.Array,
  end_BT1: jax.Array,
  *,
  blocks: blocks_lib.LogitsBlocks,
  interpret,
) -> jax.Array:
  """Returns float32 [B, T, S] logits; T and S are whole blocks.

  Args:
    span_n: int32 [B · blocks of queries · 2] for each block of queries, the
      first block of keys that any may see and the one after the last.
    q_BJTI: Queries.
    k_BSI: Keys in the dtype of the queries.
    scale_B1S: float32 factor of each key.
    weight_BTJ: float32 weights.
    start_BT1: int32 first key that each query may see.
    end_BT1: int32 one after the last.
    blocks: Sizes.
    interpret: Run on a CPU.
  """
  B, J, T, I = q_BJTI.shape
  S = k_BSI.shape[1]
  t, s = blocks.queries, blocks.keys
  num_t, num_s = T // t, S // s

  def of_queries(*shape, axis):
    def index(b, i, j, *_):
      place = [b] + [0] * len(shape)
      place[axis] = _turn(i, num_t)
      return tuple(place)

    return pl.BlockSpec((1, *shape), index)

  def seen(b, i, j, span_ref):
    # Keys that no query sees are not copied.
    at = 2 * (b * num_t + _turn(i, num_t))
    return jnp.clip(j, span_ref[at], jnp.maximum(span_ref[at + 1] - 1, 0))

  pairs = B * T * J * S
  return pl.pallas_call(
    _logits_kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, num_t, num_s),
      in_specs=[
        # VMEM, for 64 heads of 128 channels, blocks of 128 queries, 512 keys:
        # queries 2 · 2 MiB in bfloat16, 2 · 1 MiB in FP8,
        of_queries(J, t, I, axis=2),
        # keys 2 · 128 KiB, their factors 2 · 16 KiB,
        pl.BlockSpec((1, s, I), lambda b, i, j, *p: (b, seen(b, i, j, *p), 0)),
        pl.BlockSpec((1, 1, s), lambda b, i, j, *p: (b, 0, seen(b, i, j, *p))),
        # weights 2 · 32 KiB, ranges 4 · 64 KiB,
        of_queries(t, J, axis=1),
        of_queries(t, 1, axis=1),
        of_queries(t, 1, axis=1),
      ],
      # logits 2 · 256 KiB,
      out_specs=pl.BlockSpec(
        (1, t, s), lambda b, i, j, *_: (b, _turn(i, num_t), j)
      ),
      # weights in all lanes 4 MiB, and what the compiler keeps of a group,
      # 1 MiB: together 10 MiB.
      scratch_shapes=[pltpu.VMEM((J, t, _LANES), jnp.float32)],
    ),
    out_shape=jax.ShapeDtypeStruct((B, T, S), jnp.float32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=pairs * (2 * I + 3),
      transcendentals=0,
      bytes_accessed=q_BJTI.nbytes + k_BSI.nbytes + B * T * (J + S) * 4,
    ),
    interpret=interpret,
    name='sparse_mla_index_logits',
  )(span_n, q_BJTI, k_BSI, scale_B1S, weight_BTJ, start_BT1, end_BT1)


def _turn(i, num_blocks):
  """The i-th block of queries: even ones first, if there are pairs.

  Cores get halves of them, and later queries see more keys.
  """
  half = num_blocks // 2
  if num_blocks % 2:
    return i
  return jnp.where(i < half, 2 * i, 2 * (i - half) + 1)


def _logits_kernel(
  span_ref,  # SMEM [B · blocks of queries · 2]
  q_ref,  # [1, J, t, I]
  k_ref,  # [1, s, I]
  scale_ref,  # [1, 1, s]
  w_ref,  # [1, t, J]
  start_ref,  # [1, t, 1]
  end_ref,  # [1, t, 1]
  out_ref,  # [1, t, s]
  column_ref,  # [J, t, 128] f32
):
  """One block of queries and one of keys."""
  b, i, j = (pl.program_id(axis) for axis in range(3))
  num_t = pl.num_programs(1)
  _, J, t, I = q_ref.shape
  s = k_ref.shape[1]
  at = 2 * (b * num_t + _turn(i, num_t))
  is_seen = (j >= span_ref[at]) & (j < span_ref[at + 1])

  @pl.when(j == 0)
  def _spread():
    spread_weights(w_ref[0], column_ref)

  @pl.when(is_seen)
  def _logits():
    key = j * s + jax.lax.broadcasted_iota(jnp.int32, (blocks_lib.GROUP, s), 1)

    @pl.loop(0, t // blocks_lib.GROUP)
    def _(group):
      part = pl.ds(
        pl.multiple_of(group * blocks_lib.GROUP, blocks_lib.GROUP),
        blocks_lib.GROUP,
      )
      logits = weighted_scores(
        q_ref[0, :, part].reshape(J * blocks_lib.GROUP, I),
        k_ref[0],
        column_ref[:, part],
      )
      logits *= scale_ref[0]
      allowed = (key >= start_ref[0, part]) & (key < end_ref[0, part])
      out_ref[0, part] = jnp.where(allowed, logits, -jnp.inf)

  @pl.when(jnp.logical_not(is_seen))
  def _nothing():
    out_ref[0] = jnp.full((t, s), -jnp.inf)


def spread_weights(weight_tJ, column_ref):
  """Weights [t, J] to [J, t, 128], each in all lanes."""
  for i in range(column_ref.shape[0]):
    column_ref[i] = jnp.broadcast_to(
      weight_tJ[:, i : i + 1], column_ref.shape[1:]
    )


def weighted_scores(q_mI, k_sI, column_JtL):
  """Σ_j w · ReLU(q · k), float32 [t, s], of rows m = (J, t)."""
  exact = jax.lax.Precision.HIGHEST if q_mI.dtype == jnp.float32 else None
  score_ms = jax.lax.dot_general(
    q_mI,
    k_sI,
    (((1,), (1,)), ((), ())),
    precision=exact,
    preferred_element_type=jnp.float32,
  )
  score_ms = jnp.maximum(score_ms, 0.0)
  logits = []
  for lane in range(0, k_sI.shape[0], _LANES):
    part_JtL = score_ms[:, lane : lane + _LANES].reshape(column_JtL.shape)
    logits.append(jnp.sum(part_JtL * column_JtL, axis=0))
  return jnp.concatenate(logits, axis=-1)
