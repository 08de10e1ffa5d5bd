"""One completion, token by token as they are sampled."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import config as config_lib
from r1jax.model import cache as cache_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.sampling import filters

_LEAST_WIDTH = 16  # Prompts are padded to 16, 32, 64, … tokens.


@dataclasses.dataclass(frozen=True)
class StreamConfig:
  """How prompts are completed one at a time.

  Attributes:
    seed: Of sampling; each prompt draws anew.
    max_new_tokens: Longest completion; 0 for what the context holds.
    sampling: Temperature and filters.
  """

  seed: int
  max_new_tokens: int
  sampling: filters.SamplingConfig

  def __post_init__(self):
    config_lib.check_at_least(self, 0, 'seed', 'max_new_tokens')


class Stream:
  """Samples one completion of one prompt at a time.

  Prefill and one decode step are programs of their own, compiled at first
  use; the cache holds the model's whole context and is updated in place.
  """

  def __init__(
    self,
    config: model_config.ModelConfig,
    variables: Any,
    *,
    sampling: filters.SamplingConfig,
    stop_ids: Sequence[int],
    pad_id: int,
  ):
    """Lays the weights out for decoding.

    Args:
      config: Of the model.
      variables: Its parameters and router biases.
      sampling: Temperature and filters.
      stop_ids: The completion ends after sampling one of these.
      pad_id: Fills up prompts.
    """
    unstack = functools.partial(transformer.unstack_layers, config=config)
    self._variables = jax.jit(unstack)(variables)
    self._config = dataclasses.replace(config, scan_layers=False, remat=False)
    self._model = transformer.Transformer(self._config)
    self._sampling = sampling
    self._stop_ids, self._pad_id = frozenset(stop_ids), pad_id
    self._prefill = jax.jit(self._run_prefill)
    self._step = jax.jit(self._run_step, donate_argnums=1)

  def __call__(
    self, prompt_ids: Sequence[int], key: jax.Array, *, max_new_tokens: int
  ) -> Iterator[int]:
    """Yields the tokens of a completion, the stop token included.

    Args:
      prompt_ids: bos and the prompt.
      key: Random key.
      max_new_tokens: Most tokens to sample; the context may end it before.

    Raises:
      ValueError: The prompt leaves no room in the context.
    """
    length, context = len(prompt_ids), self._config.max_length
    if not 0 < length < context:
      raise ValueError(
        f'a prompt of {length} tokens, it must have 1 to {context - 1}'
      )
    prompt_1T = np.full((1, _width(length, context)), self._pad_id, np.int32)
    prompt_1T[0, :length] = prompt_ids
    token_1, cache = self._prefill(self._variables, prompt_1T, length, key)
    limit = min(max_new_tokens, context - length)
    for count in range(1, limit + 1):
      token = int(token_1[0])
      yield token
      if token in self._stop_ids or count == limit:
        return
      position = length + count - 1
      token_1, cache = self._step(
        self._variables, cache, token_1, position, count, key
      )

  def _run_prefill(
    self, variables: Any, prompt_1T: jax.Array, length: jax.Array, key: Any
  ) -> tuple[jax.Array, cache_lib.Base]:
    slot_1T = jnp.arange(prompt_1T.shape[1], dtype=jnp.int32)[None]
    out = self._model.apply(
      variables,
      prompt_1T,
      segment_BT=(slot_1T < length).astype(jnp.int32),
      cache=transformer.make_cache(self._config, 1, self._config.max_length),
    )
    # The slots behind the prompt's last token are empty: decoding goes there.
    cache = out.cache.at_slot(jnp.asarray(length, jnp.int32))
    last_1D = jnp.take(out.hidden_BTD, length - 1, axis=1)
    return self._sample(variables, last_1D, 0, key), cache

  def _run_step(
    self,
    variables: Any,
    cache: cache_lib.Base,
    token_1: jax.Array,
    position: jax.Array,
    count: jax.Array,
    key: jax.Array,
  ) -> tuple[jax.Array, cache_lib.Base]:
    out = self._model.apply(
      variables,
      token_1[:, None],
      position_BT=jnp.asarray(position, jnp.int32)[None, None],
      cache=cache,
      decode=True,
    )
    token_1 = self._sample(variables, out.hidden_BTD[:, 0], count, key)
    return token_1, out.cache

  def _sample(
    self, variables: Any, hidden_1D: jax.Array, count: Any, key: jax.Array
  ) -> jax.Array:
    head = transformer.head(variables['params'], self._config)
    logp_1V = filters.filtered_logp(head.logits(hidden_1D), self._sampling)
    key = jax.random.fold_in(key, count)
    # Greedy puts all probability on one token, which is then drawn.
    return jax.random.categorical(key, logp_1V).astype(jnp.int32)


def _width(length: int, context: int) -> int:
  """The padded width of a prompt: few widths, few compilations."""
  width = _LEAST_WIDTH
  while width < length:
    width *= 2
  return min(width, context)
