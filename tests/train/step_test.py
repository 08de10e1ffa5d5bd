"""Accumulation, non-finite steps, the reference and the router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax.train import step as step_lib
from tests.train import toy


def _copy(tree):
  return jax.tree.map(np.array, tree)


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('num_microbatches', [2, 8])
def test_microbatches_equal_the_whole_batch(num_microbatches):
  batch = toy.Source(0).next(None)
  whole, metrics = toy.make_step()(toy.make_state(), batch)
  parts, part_metrics = toy.make_step(num_microbatches=num_microbatches)(
    toy.make_state(), batch
  )
  # 8 rows summed in another order: a few float32 roundings.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, parts, whole)
  assert part_metrics.keys() == metrics.keys()
  jax.tree.map(close, part_metrics, metrics)


def test_loss_gradient_and_router_equal_numpy():
  batch, state = toy.Source(0).next(None), toy.make_state()
  params = _copy(state.variables['params'])
  error_B = batch.x_BD @ params['w_D'] - batch.y_B
  grad_D = 2 * batch.x_BD.T @ error_B / toy.NUM_ROWS
  grad_scale = 2 * (error_B * (batch.x_BD @ params['w_D'])).mean()
  counts_E = np.bincount(batch.x_BD[:, :4].argmax(-1), minlength=4)
  state, metrics = toy.make_step(schedule=lambda count: count + 0.5)(
    state, batch
  )
  np.testing.assert_allclose(
    metrics['train/loss'], (error_B**2).mean(), rtol=1e-5
  )
  norm = np.sqrt((grad_D**2).sum() + grad_scale**2)
  np.testing.assert_allclose(metrics['train/grad_norm'], norm, rtol=1e-5)
  assert float(metrics['train/lr']) == 0.5
  np.testing.assert_array_equal(metrics['moe/counts'], counts_E[None])
  np.testing.assert_allclose(
    state.variables['router']['bias_E'],
    0.001 * np.sign(counts_E.mean() - counts_E),
  )
  assert int(state.step) == 1
  assert not np.array_equal(state.variables['params']['w_D'], params['w_D'])


def test_a_non_finite_step_changes_only_the_step_number():
  source, step = toy.Source(0, bad_step=2), toy.make_step(reference_every=2)
  state, _ = step(toy.make_state(with_reference=True), source.next(None))
  before = _copy(dataclasses.replace(state, step=0))
  state, metrics = step(state, source.next(None))
  assert np.isnan(metrics['train/loss'])
  assert int(state.step) == 2
  _assert_equal(_copy(dataclasses.replace(state, step=0)), before)


def test_a_non_finite_gradient_of_a_finite_loss_is_skipped():
  def loss_fn(variables, batch):
    del batch
    return jnp.sqrt(variables['params']['w']), {}  # Slope inf at 0.

  optimizer = optax.sgd(0.1)
  variables = {'params': {'w': jnp.zeros(())}}
  state = step_lib.state_lib.init_state(lambda: variables, optimizer)
  state, metrics = step_lib.make_train_step(
    step_lib.make_gradient(loss_fn), optimizer
  )(state, {})
  assert metrics['train/loss'] == 0
  assert np.isinf(metrics['train/grad_norm'])
  assert float(state.variables['params']['w']) == 0


def test_reference_is_replaced_at_multiples_only():
  source, step = toy.Source(0), toy.make_step(reference_every=3)
  state = toy.make_state(with_reference=True)
  expected = _copy(state.variables)
  for i in range(1, 8):
    state, _ = step(state, source.next(None))
    if i % 3 == 0:
      expected = _copy(state.variables)
    _assert_equal(_copy(state.reference), expected)
  assert not np.array_equal(
    state.reference['params']['w_D'], state.variables['params']['w_D']
  )


def test_a_batch_that_does_not_divide_is_named():
  step = toy.make_step(num_microbatches=3)
  with pytest.raises(ValueError, match='num_microbatches=3 must divide .* 8'):
    step(toy.make_state(), toy.Source(0).next(None))
  with pytest.raises(ValueError, match='num_microbatches=0'):
    toy.make_step(num_microbatches=0)
