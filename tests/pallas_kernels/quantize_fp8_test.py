"""Tiles of every shape, against a loop over them; kernels, against these."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize_fp8 import blocks as blocks_lib
from pallas_kernels.quantize_fp8 import cases, e4m3, ops
from tests import known_answers

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


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('value', [np.inf, -np.inf])
def test_what_is_infinite_is_seen_in_the_scale(value, power_of_two):
  x = np.ones((2, 256), np.float32)
  x[1, 200] = value
  for implementation in ops.IMPLEMENTATIONS:
    out = ops.quantize(
      x,
      ops.ROWS,
      power_of_two=power_of_two,
      implementation=implementation,
      interpret=True,
    )
    is_finite = [[True, True], [True, False]]
    np.testing.assert_array_equal(np.isfinite(out.scale), is_finite)


# Of interpreted kernels: reads before a copy is there, writes before it left.
_RACES = pltpu.InterpretParams(detect_races=True)
# That divide as a CPU does: those that round to e4m3 from the bits, or cast.
_FROM_BITS, _CASTS = blocks_lib.ARITHMETIC[6], blocks_lib.ARITHMETIC[7]
_MULTIPLIES = blocks_lib.ARITHMETIC[5]


def _assert_same_bits(out, expected):
  assert out.tile == expected.tile
  for got, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.view(np.uint8), wanted.view(np.uint8))


def _both(run, *args, **options):
  """A function's results from the kernel and from XLA, compiled."""
  one = lambda **how: jax.jit(functools.partial(run, **how))(*args)
  return one(implementation='pallas', **options), one()


# A tile, and more of them than a block has; a single number; a stack.
PALLAS_SHAPES = ((130, 200), (1, 1), (3, 160, 384))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('tile', [ops.ROWS, ops.COLUMNS, ops.BLOCKS])
@pytest.mark.parametrize('shape', PALLAS_SHAPES)
def test_the_kernels_bits_are_the_references(shape, tile, dtype):
  x = _matrix(np.prod(shape[:-1]), shape[-1]).reshape(shape)
  x = jnp.asarray(x, dtype)
  # Many blocks, and one of all.
  for blocks, power_of_two in (
    (blocks_lib.BlockSizes(128, 128, _FROM_BITS), False),
    (blocks_lib.BlockSizes(128, 128, _CASTS), True),
    (None, True),
  ):
    run = functools.partial(ops.quantize, tile=tile, power_of_two=power_of_two)
    _assert_same_bits(*_both(run, x, blocks=blocks, interpret=True))


def _in_kernel(function, *args, out):
  """What a function of whole arrays is inside of a kernel."""

  def run(*refs):
    *in_refs, out_ref = refs
    out_ref[...] = function(*(ref[...] for ref in in_refs))

  return pl.pallas_call(run, out_shape=out, interpret=True)(*args)


@pytest.mark.parametrize('arithmetic', [_FROM_BITS, _MULTIPLIES])
def test_casts_from_the_bits_are_those_of_the_type(arithmetic):
  # What lies between two e4m3 numbers, and the float32 next to it; and all
  # bfloat16 of their range.
  codes = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
  codes = codes.astype(np.float32)
  middle = (codes[1:] + codes[:-1]) / 2
  both = np.concatenate([codes, middle])
  near = [both, np.nextafter(both, np.inf), np.nextafter(both[1:], 0)]
  wide = np.arange(2**15, dtype=np.uint16).view(ml_dtypes.bfloat16)
  wide = wide.astype(np.float32)
  y = np.concatenate([*near, wide[wide <= 448]])
  # Numbers too small to be normal are 0 for a TPU, and for this machine.
  y = np.where(y < 2.0**-126, 0, y)
  y = np.pad(y, (0, -y.size % 4096)).reshape(-1, 128).astype(np.float32)
  encode = functools.partial(e4m3.encode, arithmetic=arithmetic)
  out = _in_kernel(encode, y, out=jax.ShapeDtypeStruct(y.shape, jnp.int8))
  expected = y.astype(ml_dtypes.float8_e4m3fn).view(np.int8)
  np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize('arithmetic', [_FROM_BITS, _CASTS])
def test_all_codes_are_read(arithmetic):
  codes = np.arange(256).astype(np.uint8)
  codes = codes[(codes & 127) != 127].repeat(128)  # Without the two nan.
  q = np.pad(codes, (0, -codes.size % 4096)).reshape(-1, 128)
  q = q.view(ml_dtypes.float8_e4m3fn)
  factor = np.full((len(q), 1), 0.7, np.float32)

  def decode(q, factor):
    factor = e4m3.decoding_scale(factor, arithmetic)
    return e4m3.decoded(q, factor, arithmetic)

  out = _in_kernel(
    decode, q, factor, out=jax.ShapeDtypeStruct(q.shape, jnp.float32)
  )
  expected = np.abs(q.astype(np.float32)) * factor
  np.testing.assert_array_equal(out, expected)


def test_a_product_with_the_reciprocal_is_the_quotient_but_for_ties():
  # Whether a chip divides or multiplies is its own; here they differ.
  blocks = blocks_lib.BlockSizes(128, 256, _MULTIPLIES)
  run = functools.partial(ops.quantize, tile=ops.ROWS)
  x = _matrix(300, 256)
  out, expected = _both(run, x, blocks=blocks, interpret=True)
  np.testing.assert_array_equal(out.scale, expected.scale)
  q, wanted = (np.asarray(o.q, np.float32) for o in (out, expected))
  assert (q != wanted).mean() < 1e-3
  np.testing.assert_allclose(q, wanted, rtol=0.13, atol=2.0**-9)
  # A power of two leaves nothing to round.
  run = functools.partial(run, power_of_two=True)
  _assert_same_bits(*_both(run, x, blocks=blocks, interpret=True))


@pytest.mark.parametrize(
  ('arithmetic', 'power_of_two'), [(_FROM_BITS, False), (_CASTS, True)]
)
def test_requantised_is_what_was_dequantised_and_quantised(
  arithmetic, power_of_two
):
  x = ops.quantize(_matrix(1100, 200), ops.ROWS)
  run = functools.partial(ops.requantize, power_of_two=power_of_two)
  # 9 rows of scales: a block of 8, and one of which 7 are beyond the last.
  for rows in (128, 512):
    blocks = blocks_lib.BlockSizes(rows, 256, arithmetic)
    out, expected = _both(run, x, blocks=blocks, interpret=True)
    _assert_same_bits(out, expected)
  quantized = ops.quantize(
    x.dequantized(), ops.COLUMNS, power_of_two=power_of_two
  )
  _assert_same_bits(expected, quantized)


def test_requantised_of_a_stack():
  stack = np.stack([_matrix(130, 5), 100 * _matrix(130, 5)])
  x = ops.quantize(stack, ops.ROWS)
  out, expected = _both(ops.requantize, x, interpret=True)
  _assert_same_bits(out, expected)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_swiglu_is_quantised_as_xla_does(dtype):
  gate, up = jnp.asarray(_matrix(130, 200), dtype), _matrix(130, 200)[::-1]
  up = jnp.asarray(up, dtype)
  blocks = blocks_lib.BlockSizes(128, 128, _FROM_BITS)
  out, expected = _both(
    ops.swiglu_quantize, gate, up, blocks=blocks, interpret=True
  )
  _assert_same_bits(out, expected)
  # Where a division is refined, exponentials are other numbers.
  blocks = blocks_lib.BlockSizes(128, 256, _MULTIPLIES)
  refined, _ = _both(
    ops.swiglu_quantize, gate, up, blocks=blocks, interpret=True
  )
  np.testing.assert_allclose(refined.scale, out.scale, rtol=2.0**-7)
  differs = np.float32(refined.q) != np.float32(out.q)
  assert differs.mean() < 1e-3
  # silu(gate) · up, in float64, but for the rounding to e4m3 and to bfloat16.
  gate, up = np.float64(gate), np.float64(up)
  h = gate / (1 + np.exp(-np.maximum(gate, -700))) * up
  step = np.asarray(out.wide_scale()) * 2.0**-9
  assert (np.abs(out.dequantized() - h) < 0.067 * np.abs(h) + step).all()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_norms_are_quantised_as_xla_does(dtype):
  x = jnp.asarray(_matrix(130, 200), dtype)
  scale_k = _matrix(1, 200)[0]
  run = functools.partial(ops.rms_norm_quantize, eps=100.0)
  blocks = blocks_lib.BlockSizes(128, 256, _FROM_BITS)
  out, expected = _both(run, x, scale_k, blocks=blocks, interpret=True)
  # Sums of 200 squares in another order: 1 ulp of float32 or bfloat16 apart.
  np.testing.assert_allclose(out.scale, expected.scale, rtol=2.0**-7)
  q, wanted = (np.asarray(o.q, np.float32) for o in (out, expected))
  assert (q != wanted).mean() < 1e-3
  x = np.float64(x)
  rms = np.sqrt((x**2).mean(1, keepdims=True) + 100)
  h = x / rms * scale_k
  step = np.asarray(out.wide_scale()) * 2.0**-9
  assert (np.abs(out.dequantized() - h) < 0.067 * np.abs(h) + step).all()


def _race_free(run, *args, blocks):
  out = run(*args, implementation='pallas', blocks=blocks, interpret=_RACES)
  assert not interpret_pallas_call.races.races_found
  return out


# A block, of which x has two along both axes.
_SMALL = blocks_lib.BlockSizes(128, 128, _FROM_BITS)


@pytest.mark.parametrize('tile', [ops.ROWS, ops.COLUMNS, ops.BLOCKS])
def test_quantising_has_no_race(tile):
  x = jnp.asarray(_matrix(256, 256), jnp.bfloat16)
  run = functools.partial(ops.quantize, tile=tile)
  _assert_same_bits(_race_free(run, x, blocks=_SMALL), run(x))


def test_requantising_has_no_race():
  # Two steps, and two blocks of columns, that share rows of scales.
  x = ops.quantize(_matrix(256, 256), ops.ROWS)
  out = _race_free(ops.requantize, x, blocks=_SMALL)
  _assert_same_bits(out, ops.requantize(x))


def test_fused_forms_have_no_race():
  x = jnp.asarray(_matrix(256, 256), jnp.bfloat16)
  out = _race_free(ops.swiglu_quantize, x, x, blocks=_SMALL)
  _assert_same_bits(out, ops.swiglu_quantize(x, x))
  norm = functools.partial(ops.rms_norm_quantize, eps=1e-6)
  wide = blocks_lib.BlockSizes(128, 256, _FROM_BITS)
  _race_free(norm, x, x[0], blocks=wide)


@pytest.mark.parametrize('arithmetic', [_FROM_BITS, _CASTS, _MULTIPLIES])
@pytest.mark.parametrize('kind', ['fp32', 'ue8m0'])
def test_known_tiles_from_the_kernel(kind, arithmetic):
  known = known_answers.load('fp8_tile')
  x = np.zeros((2, ops.SIZE), np.float32)
  x[0, :8] = known['x_first8']
  out = ops.quantize(
    x,
    ops.ROWS,
    power_of_two=kind == 'ue8m0',
    implementation='pallas',
    blocks=blocks_lib.BlockSizes(32, 128, arithmetic),
    interpret=True,
  )
  np.testing.assert_allclose(out.scale[0, 0], known[kind]['scale'], rtol=1e-7)
  np.testing.assert_array_equal(np.float32(out.q[0, :8]), known[kind]['q'])
  np.testing.assert_allclose(
    out.dequantized()[0, :8], known[kind]['dq'], rtol=1e-6
  )
  if kind == 'fp32':  # The second row is a tile of zeros.
    zero = known_answers.load('fp8_zero_tile')
    np.testing.assert_allclose(out.scale[1, 0], zero['scale'], rtol=1e-6)
  assert not np.float32(out.q[1]).any()


@pytest.mark.parametrize('arithmetic', [_FROM_BITS, _CASTS, _MULTIPLIES])
def test_known_casts_from_the_kernel(arithmetic):
  known = known_answers.load('e4m3_cast')
  x = np.zeros((1, ops.SIZE), np.float32)
  # The largest is 448, so that the scale is 1.
  x[0, : len(known['inp'])] = known['inp']
  out = ops.quantize(
    x,
    ops.ROWS,
    implementation='pallas',
    blocks=blocks_lib.BlockSizes(32, 128, arithmetic),
    interpret=True,
  )
  assert out.scale == 1
  np.testing.assert_array_equal(
    np.float32(out.q[0, : len(known['out'])]), known['out']
  )


@pytest.mark.parametrize(
  ('version', 'generation'),
  [
    (pltpu.ChipVersion.TPU_V5E, 5),
    (pltpu.ChipVersion.TPU_V5P, 5),
    (pltpu.ChipVersion.TPU_V6E, 6),
    (pltpu.ChipVersion.TPU_7X, 7),
  ],
)
def test_chips_are_of_the_generations_that_jax_says(version, generation):
  assert pltpu.get_tpu_info_for_chip(version, 1).generation == generation
  assert generation in blocks_lib.ARITHMETIC


@pytest.mark.parametrize('k', [128, 7168, 18432, 129280])
@pytest.mark.parametrize('m', [32, 96, 384, 8192])
def test_default_blocks_hold_whole_tiles(m, k):
  tall = -(-m // 128) * 128
  by_rows = (
    blocks_lib.rows(m, k),
    blocks_lib.made_rows(m, k, num_inputs=2),
    blocks_lib.requantized(tall, k),
    blocks_lib.blocks(k),
  )
  for sizes in by_rows:
    # A block of some of the columns has whole lanes of scales.
    assert sizes.columns == k or sizes.columns % 128**2 == 0
  by_columns = blocks_lib.columns(tall, k)
  # A block of some of the rows has whole tiles of scales.
  assert by_columns.rows == tall or by_columns.rows % 1024 == 0
  for sizes in (*by_rows, by_columns):
    assert sizes.columns <= k
    # Of float32 in two buffers, with what becomes of it: 26 of 32 MiB.
    assert sizes.rows * sizes.columns <= 160 * 128**2


def test_cases_have_names_of_their_own_and_can_be_traced():
  all_cases = cases.cases()
  found = {case.name: case for case in all_cases}
  assert len(found) == len(all_cases) == 7
  for name in ('blocks', 'requantize'):
    case = found[name]
    out = jax.eval_shape(case.function, *case.args)
    assert out.q.dtype == ops.E4M3 and out.shape == case.args[0].shape
    assert case.hbm_bytes > 2 * out.q.size


@pytest.mark.parametrize(
  ('run', 'message'),
  [
    (
      lambda x: ops.quantize(x, ops.ROWS, implementation='triton'),
      "implementation='triton', it must be one of xla, pallas",
    ),
    (
      lambda x: ops.quantize(x, ops.TENSOR, implementation='pallas'),
      'one scale for each matrix',
    ),
    (
      lambda x: ops.quantize(x.astype(int), ops.ROWS, implementation='pallas'),
      'takes bfloat16 and float32',
    ),
    (
      lambda x: ops.requantize(ops.quantize(x, ops.COLUMNS)),
      r'tile=\(128, 1\) of what is requantised',
    ),
    (lambda x: ops.swiglu_quantize(x, x[1:]), r'float32\[4, 8\] is not as up'),
    (
      lambda x: ops.rms_norm_quantize(x, x[0, 1:], 1e-6),
      r'scale \[7\] of a norm of k=8',
    ),
    (lambda _: blocks_lib.BlockSizes(8, 128, blocks_lib.ANY), 'rows=8'),
    (lambda _: blocks_lib.BlockSizes(32, 64, blocks_lib.ANY), 'columns=64'),
  ],
)
def test_what_does_not_fit_raises(run, message):
  with pytest.raises(ValueError, match=message):
    run(np.ones((4, 8), np.float32))


def test_norms_of_rows_that_no_block_holds_raise():
  blocks = blocks_lib.BlockSizes(32, 128, _FROM_BITS)
  with pytest.raises(ValueError, match='k=200 columns: blocks of 128'):
    ops.rms_norm_quantize(
      np.ones((4, 200), np.float32),
      np.ones(200, np.float32),
      1e-6,
      implementation='pallas',
      blocks=blocks,
    )
