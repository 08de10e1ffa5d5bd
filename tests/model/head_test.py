"""The head's kernel: log-probabilities and gradients on any mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from r1jax.losses import token
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from tests.model import tiny

_CONFIG = dataclasses.replace(
  tiny.config(), num_layers=1, num_dense_layers=1, moe=None
)


@functools.cache
def _result(implementation, **sizes):
  config = dataclasses.replace(_CONFIG, head_implementation=implementation)
  count = int(np.prod(list(sizes.values()))) if sizes else 1
  mesh = mesh_lib.make_mesh(
    mesh_lib.MeshConfig(**{'data': 1, **sizes}), jax.devices()[:count]
  )
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, tiny.V, (8, 4)).astype(np.int32)
  pull_BT = rng.normal(size=(8, 4)).astype(np.float32)
  shardings = transformer.shardings(config, mesh)

  def run(variables, tokens_BT, pull_BT):
    def objective(variables):
      out = transformer.Transformer(config).apply(variables, tokens_BT)
      head = transformer.head(variables['params'], config)
      logp_BT, entropy_BT = token.next_token_logp(
        out.hidden_BTD, head, tokens_BT, temperature=0.7
      )
      return (logp_BT * pull_BT).sum(), (logp_BT, entropy_BT)

    grads, out = jax.grad(objective, has_aux=True)(variables)
    return out, sharding.sum_gradients(grads, shardings)

  program = jax.jit(
    sharding.per_device(
      run, mesh, (shardings, 'rows', 'rows'), ('rows', shardings)
    )
  )
  with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
    return jax.device_get(program(tiny.variables(config), tokens_BT, pull_BT))


@pytest.mark.parametrize(
  'sizes', [{}, {'fsdp': 2}, {'fsdp': 2, 'tensor': 2, 'expert': 2}]
)
def test_the_kernel_scores_as_chunks_do_whoever_has_the_columns(sizes):
  out, grads = _result('pallas', **sizes)
  expected, expected_grads = _result('chunked')
  for got, wanted in zip(out, expected):
    np.testing.assert_allclose(got, wanted, atol=1e-5)
  assert np.abs(expected_grads['params']['head']).max() > 0.1
  tiny.assert_trees_close(grads, expected_grads, atol=2e-5)


def test_an_unknown_implementation_is_named():
  with pytest.raises(ValueError, match="head_implementation='fused', it must"):
    dataclasses.replace(_CONFIG, head_implementation='fused')
