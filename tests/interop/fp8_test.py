"""Block FP8 of checkpoints: ragged edges, zeros, and other people's numbers."""

import ml_dtypes
import numpy as np

from r1jax.interop import fp8
from tests import known_answers


def _by_loop(q, scale, blocks):
  out = np.zeros(q.shape, np.float32)
  for i in range(q.shape[0]):
    for j in range(q.shape[1]):
      out[i, j] = np.float32(q[i, j]) * scale[i // blocks[0], j // blocks[1]]
  return out


def test_quantised_and_dequantised_is_near_and_ragged_blocks_count():
  rng = np.random.default_rng(0)
  w = rng.normal(size=(7, 10)).astype(np.float32)
  w[4:, 8:] *= 1000
  q, scale = fp8.quantize(w, (4, 4))
  assert scale.shape == fp8.scale_shape(w.shape, (4, 4)) == (2, 3)
  # Exactly what the greatest of a block needs.
  np.testing.assert_allclose(scale[1, 2], np.abs(w[4:, 8:]).max() / 448)
  back = fp8.dequantize(q, scale, np.arange(7), np.arange(10), (4, 4))
  np.testing.assert_array_equal(back, _by_loop(q, scale, (4, 4)))
  for rows, columns in (
    (slice(0, 4), slice(0, 4)),
    (slice(4, 7), slice(8, 10)),
  ):
    error = np.abs(back - w)[rows, columns].max()
    # Half a step of three bits below the greatest number.
    assert error <= np.abs(w[rows, columns]).max() / 16


def test_part_of_a_matrix_has_its_own_blocks():
  rng = np.random.default_rng(1)
  q, scale = fp8.quantize(rng.normal(size=(9, 12)), (4, 4))
  rows, columns = np.array([1, 6, 8]), np.array([0, 5, 11])
  whole = _by_loop(q, scale, (4, 4))
  part = fp8.dequantize(q[rows][:, columns], scale, rows, columns, (4, 4))
  np.testing.assert_array_equal(part, whole[rows][:, columns])


def test_the_known_tile():
  known = known_answers.load('fp8_tile')
  w = np.zeros((1, 128), np.float32)
  w[0, :8] = known['x_first8']
  q, scale = fp8.quantize(w, (1, 128))
  assert scale[0, 0] == np.float32(known['fp32']['scale'])
  np.testing.assert_array_equal(q[0, :8].astype(float), known['fp32']['q'])
  back = fp8.dequantize(q, scale, np.arange(1), np.arange(128), (1, 128))
  np.testing.assert_array_equal(back[0, :8], np.float32(known['fp32']['dq']))


def test_zeros_have_a_scale():
  q, scale = fp8.quantize(np.zeros((2, 2)), (2, 2))
  known = known_answers.load('fp8_zero_tile')
  np.testing.assert_allclose(scale[0, 0], known['scale'], rtol=1e-6)
  assert not q.astype(np.float32).any()


def test_scales_may_be_powers_of_two_of_eight_bits():
  q = np.ones((2, 2), fp8.E4M3)
  scale = np.asarray([[0.25]]).astype(ml_dtypes.float8_e8m0fnu)
  out = fp8.dequantize(q, scale, np.arange(2), np.arange(2), (2, 2))
  np.testing.assert_array_equal(out, np.full((2, 2), 0.25))
