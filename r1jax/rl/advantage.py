"""Advantages of completions within their group."""

import jax
import jax.numpy as jnp


def group_advantage(reward_PG: jax.Array, *, eps: float = 1e-6) -> jax.Array:
  """A = (r - mean) / std over each prompt's group, [P, G].

  std is the population's (divided by G), not the sample's: the papers only
  write std(). A group of equal rewards gets exactly 0.

  Source: DeepSeekMath, arXiv:2402.03300, §4.1.2.
  """
  centred_PG = centred_advantage(reward_PG)
  std_P1 = jnp.sqrt(jnp.mean(centred_PG**2, axis=1, keepdims=True))
  # Rounding of the mean must not be blown up to an advantage.
  return jnp.where(std_P1 > eps, centred_PG / jnp.maximum(std_P1, eps), 0.0)


def centred_advantage(reward_PG: jax.Array) -> jax.Array:
  """A = r - mean over each prompt's group, [P, G].

  Source: Dr. GRPO, arXiv:2503.20783, §3.2; DeepSeek-V3.2, §3.1.
  """
  return reward_PG - reward_PG.mean(axis=1, keepdims=True)


def num_zero_variance(reward_PG: jax.Array, *, eps: float = 1e-6) -> jax.Array:
  """Groups whose rewards are all equal: they teach nothing. Scalar."""
  return jnp.sum((reward_PG.max(1) - reward_PG.min(1)) <= eps)
