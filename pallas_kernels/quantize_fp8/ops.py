"""Quantisation to FP8 with a scale for each tile."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_fp8 import blocks as blocks_lib
from pallas_kernels.quantize_fp8 import kernel, reference
from pallas_kernels.quantize_fp8.reference import (
  BLOCKS,
  COLUMNS,
  E4M3,
  LARGEST,
  ROWS,
  SIZE,
  TENSOR,
  Quantized,
  Tile,
)

__all__ = (
  'BLOCKS',
  'COLUMNS',
  'E4M3',
  'IMPLEMENTATIONS',
  'LARGEST',
  'ROWS',
  'SIZE',
  'TENSOR',
  'Quantized',
  'Tile',
  'quantize',
  'requantize',
  'rms_norm_quantize',
  'swiglu_quantize',
)

IMPLEMENTATIONS = ('xla', 'pallas')
_ROWS = 32  # Of an e4m3 tile of memory.


def quantize(
  x: jax.Array,
  tile: Tile,
  *,
  power_of_two: bool = False,
  implementation: str = 'xla',
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool = False,
) -> Quantized:
  """Each tile as q · scale: scale = max(amax, 1e-4) / 448, q = e4m3(x / scale).

  A tile that holds inf has the scale inf; one that holds nan, the scale nan
  where maxima keep it, as TPUs' do. On a CPU they may not, and then a nan is
  seen in the q of 'xla' alone.

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2.

  Args:
    x: [..., m, k], of any sizes: tiles at the edges are narrower.
    tile: ROWS (1 x 128), COLUMNS (128 x 1), BLOCKS (128 x 128) or TENSOR (one
      scale for each matrix).
    power_of_two: Round scales up to powers of two (UE8M0's values).
    implementation: 'xla', or 'pallas' (a kernel for TPUs, of the same bits;
      of bfloat16 or float32).
    blocks: The kernel's.
    interpret: Run the kernel on a CPU.

  Raises:
    ValueError: An unknown implementation; for 'pallas', TENSOR or a dtype that
      it does not take.
  """
  if not _is_pallas(implementation):
    return reference.quantize(x, tile, power_of_two)
  if tile not in (ROWS, COLUMNS, BLOCKS):
    raise ValueError(
      f'tile={tile}: implementation=pallas has tiles of rows, columns and '
      "blocks; one scale for each matrix is implementation='xla'"
    )
  _check_dtype(x)
  x_mk = _matrix(x, tile)
  m, k = x_mk.shape
  match tile:
    case (1, _):
      run, default = kernel.quantize_rows, lambda: blocks_lib.rows(m, k)
    case (_, 1):
      run, default = kernel.quantize_columns, lambda: blocks_lib.columns(m, k)
    case _:
      run, default = kernel.quantize_blocks, lambda: blocks_lib.blocks(k)
  result = run(
    x_mk,
    power_of_two=power_of_two,
    blocks=blocks or default(),
    interpret=interpret,
  )
  return _unpadded(result, x.shape)


def requantize(
  x: Quantized,
  *,
  power_of_two: bool = False,
  implementation: str = 'xla',
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool = False,
) -> Quantized:
  """Tiles of columns from tiles of rows: quantises q · scale anew.

  For the gradient of a weight, which sums over the rows of what the forward
  pass has kept.

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2 and fig. 7.

  Args:
    x: [..., m, k], of any sizes, with tiles ROWS.
    power_of_two: The new scales are powers of two.
    implementation: 'xla', or 'pallas' (a kernel for TPUs that keeps q · scale
      in VMEM, of the same bits).
    blocks: The kernel's.
    interpret: Run the kernel on a CPU.

  Returns:
    [..., m, k] with tiles COLUMNS.

  Raises:
    ValueError: Other tiles, or an unknown implementation.
  """
  if x.tile != ROWS:
    raise ValueError(f'tile={x.tile} of what is requantised, it must be {ROWS}')
  if not _is_pallas(implementation):
    return reference.requantize(x, power_of_two)
  q_mk = _matrix(x.q, BLOCKS)
  scale_mk = _matrix(x.scale, COLUMNS, lanes=1)
  result = kernel.requantize(
    Quantized(q_mk, scale_mk, ROWS),
    power_of_two=power_of_two,
    blocks=blocks or blocks_lib.requantized(*q_mk.shape),
    interpret=interpret,
  )
  return _unpadded(result, x.shape)


def swiglu_quantize(
  gate: jax.Array,
  up: jax.Array,
  *,
  power_of_two: bool = False,
  implementation: str = 'xla',
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool = False,
) -> Quantized:
  """Tiles of rows of silu(gate) · up, which is never in memory.

  silu(gate) · up is computed in float32 and rounded once, to the dtype of the
  operands, before it is quantised. It has no gradient: it is made to be called
  inside of functions that have one of their own.

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.1.

  Args:
    gate: [..., m, k], of any sizes.
    up: As gate.
    power_of_two: Scales are powers of two.
    implementation: 'xla', or 'pallas' (a kernel for TPUs, of the same bits if
      both have the same exponentials; of bfloat16 or float32).
    blocks: The kernel's.
    interpret: Run the kernel on a CPU.

  Raises:
    ValueError: Arrays that do not fit, or an unknown implementation; for
      'pallas', a dtype that it does not take.
  """
  if gate.shape != up.shape or gate.dtype != up.dtype:
    raise ValueError(
      f'gate {gate.dtype}{list(gate.shape)} is not as '
      f'up {up.dtype}{list(up.shape)}'
    )
  if not _is_pallas(implementation):
    return reference.quantize(reference.swiglu(gate, up), ROWS, power_of_two)
  _check_dtype(gate)
  gate_mk, up_mk = _matrix(gate, ROWS), _matrix(up, ROWS)
  result = kernel.swiglu_quantize(
    gate_mk,
    up_mk,
    power_of_two=power_of_two,
    blocks=blocks or blocks_lib.made_rows(*gate_mk.shape, num_inputs=2),
    interpret=interpret,
  )
  return _unpadded(result, gate.shape)


def rms_norm_quantize(
  x: jax.Array,
  scale_k: jax.Array,
  eps: float,
  *,
  power_of_two: bool = False,
  implementation: str = 'xla',
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool = False,
) -> Quantized:
  """Tiles of rows of x / rms(x) · scale, which is never in memory.

  Computed in float32 and rounded to the dtype of x before it is quantised. It
  has no gradient: it is made to be called inside of functions that have one of
  their own.

  Source: Zhang & Sennrich, arXiv:1910.07467; DeepSeek-V3, arXiv:2412.19437,
  §3.3.2.

  Args:
    x: [..., m, k], of any sizes.
    scale_k: float32 [k], of the norm.
    eps: Added to the mean square.
    power_of_two: Scales of tiles are powers of two.
    implementation: 'xla', or 'pallas' (a kernel for TPUs; of bfloat16 or
      float32). Both sum in an order of their own, so that a number may be
      rounded to the next one of the dtype.
    blocks: The kernel's, with all columns in one.
    interpret: Run the kernel on a CPU.

  Raises:
    ValueError: Arrays that do not fit, or an unknown implementation; for
      'pallas', a dtype that it does not take, or more columns than it holds.
  """
  k = x.shape[-1]
  if scale_k.shape != (k,):
    raise ValueError(f'scale {list(scale_k.shape)} of a norm of k={k} columns')
  if not _is_pallas(implementation):
    normed = reference.rms_norm(x, scale_k, eps)
    return reference.quantize(normed, ROWS, power_of_two)
  _check_dtype(x)
  x_mk = _matrix(x, ROWS)
  weight_1k = _matrix(scale_k.astype(jnp.float32)[None], ROWS, rows=1)
  blocks = blocks or blocks_lib.made_rows(*x_mk.shape, num_inputs=1)
  if blocks.columns < k:
    raise ValueError(
      f'k={k} columns: blocks of {blocks.columns} hold no whole row of them'
    )
  result = kernel.rms_norm_quantize(
    x_mk,
    weight_1k,
    eps=eps,
    k=k,
    power_of_two=power_of_two,
    blocks=blocks,
    interpret=interpret,
  )
  return _unpadded(result, x.shape)


def _is_pallas(implementation):
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation={implementation!r}, it must be one of '
      f'{", ".join(IMPLEMENTATIONS)}'
    )
  return implementation == 'pallas'


def _check_dtype(x):
  if x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f'{x.dtype}: implementation=pallas takes bfloat16 and float32'
    )


def _matrix(x, tile, *, rows=None, lanes=SIZE):
  """All matrices of x, one below the other, in whole tiles.

  Zeros that fill a tile change none of its other numbers.
  """
  *_, m, k = x.shape
  unit = rows or (SIZE if tile[0] == SIZE else 1)
  x = _padded(x, unit, lanes)
  x = x.reshape(-1, x.shape[-1])
  return x if unit != 1 or rows else _padded(x, _ROWS, lanes)


def _padded(x, rows, lanes):
  behind = -x.shape[-2] % rows, -x.shape[-1] % lanes
  if not any(behind):
    return x
  return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size) for size in behind])


def _unpadded(result, shape):
  """The matrices of a shape, of which _matrix made one."""
  *lead, m, k = shape
  rows, columns = result.tile
  count = math.prod(lead)

  def cut(x, m, k, unit):
    x = x.reshape(-1, x.shape[-1])
    each = -(-m // unit) * unit
    return x[: count * each].reshape(*lead, each, -1)[..., :m, :k]

  num_m, num_k = -(-m // rows), -(-k // columns)
  return Quantized(
    cut(result.q, m, k, 1 if rows == 1 else SIZE),
    cut(result.scale, num_m, num_k, 1),
    result.tile,
  )
