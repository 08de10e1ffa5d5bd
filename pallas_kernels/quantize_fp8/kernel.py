"""The TPU kernels: one pass over what is quantised, a block at a time.

All of them are bound by HBM where the vector unit keeps up with it: a
float32 register of 1,024 numbers has to be done in 2 to 4 cycles. So a block
is worked on tile by tile of 128 x 128, all of them written out, which gives
the compiler independent work to fill its slots with.

Scales of tiles of rows are [m, k / 128], and HBM has whole lanes of them: the
56 of 7,168 columns take the room of 128, 4 MiB of 8,192 rows beside 168 MiB
of numbers.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize_fp8 import blocks as blocks_lib
from pallas_kernels.quantize_fp8 import e4m3, reference

_LANES = blocks_lib.LANES
_SCALE_ROWS = blocks_lib.SCALE_ROWS
_VMEM_LIMIT_BYTES = 32 * 2**20


def _parts(size):
  """Slices of up to 128."""
  return [slice(i, min(i + _LANES, size)) for i in range(0, size, _LANES)]


def _store_rows(x, at, column, q_ref, scale_ref, options):
  """Quantises [rows, 128], a tile each row."""
  amax = e4m3.magnitude(x, options['arithmetic']).max(axis=1, keepdims=True)
  q_ref[at], scale = e4m3.quantized(x, amax, **options)
  scale_ref[at[0], column : column + 1] = scale


def _rows_kernel(x_ref, q_ref, scale_ref, **options):
  """x_ref, q_ref [rows, columns], scale_ref [rows, columns / 128]."""
  for rows in _parts(x_ref.shape[0]):
    for column, columns in enumerate(_parts(x_ref.shape[1])):
      at = rows, columns
      _store_rows(x_ref[at], at, column, q_ref, scale_ref, options)


def _swiglu_kernel(gate_ref, up_ref, q_ref, scale_ref, **options):
  """As _rows_kernel, of silu(gate) · up."""
  for rows in _parts(gate_ref.shape[0]):
    for column, columns in enumerate(_parts(gate_ref.shape[1])):
      at = rows, columns
      h = _swiglu(gate_ref[at], up_ref[at], options['arithmetic'])
      _store_rows(h, at, column, q_ref, scale_ref, options)


def _swiglu(gate, up, arithmetic):
  """reference.swiglu, whose division is refined once if the chip needs it."""
  if arithmetic.divides:
    return reference.swiglu(gate, up)
  gate32 = gate.astype(jnp.float32)
  # Of less than -80, which is 0 in e4m3, the reciprocal would be one of inf.
  total = 1 + jnp.exp(jnp.minimum(-gate32, 80.0))
  h = gate32 * pl.reciprocal(total, full_range=False)
  return (h * up.astype(jnp.float32)).astype(gate.dtype)


def _rms_norm_kernel(x_ref, weight_ref, q_ref, scale_ref, *, eps, k, **options):
  """As _rows_kernel, of normalised rows; weight_ref [1, columns].

  Columns from k on are zeros.
  """
  load = lambda at: x_ref[at].astype(jnp.float32)
  for rows in _parts(x_ref.shape[0]):
    total = 0.0
    for columns in _parts(x_ref.shape[1]):
      total += jnp.square(load((rows, columns)))
    mean = total.sum(axis=1, keepdims=True) / k
    inverse = jax.lax.rsqrt(mean + eps)
    for column, columns in enumerate(_parts(x_ref.shape[1])):
      at = rows, columns
      y = load(at) * inverse * weight_ref[:, columns]
      y = y.astype(x_ref.dtype)
      _store_rows(y, at, column, q_ref, scale_ref, options)


def _columns_kernel(x_ref, q_ref, scale_ref, **options):
  """x_ref, q_ref [rows, columns], scale_ref [rows / 128, columns]."""
  for row, rows in enumerate(_parts(x_ref.shape[0])):
    for columns in _parts(x_ref.shape[1]):
      x = x_ref[rows, columns]
      amax = e4m3.magnitude(x, options['arithmetic'])
      amax = amax.max(axis=0, keepdims=True)
      q_ref[rows, columns], scale = e4m3.quantized(x, amax, **options)
      scale_ref[row : row + 1, columns] = scale


def _blocks_kernel(x_ref, q_ref, scale_ref, **options):
  """x_ref, q_ref [128, columns], scale_ref [1, 1, columns / 128]."""
  for column, columns in enumerate(_parts(x_ref.shape[1])):
    x = x_ref[:, columns]
    amax = e4m3.magnitude(x, options['arithmetic'])
    # Rows first, which are cheap.
    amax = amax.max(axis=0, keepdims=True).max(axis=1, keepdims=True)
    q_ref[:, columns], scale = e4m3.quantized(x, amax, **options)
    scale_ref[0, :, column : column + 1] = scale


def _requantize_kernel(
  q_ref, scale_ref, out_ref, out_scale_ref, *, arithmetic, power_of_two
):
  """One of the steps that share a tile of memory of the new scales.

  q_ref, out_ref [rows, columns], scale_ref [rows, columns / 128], out_scale_ref
  [8 or fewer, columns].
  """
  row = jax.lax.broadcasted_iota(jnp.int32, (out_scale_ref.shape[0], _LANES), 0)
  all_rows = _parts(q_ref.shape[0])
  first = pl.program_id(2) * len(all_rows)
  scales = e4m3.decoding_scale(scale_ref[...], arithmetic)
  for column, columns in enumerate(_parts(q_ref.shape[1])):
    out_scales = out_scale_ref[:, columns]
    for part, rows in enumerate(all_rows):
      q = q_ref[rows, columns]
      scale = scales[rows, column : column + 1]
      x = e4m3.decoded(q, scale, arithmetic)
      out_ref[rows, columns], out_scale = e4m3.quantized(
        x,
        x.max(axis=0, keepdims=True),
        power_of_two,
        arithmetic,
        sign=e4m3.signs(q),
      )
      out_scales = jnp.where(row == first + part, out_scale, out_scales)
    out_scale_ref[:, columns] = out_scales


def quantize_rows(
  x_mk: jax.Array,
  *,
  power_of_two: bool,
  blocks: blocks_lib.BlockSizes,
  interpret,
) -> reference.Quantized:
  """Tiles of rows of x [m, k], m a multiple of 32, k one of 128."""
  kernel = functools.partial(_rows_kernel, **_options(blocks, power_of_two))
  return _call_rows(kernel, 'quantize_rows', blocks, interpret, (x_mk,))


def swiglu_quantize(
  gate_mk: jax.Array,
  up_mk: jax.Array,
  *,
  power_of_two: bool,
  blocks: blocks_lib.BlockSizes,
  interpret,
) -> reference.Quantized:
  """Tiles of rows of silu(gate) · up, of whole tiles as `quantize_rows`."""
  kernel = functools.partial(_swiglu_kernel, **_options(blocks, power_of_two))
  args = gate_mk, up_mk
  return _call_rows(kernel, 'swiglu_quantize', blocks, interpret, args)


def rms_norm_quantize(
  x_mk: jax.Array,
  weight_1k: jax.Array,
  *,
  eps: float,
  k: int,
  power_of_two: bool,
  blocks: blocks_lib.BlockSizes,
  interpret,
) -> reference.Quantized:
  """Tiles of rows of the normalised x, of which k columns are no padding."""
  kernel = functools.partial(
    _rms_norm_kernel, eps=eps, k=k, **_options(blocks, power_of_two)
  )
  args = x_mk, weight_1k
  return _call_rows(kernel, 'rms_norm_quantize', blocks, interpret, args)


def _call_rows(kernel, name, blocks, interpret, args):
  m, k = args[0].shape
  b, c = blocks.rows, blocks.columns
  block = pl.BlockSpec((b, c), lambda i, j: (i, j))
  one_row = pl.BlockSpec((1, c), lambda i, j: (0, j))
  specs = [block if arg.shape == (m, k) else one_row for arg in args]
  scales = pl.BlockSpec((b, c // _LANES), lambda i, j: (i, j))
  # VMEM, for 7,168 columns of bfloat16 in blocks of 128 rows: x 2 · 1.75 MiB,
  # q 2 · 0.875, scales 2 · 64 KiB, 5.4 MiB.
  return _call(
    kernel,
    name,
    interpret,
    args,
    grid=(pl.cdiv(m, b), pl.cdiv(k, c)),
    in_specs=specs,
    out_specs=[block, scales],
    scale_shape=(m, k // _LANES),
    tile=reference.ROWS,
  )


def quantize_columns(
  x_mk: jax.Array,
  *,
  power_of_two: bool,
  blocks: blocks_lib.BlockSizes,
  interpret,
) -> reference.Quantized:
  """Tiles of columns of x [m, k], both multiples of 128."""
  m, k = x_mk.shape
  b, c = blocks.rows, blocks.columns
  block = pl.BlockSpec((b, c), lambda i, j: (i, j))
  # VMEM, for blocks of 1,024 x 1,024 bfloat16: x 2 · 2 MiB, q 2 · 1, scales
  # 2 · 32 KiB, 6.1 MiB.
  return _call(
    functools.partial(_columns_kernel, **_options(blocks, power_of_two)),
    'quantize_columns',
    interpret,
    (x_mk,),
    grid=(pl.cdiv(m, b), pl.cdiv(k, c)),
    in_specs=[block],
    out_specs=[block, pl.BlockSpec((b // _LANES, c), lambda i, j: (i, j))],
    scale_shape=(m // _LANES, k),
    tile=reference.COLUMNS,
  )


def quantize_blocks(
  x_mk: jax.Array,
  *,
  power_of_two: bool,
  blocks: blocks_lib.BlockSizes,
  interpret,
) -> reference.Quantized:
  """Square tiles of x [m, k], both multiples of 128."""
  m, k = x_mk.shape
  c = blocks.columns
  block = pl.BlockSpec((_LANES, c), lambda i, j: (i, j))
  # A row of scales each, as a block of one row must be all there is of them.
  scales = pl.BlockSpec((1, 1, c // _LANES), lambda i, j: (i, 0, j))
  # VMEM, for 4,096 columns of float32: x 2 · 2 MiB, q 2 · 0.5, scales 2 · 4
  # KiB, 5 MiB.
  result = _call(
    functools.partial(_blocks_kernel, **_options(blocks, power_of_two)),
    'quantize_blocks',
    interpret,
    (x_mk,),
    grid=(m // _LANES, pl.cdiv(k, c)),
    in_specs=[block],
    out_specs=[block, scales],
    scale_shape=(m // _LANES, 1, k // _LANES),
    tile=reference.BLOCKS,
  )
  return reference.Quantized(result.q, result.scale[:, 0], result.tile)


def requantize(
  x: reference.Quantized,
  *,
  power_of_two: bool,
  blocks: blocks_lib.BlockSizes,
  interpret,
) -> reference.Quantized:
  """Tiles of columns from those of rows, both sizes multiples of 128."""
  m, k = x.shape
  num_rows = m // _LANES
  b, c = blocks.rows, blocks.columns
  num_scale_rows = min(_SCALE_ROWS, num_rows)
  steps = pl.cdiv(num_scale_rows * _LANES, b)
  place = lambda i, j, r: (i * steps + r, j)
  block = pl.BlockSpec((b, c), place)
  scales = pl.BlockSpec((num_scale_rows, c), lambda i, j, r: (i, j))
  # VMEM, for 7,168 columns in blocks of 256 rows: q 2 · 1.75 MiB and again,
  # scales 2 · 128 KiB and 2 · 224 KiB, 7.7 MiB.
  return _call(
    functools.partial(_requantize_kernel, **_options(blocks, power_of_two)),
    'requantize',
    interpret,
    (x.q, x.scale),
    grid=(pl.cdiv(num_rows, num_scale_rows), pl.cdiv(k, c), steps),
    in_specs=[block, pl.BlockSpec((b, c // _LANES), place)],
    out_specs=[block, scales],
    scale_shape=(num_rows, k),
    tile=reference.COLUMNS,
    semantics=('parallel', 'parallel', 'arbitrary'),
  )


def _options(blocks, power_of_two):
  return {'arithmetic': blocks.arithmetic, 'power_of_two': power_of_two}


def _call(
  kernel: Callable,
  name: str,
  interpret,
  args: tuple[jax.Array, ...],
  *,
  grid: tuple[int, ...],
  in_specs: list[pl.BlockSpec],
  out_specs: list[pl.BlockSpec],
  scale_shape: tuple[int, ...],
  tile: reference.Tile,
  semantics: tuple[str, ...] | None = None,
) -> reference.Quantized:
  """A kernel from arrays of the first one's shape to q and scales."""
  shape = args[0].shape
  q, scale = pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=[
      jax.ShapeDtypeStruct(shape, reference.E4M3),
      jax.ShapeDtypeStruct(scale_shape, jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=semantics or ('parallel',) * len(grid),
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * args[0].size,
      bytes_accessed=sum(arg.nbytes for arg in args) + args[0].size,
      transcendentals=0,
    ),
    name=name,
    interpret=interpret,
  )(*args)
  return reference.Quantized(q, scale, tile)
