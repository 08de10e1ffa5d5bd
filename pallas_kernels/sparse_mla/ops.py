"""DeepSeek sparse attention: index logits, selection, attention (DSA).

Gradients are not needed here: a model trains with the masked form in XLA, and
its indexer with the divergence of the logits from attention's weights.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode import cache as latent_cache
from pallas_kernels.sparse_mla import (
  attend,
  logits,
  paged,
  reference,
  resident,
  select,
  xla,
)
from pallas_kernels.sparse_mla import blocks as blocks_lib
from pallas_kernels.sparse_mla.cache import (
  IndexCache,
  RowCache,
  pack,
  quantize_keys,
  unpack,
)

__all__ = (
  'IMPLEMENTATIONS',
  'IndexCache',
  'RowCache',
  'index_logits',
  'index_logits_paged',
  'pack',
  'pack_latent',
  'quantize_keys',
  'sparse_mla',
  'top_k',
  'unpack',
)

IMPLEMENTATIONS = ('pallas', 'xla', 'reference')
_LANES = 128
_SUBLANES = 32  # Of a tile of the narrowest dtype.


def index_logits(
  q_BTJI: jax.Array,
  k_BSI: jax.Array,
  weight_BTJ: jax.Array,
  *,
  scale_BS: jax.Array | None = None,
  start_BT: jax.Array | None = None,
  end_BT: jax.Array | None = None,
  implementation: str = 'pallas',
  blocks: blocks_lib.LogitsBlocks | None = None,
  interpret=False,
) -> jax.Array:
  """Logits of each query's keys, by which the best are selected.

  out[t, s] = Σ_j w[t, j] · ReLU(q[t, j] · k[s] · scale[s]), start ≤ s < end

  No array [T, J, S] is written. The kernel wants queries as [B, J, T, I]: a
  product or quantisation that makes them right there, beside this call, saves
  a copy. There are no gradients.

  Args:
    q_BTJI: [B, T, J, I] queries of J heads: bfloat16 or float32, or e4m3 whose
      scale is in the weight.
    k_BSI: [B, S, I] keys in the same dtype.
    weight_BTJ: float32 [B, T, J] weights of the heads.
    scale_BS: float32 [B, S] positive factors of the keys, or None for 1.
    start_BT: int32 [B, T] first key that each query may see, or None for 0.
    end_BT: int32 [B, T] one after the last, or None for S.
    implementation: 'pallas' (TPU), 'xla' or 'reference'.
    blocks: Of 'pallas', by default `LogitsBlocks()`; cost only.
    interpret: Run the kernel on a CPU: True or pltpu.InterpretParams.

  Returns:
    float32 [B, T, S], -inf where a query may not see a key.

  Raises:
    ValueError: Shapes or dtypes that do not fit, or an unknown implementation.

  Source: DeepSeek-V3.2-Exp report, §2.1; DeepGEMM, fp8_mqa_logits.
  """
  B, T = q_BTJI.shape[:2]
  S = k_BSI.shape[1]
  scale_BS = jnp.ones((B, S)) if scale_BS is None else scale_BS
  start_BT = jnp.zeros((B, T), jnp.int32) if start_BT is None else start_BT
  end_BT = jnp.full((B, T), S, jnp.int32) if end_BT is None else end_BT
  inputs = q_BTJI, k_BSI, weight_BTJ, scale_BS, start_BT, end_BT
  _check_logits(*inputs)
  match implementation:
    case 'pallas':
      return _logits_pallas(*inputs, blocks, interpret)
    case 'xla':
      return xla.index_logits(*inputs)
    case 'reference':
      return reference.index_logits(*inputs)
  raise ValueError(_unknown(implementation))


def index_logits_paged(
  q_BTJI: jax.Array,
  cache: IndexCache,
  weight_BTJ: jax.Array,
  block_table_Bn: jax.Array,
  length_B: jax.Array,
  *,
  implementation: str = 'pallas',
  blocks: blocks_lib.PagedBlocks | None = None,
  interpret=False,
) -> jax.Array:
  """Logits of the last T tokens of each sequence, over a paged cache of keys.

  As `index_logits`, where query t of a sequence of S tokens sees the keys
  s ≤ S - T + t. There are no gradients.

  Args:
    q_BTJI: [B, T, J, I] queries in the dtype of the cache.
    cache: Keys in pages, see `IndexCache`. What no sequence has stored may
      hold anything, nan too.
    weight_BTJ: float32 [B, T, J] weights of the heads.
    block_table_Bn: int32 [B, n] pages of each sequence, in order; those past
      its end are not read. Nobody checks that the others exist.
    length_B: int32 [B] tokens of each sequence, the T new ones included.
    implementation: 'pallas' (TPU), 'xla' or 'reference'.
    blocks: Of 'pallas', by default `blocks.paged`; cost only.
    interpret: Run the kernel on a CPU: True or pltpu.InterpretParams.

  Returns:
    float32 [B, T, n · P], -inf where a query may not see a key.

  Raises:
    ValueError: Shapes or dtypes that do not fit, or an unknown implementation.

  Source: DeepSeek-V3.2-Exp report, §2.1; DeepGEMM, fp8_paged_mqa_logits.
  """
  B, T = q_BTJI.shape[:2]
  N, P, I = cache.key_NPI.shape
  if cache.scale_N1P is None:
    cache = IndexCache(cache.key_NPI, jnp.ones((N, 1, P)))
  if cache.scale_N1P.shape != (N, 1, P):
    raise ValueError(
      f'scales {cache.scale_N1P.shape} are not {(N, 1, P)}, those of the keys'
    )
  if block_table_Bn.shape[0] != B or length_B.shape != (B,):
    raise ValueError(
      f'{B} sequences of queries have a block table {block_table_Bn.shape} and '
      f'lengths {length_B.shape}'
    )
  match implementation:
    case 'pallas':
      _check_queries(q_BTJI, cache.key_NPI, weight_BTJ)
      return _paged_pallas(
        q_BTJI, cache, weight_BTJ, block_table_Bn, length_B, blocks, interpret
      )
    case 'xla' | 'reference':
      return index_logits(
        q_BTJI,
        cache.key_NPI[block_table_Bn].reshape(B, -1, I),
        weight_BTJ,
        scale_BS=cache.scale_N1P[block_table_Bn].reshape(B, -1),
        end_BT=length_B[:, None] - T + 1 + jnp.arange(T),
        implementation=implementation,
      )
  raise ValueError(_unknown(implementation))


def top_k(
  logits_BTS: jax.Array,
  k: int,
  *,
  implementation: str = 'pallas',
  rows: int | None = None,
  interpret=False,
) -> jax.Array:
  """The k best keys of each query, ties toward the lower index.

  0 and -0 are equal. XLA sorts all keys, which for 2,048 of 4,096 takes more
  time than attention to them; the kernel finds the least of the best by
  bisection. There are no gradients.

  Args:
    logits_BTS: float32 [B, T, S], -inf for keys that may not be selected; no
      nan.
    k: At least 1.
    implementation: 'pallas' (TPU), 'xla' or 'reference'.
    rows: Queries at a time of 'pallas', a multiple of 8, by default
      `blocks.selected_rows`; cost only.
    interpret: Run the kernel on a CPU: True or pltpu.InterpretParams.

  Returns:
    int32 [B, T, k] indices, then -1 where fewer keys may be selected. Those of
    'pallas' are in the order of the keys, the others' best first.

  Raises:
    ValueError: k below 1, or an unknown implementation.

  Source: DeepSeek-V3.2-Exp report, §2.1.
  """
  if k < 1:
    raise ValueError(f'k={k} must be at least 1')
  match implementation:
    case 'pallas':
      return _top_k_pallas(logits_BTS, k, rows, interpret)
    case 'xla':
      return xla.top_k(_without_signed_zeros(logits_BTS), k)
    case 'reference':
      return reference.top_k(_without_signed_zeros(logits_BTS), k)
  raise ValueError(_unknown(implementation))


def sparse_mla(
  q_BTHC: jax.Array,
  cache: RowCache | latent_cache.LatentCache | jax.Array,
  index_BTK: jax.Array,
  block_table_Bn: jax.Array | None = None,
  *,
  value_dim: int,
  scale: float,
  implementation: str = 'pallas',
  blocks: blocks_lib.AttendBlocks | None = None,
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """Attention, in latent space, of each query to its selected tokens only.

  out[t] = Σ_s softmax_s(scale · q[t] · x[s]) · x[s, :value_dim], s ∈ index[t]
  lse[t] = log Σ_s exp(scale · q[t] · x[s])

  All heads share the rows: this is attention with absorbed projections. One
  kernel copies the selected rows from HBM, which takes the issue of a copy for
  each, some five cycles whatever its size. Another one, for several queries of
  a contiguous sequence that VMEM holds, loads them from there in half of that.
  Dense attention with a mask is faster where a sequence has less than some two
  to four times as many tokens as are selected. There are no gradients.

  Args:
    q_BTHC: [B, T, H, C] absorbed queries: value_dim latent channels, then the
      rotary ones, then any finite ones that do not matter. Nothing is copied
      where C is value_dim + 128 and H a multiple of 32.
    cache: One of
      [B, S, C] rows, contiguous, as of a prefill, which are packed first;
      a `RowCache`, pages of rows that the kernel reads as they are;
      a `LatentCache`, pages as `mla_decode` reads them, all of which are packed
      first: for tests and short ones.
      What is not selected may hold anything, nan too.
    index_BTK: int32 [B, T, K] tokens of the sequence that a query attends to,
      in any order; a negative one stands for none. Nobody checks that the
      others exist.
    block_table_Bn: int32 [B, n] pages of each sequence; without it the
      indices are places in the whole cache, as FlashMLA's. Not with [B, S, C].
    value_dim: Channels of a row that are the value, a multiple of 256.
    scale: Of the scores.
    implementation: 'pallas' (TPU; rows are bfloat16), 'xla' or 'reference'.
    blocks: Of 'pallas', by default `blocks.attend`; cost only.
    interpret: Run the kernel on a CPU: True or pltpu.InterpretParams.

  Returns:
    [B, T, H, value_dim] in the dtype of q and float32 [B, T, H], natural
    logarithms. Queries without a token are 0 and inf.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.

  Source: DeepSeek-V3.2-Exp report, §2.1; FlashMLA, sparse attention.
  """
  _check_attention(q_BTHC, cache, index_BTK, block_table_Bn, value_dim)
  is_contiguous = isinstance(cache, jax.Array)
  if is_contiguous:
    page_tokens, rope_dim = cache.shape[1], cache.shape[2] - value_dim
    first_B11 = page_tokens * jnp.arange(len(cache))[:, None, None]
    row_BTK = jnp.where(index_BTK >= 0, index_BTK + first_B11, -1)
  else:
    page_tokens, rope_dim = cache.page_tokens, cache.rope_dim
    row_BTK = _rows(index_BTK, block_table_Bn, page_tokens)
  options = {'value_dim': value_dim, 'scale': scale}
  match implementation:
    case 'pallas':
      cache = _row_cache(cache, value_dim)
      if blocks is None:
        row_bytes = cache.word_NIL[0].nbytes if is_contiguous else None
        B, T, K = index_BTK.shape
        blocks = blocks_lib.attend(B, T, K, row_bytes)
      if blocks.is_resident and not is_contiguous:
        raise ValueError('is_resident needs a cache [B, S, C]')
      return _attend_pallas(
        q_BTHC, cache, index_BTK, row_BTK, scale, blocks, interpret
      )
    case 'xla':
      q_BTHC = q_BTHC[..., : value_dim + rope_dim]
      rows = _gather(cache, value_dim + rope_dim, q_BTHC.dtype)
      return xla.sparse_mla(q_BTHC, rows, row_BTK, **options)
    case 'reference':
      q_BTHC = q_BTHC[..., : value_dim + rope_dim]
      rows = _gather(cache, value_dim + rope_dim, jnp.float32)
      num_pages = len(jax.tree.leaves(cache)[0])
      x_NC = rows(jnp.arange(num_pages * page_tokens))
      return reference.sparse_mla(q_BTHC, x_NC, row_BTK, **options)
  raise ValueError(_unknown(implementation))


def pack_latent(cache: latent_cache.LatentCache) -> RowCache:
  """The rows of a latent cache, rounded to bfloat16 if they are not."""
  return pack(latent_cache.unpack(cache), cache.latent_NPC.shape[-1])


def _unknown(implementation):
  return (
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )


def _check_queries(q_BTJI, k, weight_BTJ):
  if q_BTJI.dtype != k.dtype or q_BTJI.shape[-1] != k.shape[-1]:
    raise ValueError(
      f'queries {q_BTJI.dtype} of {q_BTJI.shape[-1]} channels do not fit keys '
      f'{k.dtype} of {k.shape[-1]}'
    )
  if weight_BTJ.shape != q_BTJI.shape[:3]:
    raise ValueError(
      f'weights {weight_BTJ.shape} are not {q_BTJI.shape[:3]}, one of each '
      'head of each query'
    )


def _check_logits(q_BTJI, k_BSI, weight_BTJ, scale_BS, start_BT, end_BT):
  _check_queries(q_BTJI, k_BSI, weight_BTJ)
  B, T = q_BTJI.shape[:2]
  expected = {
    'k': (k_BSI, (B, *k_BSI.shape[1:])),
    'scale_BS': (scale_BS, (B, k_BSI.shape[1])),
    'start_BT': (start_BT, (B, T)),
    'end_BT': (end_BT, (B, T)),
  }
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise ValueError(f'{name} of shape {array.shape} must be {shape}')


def _check_attention(q_BTHC, cache, index_BTK, block_table_Bn, value_dim):
  B, T, _, Q = q_BTHC.shape
  if value_dim % (2 * _LANES):
    raise ValueError(f'value_dim={value_dim} must be a multiple of 256')
  if isinstance(cache, jax.Array):
    cached_dim, width = value_dim, cache.shape[-1]
    if block_table_Bn is not None or len(cache) != B:
      raise ValueError(
        f'a cache {cache.shape} of rows must be of {B} sequences, without a '
        'block table'
      )
  else:
    cached_dim = (
      cache.value_dim
      if isinstance(cache, RowCache)
      else cache.latent_NPC.shape[-1]
    )
    width = cached_dim + cache.rope_dim
  if cached_dim != value_dim or not value_dim <= width <= Q:
    raise ValueError(
      f'value_dim={value_dim} and {Q} channels of queries do not fit a cache '
      f'of {width} channels, {cached_dim} of them latents'
    )
  if index_BTK.shape[:2] != (B, T):
    raise ValueError(f'indices {index_BTK.shape} are not of {B} x {T} queries')
  if block_table_Bn is not None and len(block_table_Bn) != B:
    raise ValueError(
      f'a block table {block_table_Bn.shape} is not of {B} sequences'
    )


def _logits_pallas(
  q_BTJI, k_BSI, weight_BTJ, scale_BS, start_BT, end_BT, blocks, interpret
):
  B, T, _, _ = q_BTJI.shape
  S = k_BSI.shape[1]
  # Of short ones, whole groups of queries and lanes of keys.
  blocks = blocks_lib.fit_logits(blocks or blocks_lib.LogitsBlocks(), T, S)
  t, s = blocks.queries, blocks.keys
  end_BT = jnp.minimum(end_BT, S)
  start_BT, end_BT = (
    _pad(x, 1, t).astype(jnp.int32) for x in (start_BT, end_BT)
  )
  start_Bnt, end_Bnt = (x.reshape(B, -1, t) for x in (start_BT, end_BT))
  is_any_Bnt = start_Bnt < end_Bnt
  first_Bn = jnp.where(is_any_Bnt, start_Bnt, S).min(-1) // s
  last_Bn = -(-jnp.where(is_any_Bnt, end_Bnt, 0).max(-1) // s)
  q_BJTI = jnp.swapaxes(_pad(_pad(q_BTJI, 3, _LANES), 1, t), 1, 2)
  logits_BTS = logits.index_logits(
    jnp.stack([jnp.maximum(first_Bn, 0), last_Bn], axis=-1).reshape(-1),
    q_BJTI,
    _pad(_pad(k_BSI, 2, _LANES), 1, s),
    _pad(scale_BS.astype(jnp.float32), 1, s)[:, None],
    _pad(weight_BTJ.astype(jnp.float32), 1, t),
    start_BT[..., None],
    end_BT[..., None],
    blocks=blocks,
    interpret=interpret,
  )
  return logits_BTS[:, :T, :S]


def _paged_pallas(
  q_BTJI, cache, weight_BTJ, block_table_Bn, length_B, blocks, interpret
):
  B, T, _, I = q_BTJI.shape
  P, n = cache.page_tokens, block_table_Bn.shape[1]
  if P % _LANES or I % _LANES:
    raise ValueError(
      f'pages of {P} tokens of {I} channels are no multiples of {_LANES}'
    )
  if blocks is None:
    blocks = blocks_lib.paged(P, block_table_Bn.shape)
  if B % blocks.workers:
    raise ValueError(f'workers={blocks.workers} do not divide {B} sequences')
  # Heads of weight 0 fill a tile.
  q_BTJI, weight_BTJ = (_pad(x, 2, _SUBLANES) for x in (q_BTJI, weight_BTJ))
  logits_BTS = paged.index_logits(
    length_B,
    _pad(block_table_Bn, 1, blocks.pages).reshape(-1),
    q_BTJI.reshape(B, -1, I),
    jnp.swapaxes(weight_BTJ.astype(jnp.float32), 1, 2),
    cache,
    blocks=blocks,
    interpret=interpret,
  )
  return logits_BTS[..., : n * P]


def _without_signed_zeros(x):
  return jnp.where(x == 0, 0.0, x)


def _top_k_pallas(logits_BTS, k, rows, interpret):
  B, T, S = logits_BTS.shape
  if rows is None:
    rows = blocks_lib.selected_rows(B * T, max(S, k))
  logits_RS = logits_BTS.reshape(B * T, S).astype(jnp.float32)
  # At least k keys, and whole lanes.
  logits_RS = jnp.pad(
    logits_RS, ((0, 0), (0, max(k - S, 0))), constant_values=-jnp.inf
  )
  logits_RS = _pad(_pad(logits_RS, 1, _LANES, -jnp.inf), 0, rows)
  index_RK = select.top_k(logits_RS, k, rows=rows, interpret=interpret)
  return index_RK[: B * T, :k].reshape(B, T, k)


def _rows(index_BTK, block_table_Bn, page_tokens):
  """Numbers of the rows in the whole cache, -1 for none."""
  if block_table_Bn is None:
    return jnp.maximum(index_BTK, -1)
  token_BTK = jnp.maximum(index_BTK, 0)
  # XLA reads a table's entries one by one, some ten cycles each: comparing
  # with all of them is faster.
  page_BTK = token_BTK // page_tokens
  num_pages = block_table_Bn.shape[1]
  page_BTK = jnp.sum(
    jnp.where(
      page_BTK[..., None] == jnp.arange(num_pages),
      block_table_Bn[:, None, None],
      0,
    ),
    axis=-1,
  )
  row_BTK = page_BTK * page_tokens + token_BTK % page_tokens
  return jnp.where(index_BTK >= 0, row_BTK, -1)


def _row_cache(cache, value_dim):
  match cache:
    case RowCache():
      return cache
    case latent_cache.LatentCache():
      return pack_latent(cache)
  return pack(cache, value_dim)


def _gather(cache, width, dtype):
  """What takes numbers of rows to these."""
  if isinstance(cache, RowCache):
    word_NL = cache.word_NIL.reshape(-1, cache.num_tiles * _LANES)
    return lambda row_Z: unpack(word_NL[row_Z])[..., :width].astype(dtype)
  if isinstance(cache, latent_cache.LatentCache):
    cache = latent_cache.unpack(cache)
  x_NC = cache.reshape(-1, width)
  return lambda row_Z: x_NC[row_Z].astype(dtype)


def _attend_pallas(q_BTHC, cache, index_BTK, row_BTK, scale, blocks, interpret):
  """Rows are of all sequences, indices of one; blocks say which are used."""
  B, T, H, Q = q_BTHC.shape
  num_shared = T if blocks.is_resident else B * T
  if num_shared % blocks.workers:
    raise ValueError(
      f'workers={blocks.workers} do not divide {num_shared} queries'
    )
  k = blocks.tokens
  place_BTK = index_BTK if blocks.is_resident else row_BTK
  # Two blocks in turn are in VMEM of those that are resident.
  place_RK = _pad(
    place_BTK.reshape(B * T, -1),
    1,
    2 * k if blocks.is_resident else k,
    value=-1,
  )
  K = place_RK.shape[1]
  last_R = jnp.where(place_RK >= 0, jnp.arange(1, K + 1), 0).max(-1)
  # In the place of none, a token that the query has anyway.
  some_R1 = jnp.maximum(place_RK.max(-1, keepdims=True), 0)
  copied_RK = jnp.where(place_RK >= 0, place_RK, some_R1) * cache.num_tiles
  width = cache.value_dim + _LANES
  q_BTHC = _pad(_pad(q_BTHC[..., :width], 3, width), 2, _SUBLANES)
  run, word = attend.attend, cache.word_NIL.reshape(-1, _LANES)
  if blocks.is_resident:
    run, word = resident.attend, cache.word_NIL
  out_RHU, lse_RjL = run(
    -(-last_R // k),
    copied_RK.reshape(-1, 1, k),
    place_RK[:, None],
    q_BTHC.reshape(B * T, *q_BTHC.shape[2:]).astype(jnp.bfloat16),
    word,
    scale=scale,
    blocks=blocks,
    interpret=interpret,
  )
  out_BTHU = out_RHU.reshape(B, T, *out_RHU.shape[1:])
  return (
    out_BTHU[:, :, :H].astype(q_BTHC.dtype),
    lse_RjL.reshape(B, T, -1)[:, :, :H],
  )


def _pad(x, axis, multiple, value=0):
  """Fills an axis up to a multiple."""
  missing = -x.shape[axis] % multiple
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = 0, missing
  return jnp.pad(x, widths, constant_values=value)
