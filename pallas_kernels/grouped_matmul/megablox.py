"""Grouped matmul through JAX's megablox kernels for TPUs.

Blocks past the last group cost nothing: the kernels do not visit them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

# Most bytes of a row of a tile. With blocks of 512 bfloat16 rows VMEM holds two
# tiles of rows (2 · 1 MiB) and of weights (2 · 2 MiB), the result (2 · 1 MiB)
# and its float32 accumulator (2 MiB), 10 of 16 MiB.
_TILE_BYTES = 2048
# The gradient of the weights accumulates a tile of weights, and casts rows.
_GRAD_TILE_BYTES = 1024


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
  x_mk: jax.Array,
  w_gkn: jax.Array,
  size_g: jax.Array,
  block: int,
  interpret: bool,
) -> jax.Array:
  """See ops.grouped_matmul; a block of rows is a tile."""
  return _multiply(x_mk, w_gkn, size_g, block, interpret)


def _forward(x_mk, w_gkn, size_g, block, interpret):
  out_mn = _multiply(x_mk, w_gkn, size_g, block, interpret)
  return out_mn, (x_mk, w_gkn, size_g)


def _backward(block, interpret, saved, grad_mn):
  x_mk, w_gkn, size_g = saved
  _, k, n = w_gkn.shape
  grad_mk = _multiply(grad_mn, w_gkn, size_g, block, interpret, transposed=True)
  most = _GRAD_TILE_BYTES // x_mk.dtype.itemsize
  grad_gkn = tgmm(
    x_mk.T,  # Which it transposes back.
    grad_mn,
    size_g,
    w_gkn.dtype,
    (block, _tile(k, most), _tile(n, most)),
    interpret=interpret,
  )
  return grad_mk.astype(x_mk.dtype), grad_gkn, None


grouped_matmul.defvjp(_forward, _backward)


def _multiply(x_mk, w_gkn, size_g, block, interpret, transposed=False):
  _, k, n = w_gkn.shape
  k, n = (n, k) if transposed else (k, n)
  most = _TILE_BYTES // x_mk.dtype.itemsize
  out_mn = gmm(
    x_mk,
    w_gkn,
    size_g,
    x_mk.dtype,
    (block, _tile(k, most), _tile(n, most)),
    transpose_rhs=transposed,
    interpret=interpret,
  )
  # Rows that nobody wrote may hold anything. The last row stands for those of
  # choices without a row, where 0 times NaN would be NaN.
  is_unwritten = size_g.sum() < len(out_mn)
  return out_mn.at[-1].set(jnp.where(is_unwritten, 0, out_mn[-1]))


def _tile(size: int, most: int) -> int:
  """The size cut into equal tiles of whole lanes, or whole if it is small."""
  count = -(-size // most)
  if count == 1:
    return size
  return -(-size // (128 * count)) * 128
