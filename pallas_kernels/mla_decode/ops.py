"""Multi-head latent attention, absorbed, of new tokens to a paged cache."""

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode import blocks as blocks_lib
from pallas_kernels.mla_decode import kernel, reference, xla
from pallas_kernels.mla_decode.cache import (
  ROPE_TOKENS,
  SCALE_CHANNELS,
  LatentCache,
  pack,
  quantize,
  unpack,
)

__all__ = (
  'IMPLEMENTATIONS',
  'SCALE_CHANNELS',
  'LatentCache',
  'combine',
  'mla_decode',
  'pack',
  'quantize',
  'unpack',
)

IMPLEMENTATIONS = ('pallas', 'xla', 'reference')
_SUBLANES = 16  # Of a tile of bfloat16.


def mla_decode(
  q_BTHC: jax.Array,
  cache: LatentCache,
  block_table_Bn: jax.Array,
  length_B: jax.Array,
  *,
  value_dim: int,
  scale: float,
  implementation: str,
  blocks: blocks_lib.BlockSizes | None = None,
  interpret=False,
) -> tuple[jax.Array, jax.Array]:
  """Attention of the last T tokens of each sequence to all of it.

  out[t] = Σ_s softmax_s(scale · q[t] · x[s]) · x[s, :value_dim], s <= S - T + t
  lse[t] = log Σ_s exp(scale · q[t] · x[s])

  for a sequence of S tokens, of which token s has the row x[s] in the cache.
  All heads share the rows: this is attention with absorbed projections.

  Nothing is copied where q is stored 640 wide (`jnp.concatenate` of 512 latent
  channels, 64 rotary ones and 64 of anything) and H is a multiple of 16. On a
  TPU 576 would be no whole number of lanes.

  Args:
    q_BTHC: [B, T, H, C] absorbed queries: value_dim latent channels, then the
      rotary ones, then any that are not read.
    cache: Pages of rows, see `LatentCache` for the layout, with `value_dim`
      latents. What no sequence has stored may hold anything, nan too.
    block_table_Bn: int32 [B, n] pages of each sequence, in order; those past
      its end are not read. Nobody checks that the others exist.
    length_B: int32 [B] tokens of each sequence, the T new ones included.
    value_dim: Channels of a row that are the value, multiple of 128.
    scale: Of the scores.
    implementation: 'pallas' (TPU), 'xla' or 'reference'.
    blocks: Of 'pallas', by default `blocks.default`; cost only.
    interpret: Run the kernel on a CPU: True or pltpu.InterpretParams.

  Returns:
    [B, T, H, value_dim] in the dtype of q and float32 [B, T, H], natural
    logarithms. Rows that see no token are 0 and inf.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.

  Source: DeepSeek-V2, arXiv:2405.04434, §2.1; FlashMLA.
  """
  _check(q_BTHC, cache, block_table_Bn, length_B, value_dim)
  inputs = q_BTHC, cache, block_table_Bn, length_B
  match implementation:
    case 'pallas':
      return _pallas(*inputs, scale, blocks, interpret)
    case 'xla':
      return xla.mla_decode(*inputs, value_dim=value_dim, scale=scale)
    case 'reference':
      return reference.mla_decode(*inputs, value_dim=value_dim, scale=scale)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )


def combine(
  out_ZBTHU: jax.Array, lse_ZBTH: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Attention to all keys, from that to each of Z parts of them.

  L = log Σ_z exp(lse_z),   out = Σ_z exp(lse_z - L) · out_z

  Args:
    out_ZBTHU: [Z, ..., U] attention to the keys of each part.
    lse_ZBTH: [Z, ...] logarithm of its sum of exponentials; a part without
      keys has -inf or, as `mla_decode` returns it, inf.

  Returns:
    float32 [..., U] and [...]; 0 and inf where no part has keys.

  Source: FlashMLA.
  """
  lse_ZBTH = jnp.where(lse_ZBTH == jnp.inf, -jnp.inf, lse_ZBTH)
  lse_BTH = jax.nn.logsumexp(lse_ZBTH.astype(jnp.float32), axis=0)
  lse_BTH = jnp.where(lse_BTH == -jnp.inf, jnp.inf, lse_BTH)
  weight_ZBTH = jnp.exp(lse_ZBTH - lse_BTH)
  return (weight_ZBTH[..., None] * out_ZBTHU).sum(0), lse_BTH


def _check(q_BTHC, cache, block_table_Bn, length_B, value_dim):
  (N, P, C), (B, *_, Q) = cache.latent_NPC.shape, q_BTHC.shape
  if value_dim != C or C % SCALE_CHANNELS:
    raise ValueError(
      f'value_dim={value_dim} must be that of the cache, {C}, and a multiple '
      f'of {SCALE_CHANNELS}'
    )
  if Q < C + cache.rope_dim:
    raise ValueError(
      f'{Q} channels of queries are fewer than {C} + {cache.rope_dim}'
    )
  if cache.rope_NIL.shape[:2] != (N, P // ROPE_TOKENS):
    raise ValueError(
      f'rotary channels {cache.rope_NIL.shape} are not those of {N} pages of '
      f'{P} tokens, {ROPE_TOKENS} a row'
    )
  scale_shape = N, C // SCALE_CHANNELS, P
  if cache.scale_NJP is not None and cache.scale_NJP.shape != scale_shape:
    raise ValueError(f'scales {cache.scale_NJP.shape} are not {scale_shape}')
  if block_table_Bn.shape[0] != B or length_B.shape != (B,):
    raise ValueError(
      f'{B} sequences of queries have a block table {block_table_Bn.shape} and '
      f'lengths {length_B.shape}'
    )


def _pallas(q_BTHC, cache, block_table_Bn, length_B, scale, blocks, interpret):
  B, T, H, Q = q_BTHC.shape
  multiple = 64 if cache.scale_NJP is None else 128
  if cache.page_tokens % multiple:
    raise ValueError(
      f'pages of {cache.page_tokens} tokens are no multiple of {multiple}'
    )
  if blocks is None:
    blocks = blocks_lib.default(cache.page_tokens, block_table_Bn.shape)
  chunk_tokens = blocks.num_pages * cache.page_tokens
  if chunk_tokens % blocks_lib.MULTIPLE_TOKENS:
    raise ValueError(
      f'num_pages={blocks.num_pages} of {cache.page_tokens} tokens are no '
      f'multiple of {blocks_lib.MULTIPLE_TOKENS} tokens'
    )
  if B % blocks.num_workers:
    raise ValueError(
      f'num_workers={blocks.num_workers} do not divide {B} sequences'
    )
  q_BTHC = jnp.pad(q_BTHC, ((0, 0), (0, 0), (0, -H % _SUBLANES), (0, 0)))
  out_ZBMU, lse_ZBM = kernel.mla_decode(
    q_BTHC.reshape(B, -1, Q),
    cache,
    block_table_Bn,
    length_B,
    num_queries=T,
    scale=scale,
    blocks=blocks,
    interpret=interpret,
  )
  if blocks.num_splits == 1:
    out_BMU, lse_BM = out_ZBMU[0], lse_ZBM[0]
  else:
    out_BMU, lse_BM = combine(out_ZBMU, lse_ZBM)
  out_BTHU = out_BMU.reshape(B, T, -1, out_BMU.shape[-1])
  return (
    out_BTHU[:, :, :H].astype(q_BTHC.dtype),
    lse_BM.reshape(B, T, -1)[:, :, :H],
  )
