"""The TPU kernel: a pipeline over the chunks of all sequences of a worker."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode import blocks as blocks_lib
from pallas_kernels.mla_decode import cache as cache_lib

_LANES = 128
_SHARE = cache_lib.ROPE_TOKENS  # Tokens that share a row of rope.
_STEPS = 2  # Chunks an iteration, so that one's matmuls hide another's rest.
_QUERY_SLOTS = 4  # Queries of sequences on their way.
# Of 64 MiB of v5p and tpu7x.
_VMEM_LIMIT_BYTES = 48 * 2**20
# Of a masked score, finite: the exponential of a difference of two is 1, and
# whole rows of them are told apart by their lengths.
_MASKED = -1e30


def mla_decode(
  q_BMQ: jax.Array,
  cache: cache_lib.LatentCache,
  block_table_Bn: jax.Array,
  length_B: jax.Array,
  *,
  num_queries: int,
  scale: float,
  blocks: blocks_lib.BlockSizes,
  interpret,
) -> tuple[jax.Array, jax.Array]:
  """Attends with M = num_queries · H rows a sequence, whole tiles.

  Returns:
    [Z splits, B, M, C], in float32 where there are several, and the float32
    logarithms [Z, B, M]; those of empty rows are inf, of one of several splits
    -inf.
  """
  B, M, Q = q_BMQ.shape
  N, P, C = cache.latent_NPC.shape
  I, L = cache.rope_NIL.shape[1:]
  Z, W = blocks.num_splits, blocks.num_workers
  slots, pages = blocks.num_slots, blocks.num_pages
  S = pages * P
  rows = pl.cdiv(M, _LANES)  # Of logarithms.
  dtype = q_BMQ.dtype
  out_dtype = jnp.dtype(dtype if Z == 1 else jnp.float32)
  is_fp8 = cache.scale_NJP is not None
  # VMEM, for M = 128 rows and 1,024 tokens a chunk of a bfloat16 cache:
  scratch = [
    # Latents 8 · 1,024 KiB, rotary channels 8 · 128 KiB, queries 4 · 160 KiB.
    pltpu.VMEM((slots, pages, P, C), cache.latent_NPC.dtype),
    pltpu.VMEM((slots, pages, I, L), cache.rope_NIL.dtype),
    pltpu.VMEM((_QUERY_SLOTS, M, Q), dtype),
    # Queries at work 2 · 128 KiB, and what they have of rope 2 · 256 KiB.
    pltpu.VMEM((_STEPS, M, C), dtype),
    pltpu.VMEM((_STEPS, _SHARE * M, L), dtype),
    # Scores 2 · 512 KiB, their weights 2 · 256 KiB.
    pltpu.VMEM((_STEPS, M, S), jnp.float32),
    pltpu.VMEM((_STEPS, M, S), dtype),
    # Largest score of a sequence and of a chunk, factor of what was summed
    # before it, sum of weights: 4 · 2 · 64 KiB.
    *[pltpu.VMEM((_STEPS, M, _LANES), jnp.float32)] * 4,
    # Weighted sums of values 2 · 256 KiB, results on their way 2 · 128 KiB.
    pltpu.VMEM((_STEPS, M, C), jnp.float32),
    pltpu.VMEM((_STEPS, M, C), out_dtype),
    pltpu.SemaphoreType.DMA((slots,)),
    pltpu.SemaphoreType.DMA((_QUERY_SLOTS,)),
    pltpu.SemaphoreType.DMA((_STEPS,)),
  ]
  # Together 13.2 MiB, with the logarithms' 2 · 32 KiB or more. Twice the rows
  # take 5 MiB more, twice the chunk 11. In FP8 latents take half, and scales
  # 8 · 16 KiB more.
  caches = [cache.latent_NPC, cache.rope_NIL]
  if is_fp8:
    caches.append(cache.scale_NJP)
    scratch.insert(2, pltpu.VMEM((slots, pages, C // _LANES, P), jnp.float32))
  num_tokens = block_table_Bn.size * P
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  out, lse = pl.pallas_call(
    functools.partial(
      _mla_decode_kernel if is_fp8 else _without_scales,
      num_queries=num_queries,
      scale=scale,
      num_splits=Z,
      num_sequences=B // W,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(Z * W,),
      in_specs=[in_hbm] * (1 + len(caches)),
      out_specs=[
        in_hbm,
        pl.BlockSpec((1, B // W, rows, _LANES), lambda w, *_: (w, 0, 0, 0)),
      ],
      scratch_shapes=scratch,
    ),
    out_shape=[
      jax.ShapeDtypeStruct((Z * B, M, C), out_dtype),
      jax.ShapeDtypeStruct((Z * W, B // W, rows, _LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      # Workers share nothing, so that v5p gives half of them to each core.
      dimension_semantics=('parallel',),
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
      # Of the pages of the table, which are checked nowhere: checks would take
      # a tenth of the time.
      disable_bounds_checks=True,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * M * num_tokens * (2 * C + L // _SHARE),
      transcendentals=M * num_tokens,
      bytes_accessed=q_BMQ.nbytes
      + Z * B * M * C * out_dtype.itemsize
      + block_table_Bn.size * sum(x.nbytes for x in caches) // N,
    ),
    interpret=interpret,
    name='mla_decode',
  )(length_B, block_table_Bn.reshape(-1), q_BMQ, *caches)
  return out.reshape(Z, B, M, C), lse.reshape(Z, B, -1)[..., :M]


def _div(a, b):
  """a // b of numbers that are not negative, without the signs' work."""
  return jax.lax.div(a, jnp.full_like(a, b))


def _dot_transposed(a, b):
  return jax.lax.dot_general(
    a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
  )


def _without_scales(*refs, **options):
  """The kernel on a bfloat16 cache, which has no scales."""
  before, after = 5, 9  # Operands, then results and two of the buffers.
  _mla_decode_kernel(
    *refs[:before], None, *refs[before:after], None, *refs[after:], **options
  )


def _mla_decode_kernel(
  length_ref,
  table_ref,
  q_hbm,
  latent_hbm,
  rope_hbm,
  scale_hbm,
  out_hbm,
  lse_ref,
  latent_buf,
  rope_buf,
  scale_buf,
  q_buf,
  q_ref,
  q_rope_ref,
  s_ref,
  p_ref,
  m_ref,
  most_ref,
  alpha_ref,
  l_ref,
  acc_ref,
  out_buf,
  kv_sem,
  q_sem,
  out_sem,
  *,
  num_queries,
  scale,
  num_splits,
  num_sequences,
):
  num_slots, pages, P, C = latent_buf.shape
  M, tokens = s_ref.shape[1:]
  H = M // num_queries
  R = rope_buf.shape[-1] // _SHARE
  rows = P // _SHARE
  width = pages * rows
  B = length_ref.shape[0]
  table_width = table_ref.shape[0] // B
  num_workers = B // num_sequences
  worker = pl.program_id(0)
  split, part = _div(worker, num_workers), jax.lax.rem(worker, num_workers)
  first_b = part * num_sequences
  end_b = first_b + num_sequences

  def length_of(b):
    return length_ref[jnp.minimum(b, B - 1)]

  def span_of(b):
    """First chunk of this split, and how many."""
    total = _div(length_of(b) + tokens - 1, tokens)
    if num_splits == 1:
      return 0, jnp.maximum(total, 1)
    each = _div(total + num_splits - 1, num_splits)
    first = split * each
    return first, jnp.maximum(jnp.minimum(total - first, each), 1)

  def left_of(b, c):
    """Tokens of the sequence from the chunk's first on."""
    first, _ = span_of(b)
    return jnp.where(b < end_b, length_of(b) - (first + c) * tokens, 0)

  def advance(b, c, slot):
    """The chunk after one: b, c and the slot of its pages."""
    _, count = span_of(b)
    more = c + 1 < count
    return (
      jnp.where(more, b, b + 1),
      jnp.where(more, c + 1, 0),
      jnp.where(slot == num_slots - 1, 0, slot + 1),
    )

  def parity(b):
    return jnp.bitwise_and(b - first_b, _STEPS - 1)

  # A page's place in HBM and in VMEM.
  moved = [(latent_hbm, latent_buf), (rope_hbm, rope_buf)]
  if scale_hbm is not None:
    moved.append((scale_hbm, scale_buf))

  def copies(b, c, slot, page):
    first, _ = span_of(b)
    n = table_ref[b * table_width + (first + c) * pages + page]
    return [
      pltpu.make_async_copy(hbm.at[n], buf.at[slot, page], kv_sem.at[slot])
      for hbm, buf in moved
    ]

  def start(b, c, slot):
    left = left_of(b, c)

    @pl.when(left >= tokens - P + 1)
    def _all():
      for page in range(pages):
        for copy in copies(b, c, slot, page):
          copy.start()

    @pl.when(left < tokens - P + 1)
    def _some():
      @pl.loop(0, _div(jnp.maximum(left, 0) + P - 1, P))
      def _page(page):
        for copy in copies(b, c, slot, page):
          copy.start()

  def query_copy(b):
    slot = jax.lax.rem(b - first_b, _QUERY_SLOTS)
    return pltpu.make_async_copy(q_hbm.at[b], q_buf.at[slot], q_sem.at[slot])

  def wait(b, c, slot):
    left = left_of(b, c)

    @pl.when(left >= tokens - P + 1)
    def _all():
      # Of the size of all pages together.
      for _, buf in moved:
        pltpu.make_async_copy(
          buf.at[slot], buf.at[slot], kv_sem.at[slot]
        ).wait()

    @pl.when(left < tokens - P + 1)
    def _some():
      @pl.loop(0, _div(jnp.maximum(left, 0) + P - 1, P))
      def _page(page):
        for hbm, buf in moved:
          pltpu.make_async_copy(
            hbm.at[0], buf.at[slot, page], kv_sem.at[slot]
          ).wait()

    @pl.when(left < tokens)
    def _clear():
      @pl.loop(_div(jnp.maximum(left, 0), P), pages)
      def _page(page):
        clear(left - page * P, slot, page)

    @pl.when((c == 0) & (b < end_b))
    def _queries():
      query_copy(b).wait()
      ahead = b + _QUERY_SLOTS - 1

      @pl.when(ahead < end_b)
      def _():
        query_copy(ahead).start()

      source, at = jax.lax.rem(b - first_b, _QUERY_SLOTS), parity(b)
      q_ref[at] = q_buf[source, :, :C]
      rope = q_buf[source, :, C : C + R]
      zero = jnp.zeros_like(rope)
      for g in range(_SHARE):
        q_rope_ref[at, g * M : (g + 1) * M] = jnp.concatenate(
          [rope if i == g else zero for i in range(_SHARE)], axis=-1
        )

  def clear(left, slot, page):
    """Zeroes what a page's buffer holds past the sequence's end."""
    token = jax.lax.broadcasted_iota(jnp.int32, (P, 1), 0)
    latent = latent_buf[slot, page]
    latent_buf[slot, page] = jnp.where(
      token < left, latent, jnp.zeros_like(latent)
    )
    rope = rope_buf[slot, page]
    token = (
      jax.lax.broadcasted_iota(jnp.int32, rope.shape, 0)
      + _div(jax.lax.broadcasted_iota(jnp.int32, rope.shape, 1), R) * rows
    )
    rope_buf[slot, page] = jnp.where(token < left, rope, jnp.zeros_like(rope))
    if scale_buf is not None:
      factor = scale_buf[slot, page]
      token = jax.lax.broadcasted_iota(jnp.int32, factor.shape, 1)
      scale_buf[slot, page] = jnp.where(token < left, factor, 0.0)

  def weigh(step, b, c):
    """The weights of the scores, and their sums."""
    at = parity(b)
    before = jnp.where(c == 0, _MASKED, m_ref[at])
    most = jnp.max(most_ref[step], axis=-1, keepdims=True)
    m = jnp.maximum(before, most)
    m_ref[at] = m
    alpha = jnp.exp2(before - m)
    alpha_ref[step] = alpha
    l = jnp.where(c == 0, 0.0, l_ref[at] * alpha)
    for i in range(0, tokens, _LANES):
      p = jnp.exp2(s_ref[step, :, i : i + _LANES] - m)
      l += p
      p_ref[step, :, i : i + _LANES] = p.astype(p_ref.dtype)
    l_ref[at] = l

  def add(step, at, c, i, value):
    """Adds to a tile of the weighted sum of values."""
    before = acc_ref[at, :, i : i + _LANES] * alpha_ref[step]
    acc_ref[at, :, i : i + _LANES] = jnp.where(c == 0, 0.0, before) + value

  def latents(slot, g):
    """Those of the tokens of a group of all pages, [width, C]."""
    part = pl.ds(g * rows, rows)
    return jnp.concatenate(
      [latent_buf[slot, page, part] for page in range(pages)]
    )

  def scales(slot, j, g):
    """The scales of 128 channels of a group of tokens, as a row."""
    part = pl.ds(g * rows, rows)
    return jnp.concatenate(
      [scale_buf[slot, page, j : j + 1, part] for page in range(pages)], axis=1
    )

  def gather(step, b, c, slot):
    """Adds the chunk's values."""
    at = parity(b)
    if scale_buf is None:
      x = jnp.concatenate([latents(slot, g) for g in range(_SHARE)])
      value = jnp.dot(p_ref[step], x, preferred_element_type=jnp.float32)
      for i in range(0, C, _LANES):
        add(step, at, c, i, value[:, i : i + _LANES])
      return
    for i in range(0, C, _LANES):
      # A key's scale goes to its weight, not to each of its values.
      p = jnp.concatenate(
        [
          p_ref[step, :, g * width : (g + 1) * width].astype(jnp.float32)
          * scales(slot, i // _LANES, g)
          for g in range(_SHARE)
        ],
        axis=1,
      )
      value = jnp.dot(
        p.astype(p_ref.dtype),
        jnp.concatenate(
          [latents(slot, g)[:, i : i + _LANES] for g in range(_SHARE)]
        ),
        preferred_element_type=jnp.float32,
      )
      add(step, at, c, i, value)

  def dot_latents(at, slot, g):
    """Scores of the latent channels, [M, width]."""
    x = latents(slot, g)
    if scale_buf is None:
      return _dot_transposed(q_ref[at], x)
    return sum(
      _dot_transposed(q_ref[at, :, i : i + _LANES], x[:, i : i + _LANES])
      * scales(slot, i // _LANES, g)
      for i in range(0, C, _LANES)
    )

  def score(step, b, c, slot):
    """The chunk's scores, times log2 e, and the largest by lane."""
    at = parity(b)
    rope = _dot_transposed(
      q_rope_ref[at], rope_buf[slot].reshape(width, _SHARE * R)
    )
    column = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
    page = _div(column, rows)
    token = column + page * (P - rows)
    left = left_of(b, c) - num_queries + 1
    most = jnp.full((M, _LANES), _MASKED)
    for g in range(_SHARE):
      s = dot_latents(at, slot, g) + rope[g * M : (g + 1) * M]
      bias = jnp.concatenate(
        [
          jnp.broadcast_to(
            jnp.where(token + g * rows < left + t, 0.0, _MASKED), (H, width)
          )
          for t in range(num_queries)
        ]
      )
      s = s * (scale * math.log2(math.e)) + bias
      s_ref[step, :, g * width : (g + 1) * width] = s
      for i in range(0, width, _LANES):
        most = jnp.maximum(most, s[:, i : i + _LANES])
    most_ref[step] = most

  def send(b):
    at = parity(b)
    # Of splits, one after the other.
    return pltpu.make_async_copy(
      out_buf.at[at], out_hbm.at[split * B + b], out_sem.at[at]
    )

  def finish(b):
    """Normalises the sums of a sequence and sends them."""

    @pl.when((b >= first_b) & (b < end_b))
    def _send():
      at = parity(b)

      @pl.when(b >= first_b + _STEPS)
      def _():
        send(b - _STEPS).wait()

      first, _ = span_of(b)
      l = jnp.sum(l_ref[at], axis=-1, keepdims=True)
      row = jax.lax.broadcasted_iota(jnp.int32, (M, 1), 0)
      begin = first * tokens
      seen = length_of(b) - num_queries + 1 + _div(row, H) > begin
      out = acc_ref[at] * jnp.where(seen, 1 / l, 0.0)
      out_buf[at] = jnp.where(seen, out, 0.0).astype(out_buf.dtype)
      empty = jnp.inf if num_splits == 1 else -jnp.inf
      lse = jnp.where(seen, (m_ref[at] * math.log(2) + jnp.log(l)), empty)
      for i in range(0, M, _LANES):
        some = lse[i : i + _LANES]
        diagonal = jax.lax.broadcasted_iota(
          jnp.int32, (len(some), _LANES), 0
        ) == jax.lax.broadcasted_iota(jnp.int32, (len(some), _LANES), 1)
        # From a column to a row.
        lse_ref[0, b - first_b, i // _LANES] = jnp.sum(
          jnp.where(diagonal, some, 0.0), axis=0
        )
      send(b).start()

  def fill(_, item):
    start(*item)
    return advance(*item)

  for i in range(min(_QUERY_SLOTS - 1, num_sequences)):
    query_copy(first_b + i).start()
  zero = jnp.int32(0)
  # An iteration starts copies to the slots whose values the last one summed.
  fetched = jax.lax.fori_loop(
    0, num_slots - 2 * _STEPS, fill, (first_b, zero, zero)
  )

  def body(carry):
    valued, scored, fetched = carry
    for _ in range(_STEPS):
      start(*fetched)
      fetched = advance(*fetched)
    scored = [scored]
    for _ in range(_STEPS - 1):
      scored.append(advance(*scored[-1]))
    for item in scored:
      wait(*item)
    for i in range(_STEPS):
      weigh(i, *valued[i][:2])
      score(i, *scored[i])
      gather(i, *valued[i])
    for (b, _, _), (_, following, _) in zip(valued, [*valued[1:], scored[0]]):

      @pl.when(following == 0)
      def _(b=b):
        finish(b)

    return tuple(scored), advance(*scored[-1]), fetched

  # Of no sequence, as no chunk was scored yet.
  valued = tuple(
    (first_b - 1, zero, jnp.int32(num_slots - _STEPS + i))
    for i in range(_STEPS)
  )
  jax.lax.while_loop(
    lambda carry: carry[0][0][0] < end_b,
    body,
    (valued, (first_b, zero, zero), fetched),
  )
  for i in range(min(_STEPS, num_sequences)):
    send(end_b - 1 - i).wait()
