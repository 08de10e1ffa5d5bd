"""Schedules against the paper's figures, decay, clip and config checks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.train import optimizer


def _config(**changes):
  values = {
    'peak_lr': 1e-3,
    'warmup_steps': 10,
    'schedule': 'constant',
    'final_lr_ratio': 0.1,
  }
  return optimizer.OptimConfig(**(values | changes))


@pytest.mark.parametrize(
  'trillions, ratio',
  [
    (1.0, 1.0),
    (9.9, 1.0),
    (10.0 + 4.3 / 4, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2),
    (10.0 + 4.3 / 2, 0.55),
    (14.3, 0.1),
    (14.6, 0.1),
    (14.7, 7.3e-6 / 2.2e-4),
  ],
)
def test_v3_schedule_follows_the_paper(trillions, ratio):
  num_steps = 14800
  schedule = optimizer.make_schedule(_config(schedule='v3'), num_steps)
  lr = float(schedule(round(trillions * 1000)))
  np.testing.assert_allclose(lr, 1e-3 * ratio, rtol=1e-4)


def test_warmup_is_linear_and_its_first_step_counts():
  schedule = optimizer.make_schedule(_config(), 100)
  lrs = [float(schedule(i)) for i in range(12)]
  expected = [1e-3 * min((i + 1) / 10, 1) for i in range(12)]
  np.testing.assert_allclose(lrs, expected, rtol=1e-6)


def test_cosine_falls_from_the_peak_to_the_final_ratio():
  schedule = optimizer.make_schedule(_config(schedule='cosine'), 110)
  lrs = [float(schedule(i)) for i in (10, 35, 60, 110)]
  middle = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
  np.testing.assert_allclose(
    lrs, [1e-3, 1e-3 * middle, 0.55e-3, 1e-4], rtol=1e-5
  )


def _numpy_adamw(params, grads_list, *, lr, decayed, clip=1.0, wd=0.1):
  """AdamW as the paper writes it, one array at a time."""
  b1, b2, eps = 0.9, 0.95, 1e-8
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(p) for k, p in params.items()}
  params = dict(params)
  for t, grads in enumerate(grads_list, 1):
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
    for k in params:
      g = grads[k] * min(1.0, clip / norm)
      m[k] = b1 * m[k] + (1 - b1) * g
      v[k] = b2 * v[k] + (1 - b2) * g * g
      m_hat, v_hat = m[k] / (1 - b1**t), v[k] / (1 - b2**t)
      step = m_hat / (np.sqrt(v_hat) + eps)
      if k in decayed:
        step = step + wd * params[k]
      params[k] = params[k] - lr * step
  return params


def test_update_is_adamw_without_decay_of_scales_and_biases():
  rng = np.random.default_rng(0)
  shapes = {'up_DF': (3, 4), 'norm_scale': (2, 3), 'bias': (2, 4)}
  params = {k: rng.normal(size=s) for k, s in shapes.items()}
  grads = [
    {k: rng.normal(size=s) * size for k, s in shapes.items()}
    for size in (0.01, 5.0, 0.3)
  ]
  expected = _numpy_adamw(params, grads, lr=1e-3, decayed={'up_DF'})
  transform = optimizer.make_optimizer(_config(warmup_steps=0), 100)
  got = {k: jnp.float32(x) for k, x in params.items()}
  opt_state = jax.jit(transform.init)(got)
  update = jax.jit(transform.update)
  for g in grads:
    g = {k: np.float32(x) for k, x in g.items()}
    norm = np.sqrt(sum((x**2).sum() for x in g.values()))
    updates, opt_state = update(g, opt_state, got, grad_norm=norm)
    got = {k: got[k] + updates[k] for k in got}
  for k in shapes:
    np.testing.assert_allclose(got[k], expected[k], atol=2e-6)


@pytest.mark.parametrize(
  'name, value',
  [
    ('peak_lr', 0.0),
    ('warmup_steps', -1),
    ('schedule', 'linear'),
    ('final_lr_ratio', 1.5),
    ('b1', 1.0),
    ('b2', -0.1),
    ('eps', 0.0),
    ('weight_decay', -1.0),
    ('clip_norm', 0.0),
  ],
)
def test_a_bad_value_is_named(name, value):
  with pytest.raises(ValueError, match=f'{name}={value!r} must'):
    _config(**{name: value})


def test_only_what_is_named_is_trained():
  params = {
    'indexer': {'key': jnp.ones((2, 2))},
    'ffn': {'up': jnp.ones((2, 2)), 'scale': jnp.ones(2)},
  }
  config = _config(trainable='indexer', warmup_steps=0)
  tx = optimizer.make_optimizer(config, 10)
  grads = jax.tree.map(jnp.ones_like, params)
  updates, _ = tx.update(
    grads, tx.init(params), params, grad_norm=jnp.float32(1.0)
  )
  assert not np.any(updates['ffn']['up']) and not np.any(
    updates['ffn']['scale']
  )
  whole = optimizer.make_optimizer(_config(warmup_steps=0), 10)
  expected, _ = whole.update(
    grads, whole.init(params), params, grad_norm=jnp.float32(1.0)
  )
  np.testing.assert_array_equal(
    updates['indexer']['key'], expected['indexer']['key']
  )


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_what_is_not_trained_does_not_decay(kind):
  block = {'up': jnp.ones((2, 2)), 'scale': jnp.ones(2)}
  params = {'mtp_1': {'block': block}, 'dense': block}
  config = _config(warmup_steps=0, kind=kind)
  tx = optimizer.make_optimizer(config, 10, untrained=('mtp_',))
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(
    grads, tx.init(params), params, grad_norm=jnp.float32(0.0)
  )
  assert not any(np.any(x) for x in jax.tree.leaves(updates['mtp_1']))
  decay = config.peak_lr * config.weight_decay
  np.testing.assert_allclose(updates['dense']['up'], -decay, rtol=1e-6)
