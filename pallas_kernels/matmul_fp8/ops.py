"""Products of FP8 matrices with scales of tiles."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul_fp8 import blocks as blocks_lib
from pallas_kernels.matmul_fp8 import kernel, reference
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

IMPLEMENTATIONS = ('pallas', 'xla', 'reference')
_SIZE = quantize_fp8_ops.SIZE


def matmul_fp8(
  a: quantize_fp8_ops.Quantized,
  b: quantize_fp8_ops.Quantized,
  *,
  contract: tuple[int, int] = (1, 0),
  implementation: str,
  out_dtype: jnp.dtype = jnp.float32,
  accumulate: jax.Array | None = None,
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """The product of two quantised matrices, accumulated in float32.

  out[m, n] = Σ_k a[m, k] · b[k, n]

  Both have tiles along k that are the same for all of a row of a, or of a
  column of b, inside of 128 of k. With a linear layer's weight stored [k, n]:

    product            a                    b               contract
    forward            x [m, k] ROWS        w [k, n] BLOCKS (1, 0)
    input's gradient   pull [m, n] ROWS     w [k, n] BLOCKS (1, 1)
    weight's gradient  x [m, k] COLUMNS     pull [m, n] COLUMNS (0, 0)

  'pallas' reads all three as they are stored; of a `.mT` XLA makes a copy.

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2; DeepGEMM.

  Args:
    a: [m, k], or [k, m].
    b: [k, n], or [n, k].
    contract: The axes of a and of b that are k.
    implementation: 'pallas' (for TPUs from v5e on; a k that is no multiple of
      128 is padded, a copy), 'xla' (exact emulation: float32 products of
      q · scale) or 'reference'.
    out_dtype: Of the result, float32 or bfloat16.
    accumulate: float32 [m, n] that the product is added to; 'pallas' does so
      in place if it is donated. The result is then float32.
    blocks: Sizes of the tiles of 'pallas', by default those that suit shapes
      and device.
    interpret: Run the kernel on a CPU.

  Returns:
    [m, n].

  Raises:
    ValueError: Shapes, types or tiles that do not fit, a TPU before v5e, or an
      unknown implementation.
  """
  _check(a, b, contract, out_dtype, accumulate)
  match implementation:
    case 'pallas':
      return _pallas(a, b, contract, out_dtype, accumulate, blocks, interpret)
    case 'xla' | 'reference':
      a_mk = a if contract[0] == 1 else a.mT
      b_kn = b if contract[1] == 0 else b.mT
      multiply = _xla if implementation == 'xla' else reference.matmul_fp8
      out_mn = multiply(a_mk, b_kn)
      if accumulate is not None:
        out_mn += accumulate
      return out_mn.astype(out_dtype)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )


def _xla(a_mk, b_kn):
  return jnp.dot(
    a_mk.dequantized(),
    b_kn.dequantized(),
    precision=jax.lax.Precision.HIGHEST,
  )


def _pallas(a, b, contract, out_dtype, accumulate, blocks, interpret):
  blocks_lib.chip_with_fp8()  # Or it raises.
  if b.tile[1 - contract[1]] == 1:
    # As many scales on either side: what is computed transposed is the result.
    return _multiply(
      b, a, contract[::-1], True, True, out_dtype, accumulate, blocks, interpret
    )
  # XLA stores a matrix, whose columns are no whole tiles of memory and whose
  # rows are, with its columns first.
  k, m = a.shape[contract[0]], a.shape[1 - contract[0]]
  n = b.shape[1 - contract[1]]
  is_ragged = n % _SIZE > 0
  if is_ragged and contract[1] == 0 and k % _SIZE == 0:
    b, contract = b.mT, (contract[0], 1)
  is_transposed = is_ragged and m % _SIZE == 0
  if is_transposed and accumulate is not None:
    accumulate = accumulate.T
  out = _multiply(
    *(a, b, contract, False, is_transposed),
    *(out_dtype, accumulate, blocks, interpret),
  )
  return out.T if is_transposed else out


def _multiply(
  a,
  b,
  contract,
  by_column,
  is_transposed,
  out_dtype,
  accumulate,
  blocks,
  interpret,
):
  """[m, n], or [n, m] if transposed, and of that shape what accumulates."""
  k, m = a.shape[contract[0]], a.shape[1 - contract[0]]
  n = b.shape[1 - contract[1]]
  scale_a_im = _scales('a', a, contract[0], 1)
  scale_b = _scales('b', b, contract[1], 1 if by_column else _SIZE)
  if blocks is None:
    out_bytes = jnp.dtype(out_dtype).itemsize
    if accumulate is not None:
      out_bytes += accumulate.dtype.itemsize
    blocks = blocks_lib.default(
      m, k, n, out_bytes, by_column, blocks_lib.chip()
    )
  blocks.check(k)
  behind = -k % blocks.depth
  steps = (k + behind) // blocks.depth
  scale_a_im, scale_b = (
    _padded(x, 0, -len(x) % (blocks.depth // _SIZE))
    for x in (scale_a_im, scale_b)
  )
  if not by_column:
    # [steps of k, tiles, scales of a tile along k, along its columns]
    per_tile = blocks.columns // _SIZE
    scale_b = _padded(scale_b, 1, -scale_b.shape[1] % per_tile)
    scale_b = scale_b.reshape(steps, len(scale_b) // steps, -1, per_tile)
    scale_b = scale_b.swapaxes(1, 2)
  return kernel.multiply(
    _padded(a.q, contract[0], behind),
    scale_a_im,
    _padded(b.q, contract[1], behind),
    scale_b,
    accumulate,
    blocks=blocks,
    contract=contract,
    is_transposed=is_transposed,
    out_dtype=out_dtype,
    interpret=interpret,
  )


def _scales(name, x, axis, other):
  """Scales [⌈k/128⌉, …] of an operand whose axis is k; other: the tile's."""
  scale = x.scale
  if x.tile == quantize_fp8_ops.TENSOR:
    shape = [-(-x.shape[1 - axis] // other)] * 2
    shape[axis] = -(-x.shape[axis] // _SIZE)
    scale = jnp.broadcast_to(scale, shape)
  elif (x.tile[axis], x.tile[1 - axis]) != (_SIZE, other):
    raise ValueError(
      f'{name} has tiles of {x.tile}: implementation=pallas needs {_SIZE} '
      f'along axis {axis}, which is k, and {other} along the other'
    )
  return scale if axis == 0 else scale.T


def _padded(x, axis, behind):
  if not behind:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = 0, behind
  return jnp.pad(x, widths)


def _check(a, b, contract, out_dtype, accumulate):
  if not {*contract} <= {0, 1}:
    raise ValueError(f'contract={contract} must be axes 0 or 1')
  sizes = a.shape[contract[0]], b.shape[contract[1]]
  if sizes[0] != sizes[1]:
    raise ValueError(f'k={sizes[0]} of a is not k={sizes[1]} of b')
  if out_dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f'out_dtype={out_dtype} must be float32 or bfloat16')
  if accumulate is not None:
    shape = a.shape[1 - contract[0]], b.shape[1 - contract[1]]
    if accumulate.shape != shape or accumulate.dtype != jnp.float32:
      raise ValueError(
        f'accumulate is {accumulate.dtype} {accumulate.shape}, not float32 '
        f'{shape}'
      )
    if out_dtype != jnp.float32:
      raise ValueError('what accumulates is float32, out_dtype must be, too')
