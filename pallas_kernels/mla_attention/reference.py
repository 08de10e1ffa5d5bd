"""The obvious attention: keys put together, all scores, a softmax."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import reference


def mla_attention(
  q_BTHQ: jax.Array,
  k_BSHN: jax.Array,
  rope_BSR: jax.Array,
  v_BSHU: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  first_query: int | jax.Array,
  scale: float,
) -> jax.Array:
  """See ops.mla_attention."""
  B, S, H, _ = k_BSHN.shape
  rope_BSHR = jnp.broadcast_to(
    rope_BSR[:, :, None], (B, S, H, rope_BSR.shape[-1])
  )
  k_BSHQ = jnp.concatenate([k_BSHN, rope_BSHR], axis=-1)
  return reference.flash_attention(
    q_BTHQ, k_BSHQ, v_BSHU, segment_BT, segment_BS, first_query, scale
  )
