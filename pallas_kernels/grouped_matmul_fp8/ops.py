"""Grouped products of FP8 matrices with scales of tiles, DeepGEMM's."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import ops as grouped_matmul_ops
from pallas_kernels.grouped_matmul_fp8 import blocks as blocks_lib
from pallas_kernels.grouped_matmul_fp8 import kernel, outer, reference
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

IMPLEMENTATIONS = ('pallas', 'xla', 'reference')
_SIZE = quantize_fp8_ops.SIZE
_ROWS, _COLUMNS, _BLOCKS, _TENSOR = (
  quantize_fp8_ops.ROWS,
  quantize_fp8_ops.COLUMNS,
  quantize_fp8_ops.BLOCKS,
  quantize_fp8_ops.TENSOR,
)


def grouped_matmul_fp8(
  x: quantize_fp8_ops.Quantized,
  w: quantize_fp8_ops.Quantized,
  size_g: jax.Array,
  *,
  block: int,
  transposed: bool = False,
  implementation: str,
  out_dtype: jnp.dtype = jnp.float32,
  blocks: blocks_lib.ProductSizes | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Multiplies the rows of each group by its matrix.

  out[i] = x[i] · w[g], or x[i] · w[g]ᵀ, for the rows i of group g, which begin
  where those of group g - 1 end.

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2; DeepGEMM's contiguous layout.

  Args:
    x: [m, k] in tiles ROWS; [m, n] if transposed. Those past the last group may
      hold anything.
    w: [g, k, n] in tiles BLOCKS, one matrix per group.
    size_g: int32 [g] rows of each group, whole blocks, at most m together.
    block: Rows a block, a multiple of 128.
    transposed: Multiply by the transposed matrices, which are read as stored;
      'pallas' is faster so, as it need not transpose them itself.
    implementation: 'pallas' (for TPUs from v5e on; k and n that are no
      multiples of 128 are padded, a copy), 'xla' (exact emulation: float32
      products of q · scale) or 'reference'.
    out_dtype: Of the result, float32 or bfloat16.
    blocks: Sizes of the tiles of 'pallas', by default those that suit shapes
      and device.
    interpret: Run the kernel on a CPU.

  Returns:
    [m, n], or [m, k]; accumulated in float32. Rows past the last group are
    finite, and else undefined.

  Raises:
    ValueError: Shapes, types or tiles that do not fit, a TPU before v5e, or an
      unknown implementation.
  """
  _check_block(x, block)
  _check_product(x, w, 2 if transposed else 1, out_dtype)
  match implementation:
    case 'pallas':
      end_of = jnp.cumsum(size_g)
      out_mn = _multiply(
        *(x, w, end_of - size_g, size_g, transposed, x.shape[0]),
        fill=True,
        out_dtype=out_dtype,
        blocks=blocks,
        interpret=interpret,
      )
      return out_mn
    case 'xla':
      out_mn = _emulated(
        _within(x, size_g).dequantized(),
        (w.mT if transposed else w).dequantized(),
        size_g,
        block,
      )
      return out_mn.astype(out_dtype)
    case 'reference':
      out_mn = reference.grouped_matmul_fp8(
        x, w.mT if transposed else w, size_g
      )
      return out_mn.astype(out_dtype)
  raise _unknown(implementation)


def grouped_matmul_fp8_masked(
  x: quantize_fp8_ops.Quantized,
  w: quantize_fp8_ops.Quantized,
  size_g: jax.Array,
  *,
  implementation: str,
  out_dtype: jnp.dtype = jnp.float32,
  blocks: blocks_lib.ProductSizes | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Multiplies the first rows of each group by its matrix, for decoding.

  out[g, i] = x[g, i] · w[g] for i < size[g]

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2; DeepGEMM's masked layout.

  Args:
    x: [g, m, k] in tiles ROWS, room for m rows a group; those past its size may
      hold anything. An m that is no multiple of 128 is padded, a copy.
    w: [g, k, n] in tiles BLOCKS, one matrix per group; that of an empty one is
      not read.
    size_g: int32 [g] rows of each group, m at most.
    implementation: As of grouped_matmul_fp8.
    out_dtype: Of the result, float32 or bfloat16.
    blocks: Sizes of the tiles of 'pallas'.
    interpret: Run the kernel on a CPU.

  Returns:
    [g, m, n], accumulated in float32. Rows past a group's size are undefined.

  Raises:
    ValueError: As of grouped_matmul_fp8.
  """
  g, m, _ = x.shape
  if len(w.q) != g:
    raise ValueError(f'{g} groups of rows are not {len(w.q)} of weights')
  _check_product(x, w, 1, out_dtype)
  match implementation:
    case 'pallas':
      room = _up(m)
      flat = quantize_fp8_ops.Quantized(
        _padded(x.q, -2).reshape(g * room, -1),
        _wide(x, (1, _SIZE), room).reshape(g * room, -1),
        _ROWS,
      )
      out_mn = _multiply(
        *(flat, w, room * jnp.arange(g, dtype=jnp.int32), size_g, False, room),
        fill=False,
        out_dtype=out_dtype,
        blocks=blocks,
        interpret=interpret,
      )
      return out_mn.reshape(g, room, -1)[:, :m]
    case 'xla':
      out_gmn = jnp.einsum(
        'gmk,gkn->gmn',
        x.dequantized(),
        w.dequantized(),
        precision=jax.lax.Precision.HIGHEST,
      )
      return out_gmn.astype(out_dtype)
    case 'reference':
      out_gmn = reference.grouped_matmul_fp8_masked(x, w, size_g)
      return out_gmn.astype(out_dtype)
  raise _unknown(implementation)


def grouped_outer_fp8(
  x: quantize_fp8_ops.Quantized,
  y: quantize_fp8_ops.Quantized,
  size_g: jax.Array,
  *,
  block: int,
  implementation: str,
  blocks: blocks_lib.OuterSizes | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Sums over the rows of each group, the gradient of its weights.

  out[g] = Σ over rows i of group g of x[i]ᵀ · y[i]

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2; DeepGEMM's k-grouped layout.

  Args:
    x: [m, k] in tiles COLUMNS; rows past the last group may hold anything.
    y: [m, n] in tiles COLUMNS.
    size_g: int32 [g] rows of each group, whole blocks, at most m together.
    block: Rows a block, a multiple of 128, so that no tile has two groups.
    implementation: As of grouped_matmul_fp8.
    blocks: Sizes of the tiles of 'pallas'.
    interpret: Run the kernel on a CPU.

  Returns:
    float32 [g, k, n], zero for a group without rows.

  Raises:
    ValueError: As of grouped_matmul_fp8.
  """
  _check_block(x, block)
  if y.shape[0] != x.shape[0]:
    raise ValueError(f'{x.shape[0]} rows of x are not {y.shape[0]} of y')
  _check_tile('x', x, _COLUMNS)
  _check_tile('y', y, _COLUMNS)
  match implementation:
    case 'pallas':
      on = blocks_lib.chip_with_fp8()
      (k, n), (k_up, n_up) = (
        tuple(size(z.shape[1]) for z in (x, y)) for size in (int, _up)
      )
      blocks = blocks or blocks_lib.outer(k_up, n_up, on)
      blocks.check(k_up, n_up)
      out_gkn = outer.outer(
        *(_padded(x.q, -1), _padded(_wide(x, _COLUMNS), -1)),
        *(_padded(y.q, -1), _padded(_wide(y, _COLUMNS), -1)),
        size_g,
        blocks=blocks,
        interpret=_interpreted(interpret),
      )
      return out_gkn if (k, n) == (k_up, n_up) else out_gkn[:, :k, :n]
    case 'xla':
      x_mk, y_mn = (_within(z, size_g).dequantized() for z in (x, y))
      shape = len(size_g), x_mk.shape[1], y_mn.shape[1]
      # Linear in the weights, whatever they are.
      _, vjp = jax.vjp(
        lambda w_gkn: _emulated(x_mk, w_gkn, size_g, block),
        jnp.zeros(shape, jnp.float32),
      )
      return vjp(y_mn)[0]
    case 'reference':
      return reference.grouped_outer_fp8(x, y, size_g)
  raise _unknown(implementation)


def _emulated(x_mk, w_gkn, size_g, block):
  with jax.default_matmul_precision('highest'):
    return grouped_matmul_ops.grouped_matmul(
      x_mk, w_gkn, size_g, block=block, implementation='xla'
    )


def _within(x, size_g):
  return reference.only(x, 0, jnp.sum(size_g))


def _multiply(x, w, start_g, size_g, transposed, most, **options):
  """Of kernel.multiply, x and w as given."""
  on, axis = blocks_lib.chip_with_fp8(), 2 if transposed else 1
  out_dtype, blocks = options['out_dtype'], options['blocks']
  n = w.shape[3 - axis]
  k_up, n_up = _up(w.shape[axis]), _up(n)
  if blocks is None:
    size = jnp.dtype(out_dtype).itemsize
    blocks = blocks_lib.product(most, k_up, n_up, size, on)
  blocks.check(n_up)
  scale_gkn = _wide(w, _BLOCKS)
  if transposed:
    scale_gkn = scale_gkn.mT
  # A tile's scales side by side: [g, tiles, scales along k, along its width].
  per_tile = blocks.width // _SIZE
  scale = scale_gkn.reshape(*scale_gkn.shape[:2], -1, per_tile).swapaxes(1, 2)
  out_mn = kernel.multiply(
    *(_padded(x.q, -1), _wide(x, _ROWS).T),
    *(_padded(_padded(w.q, -1), -2), scale),
    *(start_g, size_g),
    blocks=blocks,
    transposed=transposed,
    fill=options['fill'],
    out_dtype=out_dtype,
    interpret=_interpreted(options['interpret']),
  )
  return out_mn if n == n_up else out_mn[:, :n]


def _wide(x, tile, rows=None):
  """Scales of tiles of this shape, of one more than of TENSOR."""
  *lead, m, k = x.shape
  num_rows, num_columns = -(-m // tile[0]), -(-k // tile[1])
  scale = jnp.broadcast_to(x.scale, (*lead, num_rows, num_columns))
  if rows is None or rows == m:
    return scale
  return jnp.pad(scale, [*[(0, 0)] * len(lead), (0, rows - m), (0, 0)])


def _padded(x, axis):
  behind = -x.shape[axis] % _SIZE
  if not behind:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = 0, behind
  return jnp.pad(x, widths)


def _up(size):
  return -(-size // _SIZE) * _SIZE


def _interpreted(interpret):
  # The plain interpreter has no copies of sizes known at run time only.
  return pltpu.InterpretParams() if interpret is True else interpret


def _unknown(implementation):
  return ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )


def _check_block(x, block):
  if block < 1 or block % _SIZE:
    raise ValueError(f'block={block} must be a multiple of {_SIZE}')
  if x.shape[0] % block:
    raise ValueError(
      f'{x.shape[0]} rows are no whole number of blocks of {block}'
    )


def _check_product(x, w, axis, out_dtype):
  if x.shape[-1] != w.shape[axis]:
    raise ValueError(
      f'k={x.shape[-1]} of the rows is not k={w.shape[axis]} of the weights'
    )
  _check_tile('x', x, _ROWS)
  _check_tile('w', w, _BLOCKS)
  if out_dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f'out_dtype={out_dtype} must be float32 or bfloat16')


def _check_tile(name, x, tile):
  if x.tile not in (tile, _TENSOR):
    raise ValueError(f'{name} has tiles of {x.tile}, they must be {tile}')
