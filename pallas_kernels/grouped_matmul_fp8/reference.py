"""The obvious grouped FP8 products: one group after the other."""

import jax
import jax.numpy as jnp

from pallas_kernels.matmul_fp8 import reference as matmul_fp8
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

Quantized = quantize_fp8_ops.Quantized


def grouped_matmul_fp8(
  x_mk: Quantized, w_gkn: Quantized, size_g: jax.Array
) -> jax.Array:
  """See ops.grouped_matmul_fp8; rows past the last group are zero."""
  row_m1 = jnp.arange(x_mk.shape[0])[:, None]
  out_mn, start = 0.0, 0
  for g in range(len(size_g)):
    is_row_m1 = (start <= row_m1) & (row_m1 < start + size_g[g])
    product_mn = matmul_fp8.matmul_fp8(x_mk, group(w_gkn, g))
    out_mn = jnp.where(is_row_m1, product_mn, out_mn)
    start += size_g[g]
  return out_mn


def grouped_matmul_fp8_masked(
  x_gmk: Quantized, w_gkn: Quantized, size_g: jax.Array
) -> jax.Array:
  """See ops.grouped_matmul_fp8_masked; rows past a group's size are zero."""
  row_m1 = jnp.arange(x_gmk.shape[1])[:, None]
  return jnp.stack(
    [
      jnp.where(
        row_m1 < size_g[g],
        matmul_fp8.matmul_fp8(group(x_gmk, g), group(w_gkn, g)),
        0.0,
      )
      for g in range(len(size_g))
    ]
  )


def grouped_outer_fp8(
  x_mk: Quantized, y_mn: Quantized, size_g: jax.Array
) -> jax.Array:
  """See ops.grouped_outer_fp8."""
  out, start = [], 0
  for g in range(len(size_g)):
    end = start + size_g[g]
    out.append(
      matmul_fp8.matmul_fp8(only(x_mk, start, end).mT, only(y_mn, start, end))
    )
    start = end
  return jnp.stack(out)


def group(x: Quantized, g: int) -> Quantized:
  """One matrix of several."""
  return Quantized(x.q[g], x.scale[g], x.tile)


def only(x: Quantized, start: jax.Array, end: jax.Array) -> Quantized:
  """Zeros, whatever there was, but in some whole tiles of rows."""
  tile = x.tile[0] or x.shape[0]

  def keep(values, rows):
    first_m1 = rows * jnp.arange(len(values))[:, None]
    is_kept_m1 = (start <= first_m1) & (first_m1 < end)
    return jnp.where(is_kept_m1, values, jnp.zeros_like(values))

  scale = x.scale if x.tile[0] == 0 else keep(x.scale, tile)
  return Quantized(keep(x.q, 1), scale, x.tile)
