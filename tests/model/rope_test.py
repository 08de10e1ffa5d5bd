"""Rotation and YaRN against known values and complex numbers."""

import math

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


_LLAMA3 = model_config.RopeConfig(
  theta=5e5,
  interleaved=False,
  scaling=model_config.Llama3RopeConfig(8.0, 1.0, 4.0, 8192),
)


@pytest.mark.parametrize(
  ('config', 'dim', 'first', 'known'),
  [
    (
      _yarn_v3(),
      64,
      10,
      [
        *(0.0562341288, 0.0390069261, 0.0268793609, 0.0183781441),
        *(0.012447956, 0.0083345091, 0.00550000044, 0.00356199732),
        *(0.00224936521, 0.00137051346, 0.000790569407, 0.000414990413),
        *(0.00017782794, 3.3338034e-05, 2.49999994e-05),
      ],
    ),
    (
      _LLAMA3,
      128,
      26,
      [
        *(0.00483942125, 0.00394227589, 0.00321144611, 0.00216657063),
        *(0.00137189368, 0.00085675146, 0.000524846022, 0.00031269365),
        *(0.000178507791, 9.55621217e-05, 7.78465546e-05),
      ],
    ),
  ],
  ids=['DeepSeek-V3', 'Llama 3.1 8B'],
)
def test_frequencies_are_those_of_transformers_to_the_last_bit(
  config, dim, first, known
):
  """One unit there is 1e-4 radians at 2,048 tokens. Source: version 5.23."""
  frequency_R = rope.frequencies(config, dim)[first : first + len(known)]
  np.testing.assert_array_equal(frequency_R, np.float32(known))


def test_yarn_ramp_need_not_begin_and_end_at_whole_pairs():
  yarn = model_config.YarnConfig(40.0, 4096, truncate=False)
  config = model_config.RopeConfig(1e4, interleaved=True, scaling=yarn)
  frequency_R = rope.frequencies(config, 16)
  turns = lambda n: 16 * math.log(4096 / (2 * math.pi * n)) / 2 / math.log(1e4)
  low, high = turns(32), turns(1)
  for i, frequency in enumerate(frequency_R):
    ramp = min(max((i - low) / (high - low), 0), 1)
    plain = 1e4 ** (-2 * i / 16)
    expected = plain / 40 * ramp + plain * (1 - ramp)
    assert frequency == pytest.approx(expected, rel=1e-6)
  # Of transformers 5.23; whole pairs would make it 0.0239.
  assert frequency_R[3] == pytest.approx(0.0277108587, rel=1e-6)


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


def test_attention_factor_scales_cos_and_sin():
  yarn = model_config.YarnConfig(40.0, 4096, attention_factor=1.5)
  config = model_config.RopeConfig(1e4, interleaved=True, scaling=yarn)
  cos_BTR, sin_BTR = rope.cos_sin(np.array([[0, 7]]), config, 64)
  np.testing.assert_allclose(cos_BTR**2 + sin_BTR**2, 1.5**2, atol=1e-6)


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
