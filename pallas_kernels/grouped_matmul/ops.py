"""Grouped matmul on the contiguous and the masked layout (DeepGEMM's).

Contiguous: the rows of all groups stand one group after the other, each group
padded to whole blocks, so that one block has one group. Masked: each group has
room for equally many rows, of which the first are there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import blocks as blocks_lib
from pallas_kernels.grouped_matmul import kernel, megablox, reference, xla

IMPLEMENTATIONS = ('xla', 'megablox', 'pallas', 'reference')
MASKED_IMPLEMENTATIONS = ('pallas', 'reference')


def grouped_matmul(
  x_mk: jax.Array,
  w_gkn: jax.Array,
  size_g: jax.Array,
  *,
  block: int,
  implementation: str,
  blocks: blocks_lib.Blocks | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Multiplies the rows of each group by its matrix.

  out[i] = x[i] · w[g] for the rows i of group g, which begin where those of
  group g - 1 end.

  Args:
    x_mk: [m, k] rows in contiguous layout; padding rows inside of a group may
      hold anything finite, those past the last group anything.
    w_gkn: [g, k, n] one matrix per group.
    size_g: int32 [g] rows of each group, whole blocks, at most m together.
    block: Rows a block. 'pallas' takes any, 1 for groups of any size, at the
      cost of the rows there are; one of 16 (8 for float32) or a multiple
      spares it the joining of groups that share a tile of memory.
    implementation: 'xla' (gathers a matrix for each block: small models),
      'megablox' (JAX's kernel for TPUs), 'pallas' (ours for TPUs, bfloat16 or
      float32; k and n that are no multiples of 128 are padded, a copy) or
      'reference'.
    blocks: Sizes of the tiles of 'pallas', by default those that suit shapes
      and device.
    interpret: Run the kernel on a CPU.

  Returns:
    [m, n] in the dtype of x, accumulated in float32. Rows past the last group
    are undefined, but for the last row of all, which is finite.

  Raises:
    ValueError: Shapes, types or tiles that do not fit, or an unknown
      implementation.
  """
  if x_mk.shape[0] % block:
    raise ValueError(
      f'{x_mk.shape[0]} rows are no whole number of blocks of {block}'
    )
  _check_k(x_mk.shape[1], w_gkn)
  match implementation:
    case 'xla':
      return xla.grouped_matmul(x_mk, w_gkn, size_g, block)
    case 'megablox':
      return megablox.grouped_matmul(x_mk, w_gkn, size_g, block, interpret)
    case 'pallas':
      _check_types(x_mk, w_gkn)
      if blocks is None:
        blocks = _default_blocks(x_mk, w_gkn, block)
      _check_blocks(blocks, x_mk, w_gkn)
      is_aligned = block % blocks_lib.align(x_mk.dtype.itemsize) == 0
      return _contiguous(
        x_mk, w_gkn, size_g, blocks, is_aligned, _interpreted(interpret)
      )
    case 'reference':
      return reference.grouped_matmul(x_mk, w_gkn, size_g)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )


def grouped_matmul_masked(
  x_gmk: jax.Array,
  w_gkn: jax.Array,
  size_g: jax.Array,
  *,
  implementation: str,
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Multiplies the first rows of each group by its matrix, for decoding.

  out[g, i] = x[g, i] · w[g] for i < size[g]

  Args:
    x_gmk: [g, m, k] room for m rows a group; those past its size may hold
      anything.
    w_gkn: [g, k, n] one matrix per group; that of an empty one is not read.
    size_g: int32 [g] rows of each group, m at most.
    implementation: 'pallas' (for TPUs, bfloat16 or float32; it has no gradient)
      or 'reference'.
    blocks: Sizes of the tiles of 'pallas', by default those that suit shapes
      and device.
    interpret: Run the kernel on a CPU.

  Returns:
    [g, m, n] in the dtype of x, accumulated in float32. Rows past a group's
    size are undefined.

  Raises:
    ValueError: Shapes, types or tiles that do not fit, or an unknown
      implementation.
  """
  g, m, k = x_gmk.shape
  if len(w_gkn) != g:
    raise ValueError(f'{g} groups of rows are not {len(w_gkn)} of weights')
  _check_k(k, w_gkn)
  match implementation:
    case 'pallas':
      _check_types(x_gmk, w_gkn)
      align = blocks_lib.align(x_gmk.dtype.itemsize)
      x_mk = _padded(x_gmk, 1, align, blocks_lib.LANES).reshape(
        g * _up(m, align), -1
      )
      w_gkn, n = _padded_weights(w_gkn), w_gkn.shape[2]
      shape = _up(m, align), x_mk.shape[1], w_gkn.shape[2]
      if blocks is None:
        blocks = blocks_lib.masked(
          *shape, x_gmk.dtype.itemsize, blocks_lib.chip()
        )
      blocks.check(shape[2], x_gmk.dtype.itemsize)
      out_mn = kernel.multiply(
        x_mk,
        w_gkn,
        _up(m, align) * jnp.arange(g),
        size_g,
        blocks=blocks,
        transposed=False,
        is_aligned=True,
        interpret=_interpreted(interpret),
      )
      return out_mn.reshape(g, -1, w_gkn.shape[2])[:, :m, :n]
    case 'reference':
      return reference.grouped_matmul_masked(x_gmk, w_gkn, size_g)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(MASKED_IMPLEMENTATIONS)}'
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _contiguous(x_mk, w_gkn, size_g, blocks, is_aligned, interpret):
  return _multiply(
    x_mk, w_gkn, size_g, blocks.forward, False, is_aligned, interpret
  )


def _forward(x_mk, w_gkn, size_g, *options):
  out_mn = _contiguous(x_mk, w_gkn, size_g, *options)
  return out_mn, (x_mk, w_gkn, size_g)


def _backward(blocks, is_aligned, interpret, saved, grad_mn):
  x_mk, w_gkn, size_g = saved
  _, k, n = w_gkn.shape
  grad_mk = _multiply(
    grad_mn, w_gkn, size_g, blocks.grad_x, True, is_aligned, interpret
  )
  align = blocks_lib.align(x_mk.dtype.itemsize)
  grad_gkn = kernel.weight_gradient(
    _padded(x_mk, align, blocks_lib.LANES),
    _padded(grad_mn, align, blocks_lib.LANES),
    jnp.cumsum(size_g) - size_g,
    size_g,
    blocks=blocks.grad_w,
    dtype=w_gkn.dtype,
    interpret=interpret,
  )
  return grad_mk, grad_gkn[:, :k, :n], None


_contiguous.defvjp(_forward, _backward)


def _multiply(x_mk, w_gkn, size_g, blocks, transposed, is_aligned, interpret):
  m, n = len(x_mk), w_gkn.shape[1 if transposed else 2]
  align = blocks_lib.align(x_mk.dtype.itemsize)
  out_mn = kernel.multiply(
    _padded(x_mk, align, blocks_lib.LANES),
    _padded_weights(w_gkn),
    jnp.cumsum(size_g) - size_g,
    size_g,
    blocks=blocks,
    transposed=transposed,
    is_aligned=is_aligned,
    interpret=interpret,
  )[:m, :n]
  # Rows that nobody wrote may hold anything. The last row stands for those of
  # choices without a row, where 0 times NaN would be NaN.
  is_unwritten = size_g.sum() < m
  return out_mn.at[-1].set(jnp.where(is_unwritten, 0, out_mn[-1]))


def _padded(x, *multiples):
  """Zeros behind the last axes, to multiples of so many; x if it has them."""
  sizes = x.shape[-len(multiples) :]
  behind = [-size % multiple for size, multiple in zip(sizes, multiples)]
  if not any(behind):
    return x
  return jnp.pad(
    x, [(0, 0)] * (x.ndim - len(behind)) + [(0, b) for b in behind]
  )


def _padded_weights(w_gkn):
  return _padded(w_gkn, blocks_lib.LANES, blocks_lib.LANES)


def _up(size, multiple):
  return -(-size // multiple) * multiple


def _widths(w_gkn):
  """k and n as the kernels see them."""
  return tuple(_up(size, blocks_lib.LANES) for size in w_gkn.shape[1:])


def _default_blocks(x_mk, w_gkn, block):
  return blocks_lib.default(
    len(x_mk), *_widths(w_gkn), x_mk.dtype.itemsize, block, blocks_lib.chip()
  )


def _check_blocks(blocks, x_mk, w_gkn):
  (k, n), itemsize = _widths(w_gkn), x_mk.dtype.itemsize
  blocks.forward.check(n, itemsize)
  blocks.grad_x.check(k, itemsize)
  blocks.grad_w.check(k, n, itemsize)


def _check_k(k, w_gkn):
  if k != w_gkn.shape[1]:
    raise ValueError(
      f'k={k} of the rows is not k={w_gkn.shape[1]} of the weights'
    )


def _check_types(x, w):
  if x.dtype != w.dtype or x.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(
      f'rows of {x.dtype} and weights of {w.dtype}: implementation=pallas '
      f'needs bfloat16 or float32 of both'
    )


def _interpreted(interpret):
  # The plain interpreter has no copies of sizes known at run time only.
  return pltpu.InterpretParams() if interpret is True else interpret
