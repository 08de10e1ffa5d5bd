"""Which experts a token goes to, and what keeps their load even."""

import jax
import jax.numpy as jnp

from r1jax.model import config as model_config
from r1jax.parallel import sharding


def scores(logits: jax.Array, kind: str) -> jax.Array:
  """Affinities in float32, [..., E]: 'sigmoid' (V3) or 'softmax' (V2)."""
  logits = logits.astype(jnp.float32)
  if kind == 'sigmoid':
    return jax.nn.sigmoid(logits)
  return jax.nn.softmax(logits, axis=-1)


def route(
  score: jax.Array, bias_E: jax.Array, *, config: model_config.MoeConfig
) -> tuple[jax.Array, jax.Array]:
  """Picks experts inside the best groups; the bias chooses, never weighs.

  Args:
    score: [..., E] affinities, float32.
    bias_E: Correction that evens out the load; no gradient.
    config: top_k, groups, normalisation and scale.

  Returns:
    Experts int32 [..., K] and their weights [..., K].

  Source: DeepSeek-V3, arXiv:2412.19437, §2.1.2.
  """
  c = config
  biased = score + jax.lax.stop_gradient(bias_E)
  if c.num_groups > 1:
    group = biased.reshape(*biased.shape[:-1], c.num_groups, -1)
    if c.group_score == 'top2':
      group_score = jax.lax.top_k(group, 2)[0].sum(-1)
    else:
      group_score = group.max(-1)
    best = jax.lax.top_k(group_score, c.top_groups)[1]
    keep = jax.nn.one_hot(best, c.num_groups, dtype=bool).any(-2)
    # -inf, not 0: a biased score may be negative, and 0 would then win.
    biased = jnp.where(keep[..., None], group, -jnp.inf).reshape(score.shape)
  expert = jax.lax.top_k(jax.lax.stop_gradient(biased), c.top_k)[1]
  weight = jnp.take_along_axis(score, expert, axis=-1)
  if c.normalize:
    weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
  return expert, c.scale * weight


def counts(expert_BTK: jax.Array, keep_BT: jax.Array, num_experts: int):
  """Choices per expert over the kept tokens of each row, float32 [B, E]."""
  one_hot = jax.nn.one_hot(expert_BTK, num_experts, dtype=jnp.float32)
  counts_BE = jnp.einsum('BTKE,BT->BE', one_hot, keep_BT.astype(jnp.float32))
  return sharding.sum_length(counts_BE)


def sequence_balance(
  score_BTE: jax.Array, keep_BT: jax.Array, *, top_k: int
) -> jax.Array:
  """Sequence-wise balance loss of each row before its coefficient, [B].

  L = Σᵢ fᵢ Pᵢ,  fᵢ = E/(K T) Σₜ 1[i ∈ topK(sₜ)],  Pᵢ = 1/T Σₜ sₜᵢ/Σⱼ sₜⱼ

  with the raw scores, without bias or groups; 1 at perfect balance.

  Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20.
  """
  E = score_BTE.shape[-1]
  keep_BT = keep_BT.astype(jnp.float32)
  # Of whole rows, where devices share them.
  total = sharding.sum_length
  length_B1 = jnp.maximum(total(keep_BT.sum(1)), 1.0)[:, None]
  # The K-th largest score as a threshold: the same set as top-k, no scatter.
  raw_BTE = jax.lax.stop_gradient(score_BTE)
  threshold_BT1 = jax.lax.top_k(raw_BTE, top_k)[0][..., -1:]
  chosen_BTE = (raw_BTE >= threshold_BT1).astype(jnp.float32)
  f_BE = total(jnp.einsum('BTE,BT->BE', chosen_BTE, keep_BT)) / length_B1
  f_BE = f_BE * (E / top_k)
  share_BTE = score_BTE / (score_BTE.sum(-1, keepdims=True) + 1e-20)
  P_BE = total(jnp.einsum('BTE,BT->BE', share_BTE, keep_BT)) / length_B1
  return jnp.sum(f_BE * P_BE, axis=-1)


def updated_bias(
  bias_LE: jax.Array, counts_LE: jax.Array, speed: float
) -> jax.Array:
  """bᵢ + γ sign(mean(c) - cᵢ): overloaded experts become less attractive.

  Source: Wang et al., arXiv:2408.15664, algorithm 1.
  """
  mean_L1 = counts_LE.mean(-1, keepdims=True)
  return bias_LE + speed * jnp.sign(mean_L1 - counts_LE)


def max_violation(counts_LE: jax.Array) -> jax.Array:
  """MaxVio = max load / mean load - 1 of each layer, [L].

  Source: Wang et al., arXiv:2408.15664, eq. 4.
  """
  mean_L = jnp.maximum(counts_LE.mean(-1), 1e-9)
  return counts_LE.max(-1) / mean_L - 1.0
