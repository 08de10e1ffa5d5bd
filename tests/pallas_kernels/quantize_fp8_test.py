"""Tiles of every shape, against a loop over them."""

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantize_fp8 import ops

TILES = (ops.ROWS, ops.COLUMNS, ops.BLOCKS, ops.TENSOR)
SHAPES = ((256, 384), (130, 200), (1, 1), (3, 128), (129, 5))


def _matrix(m, k):
  rng = np.random.default_rng(0)
  # Each entry of another size: a scale of the wrong tile is seen.
  size = np.exp(rng.normal(size=(m, k)) * 2)
  return (rng.normal(size=(m, k)) * size).astype(np.float32)


def _loop(x, tile, power_of_two):
  """q and scale of each tile, one after the other."""
  m, k = x.shape
  rows, columns = tile[0] or m, tile[1] or k
  q, scales = np.zeros(x.shape, np.float32), []
  for i in range(0, m, rows):
    scales.append([])
    for j in range(0, k, columns):
      part = x[i : i + rows, j : j + columns]
      amax = max(np.float32(np.abs(part).max()), np.float32(1e-4))
      scale = amax / np.float32(448)
      if power_of_two:
        scale = np.float32(2.0 ** np.ceil(np.log2(np.float64(scale))))
      scaled = np.clip(part / scale, -448, 448)
      cast = scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
      q[i : i + rows, j : j + columns] = cast
      scales[-1].append(scale)
  return q, np.float32(scales)


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('tile', TILES)
@pytest.mark.parametrize('shape', SHAPES)
def test_each_tile_has_its_scale_at_the_edges_too(shape, tile, power_of_two):
  x = _matrix(*shape)
  out = ops.quantize(x, tile, power_of_two=power_of_two)
  q, scale = _loop(x, tile, power_of_two)
  np.testing.assert_allclose(out.scale, scale, rtol=1e-6)
  # A scale one rounding apart may move a value that lies between two.
  differs = np.asarray(out.q, np.float32) != q
  assert differs.mean() < 1e-3
  np.testing.assert_allclose(
    out.dequantized(), q * np.asarray(out.wide_scale()), rtol=0.13
  )
  assert out.wide_scale().shape == x.shape


def test_the_transposed_has_the_same_numbers():
  out = ops.quantize(_matrix(130, 200), ops.ROWS)
  assert out.mT.tile == ops.COLUMNS
  np.testing.assert_array_equal(out.mT.dequantized(), out.dequantized().T)


def test_matrices_of_a_stack_have_scales_of_their_own():
  stack = np.stack([_matrix(130, 200), 100 * _matrix(130, 200)])
  for tile in TILES:
    out = ops.quantize(stack, tile)
    for one, x in enumerate(stack):
      expected = ops.quantize(x, tile)
      np.testing.assert_array_equal(out.scale[one], expected.scale)
      np.testing.assert_array_equal(out.q[one], expected.q)
