"""Temperature, top-k and top-p by loops over sorted tokens."""

import math

import jax
import numpy as np
import pytest

from r1jax.sampling import filters

_filtered = jax.jit(filters.filtered_logp, static_argnames='config')


def _by_loops(logits_V, c):
  """The distribution sampled from, {token: probability}."""
  V = len(logits_V)
  if c.temperature == 0:
    return {int(np.argmax(logits_V)): 1.0}
  weight = [math.exp(float(z) / c.temperature) for z in logits_V]
  order = sorted(range(V), key=lambda v: -weight[v])
  if c.top_k:
    order = order[: c.top_k]
  total, nucleus, held = sum(weight[v] for v in order), [], 0.0
  for v in order:
    if held >= c.top_p:
      break
    nucleus.append(v)
    held += weight[v] / total
  # Tokens as probable as the last one kept are kept as well.
  edge = weight[nucleus[-1]]
  kept = [v for v in range(V) if weight[v] >= edge]
  total = sum(weight[v] for v in kept)
  return {v: weight[v] / total for v in kept}


def _logits():
  logits_BV = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
  logits_BV[1, 3:9] = 0.5  # Ties, at the edges of the filters.
  logits_BV[2] = 0.0
  return 2 * logits_BV


@pytest.mark.parametrize(
  ('temperature', 'top_k', 'top_p'),
  [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (0.0, 0, 1.0),
    (1.0, 5, 1.0),
    (1.0, 16, 1.0),
    (1.0, 100, 1.0),
    (1.0, 1, 1.0),
    (0.7, 0, 0.83),
    (1.0, 0, 1e-9),
    (1.3, 6, 0.71),
  ],
)
def test_distribution_is_that_of_the_loop(temperature, top_k, top_p):
  c = filters.SamplingConfig(temperature, top_k, top_p)
  logp_BV = np.asarray(_filtered(_logits(), config=c))
  for b, logits_V in enumerate(_logits()):
    expected = _by_loops(logits_V, c)
    kept = np.flatnonzero(np.isfinite(logp_BV[b])).tolist()
    assert kept == sorted(expected), b
    for v in kept:
      assert math.exp(logp_BV[b, v]) == pytest.approx(expected[v], abs=1e-5)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'temperature': -1.0}, 'temperature=-1.0'),
    ({'top_k': -1}, 'top_k=-1'),
    ({'top_p': 0.0}, 'top_p=0.0'),
    ({'top_p': 1.5}, 'top_p=1.5'),
  ],
)
def test_rules(values, message):
  with pytest.raises(ValueError, match=message):
    filters.SamplingConfig(**values)
