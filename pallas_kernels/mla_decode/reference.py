"""The obvious MLA decode: all pages of a sequence, then a softmax."""

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode import cache as cache_lib


def mla_decode(
  q_BTHC: jax.Array,
  cache: cache_lib.LatentCache,
  block_table_Bn: jax.Array,
  length_B: jax.Array,
  *,
  value_dim: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """See ops.mla_decode; float32, whatever the inputs are."""
  B, T = q_BTHC.shape[:2]
  x_NPC = cache_lib.unpack(cache)
  x_BSC = x_NPC[block_table_Bn].reshape(B, -1, x_NPC.shape[-1])
  key_S = jnp.arange(x_BSC.shape[1])
  # Whatever is stored past the end, 0 times it must be 0.
  x_BSC = jnp.where(key_S[:, None] < length_B[:, None, None], x_BSC, 0)
  last_BT = length_B[:, None] - T + jnp.arange(T)
  seen_BTS = key_S <= last_BT[..., None]
  score_BTHS = scale * jnp.einsum(
    'BTHC,BSC->BTHS',
    q_BTHC[..., : x_BSC.shape[-1]].astype(jnp.float32),
    x_BSC,
    precision=jax.lax.Precision.HIGHEST,
  )
  score_BTHS = jnp.where(seen_BTS[:, :, None], score_BTHS, -jnp.inf)
  lse_BTH = jax.nn.logsumexp(score_BTHS, axis=-1)
  is_empty_BT1 = (last_BT < 0)[..., None]
  lse_BTH = jnp.where(is_empty_BT1, jnp.inf, lse_BTH)
  out_BTHU = jnp.einsum(
    'BTHS,BSU->BTHU',
    jnp.exp(score_BTHS - lse_BTH[..., None]),
    x_BSC[..., :value_dim],
    precision=jax.lax.Precision.HIGHEST,
  )
  return out_BTHU.astype(q_BTHC.dtype), lse_BTH
