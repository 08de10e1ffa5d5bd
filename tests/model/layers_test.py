"""Layers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.model import layers
from r1jax.parallel import sharding


def test_swiglu_s_gradient_is_that_of_its_formula():
  layer = layers.SwiGlu(5, init_std=0.5, dtype=jnp.dtype('float32'))
  rng = np.random.default_rng(0)
  x_BTD, pull_BTD = rng.normal(size=(2, 2, 3, 4)).astype(np.float32)
  params = layer.init(jax.random.key(0), x_BTD)['params']
  params = sharding.unbox(params)

  def formula(params, x_BTD):
    h_BTF = jax.nn.silu(x_BTD @ params['gate']) * (x_BTD @ params['up'])
    return h_BTF @ params['down']

  apply = lambda params, x_BTD: layer.apply({'params': params}, x_BTD)
  gradients = [
    jax.vjp(function, params, x_BTD)[1](pull_BTD)
    for function in (apply, formula)
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients
  )
