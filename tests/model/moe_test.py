"""The MoE layer is a loop over its experts, at the cost of the chosen ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.model import config as model_config
from r1jax.model import moe, router
from tests.model import tiny

_CONFIG = tiny.config().moe
_D = 12


def _layer(config):
  return moe.Moe(config, init_std=0.1, dtype=jnp.dtype('float32'))


def _params(config, seed=0):
  E, F = config.num_experts, config.expert_dim
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
  swiglu = lambda *lead: {
    'gate': draw(*lead, _D, F),
    'up': draw(*lead, _D, F),
    'down': draw(*lead, F, _D),
  }
  return swiglu(E) | {'router': 3 * draw(_D, E), 'shared': swiglu()}


def _swiglu(x_TD, p):
  return (jax.nn.silu(x_TD @ p['gate']) * (x_TD @ p['up'])) @ p['down']


def _by_loop(config, params, bias_E, x_BTD):
  """Every expert on every token, kept where it was chosen."""
  x_TD = x_BTD.reshape(-1, _D)
  score_TE = router.scores(x_TD @ params['router'], config.score)
  expert_TK, weight_TK = router.route(score_TE, bias_E, config=config)
  out_TD = _swiglu(x_TD, params['shared'])
  for e in range(config.num_experts):
    weight_T = jnp.where(expert_TK == e, weight_TK, 0.0).sum(-1)
    expert = {name: params[name][e] for name in ('gate', 'up', 'down')}
    out_TD += weight_T[:, None] * _swiglu(x_TD, expert)
  return out_TD.reshape(x_BTD.shape)


def _by_layer(config, params, bias_E, x_BTD):
  variables = {'params': params, 'router': {'bias': bias_E}}
  keep_BT = jnp.ones(x_BTD.shape[:2], bool)
  return _layer(config).apply(variables, x_BTD, keep_BT)[0]


@functools.cache
def _value_and_gradients(function):
  """A program of (params, bias, x, target): output and gradients."""

  @jax.jit
  def run(params, bias_E, x_BTD, target_BTD):
    def objective(params, bias_E, x_BTD):
      out_BTD = function(_CONFIG, params, bias_E, x_BTD)
      return jnp.sum(out_BTD * target_BTD), out_BTD

    return jax.grad(objective, argnums=(0, 1, 2), has_aux=True)(
      params, bias_E, x_BTD
    )

  return run


@pytest.mark.parametrize('skew', ['even', 'all tokens to one pair'])
def test_layer_and_gradients_are_those_of_the_loop(skew):
  rng = np.random.default_rng(1)
  x_BTD = jnp.asarray(rng.normal(size=(2, 13, _D)), jnp.float32)
  target_BTD = jnp.asarray(rng.normal(size=x_BTD.shape), jnp.float32)
  bias_E = jnp.zeros(8).at[jnp.array([4, 5])].set(0 if skew == 'even' else 9)
  args = (_params(_CONFIG), bias_E, x_BTD, target_BTD)
  grads, out_BTD = _value_and_gradients(_by_layer)(*args)
  expected, expected_BTD = _value_and_gradients(_by_loop)(*args)
  np.testing.assert_allclose(out_BTD, expected_BTD, atol=1e-5)
  tiny.assert_trees_close(grads, expected, atol=1e-5)
  assert not grads[1].any()  # The bias learns nothing from the loss.
  assert grads[0]['router'].any()
  # Experts nobody chose get exactly nothing.
  if skew != 'even':
    idle_E = np.ones(8, bool)
    idle_E[[4, 5]] = False
    assert not np.asarray(grads[0]['gate'])[idle_E].any()


def test_padding_is_not_counted():
  config = dataclasses.replace(_CONFIG, num_shared=0)
  params = {k: v for k, v in _params(config).items() if k != 'shared'}
  x_BTD = jax.random.normal(jax.random.key(0), (2, 13, _D))
  keep_BT = jnp.arange(13)[None] < jnp.asarray([[13], [4]])
  variables = {'params': params, 'router': {'bias': jnp.zeros(8)}}
  run = jax.jit(_layer(config).apply)
  _, metrics = run(variables, x_BTD, keep_BT)
  assert float(metrics.counts_E.sum()) == (13 + 4) * config.top_k
  other_BTD = jnp.where(keep_BT[..., None], x_BTD, 7.0)
  _, again = run(variables, other_BTD, keep_BT)
  tiny.assert_trees_close(again, metrics, atol=0)


@pytest.mark.parametrize('implementation', ['xla', 'grouped'])
def test_work_grows_with_routed_tokens_not_with_experts(implementation):
  """At most 1.3 times 6 · T · K · D · F operations, plus the router's.

  A row costs three products of 2 · D · F. There are T · K rows; 'grouped' adds
  at most E · (block - 1) of padding, 1.12 times as many here, and 'xla' the
  turns of its tail, which the compiler counts as one and the test of its
  layout counts exactly. Running every expert on every token would cost
  E / K = 16 times as much.
  """
  T, D, F, E, K, block = 2048, 64, 64, 32, 2, 16
  config = model_config.MoeConfig(
    num_experts=E,
    top_k=K,
    expert_dim=F,
    num_shared=0,
    block=block,
    implementation=implementation,
  )
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  variables = {
    'params': {
      'router': shape(D, E),
      'gate': shape(E, D, F),
      'up': shape(E, D, F),
      'down': shape(E, F, D),
    },
    'router': {'bias': shape(E)},
  }
  keep_BT = jax.ShapeDtypeStruct((1, T), bool)
  layer = jax.jit(_layer(config).apply)
  compiled = layer.lower(variables, shape(1, T, D), keep_BT).compile()
  ideal = 6 * T * K * D * F + 2 * T * D * E
  assert ideal <= compiled.cost_analysis()['flops'] <= 1.3 * ideal
