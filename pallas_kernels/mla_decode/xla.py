"""MLA decode in plain XLA: some pages of all sequences at a time."""

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
  """See ops.mla_decode; it gathers a page of each sequence at a time."""
  B, T, H, _ = q_BTHC.shape
  P, Q = cache.page_tokens, value_dim + cache.rope_dim
  q_BTHC = q_BTHC[..., :Q]
  last_BT = length_B[:, None] - T + jnp.arange(T)

  def attend(state, page):
    m_BTH, l_BTH, out_BTHU = state
    i, page_B = page
    x_BPC = cache_lib.unpack(jax.tree.map(lambda x: x[page_B], cache))
    key_P = i * P + jnp.arange(P)
    # Whatever is stored past the end, 0 times it must be 0.
    x_BPC = jnp.where(key_P[:, None] < length_B[:, None, None], x_BPC, 0)
    x_BPC = x_BPC.astype(q_BTHC.dtype)
    score_BTHP = scale * jnp.einsum(
      'BTHC,BPC->BTHP', q_BTHC, x_BPC, preferred_element_type=jnp.float32
    )
    seen_BTHP = (key_P <= last_BT[..., None])[:, :, None]
    score_BTHP = jnp.where(seen_BTHP, score_BTHP, -jnp.inf)
    # Finite, so that rows that saw nothing yet are not nan.
    after_BTH = jnp.maximum(m_BTH, score_BTHP.max(-1))
    p_BTHP = jnp.exp(score_BTHP - after_BTH[..., None])
    alpha_BTH = jnp.exp(m_BTH - after_BTH)
    out_BTHU = alpha_BTH[..., None] * out_BTHU + jnp.einsum(
      'BTHP,BPU->BTHU',
      p_BTHP.astype(x_BPC.dtype),
      x_BPC[..., :value_dim],
      preferred_element_type=jnp.float32,
    )
    return (after_BTH, alpha_BTH * l_BTH + p_BTHP.sum(-1), out_BTHU), None

  start = (
    jnp.full((B, T, H), jnp.finfo(jnp.float32).min),
    jnp.zeros((B, T, H)),
    jnp.zeros((B, T, H, value_dim)),
  )
  pages = jnp.arange(block_table_Bn.shape[1]), block_table_Bn.T
  (m_BTH, l_BTH, out_BTHU), _ = jax.lax.scan(attend, start, pages)
  is_empty_BTH = l_BTH == 0
  lse_BTH = jnp.where(is_empty_BTH, jnp.inf, m_BTH + jnp.log(l_BTH))
  out_BTHU /= jnp.where(is_empty_BTH, 1, l_BTH)[..., None]
  return out_BTHU.astype(q_BTHC.dtype), lse_BTH
