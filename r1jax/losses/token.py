"""Log-probabilities of tokens without [B, T, V] logits, and their loss."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import ops as linear_cross_entropy_ops

# Logits that exist at once: 512 MiB in float32, 1,024 tokens of V3.
_CHUNK_LOGITS = 2**27


def _same(x: jax.Array) -> jax.Array:
  return x


@dataclasses.dataclass(frozen=True)
class Head:
  """The output projection, or some columns of it and what joins them.

  Attributes:
    w_DV: Its columns on this device.
    first: Number of the first of them.
    spread: What each device scores with its columns: [X, …] of its own tokens
      to those of all devices that share the head, [n X, …].
    num_spread: n.
    total: Sums over all columns, [n X] -> [X].
    largest: The largest over all columns, of constants, [n X] -> [n X].
    join: What was scored of own tokens, [n X, V here] -> [X, V]; a constant.
    own_length: The part of rows [B, T] whose hidden states are here.
    join_length: The whole rows of what each device scored a part of.
    implementation: Of `token_logp`: 'chunked' (XLA, some tokens at a time) or
      'pallas' (pallas_kernels.linear_cross_entropy, for TPUs).
  """

  w_DV: jax.Array
  first: int | jax.Array = 0
  spread: Callable[[jax.Array], jax.Array] = _same
  num_spread: int = 1
  total: Callable[[jax.Array], jax.Array] = _same
  largest: Callable[[jax.Array], jax.Array] = _same
  join: Callable[[jax.Array], jax.Array] = _same
  own_length: Callable[[jax.Array], jax.Array] = _same
  join_length: Callable[[jax.Array], jax.Array] = _same
  implementation: str = 'chunked'

  def own_logits(self, hidden_XD: jax.Array) -> jax.Array:
    """Float32 logits of this device's columns, [n X, V here]."""
    return jnp.einsum(
      'XD,DV->XV',
      self.spread(hidden_XD),
      self.w_DV.astype(hidden_XD.dtype),
      preferred_element_type=jnp.float32,
    )

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Float32 logits, [..., D] -> [..., V]."""
    hidden_XD = hidden.reshape(-1, hidden.shape[-1])
    logits_XV = self.join(self.own_logits(hidden_XD))
    return logits_XV.reshape(*hidden.shape[:-1], -1)


def token_logp(
  hidden_BTD: jax.Array,
  head: Head,
  targets_BT: jax.Array,
  *,
  temperature: float = 1.0,
  chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of its distribution.

  logp = z_y/τ - log Σ_v exp(z_v/τ),  z = hidden · head, in float32. Logits are
  computed again in the backward pass, unless 'chunked' has a single chunk.

  Args:
    hidden_BTD: Final hidden states.
    head: Output projection.
    targets_BT: int32, the token to score at each position of whole rows.
    temperature: τ > 0.
    chunk: Own tokens whose logits exist at once, of 'chunked'; by default what
      512 MiB hold.

  Returns:
    logp_BT (nats, float32) and entropy_BT (nats, no gradient).
  """
  B, T, D = hidden_BTD.shape
  targets_BT = head.own_length(targets_BT)

  def score(hidden_XD, target_X):
    logits_XV = head.own_logits(hidden_XD) / temperature
    top_X = head.largest(jax.lax.stop_gradient(logits_XV.max(-1)))
    logits_XV -= top_X[:, None]
    exp_XV = jnp.exp(logits_XV)
    sum_X = head.total(exp_XV.sum(-1))
    # A masked sum, not a gather: its gradient is no scatter.
    column_V = head.first + jnp.arange(logits_XV.shape[-1])
    hit_XV = column_V == head.spread(target_X)[:, None]
    hit_X = head.total(jnp.where(hit_XV, logits_XV, 0.0).sum(-1))
    mean_X = head.total((exp_XV * logits_XV).sum(-1)) / sum_X
    entropy_X = jax.lax.stop_gradient(jnp.log(sum_X) - mean_X)
    return hit_X - jnp.log(sum_X), entropy_X

  num_tokens = B * T
  hidden_XD = hidden_BTD.reshape(num_tokens, D)
  target_X = targets_BT.reshape(num_tokens)
  columns = head.w_DV.shape[1] * head.num_spread
  chunk = chunk or max(_CHUNK_LOGITS // columns, 1)
  if head.implementation == 'pallas':
    logp, entropy = linear_cross_entropy_ops.linear_cross_entropy(
      head.spread(hidden_XD),
      head.w_DV,
      head.spread(target_X),
      temperature=temperature,
      implementation='pallas',
      first=head.first,
      spread=head.spread,
      total=head.total,
      largest=head.largest,
    )
  elif num_tokens <= chunk:
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
  whole = lambda x: head.join_length(x.reshape(B, T))
  return whole(logp), whole(entropy)


def shifted(targets_BT: jax.Array, depth: int) -> jax.Array:
  """The token `depth` places later, 0 past the end: what t predicts."""
  T = targets_BT.shape[1]
  return jnp.pad(targets_BT, ((0, 0), (0, depth)))[:, depth : depth + T]


def next_token_logp(
  hidden_BTD: jax.Array,
  head: Head,
  tokens_BT: jax.Array,
  *,
  temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
  """`logp_BT[b, t]` = log p(tokens[b, t] | tokens[b, :t]), and entropies.

  Column 0, which nothing predicts, is 0. See `token_logp`.
  """
  logp_BT, entropy_BT = token_logp(
    hidden_BTD, head, shifted(tokens_BT, 1), temperature=temperature
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
