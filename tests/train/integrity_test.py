"""The sum of an array's bits, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.train import integrity


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'bool'])
def test_bits_are_added(dtype):
  x = np.random.default_rng(0).normal(size=(3, 100)).astype(jnp.dtype(dtype))
  bits = x.view(f'uint{8 * x.dtype.itemsize}')
  expected = int(bits.sum(dtype=np.uint32))
  assert integrity.checksums({'a': {'x': jnp.array(x)}}) == {'a': [expected]}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_nothing_is_copied(dtype):
  x = jax.ShapeDtypeStruct((61, 1024, 1024), dtype)
  compiled = integrity._sums('cpu').lower({'a': [x, x]}).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
