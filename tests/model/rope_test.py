"""Rotation and YaRN against known values and complex numbers."""

import numpy as np
import pytest

from r1jax.model import config as model_config
from r1jax.model import rope
from tests import known_answers


def _yarn_v3(mscale=1.0):
  return model_config.RopeConfig(
    theta=10000.0,
    interleaved=True,
    scaling=model_config.YarnConfig(
      factor=40.0,
      original_length=4096,
      mscale=mscale,
      mscale_all_dim=mscale,
    ),
  )


def _attention(rope_config):
  return model_config.MlaConfig(
    num_heads=1,
    q_lora_rank=None,
    kv_lora_rank=8,
    nope_head_dim=128,
    rope_head_dim=64,
    v_head_dim=128,
    rope=rope_config,
  )


def test_yarn_frequencies_of_v3():
  known = known_answers.load('yarn_v3')
  frequency_R = rope.frequencies(_yarn_v3(), 64)
  np.testing.assert_allclose(frequency_R, known['inv_freq'], rtol=1e-6)


def test_yarn_mscale_goes_into_the_softmax_scale_squared():
  known = known_answers.load('yarn_v3')
  plain = model_config.RopeConfig(theta=10000.0, interleaved=True)
  mscale = model_config.yarn_mscale
  assert mscale(40, 1.0) == pytest.approx(known['mscale'], abs=1e-12)
  assert mscale(40, 0.707) == pytest.approx(known['mscale_0707'], abs=1e-12)
  for config, key in (
    (_yarn_v3(), 'softmax_scale'),
    (_yarn_v3(0.707), 'softmax_scale_v2lite'),
    (plain, 'softmax_scale_nomscale'),
  ):
    scale = _attention(config).softmax_scale
    assert scale == pytest.approx(known[key], abs=1e-12)


def test_yarn_does_not_scale_cos_and_sin_when_the_mscales_are_equal():
  position_BT = np.array([[0, 7]])
  cos_BTR, sin_BTR = rope.cos_sin(position_BT, _yarn_v3(), 64)
  np.testing.assert_allclose(cos_BTR**2 + sin_BTR**2, 1.0, atol=1e-6)


def test_plain_frequencies():
  plain = model_config.RopeConfig(theta=100.0, interleaved=True)
  expected = [1.0, 100 ** (-1 / 2)]
  np.testing.assert_allclose(rope.frequencies(plain, 4), expected, rtol=1e-6)


@pytest.mark.parametrize('interleaved', [True, False])
def test_rotation_is_multiplication_by_a_complex_number(interleaved):
  rng = np.random.default_rng(0)
  x_TR = rng.normal(size=(5, 8)).astype(np.float32)
  config = model_config.RopeConfig(theta=50.0, interleaved=interleaved)
  cos, sin = rope.cos_sin(np.arange(5)[None], config, 8)
  actual_TR = rope.rotate(x_TR, cos[0], sin[0], interleaved=interleaved)
  for t in range(5):
    for i in range(4):
      a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + 4)
      turn = np.exp(1j * t * 50.0 ** (-2 * i / 8))
      z = (x_TR[t, a] + 1j * x_TR[t, b]) * turn
      np.testing.assert_allclose(actual_TR[t, a], z.real, atol=1e-5)
      np.testing.assert_allclose(actual_TR[t, b], z.imag, atol=1e-5)
