"""The two parts of a layer's gradient are the whole, and wait as they say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.parallel import layer_gradient
from r1jax.recipe import pipelined, pretrain
from tests.model import tiny
from tests.parallel import model_gradient

_B, _D, _F = 3, 4, 5


def _layer(params, frozen, x, context):
  """Two products, a scale, and a loss of the layer's own."""
  h_BD = x * params['scale'] + frozen['shift']
  up_BF = jnp.einsum('BD,DF->BF', h_BD, params['up'].astype(jnp.bfloat16))
  h_BF = jnp.tanh(up_BF.astype(jnp.float32)) * context
  y_BD = x + jnp.einsum('BF,FD->BD', h_BF, params['down'])
  return y_BD, (h_BF**2).sum(), {'size': jnp.abs(h_BF).sum()}


def _inputs(layer=_layer, keep_all=False):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  params = {'scale': draw(_D), 'up': draw(_D, _F), 'down': draw(_F, _D)}
  a = layer_gradient.Arguments(params, {'shift': draw(_D)}, draw(_B, _F))
  x, g = draw(_B, _D), draw(_B, _D)
  gradient = layer_gradient.LayerGradient(layer, a, x, keep_all=keep_all)
  return gradient, a, x, g


@pytest.mark.parametrize('keep_all', [False, True])
def test_both_parts_are_the_gradient(keep_all):
  gradient, a, x, g = _inputs(keep_all=keep_all)
  results, kept = gradient.forward(a, x)
  jax.tree.map(np.testing.assert_array_equal, results, gradient.run(a, x))
  g_x, at_once, stash = gradient.of_input(a, kept, g)
  grads = at_once | gradient.of_weights(a, stash)

  def objective(params, x):
    y, loss, _ = _layer(params, a.frozen, x, a.context)
    return (y * g).sum() + loss

  of_params, of_x = jax.grad(objective, argnums=(0, 1))(a.params, x)
  np.testing.assert_allclose(g_x, of_x, rtol=1e-6)
  assert grads.keys() == of_params.keys()
  for name, expected in of_params.items():
    np.testing.assert_allclose(grads[name], expected, rtol=1e-6)
  shapes = lambda xs: [(x.shape, x.dtype) for x in xs]
  assert shapes(kept) == shapes(gradient.kept)
  assert shapes(stash) == shapes(gradient.stash)


def _counts(program, *args):
  """How many products a program has."""
  return str(jax.make_jaxpr(program)(*args)).count('dot_general[')


def test_products_of_weights_wait_and_nothing_else_does():
  gradient, a, x, g = _inputs()
  assert gradient.put_off == ('down', 'up')
  _, kept = gradient.forward(a, x)
  of_input = functools.partial(gradient.of_input, a)
  _, at_once, stash = of_input(kept, g)
  assert list(at_once) == ['scale']
  # Forward again, then of both inputs.
  assert _counts(of_input, kept, g) == 3
  assert _counts(functools.partial(gradient.of_weights, a), stash) == 2
  # What either product took in, and the gradient of what it gave.
  shapes = sorted(s.shape for s in gradient.stash)
  assert shapes == [(_B, _D), (_B, _D), (_B, _F), (_B, _F)]


def test_what_comes_of_weights_alone_is_not_kept():
  gradient, a, x, _ = _inputs(keep_all=True)
  shapes = [k.shape for k in gradient.forward(a, x)[1]]
  assert (_B, _F) in shapes
  # Neither the weights nor the rounded one; nor context, which is read again.
  assert (_D, _F) not in shapes and (_F, _D) not in shapes
  kept = gradient.forward(a, x)[1]
  assert not any(np.array_equal(k, a.context) for k in kept)
  # Nothing of the forward runs again but the rounding.
  of_input = functools.partial(gradient.of_input, a)
  assert _counts(of_input, kept, x) == 2


def test_a_gradient_that_others_need_is_not_put_off():
  def layer(params, frozen, x, context):
    # One loop computes both gradients.
    step = lambda x, w: (x + jnp.tanh(x @ w), None)
    w_LDD = jnp.stack([params['up'] @ params['down']] * 2)
    return jax.lax.scan(step, x, w_LDD)[0], jnp.zeros(()), {}

  gradient, *_ = _inputs(layer)
  assert gradient.put_off == ('down', 'up')  # Of what the loop gave.

  def loop(params, frozen, x, context):
    step = lambda x, _: (x + jnp.tanh(x @ params['up'] @ params['down']), None)
    return jax.lax.scan(step, x, None, length=2)[0], jnp.zeros(()), {}

  assert _inputs(loop)[0].put_off == ()


def _first(layers):
  return jax.tree.map(lambda x: x[0], layers)


@pytest.mark.parametrize(
  ('name', 'experts'),
  [('mla', 'xla'), ('mla', 'megablox'), ('gqa', 'xla'), ('sparse', None)],
)
def test_all_matrices_of_the_model_s_layers_wait(name, experts):
  config = model_gradient.CONFIGS[name]
  if experts is not None:
    form = dataclasses.replace(config.moe, implementation=experts)
    config = dataclasses.replace(config, moe=form)
  objective = pretrain.make_loss(config, mtp_coef=0.0, balance_coef=0.1)
  num_layers = pipelined.split_layers(config, 1)
  functions = pipelined.make_functions(objective, num_layers)
  variables = tiny.variables(config)
  batch = model_gradient.batch()
  for stack in num_layers:
    a = layer_gradient.Arguments(
      _first(variables['params'][stack]),
      _first(variables['router'].get(stack, {})),
      functions.context(batch),
    )
    x = np.zeros((*batch.tokens_BT.shape, config.embed_dim), np.float32)
    gradient = layer_gradient.LayerGradient(
      functions.stacks[stack].layer, a, x, keep_all=True
    )
    named = layer_gradient.named_leaves(a.params)
    matrices = {
      n for n, w in named.items() if w.ndim > 1 and not n.endswith('bias')
    }
    at_once = set()
    if experts == 'xla':  # A CPU computes both gradients in one loop.
      at_once = {f'moe/{n}' for n in ('gate', 'up', 'down')} & matrices
    assert set(gradient.put_off) == matrices - at_once
