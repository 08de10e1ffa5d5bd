"""The cache: what is appended is read, in either layout."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.model import cache as cache_lib

_B, _L, _C = 2, 3, 4


def _entry(layer, T):
  rng = np.random.default_rng(layer)
  draw = lambda *shape: rng.normal(size=(_B, T, *shape)).astype(np.float32)
  return {'a': draw(_C), 'b': draw(2, _C)}


def _segments(T, value):
  return jnp.full((_B, T), value, jnp.int32)


@pytest.mark.parametrize('stacked', [True, False])
def test_append_advance_grow_and_read(stacked):
  cache = cache_lib.make_cache(
    num_layers=_L,
    batch=_B,
    length=3,
    shapes={'a': (_C,), 'b': (2, _C)},
    dtype=jnp.float32,
    stacked=stacked,
  )
  for layer in range(_L):
    cache = cache.append(layer, _entry(layer, 2), is_first=True)
  cache = cache.advance(_segments(2, 1), _segments(2, 5))
  cache = cache.grown(5)
  for layer in range(_L):
    cache = cache.append(layer, _entry(10 + layer, 1), is_first=False)
  cache = cache.advance(_segments(1, 2), _segments(1, 6))
  assert int(cache.slot) == 3
  np.testing.assert_array_equal(cache.segment_BS, [[1, 1, 2, 0, 0]] * _B)
  np.testing.assert_array_equal(cache.position_BS, [[5, 5, 6, 0, 0]] * _B)
  for layer in range(_L):
    held, first, then = (
      cache.read(layer),
      _entry(layer, 2),
      _entry(10 + layer, 1),
    )
    for name, shape in (('a', (_C,)), ('b', (2, _C))):
      assert held[name].shape == (_B, 5, *shape)
      np.testing.assert_array_equal(held[name][:, :2], first[name])
      np.testing.assert_array_equal(held[name][:, 2:3], then[name])
      assert not np.asarray(held[name][:, 3:]).any()


def test_growing_by_nothing_is_nothing():
  cache = cache_lib.make_cache(
    num_layers=1, batch=1, length=1, shapes={}, dtype=jnp.float32, stacked=True
  )
  assert cache.grown(1) is cache
