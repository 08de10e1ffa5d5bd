"""The TPU kernel of attention to selected tokens, copied one by one from HBM.

A copy costs the scalar unit some four cycles whatever its size is, and that is
what bounds the kernel: the matrix units work beside it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla import blocks as blocks_lib

_LANES = 128
# Slots of blocks of tokens, and how many blocks ahead copies are started: two
# blocks are on their way while a third is asked for and one is computed.
_SLOTS, _AHEAD = 4, 3
_VMEM_LIMIT_BYTES = 48 * 2**20  # Of 64 MiB of v5p and tpu7x.
# Below all scores, finite: of no two of them is the difference nan.
_LOWEST = -1e30


def attend(
  count_R: jax.Array,
  row_g1k: jax.Array,
  index_R1K: jax.Array,
  q_RHC: jax.Array,
  word_IL: jax.Array,
  *,
  scale: float,
  blocks: blocks_lib.AttendBlocks,
  interpret,
) -> tuple[jax.Array, jax.Array]:
  """Attends with each of R queries to its own tokens.

  Args:
    count_R: int32 blocks of a query that have tokens; 0 if it has none.
    row_g1k: int32 [R · blocks a query, 1, block] where in `word_IL` the tokens
      begin. All exist, and what stands for none is a token of the query's own.
    index_R1K: int32, negative where there is no token.
    q_RHC: [R, H, C + 128] queries.
    word_IL: The words of all pages, see `RowCache`.
    scale: Of the scores.
    blocks: Sizes; `workers` divides R.
    interpret: Run on a CPU.

  Returns:
    [R, H, C] in the dtype of q and float32 [R, ⌈H / 128⌉, 128] logarithms; 0
    and inf where a query has no token.
  """
  R, H, Q = q_RHC.shape
  K, k = index_R1K.shape[-1], row_g1k.shape[-1]
  C = Q - _LANES
  tiles = C // (2 * _LANES) + 1
  W, lse_rows = blocks.workers, pl.cdiv(H, _LANES)
  per_worker = R // W

  def of_row(*shape):
    return pl.BlockSpec(
      (1, *shape), lambda w, r, *_: (w * per_worker + r, 0, 0)
    )

  if not interpret:
    # XLA puts small ones into VMEM, from where each copy is a loop.
    word_IL = pltpu.with_memory_space_constraint(word_IL, pltpu.HBM)
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    functools.partial(
      _attend_kernel,
      scale=scale,
      per_worker=per_worker,
      is_unrolled=blocks.is_unrolled,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(W, per_worker),
      in_specs=[in_hbm, of_row(1, K), of_row(H, Q), in_hbm],
      out_specs=[of_row(H, C), of_row(lse_rows, _LANES)],
      # VMEM, for 128 heads of 640 channels and blocks of 512 tokens:
      scratch_shapes=[
        # Words of tokens 4 · 768 KiB, and pairs of tokens 640 KiB.
        pltpu.VMEM((_SLOTS, k * tiles, _LANES), jnp.uint32),
        pltpu.VMEM((Q // _LANES, k // 2, _LANES), jnp.uint32),
        # Largest score and sum of weights 2 · 64 KiB, values 256 KiB.
        pltpu.VMEM((H, _LANES), jnp.float32),
        pltpu.VMEM((H, _LANES), jnp.float32),
        pltpu.VMEM((H, C), jnp.float32),
        # What is to be copied, and where copying is: 8 KiB of SMEM.
        pltpu.SMEM((_SLOTS, 1, k), jnp.int32),
        pltpu.SMEM((3,), jnp.int32),
        pltpu.SemaphoreType.DMA((_SLOTS,)),
        pltpu.SemaphoreType.DMA((_SLOTS,)),
      ],
      # Queries 2 · 160 KiB, results 2 · 128 KiB, indices 2 · 64 KiB, scores
      # and weights of a block 256 and 128 KiB: together 5.2 MiB.
    ),
    out_shape=[
      jax.ShapeDtypeStruct((R, H, C), q_RHC.dtype),
      jax.ShapeDtypeStruct((R, lse_rows, _LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      # Workers share nothing, so that v5p gives half of them to each core.
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
      # Checks of each row would take as long as its copy; see row_g1k.
      disable_bounds_checks=True,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * R * H * K * (Q + C),
      transcendentals=R * H * K,
      bytes_accessed=R * K * tiles * 4 * _LANES + q_RHC.nbytes + R * H * C * 2,
    ),
    interpret=interpret,
    name='sparse_mla_attend',
  )(count_R, row_g1k, index_R1K, q_RHC, word_IL)


def _attend_kernel(
  count_ref,  # SMEM [R]
  row_hbm,  # [R · blocks, 1, k]
  index_ref,  # [1, 1, K]
  q_ref,  # [1, H, C + 128]
  word_hbm,  # [rows, 128] u32
  out_ref,  # [1, H, C]
  lse_ref,  # [1, rows, 128]
  word_buf,  # [slots, k · tiles, 128] u32
  x_ref,  # [C / 128 + 1, k / 2, 128] u32
  m_ref,  # [H, 128] f32
  l_ref,  # [H, 128] f32, to be summed over lanes
  acc_ref,  # [H, C] f32
  row_buf,  # SMEM [slots, 1, k]
  state_ref,  # SMEM: the query and the block whose rows come next, and a slot
  word_sem,
  row_sem,
  *,
  scale,
  per_worker,
  is_unrolled,
):
  """One query: its blocks of tokens, and copies for those that follow.

  The blocks of all queries of a worker are one sequence. That of the rows to
  copy is a block ahead of the copies, those are `_AHEAD` blocks ahead of what
  is computed; after the end both go on with the last query, in vain.
  """
  slots, k = word_buf.shape[0], 2 * x_ref.shape[1]
  tiles = word_buf.shape[1] // k
  num_blocks = index_ref.shape[-1] // k
  worker, step = pl.program_id(0), pl.program_id(1)
  row = worker * per_worker + step
  last_row = (worker + 1) * per_worker - 1
  count = count_ref[row]

  def next_slot(slot, distance=1):
    return jnp.bitwise_and(slot + distance, slots - 1)

  def rows_copy(r, i, slot):
    return pltpu.make_async_copy(
      row_hbm.at[r * num_blocks + i], row_buf.at[slot], row_sem.at[slot]
    )

  def fetch_rows(slot):
    """Starts the copy of the next block's rows into SMEM."""
    r, i = state_ref[0], state_ref[1]
    rows_copy(r, i, slot).start()
    more = i + 1 < count_ref[r]
    state_ref[0] = jnp.where(more, r, jnp.minimum(r + 1, last_row))
    state_ref[1] = jnp.where(more, i + 1, 0)

  def wait_for_rows(slot):
    rows_copy(row, 0, slot).wait()

  def fetch_words(slot):
    @pl.loop(0, k, unroll=k if is_unrolled else 1)
    def _(j):
      pltpu.make_async_copy(
        word_hbm.at[pl.ds(row_buf[slot, 0, j], tiles)],
        word_buf.at[slot, pl.ds(j * tiles, tiles)],
        word_sem.at[slot],
      ).start()

  def wait_for_words(slot):
    # Of the size of all of them together.
    pltpu.make_async_copy(
      word_buf.at[slot], word_buf.at[slot], word_sem.at[slot]
    ).wait()

  @pl.when(step == 0)
  def _start():
    state_ref[0] = row
    state_ref[1] = 0
    state_ref[2] = 0
    for slot in range(slots):
      fetch_rows(slot)

    @pl.loop(0, _AHEAD)
    def _(slot):
      wait_for_rows(slot)
      fetch_words(slot)

  def block(i, _):
    slot = state_ref[2]
    ahead = next_slot(slot, _AHEAD)
    wait_for_rows(ahead)
    fetch_rows(slot)
    wait_for_words(slot)
    words_to_bfloat16(word_buf.at[slot], x_ref)
    fetch_words(ahead)
    add_block(
      i == 0,
      index_ref[0, :, pl.ds(pl.multiple_of(i * k, k), k)],
      q_ref[0],
      x_ref,
      m_ref,
      l_ref,
      acc_ref,
      scale,
    )
    state_ref[2] = next_slot(slot)
    return 0

  jax.lax.fori_loop(0, jnp.maximum(count, 1), block, 0)
  finish(count > 0, m_ref, l_ref, acc_ref, out_ref, lse_ref)

  @pl.when(step == per_worker - 1)
  def _drain():
    slot = state_ref[2]
    for distance in range(_AHEAD):
      wait_for_words(next_slot(slot, distance))
    wait_for_rows(next_slot(slot, _AHEAD))


def words_to_bfloat16(word_ref, x_ref):
  """Words [k · tiles, 128] of channels of a token to pairs of tokens.

  These are [C / 128 + 1, k / 2, 128], for `pltpu.bitcast` to bfloat16: whole
  registers of them can be stored at a time. A register of bfloat16 has two
  tokens in a word, so halves of words change places between an even token and
  the odd one behind it.
  """
  k = 2 * x_ref.shape[1]
  tiles = word_ref.shape[0] // k
  half = tiles - 1
  for tile in range(tiles):
    even, odd = (
      word_ref[pl.ds(i * tiles + tile, k // 2, 2 * tiles), :] for i in range(2)
    )
    low = (even & 0xFFFF) | (odd << 16)
    is_rope = tile == half
    x_ref[2 * half if is_rope else tile] = low
    if not is_rope:
      high = (even >> 16) | (odd & jnp.uint32(0xFFFF0000))
      x_ref[half + tile] = high


def add_block(is_first, index_1k, q_HC, x_ref, m_ref, l_ref, acc_ref, scale):
  """Adds a block of tokens to the softmax and the values of one query."""
  k, C = 2 * x_ref.shape[1], acc_ref.shape[-1]
  x_kC = jnp.concatenate(
    [pltpu.bitcast(x_ref[i], jnp.bfloat16) for i in range(x_ref.shape[0])],
    axis=-1,
  )
  score_Hk = jax.lax.dot_general(
    q_HC,
    x_kC,
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  # In units of log 2.
  score_Hk = score_Hk * (scale * math.log2(math.e))
  before = jnp.where(is_first, _LOWEST, m_ref[...])
  m = jnp.maximum(before, jnp.max(score_Hk, axis=-1, keepdims=True))
  m_ref[...] = m
  alpha = jnp.exp2(before - m)
  total = jnp.where(is_first, 0.0, l_ref[...] * alpha)
  parts = []
  for lane in range(0, k, _LANES):
    p = jnp.exp2(score_Hk[:, lane : lane + _LANES] - m)
    # What stands for none is a token of the query's own: m is right with it.
    p = jnp.where(index_1k[:, lane : lane + _LANES] >= 0, p, 0.0)
    total += p
    parts.append(p.astype(jnp.bfloat16))
  l_ref[...] = total
  value_HC = jnp.dot(
    jnp.concatenate(parts, axis=-1),
    x_kC[:, :C],
    preferred_element_type=jnp.float32,
  )
  for lane in range(0, C, _LANES):
    span = slice(lane, lane + _LANES)
    before = acc_ref[:, span] * alpha
    acc_ref[:, span] = jnp.where(is_first, 0.0, before) + value_HC[:, span]


def finish(is_any, m_ref, l_ref, acc_ref, out_ref, lse_ref):
  """Normalises the sums of a query."""
  H = m_ref.shape[0]
  l = jnp.sum(l_ref[...], axis=-1, keepdims=True)
  # What was read for a query without tokens may be nan.
  out = jnp.where(is_any, acc_ref[...] * (1 / l), 0.0)
  out_ref[0] = out.astype(out_ref.dtype)
  lse = jnp.where(is_any, m_ref[...] * math.log(2) + jnp.log(l), jnp.inf)
  for i in range(0, H, _LANES):
    some = lse[i : i + _LANES]
    diagonal = jax.lax.broadcasted_iota(
      jnp.int32, some.shape, 0
    ) == jax.lax.broadcasted_iota(jnp.int32, some.shape, 1)
    # From a column to a row.
    lse_ref[0, i // _LANES] = jnp.sum(jnp.where(diagonal, some, 0.0), axis=0)
