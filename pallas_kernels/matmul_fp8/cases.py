"""DeepSeek-V3's projections in FP8, to be compiled and measured.

4,096 tokens and DeepGEMM's list of (K, N): both down projections of attention
side by side, the up projections of queries and of keys and values, that of its
result, and gate and up side by side and down of an expert.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.matmul_fp8 import ops
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

_TOKENS = 4096
_SIZES = (
  (7168, 2112),
  (1536, 24576),
  (512, 32768),
  (16384, 7168),
  (7168, 4096),
  (2048, 7168),
)
_WITH_GRADIENTS = 7168, 4096


def cases() -> tuple[common.Case, ...]:
  """Forward at all sizes, and at one the gradients of both operands."""
  rows, columns, blocks = (
    quantize_fp8_ops.ROWS,
    quantize_fp8_ops.COLUMNS,
    quantize_fp8_ops.BLOCKS,
  )
  k, n = _WITH_GRADIENTS
  w = _quantized(k, n, blocks)
  pull = (_TOKENS, n)
  return (
    *(
      _case(
        f'forward_{k}_{n}',
        _quantized(_TOKENS, k, rows),
        _quantized(k, n, blocks),
        contract=(1, 0),
        out_dtype=jnp.bfloat16,
      )
      for k, n in _SIZES
    ),
    _case(
      f'grad_rows_{k}_{n}',
      _quantized(*pull, rows),
      w,
      contract=(1, 1),
      out_dtype=jnp.bfloat16,
    ),
    _case(
      f'grad_weights_{k}_{n}',
      _quantized(_TOKENS, k, columns),
      _quantized(*pull, columns),
      contract=(0, 0),
      out_dtype=jnp.float32,
    ),
    _case(
      f'grad_weights_{k}_{n}_accumulated',
      _quantized(_TOKENS, k, columns),
      _quantized(*pull, columns),
      jax.ShapeDtypeStruct((k, n), jnp.float32),
      contract=(0, 0),
      out_dtype=jnp.float32,
    ),
  )


def _quantized(m, k, tile):
  scales = -(-m // tile[0]), -(-k // tile[1])
  return quantize_fp8_ops.Quantized(
    jax.ShapeDtypeStruct((m, k), quantize_fp8_ops.E4M3),
    jax.ShapeDtypeStruct(scales, jnp.float32),
    tile,
  )


def _case(name, a, b, *sums, contract, out_dtype):
  def run(a, b, *sums):
    return ops.matmul_fp8(
      a,
      b,
      contract=contract,
      implementation='pallas',
      out_dtype=out_dtype,
      accumulate=sums[0] if sums else None,
    )

  args = a, b, *sums
  out = jax.eval_shape(run, *args)
  k = a.shape[contract[0]]
  arrays = *jax.tree.leaves(args), out
  return common.Case(
    kernel='matmul_fp8',
    name=name,
    implementation='pallas',
    function=run,
    args=args,
    flops=2 * out.size * k,
    hbm_bytes=sum(x.size * x.dtype.itemsize for x in arrays),
    dtype='float8_e4m3fn',
    donate=(2,) if sums else (),
  )
