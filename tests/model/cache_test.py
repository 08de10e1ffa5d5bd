"""The latent cache: what is appended is read, in either layout."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.model import cache as cache_lib

_B, _L, _C = 2, 3, 4


def _latent(layer, T):
  rng = np.random.default_rng(layer)
  return rng.normal(size=(_B, T, _C)).astype(np.float32)


def _segments(T, value):
  return jnp.full((_B, T), value, jnp.int32)


@pytest.mark.parametrize('stacked', [True, False])
def test_append_advance_grow_and_read(stacked):
  cache = cache_lib.make_latent_cache(
    num_layers=_L,
    batch=_B,
    length=3,
    width=_C,
    dtype=jnp.float32,
    stacked=stacked,
  )
  for layer in range(_L):
    cache = cache.append(layer, _latent(layer, 2))
  cache = cache.advance(_segments(2, 1), _segments(2, 5))
  cache = cache.grown(2)
  for layer in range(_L):
    cache = cache.append(layer, _latent(10 + layer, 1))
  cache = cache.advance(_segments(1, 2), _segments(1, 6))
  assert int(cache.slot) == 3
  np.testing.assert_array_equal(cache.segment_BS, [[1, 1, 2, 0, 0]] * _B)
  np.testing.assert_array_equal(cache.position_BS, [[5, 5, 6, 0, 0]] * _B)
  for layer in range(_L):
    held = cache.read(layer)
    assert held.shape == (_B, 5, _C)
    np.testing.assert_array_equal(held[:, :2], _latent(layer, 2))
    np.testing.assert_array_equal(held[:, 2:3], _latent(10 + layer, 1))
    assert not np.asarray(held[:, 3:]).any()


def test_growing_by_nothing_is_nothing():
  cache = cache_lib.make_latent_cache(
    num_layers=1, batch=1, length=1, width=1, dtype=jnp.float32, stacked=True
  )
  assert cache.grown(0) is cache
