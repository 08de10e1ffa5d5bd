"""Token by token gives what prefill and decode in one program give."""

import dataclasses

import jax
import numpy as np
import pytest

from r1jax.sampling import filters, generate, stream
from tests.model import tiny

_CONFIG = dataclasses.replace(tiny.config(), num_layers=2, max_length=24)
_GREEDY = filters.SamplingConfig(temperature=0.0)
_KEY = jax.random.key(3)


@pytest.fixture(scope='module')
def greedy():
  return _stream(_GREEDY)


def _stream(sampling, stop_ids=()):
  variables = tiny.variables(_CONFIG)
  return stream.Stream(
    _CONFIG, variables, sampling=sampling, stop_ids=stop_ids, pad_id=0
  )


def _prompt(length):
  return np.random.default_rng(length).integers(1, tiny.V, length).tolist()


def _expected(prompts, num_tokens):
  """What `generate` samples greedily, one list a prompt."""
  width = max(map(len, prompts))
  padded_BT = np.zeros((len(prompts), width), np.int32)
  for row_T, prompt in zip(padded_BT, prompts):
    row_T[: len(prompt)] = prompt
  length_B = np.array([len(p) for p in prompts], np.int32)

  @jax.jit
  def run(variables):
    return generate.generate(
      _CONFIG,
      variables,
      padded_BT,
      length_B,
      np.arange(len(prompts), dtype=np.int32),
      _KEY,
      max_new_tokens=num_tokens,
      sampling=_GREEDY,
      stop_ids=(),
      pad_id=0,
    )

  tokens_BT = np.asarray(run(tiny.variables(_CONFIG)).tokens_BT)
  return [
    row[n : n + num_tokens].tolist() for row, n in zip(tokens_BT, length_B)
  ]


def test_greedy_equals_generate_up_to_the_context(greedy):
  prompts = [_prompt(n) for n in (1, 5, 16, 17)]
  for prompt, expected in zip(prompts, _expected(prompts, 23)):
    tokens = list(greedy(prompt, _KEY, max_new_tokens=100))
    assert len(tokens) == _CONFIG.max_length - len(prompt)
    assert tokens == expected[: len(tokens)]


def test_compiles_once(greedy):
  for length in (2, 3, 9):
    list(greedy(_prompt(length), _KEY, max_new_tokens=3))
  assert greedy._step._cache_size() == 1
  assert greedy._prefill._cache_size() <= 2  # Widths 16 and 24.


def test_ends_after_a_stop_token_or_enough_of_them(greedy):
  whole = list(greedy(_prompt(5), _KEY, max_new_tokens=9))
  assert len(whole) == 9
  stop = whole[4]
  greedy._stop_ids = frozenset([stop])
  try:
    stopped = list(greedy(_prompt(5), _KEY, max_new_tokens=9))
  finally:
    greedy._stop_ids = frozenset()
  assert stopped == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize('length', [0, 24, 30])
def test_a_prompt_must_leave_room(greedy, length):
  with pytest.raises(ValueError, match=f'a prompt of {length} tokens'):
    next(greedy(_prompt(length), _KEY, max_new_tokens=1))


def test_sampling_follows_the_key_and_the_filters():
  sampled = _stream(filters.SamplingConfig(temperature=1.5))
  draws = {
    tuple(sampled(_prompt(4), jax.random.key(k), max_new_tokens=6))
    for k in (0, 0, 1, 2)
  }
  assert len(draws) == 3
