"""Grouped FP8 products: all forms are exact on what was quantised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import plan
from pallas_kernels.grouped_matmul_fp8 import blocks as blocks_lib
from pallas_kernels.grouped_matmul_fp8 import cases, ops
from pallas_kernels.matmul_fp8 import blocks as matmul_fp8_blocks
from pallas_kernels.quantize_fp8 import ops as quantize

# Of interpreted kernels: reads before a copy is there, writes before it left.
_RACES = pltpu.InterpretParams(detect_races=True)
_M, _K, _N = 640, 384, 256
# Rows of each group: an empty one, one block, one and a half tiles and a block
# of padding; all in the middle one; nothing but padding.
SIZES = ((0, 128, 384), (0, 640, 0), (0, 0, 0))
# Two tiles of columns and of rows; three cores, and a tile with a rest.
_PRODUCT = blocks_lib.ProductSizes(256, 128, 128, 1, halved=(1, 2))
_WIDE = blocks_lib.ProductSizes(512, 128, 128, 3)
_OUTER = blocks_lib.OuterSizes((256, 128), 384, 128, 384, 128, 1, (1, 2))
_OUTER_CORES = blocks_lib.OuterSizes((256, 128), 128, 128, 128, 128, 2)


def _draw(*shapes):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def _scrambled(x, tile):
  """Quantised, with scales that differ by 2^20: misplaced ones are seen."""
  x = quantize.quantize(x, tile)
  rng = np.random.default_rng(1)
  scale = jnp.float32(np.exp2(rng.integers(-10, 10, x.scale.shape)))
  return quantize.Quantized(x.q, scale, tile)


def _spoilt(x, rows):
  """NaN in all rows past these, and in their scales."""
  past = lambda values, each: np.arange(len(values))[:, None] * each >= rows
  return quantize.Quantized(
    jnp.where(past(x.q, 1), jnp.full_like(x.q, jnp.nan), x.q),
    jnp.where(past(x.scale, x.tile[0]), jnp.nan, x.scale),
    x.tile,
  )


def _close(out, exact):
  """Rows of a product, each to its own magnitude."""
  assert out.shape == exact.shape
  largest = np.abs(exact).max(-1, keepdims=True, initial=0)
  assert (np.abs(np.float64(out) - exact) <= 2e-6 * largest).all()


def _exact(x, w, sizes, transposed):
  """Of what was quantised, float64."""
  x_mk, w_gkn = (np.float64(y.dequantized()) for y in (x, w))
  w_gkn = w_gkn.swapaxes(1, 2) if transposed else w_gkn
  ends = np.cumsum(sizes)
  return np.concatenate(
    [
      x_mk[end - size : end] @ w_kn
      for end, size, w_kn in zip(ends, sizes, w_gkn, strict=True)
    ]
  )


@functools.partial(
  jax.jit,
  static_argnames=('transposed', 'implementation', 'blocks', 'out_dtype'),
)
def _product(x, w, size_g, **options):
  return ops.grouped_matmul_fp8(
    x, w, size_g, block=128, interpret=_RACES, **options
  )


@pytest.mark.parametrize(
  ('implementation', 'transposed', 'blocks'),
  [
    ('reference', False, None),
    ('xla', False, None),
    ('xla', True, None),
    ('pallas', False, _PRODUCT),
    ('pallas', True, _WIDE),
  ],
)
def test_rows_are_multiplied_by_their_groups_weights(
  implementation, transposed, blocks
):
  g, k = len(SIZES[0]), _N if transposed else _K
  x_mk, w_gkn = _draw((_M, k), (g, _K, _N))
  x = _scrambled(x_mk, quantize.ROWS)
  w = _scrambled(w_gkn, quantize.BLOCKS)
  for sizes in SIZES:
    rows = sum(sizes)
    out_mn = _product(
      _spoilt(x, rows),
      w,
      np.int32(sizes),
      transposed=transposed,
      implementation=implementation,
      blocks=blocks,
    )
    assert np.isfinite(out_mn).all()
    _close(out_mn[:rows], _exact(x, w, sizes, transposed))
    assert out_mn.dtype == jnp.float32
    if implementation == 'pallas':  # Of the last call.
      assert interpret_pallas_call.races.races_found is False


def _exact_outer(x, y, sizes):
  x_mk, y_mn = (np.float64(z.dequantized()) for z in (x, y))
  ends = np.cumsum(sizes)
  return np.stack(
    [
      x_mk[end - size : end].T @ y_mn[end - size : end]
      for end, size in zip(ends, sizes, strict=True)
    ]
  )


@functools.partial(jax.jit, static_argnames=('implementation', 'blocks'))
def _outer(x, y, size_g, **options):
  return ops.grouped_outer_fp8(
    x, y, size_g, block=128, interpret=_RACES, **options
  )


@pytest.mark.parametrize(
  ('implementation', 'blocks'),
  [
    ('reference', None),
    ('xla', None),
    ('pallas', _OUTER),
    ('pallas', _OUTER_CORES),
  ],
)
def test_rows_of_each_group_are_summed(implementation, blocks):
  x, y = (_scrambled(z, quantize.COLUMNS) for z in _draw((_M, _K), (_M, _N)))
  for sizes in SIZES:
    rows = sum(sizes)
    out_gkn = _outer(
      _spoilt(x, rows),
      _spoilt(y, rows),
      np.int32(sizes),
      implementation=implementation,
      blocks=blocks,
    )
    assert out_gkn.dtype == jnp.float32
    _close(out_gkn, _exact_outer(x, y, sizes))
    if implementation == 'pallas':  # Of the last call.
      assert interpret_pallas_call.races.races_found is False


@pytest.mark.parametrize('implementation', ['reference', 'xla', 'pallas'])
def test_the_first_rows_of_each_group_are_multiplied(implementation):
  """A room that is no whole tile, and k and n that are none, either."""
  sizes, room = (0, 150, 17), 150
  x_gmk, w_gkn = _draw((3, room, 200), (3, 200, 130))
  x = _scrambled(x_gmk, quantize.ROWS)
  w = _scrambled(w_gkn, quantize.BLOCKS)
  is_past_gm1 = (np.arange(room) >= np.int32(sizes)[:, None])[..., None]
  spoilt = quantize.Quantized(
    jnp.where(is_past_gm1, jnp.full_like(x.q, jnp.nan), x.q), x.scale, x.tile
  )
  run = functools.partial(
    ops.grouped_matmul_fp8_masked,
    implementation=implementation,
    interpret=_RACES,
  )
  out_gmn = jax.jit(run)(spoilt, w, np.int32(sizes))
  assert out_gmn.shape == (3, room, 130)
  x_gmk, w_gkn = (np.float64(z.dequantized()) for z in (x, w))
  for g, size in enumerate(sizes):
    _close(out_gmn[g, :size], x_gmk[g, :size] @ w_gkn[g])
  if implementation == 'pallas':
    assert interpret_pallas_call.races.races_found is False


def test_one_scale_of_each_matrix_and_narrow_results():
  x_mk, w_gkn = _draw((128, 128), (1, 128, 128))
  x, w = (quantize.quantize(z, quantize.TENSOR) for z in (x_mk, w_gkn))
  out_mn = _product(
    x,
    w,
    np.int32([128]),
    implementation='pallas',
    blocks=_PRODUCT,
    out_dtype=jnp.bfloat16,
  )
  exact = _exact(x, w, (128,), False)
  assert out_mn.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float64(out_mn), exact, rtol=2**-8, atol=1e-5)


def test_groups_are_cut_into_depths_without_a_rest():
  """The sums take all rows of a depth: none may be another group's."""
  size_g = 128 * np.arange(40)
  make = functools.partial(
    plan.make_plan,
    max_rows=size_g.sum(),
    heights=blocks_lib.DEPTHS,
    align=128,
    visit_empty=True,
  )
  start_g = np.cumsum(size_g) - size_g
  made = jax.jit(make)(jnp.int32(start_g), jnp.int32(size_g))
  count = int(made.num_tiles[0])
  height_t = np.int32([*blocks_lib.DEPTHS, 0])[made.kind_t[:count]]
  np.testing.assert_array_equal(height_t, made.rows_t[:count])
  summed_g = np.bincount(made.visit_t[:count], height_t)
  np.testing.assert_array_equal(summed_g, size_g)


def _quantized(*shape, tile):
  *lead, m, k = shape
  scales = *lead, -(-m // tile[0]), -(-k // tile[1])
  q = jnp.zeros(shape, quantize.E4M3)
  return quantize.Quantized(q, jnp.ones(scales), tile)


def test_what_does_not_fit_is_named(monkeypatch):
  rows, blocks = quantize.ROWS, quantize.BLOCKS
  x, w = _quantized(256, 128, tile=rows), _quantized(2, 128, 256, tile=blocks)
  columns = _quantized(256, 128, tile=quantize.COLUMNS)
  size_g = np.int32([128, 0])

  def multiply(x=x, w=w, block=128, implementation='pallas', **options):
    options['implementation'] = implementation
    return ops.grouped_matmul_fp8(x, w, size_g, block=block, **options)

  def outer(x=columns, y=columns, implementation='pallas', **options):
    options['implementation'] = implementation
    return ops.grouped_outer_fp8(x, y, size_g, block=128, **options)

  def masked(x, **options):
    return ops.grouped_matmul_fp8_masked(x, w, size_g, **options)

  def named(message, function, *args, **options):
    with pytest.raises(ValueError, match=message):
      function(*args, **options)

  named('block=64 must be a multiple of 128', multiply, block=64)
  named('256 rows are no whole number of blocks of 384', multiply, block=384)
  named('k=128 of the rows is not k=256', multiply, transposed=True)
  named(r'x has tiles of \(128, 1\), they must be \(1,', multiply, x=columns)
  named('w has tiles of', multiply, w=_quantized(2, 128, 256, tile=rows))
  named('out_dtype=.*must be float32 or', multiply, out_dtype=jnp.float16)
  named("implementation='nowhere'", multiply, implementation='nowhere')
  named("implementation='nowhere'", outer, implementation='nowhere')
  named('y has tiles of', outer, y=x)
  named(
    '256 rows of x are not 128 of y', outer, y=_quantized(128, 8, tile=rows)
  )
  x_gmk = _quantized(2, 128, 128, tile=rows)
  named("implementation='nowhere'", masked, x_gmk, implementation='nowhere')
  x_gmk = _quantized(3, 128, 128, tile=rows)
  named('3 groups of rows are not 2', masked, x_gmk, implementation='xla')
  for blocks, message in (
    (blocks_lib.ProductSizes(128, 128, 128, 1), 'rows=128 must be a multiple'),
    (blocks_lib.ProductSizes(256, 256, 192, 1), 'code_columns=192 must be'),
    (blocks_lib.ProductSizes(256, 128, 256, 1), 'code_columns=256 does not'),
    (blocks_lib.ProductSizes(256, 256, 128, 2), r'width . parts=512 does not'),
  ):
    named(message, multiply, blocks=blocks)
  depths = blocks_lib.OuterSizes((512, 128), 128, 128, 128, 128, 1)
  named(r'depths=\(512, 128\) must halve down', outer, blocks=depths)
  wide = blocks_lib.OuterSizes((128,), 256, 128, 128, 128, 1)
  named('width_k=256 does not divide k=128', outer, blocks=wide)
  v4 = blocks_lib.Chip(4, 16 << 20, 2)
  monkeypatch.setattr(matmul_fp8_blocks, 'chip', lambda: v4)
  named('needs a TPU v5 or later.*v4 do not', multiply)


@pytest.mark.parametrize(
  ('generation', 'mib', 'cores'),
  [(5, 128, 1), (5, 64, 2), (6, 128, 1), (7, 64, 1)],
)
def test_default_tiles_fit_the_shapes_and_vmem(generation, mib, cores):
  on = blocks_lib.Chip(generation, mib << 20, cores)
  for k, n in (
    (7168, 4096),
    (2048, 7168),
    (128, 256),
    (18432, 7168),
    (1408, 384),
  ):
    for m in (256, 8192):
      for inner, wide in ((k, n), (n, k)):
        product = blocks_lib.product(m, inner, wide, 4, on)
        product.check(wide)
        assert product.vmem_bytes(inner, 4) <= on.vmem_bytes * 13 // 16
        assert product.rows <= max(m, 256)
    outer = blocks_lib.outer(k, n, on)
    outer.check(k, n)
    assert outer.vmem_bytes() <= 0.75 * on.vmem_bytes


def test_cases_have_names_of_their_own_and_count_what_is_useful():
  found = {case.name: case for case in cases.cases()}
  assert len(found) == len(cases.cases()) == 11
  m, k, n = 8192, 7168, 4096
  for name in ('forward', 'forward_uneven', 'grad_rows', 'grad_weights'):
    assert found[name].flops == 2 * m * k * n
    assert found[name].hbm_bytes > m * k + m * n
