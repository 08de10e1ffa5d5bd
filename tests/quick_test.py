"""Programs of several devices stay out of the cache of compiled ones."""

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache


@pytest.mark.parametrize(('devices', 'written'), [(1, 1), (2, 0)])
def test_programs_of_one_device_are_cached(monkeypatch, devices, written):
  entries = {}

  class Cache:
    put = entries.__setitem__

  mesh = jax.make_mesh((devices,), ('x',), devices=jax.devices()[:devices])
  sharding = jax.NamedSharding(mesh, jax.P('x'))
  x = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=sharding)
  program = jax.jit(jnp.sin).lower(x).compile().runtime_executable()
  monkeypatch.setattr(compilation_cache, '_get_cache', lambda _: Cache)
  compilation_cache.put_executable_and_time(
    'key', 'jit_sin', program, jax.devices()[0].client, 1
  )
  assert len(entries) == written
