"""Product of FP8 matrices, as DeepGEMM computes it: 128 of K at a time."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops


def matmul_fp8(
  a_mk: quantize_fp8_ops.Quantized, b_kn: quantize_fp8_ops.Quantized
) -> jax.Array:
  """Σ over blocks of K of (q_a · q_b) · scale_a · scale_b, float32 [m, n]."""
  k = a_mk.shape[1]
  scale_a, scale_b = a_mk.wide_scale(), b_kn.wide_scale()
  total_mn = 0.0
  for first in range(0, k, quantize_fp8_ops.SIZE):
    part = slice(first, min(first + quantize_fp8_ops.SIZE, k))
    product_mn = jnp.dot(
      a_mk.q[:, part].astype(jnp.float32),
      b_kn.q[part].astype(jnp.float32),
      precision=jax.lax.Precision.HIGHEST,
    )
    # Inside of a block of K a row of a, and a column of b, has one scale.
    total_mn += product_mn * scale_a[:, first, None] * scale_b[None, first]
  return total_mn
