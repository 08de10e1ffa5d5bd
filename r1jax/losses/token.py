"""Log-probabilities of tokens without [B, T, V] logits, and their loss."""

import jax
import jax.numpy as jnp

# Logits that exist at once: 512 MiB in float32, 1,024 tokens of V3.
_CHUNK_LOGITS = 2**27


def token_logp(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of its distribution.

  logp = z_y/τ - log Σ_v exp(z_v/τ),  z = hidden · head, in float32. More
  tokens than a chunk are scored chunk by chunk, and their logits are computed
  again in the backward pass.

  Args:
    hidden_BTD: Final hidden states.
    head_DV: Output projection.
    targets_BT: int32, the token to score at each position.
    temperature: τ > 0.
    chunk: Tokens whose logits exist at once; by default what 512 MiB hold.

  Returns:
    logp_BT (nats, float32) and entropy_BT (nats, no gradient).
  """
  B, T, D = hidden_BTD.shape
  head_DV = head_DV.astype(hidden_BTD.dtype)

  def score(hidden_XD, target_X):
    logits_XV = jnp.einsum(
      'XD,DV->XV', hidden_XD, head_DV, preferred_element_type=jnp.float32
    )
    logits_XV = logits_XV / temperature
    logits_XV -= jax.lax.stop_gradient(logits_XV.max(-1, keepdims=True))
    lse_X = jnp.log(jnp.exp(logits_XV).sum(-1))
    # A masked sum, not a gather: its gradient is no scatter.
    hit_XV = jnp.arange(logits_XV.shape[-1]) == target_X[:, None]
    logp_X = jnp.where(hit_XV, logits_XV, 0.0).sum(-1) - lse_X
    free_XV = jax.lax.stop_gradient(logits_XV - lse_X[:, None])
    entropy_X = -jnp.sum(jnp.exp(free_XV) * free_XV, axis=-1)
    return logp_X, entropy_X

  num_tokens = B * T
  hidden_XD = hidden_BTD.reshape(num_tokens, D)
  target_X = targets_BT.reshape(num_tokens)
  chunk = chunk or max(_CHUNK_LOGITS // head_DV.shape[1], 1)
  if num_tokens <= chunk:
    logp, entropy = score(hidden_XD, target_X)
  else:
    padding = -num_tokens % chunk
    hidden_XD = jnp.pad(hidden_XD, ((0, padding), (0, 0)))
    target_X = jnp.pad(target_X, (0, padding))
    logp, entropy = jax.lax.map(
      lambda xs: jax.checkpoint(score)(*xs),
      (hidden_XD.reshape(-1, chunk, D), target_X.reshape(-1, chunk)),
    )
    logp = logp.reshape(-1)[:num_tokens]
    entropy = entropy.reshape(-1)[:num_tokens]
  return logp.reshape(B, T), entropy.reshape(B, T)


def shifted(targets_BT: jax.Array, depth: int) -> jax.Array:
  """The token `depth` places later, 0 past the end: what t predicts."""
  T = targets_BT.shape[1]
  return jnp.pad(targets_BT, ((0, 0), (0, depth)))[:, depth : depth + T]


def next_token_logp(
  hidden_BTD: jax.Array,
  head_DV: jax.Array,
  tokens_BT: jax.Array,
  *,
  temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """`logp_BT[b, t]` = log p(tokens[b, t] | tokens[b, :t]), and entropies.

  Column 0, which nothing predicts, is 0. See `token_logp`.
  """
  logp_BT, entropy_BT = token_logp(
    hidden_BTD, head_DV, shifted(tokens_BT, 1), temperature=temperature
  )
  back = lambda x_BT: jnp.pad(x_BT, ((0, 0), (1, 0)))[:, :-1]
  return back(logp_BT), back(entropy_BT)


def cross_entropy(
  logp_BT: jax.Array, mask_BT: jax.Array, num_tokens: jax.Array
) -> jax.Array:
  """-Σ logp · mask / num_tokens, nats per token of the global batch."""
  return -jnp.sum(logp_BT * mask_BT) / num_tokens


def mtp_mask(
  mask_BT: jax.Array, segment_BT: jax.Array, depth: int
) -> jax.Array:
  """Positions i whose token i + depth + 1 exists in i's own document.

  The result stands at i, not at the predicted token. [B, T] float32.
  """
  same_BT = shifted(segment_BT, depth + 1) == segment_BT
  return shifted(mask_BT, depth + 1) * (same_BT & (segment_BT > 0))
