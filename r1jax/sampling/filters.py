"""Temperature, top-k and top-p: from logits to the distribution sampled."""

import dataclasses

import jax
import jax.numpy as jnp

from r1jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How tokens are drawn.

  Attributes:
    temperature: 0 is greedy.
    top_k: Keep this many most probable tokens; 0 keeps all.
    top_p: Keep the fewest tokens that hold this probability; 1 keeps all.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    config_lib.check_at_least(self, 0, 'temperature', 'top_k')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must lie in (0, 1]')


def filtered_logp(logits_BV: jax.Array, config: SamplingConfig) -> jax.Array:
  """Log-probabilities (nats, float32) of the distribution sampled from.

  Tokens that a filter drops get -inf. Greedy puts all on the best token.
  """
  logits_BV = logits_BV.astype(jnp.float32)
  V = logits_BV.shape[-1]
  if config.temperature == 0:
    best_BV = jnp.arange(V) == jnp.argmax(logits_BV, axis=-1)[..., None]
    return jnp.where(best_BV, 0.0, -jnp.inf)
  if config.top_k == 0 and config.top_p == 1:
    return jax.nn.log_softmax(logits_BV / config.temperature)
  # Compared are the logits as given: what is computed from them may be rounded
  # one way in the sort and another beside it, and lose the last token kept.
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  keep_BV = jnp.ones(logits_BV.shape, bool)
  if 0 < config.top_k < V:
    keep_BV &= logits_BV >= sorted_BV[..., config.top_k - 1 : config.top_k]
    sorted_BV = jnp.where(jnp.arange(V) < config.top_k, sorted_BV, -jnp.inf)
  if config.top_p < 1:
    prob_BV = jax.nn.softmax(sorted_BV / config.temperature)
    # A token stays if those before it do not hold top_p yet.
    before_BV = jnp.cumsum(prob_BV, axis=-1) - prob_BV
    count_B1 = jnp.sum(before_BV < config.top_p, axis=-1, keepdims=True)
    last_B1 = jnp.take_along_axis(sorted_BV, count_B1 - 1, axis=-1)
    keep_BV &= logits_BV >= last_B1
  kept_BV = jnp.where(keep_BV, logits_BV / config.temperature, -jnp.inf)
  return jax.nn.log_softmax(kept_BV)
