"""Products of FP8 matrices: forms agree, and stay near the float32 ones."""

import json
import pathlib

import numpy as np
import pytest

from pallas_kernels.matmul_fp8 import ops
from pallas_kernels.quantize_fp8 import ops as quantize

_DATA = pathlib.Path(__file__).parents[1] / 'data' / 'known_answers.json'
_KNOWN = json.loads(_DATA.read_text())['fp8_gemm_gauss']

# (m, k, n): DeepGEMM's (K, N) list scaled down by 16, and edges.
SHAPES = (
  (64, 448, 132),
  (128, 96, 1536),
  (64, 32, 2048),
  (128, 1024, 448),
  (64, 448, 256),
  (256, 128, 448),
  (1, 130, 5),
  (3, 1, 1),
)


def _draw(m, k, n):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(m, k), draw(k, n)


def _operands(layout, a_mk, b_kn):
  """Rows x blocks; the same with a transposed weight; rows x columns."""
  match layout:
    case 'NN':
      b = quantize.quantize(b_kn, quantize.BLOCKS)
      return quantize.quantize(a_mk, quantize.ROWS), b
    case 'NT':
      b = quantize.quantize(np.ascontiguousarray(b_kn.T), quantize.BLOCKS)
      return quantize.quantize(a_mk, quantize.ROWS), b.mT
    case 'TN':
      a = quantize.quantize(np.ascontiguousarray(a_mk.T), quantize.COLUMNS)
      return a.mT, quantize.quantize(b_kn, quantize.COLUMNS)


def calc_diff(x, y):
  """DeepGEMM's measure: 1 - 2 Σ x y / Σ (x² + y²)."""
  x, y = np.float64(x), np.float64(y)
  return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


@pytest.mark.parametrize('layout', ['NN', 'NT', 'TN'])
@pytest.mark.parametrize('shape', SHAPES)
def test_exact_on_what_was_quantised_and_near_what_was_not(shape, layout):
  a_mk, b_kn = _draw(*shape)
  a, b = _operands(layout, a_mk, b_kn)
  exact = np.float64(a.dequantized()) @ np.float64(b.dequantized())
  for implementation in ops.IMPLEMENTATIONS:
    out_mn = np.asarray(ops.matmul_fp8(a, b, implementation=implementation))
    error = np.linalg.norm(out_mn - exact) / np.linalg.norm(exact)
    assert error <= 1e-6
    if min(shape) >= 32:
      assert calc_diff(out_mn, a_mk @ b_kn) < 1e-3


def test_gaussians_of_the_known_answer():
  rng = np.random.default_rng(0)
  m, k, n = 256, 1024, 256
  a_mk = rng.normal(size=(m, k)).astype(np.float32)
  b_kn = rng.normal(size=(k, n)).astype(np.float32)
  a, b = _operands('NN', a_mk, b_kn)
  out_mn = np.asarray(ops.matmul_fp8(a, b, implementation='xla'))
  diff = calc_diff(out_mn, a_mk @ b_kn)
  assert diff == pytest.approx(_KNOWN['calc_diff'], rel=0.1)


def test_sizes_that_do_not_fit_are_named():
  a, _ = _operands('NN', *_draw(4, 8, 2))
  _, b = _operands('NN', *_draw(4, 9, 2))
  with pytest.raises(ValueError, match='k=8 of a is not k=9 of b'):
    ops.matmul_fp8(a, b, implementation='xla')
  with pytest.raises(ValueError, match='nowhere'):
    ops.matmul_fp8(a, a.mT, implementation='nowhere')
