"""Products of FP8 matrices with scales of tiles."""

import jax
import jax.numpy as jnp

from pallas_kernels.matmul_fp8 import reference
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

IMPLEMENTATIONS = ('xla', 'reference')


def matmul_fp8(
  a_mk: quantize_fp8_ops.Quantized,
  b_kn: quantize_fp8_ops.Quantized,
  *,
  implementation: str,
) -> jax.Array:
  """The product of two quantised matrices, accumulated in float32.

  Both have tiles along k that are the same for all of a row of a, or of a
  column of b, inside of 128 of k: rows x blocks (forward and input gradient;
  `b.mT` is the transposed weight), or rows x columns (weight gradient, whose
  a is transposed).

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2; DeepGEMM.

  Args:
    a_mk: [m, k].
    b_kn: [k, n].
    implementation: 'xla' (exact emulation: float32 products of q · scale) or
      'reference'.

  Returns:
    float32 [m, n].

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.
  """
  if a_mk.shape[-1] != b_kn.shape[-2]:
    raise ValueError(f'k={a_mk.shape[-1]} of a is not k={b_kn.shape[-2]} of b')
  match implementation:
    case 'xla':
      return jnp.dot(
        a_mk.dequantized(),
        b_kn.dequantized(),
        precision=jax.lax.Precision.HIGHEST,
      )
    case 'reference':
      return reference.matmul_fp8(a_mk, b_kn)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )
