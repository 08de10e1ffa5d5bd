"""Products of FP8 matrices: forms agree, and stay near the float32 ones."""

import functools
import json
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul_fp8 import blocks as blocks_lib
from pallas_kernels.matmul_fp8 import cases, ops
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
# Of the kernel: a tile and its edges; one whose result is stored transposed;
# several tiles, with edges, and several steps of k.
_SMALL = blocks_lib.BlockSizes(256, 256, 1024, 256, 128, halved=(1, 2))
_KERNEL_SHAPES = (
  ((1, 130, 5), None),
  ((256, 256, 140), _SMALL),
  ((257, 1100, 300), _SMALL),
)
_CONTRACT = {'NN': (1, 0), 'NT': (1, 1), 'TN': (0, 0)}
_LAYOUTS = tuple(_CONTRACT)


def _draw(m, k, n):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(m, k), draw(k, n)


def _operands(layout, a_mk, b_kn):
  """As stored: rows x blocks; a transposed weight; columns x columns."""
  match layout:
    case 'NN':
      b = quantize.quantize(b_kn, quantize.BLOCKS)
      return quantize.quantize(a_mk, quantize.ROWS), b
    case 'NT':
      b = quantize.quantize(np.ascontiguousarray(b_kn.T), quantize.BLOCKS)
      return quantize.quantize(a_mk, quantize.ROWS), b
    case 'TN':
      a = quantize.quantize(np.ascontiguousarray(a_mk.T), quantize.COLUMNS)
      return a, quantize.quantize(b_kn, quantize.COLUMNS)


def _exact(layout, a, b):
  """Of what was quantised, float64 [m, n]."""
  axis_a, axis_b = _CONTRACT[layout]
  a, b = np.float64(a.dequantized()), np.float64(b.dequantized())
  return (a if axis_a == 1 else a.T) @ (b if axis_b == 0 else b.T)


def _error(out, exact):
  """The relative error of a matrix."""
  return np.linalg.norm(np.float64(out) - exact) / np.linalg.norm(exact)


def calc_diff(x, y):
  """DeepGEMM's measure: 1 - 2 Σ x y / Σ (x² + y²)."""
  x, y = np.float64(x), np.float64(y)
  return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


@pytest.mark.parametrize('layout', _LAYOUTS)
@pytest.mark.parametrize('shape', SHAPES)
def test_exact_on_what_was_quantised_and_near_what_was_not(shape, layout):
  a_mk, b_kn = _draw(*shape)
  a, b = _operands(layout, a_mk, b_kn)
  exact = _exact(layout, a, b)
  run = functools.partial(ops.matmul_fp8, contract=_CONTRACT[layout])
  for implementation in ('xla', 'reference'):
    out_mn = np.asarray(run(a, b, implementation=implementation))
    assert _error(out_mn, exact) <= 1e-6
    if min(shape) >= 32:
      assert calc_diff(out_mn, a_mk @ b_kn) < 1e-3


@pytest.mark.parametrize('layout', _LAYOUTS)
@pytest.mark.parametrize(('shape', 'blocks'), _KERNEL_SHAPES)
def test_the_kernel_is_as_exact(shape, blocks, layout):
  a, b = _operands(layout, *_draw(*shape))
  run = functools.partial(
    ops.matmul_fp8,
    a,
    b,
    contract=_CONTRACT[layout],
    implementation='pallas',
    blocks=blocks,
    interpret=True,
  )
  exact = _exact(layout, a, b)
  sums_mn = np.random.default_rng(1).normal(size=exact.shape)
  added_mn = run(accumulate=jnp.float32(sums_mn))
  assert added_mn.dtype == jnp.float32
  assert _error(added_mn, exact + sums_mn) <= 1e-6
  if shape != (256, 256, 140):
    return
  narrow_mn = run(out_dtype=jnp.bfloat16)
  assert narrow_mn.dtype == jnp.bfloat16
  assert 1e-4 < _error(narrow_mn, exact) <= 2**-9


@pytest.mark.parametrize('layout', _LAYOUTS)
def test_each_scale_is_where_it_belongs(layout):
  """Scales that differ by 2^40: one in another's place would be seen."""
  rng = np.random.default_rng(0)
  a, b = (
    quantize.Quantized(
      x.q, jnp.exp2(rng.integers(-20, 20, x.scale.shape)), x.tile
    )
    for x in _operands(layout, *_draw(300, 384, 260))
  )
  out_mn = ops.matmul_fp8(
    a,
    b,
    contract=_CONTRACT[layout],
    implementation='pallas',
    interpret=True,
  )
  exact = _exact(layout, a, b)
  assert (np.abs(out_mn - exact) <= 1e-5 * np.abs(exact).max(1)[:, None]).all()
  assert _error(out_mn, exact) <= 1e-6


def test_gaussians_of_the_known_answer():
  rng = np.random.default_rng(0)
  m, k, n = 256, 1024, 256
  a_mk = rng.normal(size=(m, k)).astype(np.float32)
  b_kn = rng.normal(size=(k, n)).astype(np.float32)
  a, b = _operands('NN', a_mk, b_kn)
  for implementation in ('xla', 'pallas'):
    out_mn = ops.matmul_fp8(
      a,
      b,
      implementation=implementation,
      interpret=implementation == 'pallas',
    )
    diff = calc_diff(out_mn, a_mk @ b_kn)
    assert diff == pytest.approx(_KNOWN['calc_diff'], rel=0.1)


def test_one_scale_of_a_whole_tensor_is_that_of_all_its_tiles():
  a_mk, b_kn = _draw(40, 200, 140)
  a, b = (quantize.quantize(x, quantize.TENSOR) for x in (a_mk, b_kn))
  out_mn = ops.matmul_fp8(a, b, implementation='pallas', interpret=True)
  assert _error(out_mn, _exact('NN', a, b)) <= 1e-6


@pytest.mark.parametrize('layout', _LAYOUTS)
def test_no_two_steps_race(layout):
  """Two tiles each way, two steps of k, and a sum in place."""
  a, b = _operands(layout, *_draw(512, 1100, 512))
  sums_mn = jnp.ones((512, 512), jnp.float32)
  out_mn = ops.matmul_fp8(
    a,
    b,
    contract=_CONTRACT[layout],
    implementation='pallas',
    accumulate=sums_mn,
    blocks=_SMALL,
    interpret=pltpu.InterpretParams(detect_races=True),
  )
  assert interpret_pallas_call.races.races_found is False
  assert _error(out_mn, _exact(layout, a, b) + 1) <= 1e-6


def test_what_does_not_fit_is_named(monkeypatch):
  a, _ = _operands('NN', *_draw(4, 8, 2))
  _, b = _operands('NN', *_draw(4, 9, 2))
  run = functools.partial(ops.matmul_fp8, implementation='pallas')
  with pytest.raises(ValueError, match='k=8 of a is not k=9 of b'):
    run(a, b)
  with pytest.raises(ValueError, match='k=8 of a is not k=2 of b'):
    run(a, b, contract=(1, 1))
  with pytest.raises(ValueError, match=r'contract=\(1, 2\) must be axes'):
    run(a, a.mT, contract=(1, 2))
  with pytest.raises(ValueError, match='nowhere'):
    ops.matmul_fp8(a, a.mT, implementation='nowhere')
  with pytest.raises(ValueError, match=r'a has tiles of \(128, 1\).*128 along'):
    run(a.mT, a)
  with pytest.raises(ValueError, match='out_dtype=.*must be float32 or'):
    run(a, a.mT, out_dtype=jnp.float16)
  with pytest.raises(ValueError, match=r'float32 \(4, 5\), not float32 \(4, 4'):
    run(a, a.mT, accumulate=jnp.zeros((4, 5)))
  with pytest.raises(ValueError, match='out_dtype must be, too'):
    run(a, a.mT, accumulate=jnp.zeros((4, 4)), out_dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match='rows=100 must be a multiple of 256'):
    blocks_lib.BlockSizes(100, 128, 128, 256, 128)
  with pytest.raises(
    ValueError, match='code_rows=512 does not divide rows=768'
  ):
    blocks_lib.BlockSizes(768, 128, 128, 512, 128)
  a, b = _operands('NN', *_draw(4, 200, 2))
  with pytest.raises(ValueError, match='depth=128 must be .* 1024 or k=200'):
    run(a, b, blocks=blocks_lib.BlockSizes(256, 128, 128, 256, 128))
  v4 = types.SimpleNamespace(
    generation=4, vmem_capacity_bytes=16 << 20, num_cores=2
  )
  monkeypatch.setattr(pltpu, 'get_tpu_info', lambda: v4)
  with pytest.raises(ValueError, match='needs a TPU v5 or later.*v4 do not'):
    run(a, b)


@pytest.mark.parametrize('generation', [5, 6, 7])
def test_default_tiles_fit_and_cover_deepseeks_shapes(generation):
  on = blocks_lib.Chip(generation, 64 << 20, 1)
  for case in cases.cases():
    a, b = case.args[:2]
    m, n = jax.eval_shape(case.function, *case.args).shape
    k = a.q.size // m
    blocks = blocks_lib.default(m, k, n, 8, b.tile[1] == 1, on)
    blocks.check(k)
    assert case.flops == 2 * m * k * n
    assert blocks.depth >= k  # A tile of b is read and transposed once.
    used = 2 * blocks.depth * (blocks.rows + blocks.columns)
    assert used <= 0.75 * on.vmem_bytes
