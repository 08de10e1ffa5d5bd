"""The TPU kernel of index logits of new tokens, over a paged cache of keys."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla import blocks as blocks_lib
from pallas_kernels.sparse_mla import cache as cache_lib

_LANES = 128
_VMEM_LIMIT_BYTES = 48 * 2**20  # Of 64 MiB of v5p and tpu7x.


def index_logits(
  length_B: jax.Array,
  table_n: jax.Array,
  q_BMI: jax.Array,
  weight_BJT: jax.Array,
  cache: cache_lib.IndexCache,
  *,
  blocks: blocks_lib.PagedBlocks,
  interpret,
) -> jax.Array:
  """Returns float32 [B, T, S] logits of all S tokens of the table's pages.

  Args:
    length_B: int32 tokens of each sequence.
    table_n: int32 [B · pages a sequence] pages, of whole chunks. Those past a
      sequence's end are not read.
    q_BMI: Rows (T, J) of queries in the dtype of the keys.
    weight_BJT: float32 weights.
    cache: Keys, with scales.
    blocks: Sizes; `workers` divides B.
    interpret: Run on a CPU.
  """
  B, M, I = q_BMI.shape
  J, T = weight_BJT.shape[1:]
  P = cache.page_tokens
  S = table_n.shape[0] // B * P
  W, slots, pages = blocks.workers, blocks.slots, blocks.pages
  per_worker = B // W
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)

  def of_sequence(*shape):
    return pl.BlockSpec(
      (1, *shape), lambda w, b, *_: (w * per_worker + b, 0, 0)
    )

  key_bytes = cache.key_NPI.dtype.itemsize
  return pl.pallas_call(
    functools.partial(_index_kernel, per_worker=per_worker),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(W, per_worker),
      in_specs=[
        # VMEM, for 64 heads, 1 token and 4,096 keys in FP8: queries 2 · 8 KiB,
        of_sequence(M, I),
        # weights 2 · 32 KiB,
        of_sequence(J, T),
        in_hbm,
        in_hbm,
      ],
      # logits 2 · 16 KiB, of tokens that fill a whole tile 8 times as much,
      out_specs=of_sequence(T, S),
      scratch_shapes=[
        # keys 8 · 512 KiB, scales 8 · 16 KiB, and weights in all lanes 32 KiB.
        pltpu.VMEM((slots, pages, P, I), cache.key_NPI.dtype),
        pltpu.VMEM((slots, pages, 1, P), jnp.float32),
        pltpu.VMEM((T, J, _LANES), jnp.float32),
        pltpu.SMEM((3,), jnp.int32),
        pltpu.SemaphoreType.DMA((slots,)),
      ],
      # The compiler keeps scores of a chunk, 1 MiB: together 5.3 MiB.
    ),
    out_shape=jax.ShapeDtypeStruct((B, T, S), jnp.float32),
    compiler_params=pltpu.CompilerParams(
      # Workers share nothing, so that v5p gives half of them to each core.
      dimension_semantics=('parallel', 'arbitrary'),
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
      disable_bounds_checks=True,
    ),
    cost_estimate=pl.CostEstimate(
      flops=B * M * S * (2 * I + 3),
      transcendentals=0,
      bytes_accessed=B * S * (I * key_bytes + 4 + 4 * T) + q_BMI.nbytes,
    ),
    interpret=interpret,
    name='sparse_mla_index_paged',
  )(length_B, table_n, q_BMI, weight_BJT, cache.key_NPI, cache.scale_N1P)


def _index_kernel(
  length_ref,  # SMEM [B]
  table_ref,  # SMEM [B · pages]
  q_ref,  # [1, M, I]
  w_ref,  # [1, J, T]
  key_hbm,  # [N, P, I]
  scale_hbm,  # [N, 1, P]
  out_ref,  # [1, T, S]
  key_buf,  # [slots, pages, P, I]
  scale_buf,  # [slots, pages, 1, P]
  column_ref,  # [T, J, 128] f32
  state_ref,  # SMEM: the sequence and the chunk that come next, and a slot
  sem,
  *,
  per_worker,
):
  """One sequence: its chunks of keys, and copies for those that follow.

  The chunks of all sequences of a worker are one sequence of copies, as far
  ahead as there are slots; after the end they go on with the last one, in vain.
  """
  slots, pages, P, I = key_buf.shape
  T, S = out_ref.shape[1:]
  tokens = pages * P
  table_width = S // P
  worker, step = pl.program_id(0), pl.program_id(1)
  b = worker * per_worker + step
  last_b = (worker + 1) * per_worker - 1
  length = length_ref[b]

  def count_of(b):
    return jnp.maximum(pl.cdiv(length_ref[b], tokens), 1)

  def pages_of(b, c):
    left = length_ref[b] - c * tokens
    return jnp.clip(pl.cdiv(left, P), 0, pages)

  def copies(n, slot, page):
    return [
      pltpu.make_async_copy(hbm.at[n], buf.at[slot, page], sem.at[slot])
      for hbm, buf in ((key_hbm, key_buf), (scale_hbm, scale_buf))
    ]

  def fetch(slot):
    """Starts the copies of the next chunk."""
    b, c = state_ref[0], state_ref[1]

    @pl.loop(0, pages_of(b, c))
    def _(page):
      n = table_ref[b * table_width + c * pages + page]
      for copy in copies(n, slot, page):
        copy.start()

    more = c + 1 < count_of(b)
    state_ref[0] = jnp.where(more, b, jnp.minimum(b + 1, last_b))
    state_ref[1] = jnp.where(more, c + 1, 0)

  def wait(b, c, slot):
    count = pages_of(b, c)

    @pl.when(count == pages)
    def _all():
      # Of the size of all of them together.
      for buf in (key_buf, scale_buf):
        pltpu.make_async_copy(buf.at[slot], buf.at[slot], sem.at[slot]).wait()

    @pl.when(count < pages)
    def _some():
      @pl.loop(0, count)
      def _(page):
        for copy in copies(0, slot, page):
          copy.wait()

  @pl.when(step == 0)
  def _start():
    state_ref[0] = b
    state_ref[1] = 0
    state_ref[2] = 0
    for slot in range(slots - 1):
      fetch(slot)

  for t in range(T):
    column_ref[t] = jnp.broadcast_to(
      w_ref[0, :, t : t + 1], column_ref.shape[1:]
    )

  def chunk(c, _):
    slot = state_ref[2]
    # The one before: its chunk is done.
    fetch(jnp.bitwise_and(slot - 1, slots - 1))
    wait(b, c, slot)
    score_Ms = jax.lax.dot_general(
      q_ref[0],
      key_buf[slot].reshape(tokens, I),
      (((1,), (1,)), ((), ())),
      precision=(
        jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
      ),
      preferred_element_type=jnp.float32,
    )
    score_Ms = jnp.maximum(score_Ms, 0.0)
    first = c * tokens
    # Of the last token of each query, in sublanes.
    seen = length - T + 1 + jax.lax.broadcasted_iota(jnp.int32, (T, _LANES), 0)
    for page in range(pages):
      factor = scale_buf[slot, page]
      for lane in range(0, P, _LANES):
        place = page * P + lane
        part_TJL = score_Ms[:, place : place + _LANES].reshape(column_ref.shape)
        logits = jnp.sum(part_TJL * column_ref[...], axis=1)
        logits *= factor[:, lane : lane + _LANES]
        key = (
          first + place + jax.lax.broadcasted_iota(jnp.int32, (T, _LANES), 1)
        )
        # Whatever is stored where there is no key, it is in no other logit.
        out_ref[0, :, pl.ds(pl.multiple_of(first + place, _LANES), _LANES)] = (
          jnp.where(key < seen, logits, -jnp.inf)
        )
    state_ref[2] = jnp.bitwise_and(slot + 1, slots - 1)
    return 0

  jax.lax.fori_loop(0, count_of(b), chunk, 0)

  @pl.loop(count_of(b), S // tokens)
  def _nothing(c):
    span = pl.ds(pl.multiple_of(c * tokens, tokens), tokens)
    out_ref[0, :, span] = jnp.full((T, tokens), -jnp.inf)

  @pl.when(step == per_worker - 1)
  def _drain():
    # What was started in vain: chunks of the last sequence, from its first.
    slot, c = state_ref[2], jnp.int32(0)
    for distance in range(slots - 1):
      wait(b, c, jnp.bitwise_and(slot + distance, slots - 1))
      c = jnp.where(c + 1 < count_of(b), c + 1, 0)
