"""Group relative policy optimisation: the clipped loss with a k3 penalty."""

import chex
import jax
import jax.numpy as jnp

from r1jax import types


def sequence_mean(x_BT: jax.Array, batch: types.PolicyBatch) -> jax.Array:
  """Mean over completions of each one's token mean: 1/N Σᵢ 1/|oᵢ| Σₜ x.

  Source: DeepSeekMath, arXiv:2402.03300, eq. 3.
  """
  weight_BT = batch.mask_BT / batch.length_BT
  return jnp.sum(x_BT * weight_BT) / batch.num_sequences


def token_mean(x_BT: jax.Array, batch: types.PolicyBatch) -> jax.Array:
  """Mean over all sampled tokens of the global batch: Σ x / Σ|oᵢ|.

  Source: DAPO, arXiv:2503.14476, §3.3.
  """
  return jnp.sum(x_BT * batch.mask_BT) / batch.num_tokens


def clipped_gain(
  ratio_BT: jax.Array, adv_BT: jax.Array, *, clip_low: float, clip_high: float
) -> jax.Array:
  """min(ρÂ, clip(ρ, 1-ε_low, 1+ε_high)Â).

  Source: DeepSeekMath, arXiv:2402.03300, eq. 3.
  """
  clipped_BT = jnp.clip(ratio_BT, 1.0 - clip_low, 1.0 + clip_high)
  return jnp.minimum(ratio_BT * adv_BT, clipped_BT * adv_BT)


def k3(logp_BT: jax.Array, ref_logp_BT: jax.Array) -> jax.Array:
  """KL estimate r - ln r - 1 with r = π_ref/π_θ; never negative.

  Source: DeepSeekMath, arXiv:2402.03300, eq. 4.
  """
  log_ratio_BT = jax.lax.stop_gradient(ref_logp_BT) - logp_BT
  return jnp.expm1(log_ratio_BT) - log_ratio_BT


def grpo_terms(
  logp_BT: jax.Array,
  old_logp_BT: jax.Array,
  ref_logp_BT: jax.Array,
  adv_BT: jax.Array,
  mask_BT: jax.Array,
  *,
  clip_low: float,
  clip_high: float,
  kl_coef: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Per-token loss of GRPO, to be reduced by sequence_mean or token_mean.

  loss = β D_k3(π_θ ‖ π_ref) - min(ρÂ, clip(ρ, 1-ε_low, 1+ε_high)Â)

  Args:
    logp_BT: Under the policy, nats.
    old_logp_BT: When sampled.
    ref_logp_BT: Under the reference.
    adv_BT: Advantage of the completion of each token.
    mask_BT: 1 on sampled tokens.
    clip_low: ε_low.
    clip_high: ε_high; R1 uses 10.
    kl_coef: β.

  Returns:
    loss_BT, and per-token 'kl', 'clipped' (1 where the clip binds), 'ratio'.

  Source: DeepSeekMath, arXiv:2402.03300, eq. 3-4.
  """
  chex.assert_equal_shape([logp_BT, old_logp_BT, ref_logp_BT, mask_BT])
  adv_BT = jax.lax.stop_gradient(adv_BT)
  # Outside the mask both are 0, so that nothing there can overflow.
  old_logp_BT = jnp.where(mask_BT > 0, old_logp_BT, 0.0)
  logp_BT = jnp.where(mask_BT > 0, logp_BT, 0.0)
  ref_logp_BT = jnp.where(mask_BT > 0, ref_logp_BT, 0.0)
  ratio_BT = jnp.exp(logp_BT - jax.lax.stop_gradient(old_logp_BT))
  gain_BT = clipped_gain(
    ratio_BT, adv_BT, clip_low=clip_low, clip_high=clip_high
  )
  kl_BT = k3(logp_BT, ref_logp_BT)
  loss_BT = kl_coef * kl_BT - gain_BT
  clipped_BT = (gain_BT < ratio_BT * adv_BT).astype(jnp.float32)
  return loss_BT, {
    'kl': kl_BT,
    'clipped': clipped_BT,
    'ratio': jax.lax.stop_gradient(ratio_BT),
  }
