"""The obvious attention: all scores, a mask, a softmax."""

import jax
import jax.numpy as jnp


def flash_attention(
  q_BTHQ: jax.Array,
  k_BSGQ: jax.Array,
  v_BSGU: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  first_query: int | jax.Array,
  scale: float,
) -> jax.Array:
  """See ops.flash_attention."""
  T, S = q_BTHQ.shape[1], k_BSGQ.shape[1]
  per_group = q_BTHQ.shape[2] // k_BSGQ.shape[2]
  k_BSHQ = jnp.repeat(k_BSGQ, per_group, axis=2).astype(jnp.float32)
  v_BSHU = jnp.repeat(v_BSGU, per_group, axis=2).astype(jnp.float32)
  score_BHTS = scale * jnp.einsum(
    'BTHQ,BSHQ->BHTS', q_BTHQ.astype(jnp.float32), k_BSHQ
  )
  slot_T = first_query + jnp.arange(T)
  mask_BTS = segment_BT[:, :, None] == segment_BS[:, None, :]
  mask_BTS &= jnp.arange(S) <= slot_T[:, None]
  score_BHTS = jnp.where(mask_BTS[:, None], score_BHTS, -jnp.inf)
  weight_BHTS = jax.nn.softmax(score_BHTS, axis=-1)
  return jnp.einsum('BHTS,BSHU->BTHU', weight_BHTS, v_BSHU).astype(v_BSGU.dtype)
