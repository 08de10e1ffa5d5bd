"""The FP8 products of DeepSeek-V3's experts, to be compiled and measured.

8 groups: the experts of a device. K 7,168 and N 4,096 are gate and up side by
side, K 2,048 and N 7,168 down. Rows stand in blocks of 128.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul_fp8 import blocks as blocks_lib
from pallas_kernels.grouped_matmul_fp8 import kernel, ops
from pallas_kernels.grouped_matmul_fp8 import outer as outer_kernel
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

# k, n: gate and up side by side, and down.
_GATE_UP = 7168, 4096
_DOWN = 2048, 7168
_BLOCK = 128
# Rows of each group: equally many, or as a router has it.
EVEN = (1024,) * 8
UNEVEN = (1280, 896, 1152, 896, 1152, 896, 1024, 896)
# A decoding step: room for 256 rows a group, about half of it taken.
_ROOM = 256
_DECODED = (128, 17, 256, 0, 96, 141, 64, 200)
_Quantized = quantize_fp8_ops.Quantized


def cases() -> tuple[common.Case, ...]:
  """Forward, gradients of rows and of weights, and a decoding step."""
  return (
    *_contiguous('', EVEN, _GATE_UP),
    *_contiguous('_uneven', UNEVEN, _GATE_UP),
    *_contiguous('_down', EVEN, _DOWN),
    _masked('', _GATE_UP),
    _masked('_down', _DOWN),
  )


def _contiguous(ending, sizes, widths):
  """A product and both of its gradients."""
  (k, n), m, g = widths, sum(sizes), len(sizes)
  rows, columns = quantize_fp8_ops.ROWS, quantize_fp8_ops.COLUMNS
  w = _quantized(g, k, n, tile=quantize_fp8_ops.BLOCKS)
  multiply = functools.partial(
    ops.grouped_matmul_fp8,
    block=_BLOCK,
    implementation='pallas',
    out_dtype=jnp.bfloat16,
  )
  outer = functools.partial(
    ops.grouped_outer_fp8, block=_BLOCK, implementation='pallas'
  )
  for name, function, x, y, out_bytes in (
    ('forward', multiply, _quantized(m, k, tile=rows), w, 2 * m * n),
    (
      'grad_rows',
      functools.partial(multiply, transposed=True),
      _quantized(m, n, tile=rows),
      w,
      2 * m * k,
    ),
    (
      'grad_weights',
      outer,
      _quantized(m, k, tile=columns),
      _quantized(m, n, tile=columns),
      4 * g * k * n,
    ),
  ):
    yield common.Case(
      kernel='grouped_matmul_fp8',
      name=name + ending,
      implementation='pallas',
      function=function,
      args=(x, y, jax.ShapeDtypeStruct((g,), jnp.int32)),
      flops=2 * m * k * n,
      hbm_bytes=_bytes(x) + _bytes(y) + out_bytes,
      dtype='float8_e4m3fn',
      scalars=functools.partial(
        _scalars, sizes, m, name == 'grad_weights', None
      ),
    )


def _masked(ending, widths):
  """A decoding step."""
  (k, n), g, m = widths, len(_DECODED), sum(_DECODED)
  x = _quantized(g, _ROOM, k, tile=quantize_fp8_ops.ROWS)
  w = _quantized(g, k, n, tile=quantize_fp8_ops.BLOCKS)
  return common.Case(
    kernel='grouped_matmul_fp8',
    name='masked' + ending,
    implementation='pallas',
    function=functools.partial(
      ops.grouped_matmul_fp8_masked,
      implementation='pallas',
      out_dtype=jnp.bfloat16,
    ),
    args=(x, w, jax.ShapeDtypeStruct((g,), jnp.int32)),
    flops=2 * m * k * n,
    # Rows and results that are there, and weights of groups that have any.
    hbm_bytes=m * _bytes(x) // (g * _ROOM)
    + np.count_nonzero(_DECODED) * _bytes(w) // g
    + 2 * m * n,
    dtype='float8_e4m3fn',
    scalars=functools.partial(_scalars, _DECODED, g * _ROOM, False, _ROOM),
  )


def _bytes(x):
  return x.q.size + 4 * x.scale.size


@functools.cache
def _scalars(sizes, m, outer, room):
  """What control flow reads, by place among the operands of the kernel."""
  size_g = np.int32(sizes)
  start_g = room * np.arange(len(sizes)) if room else np.cumsum(sizes) - sizes
  made = jax.jit(
    functools.partial(
      plan_lib.make_plan,
      max_rows=m,
      heights=blocks_lib.DEPTHS if outer else (min(1024, room or m),),
      align=kernel.ALIGN,
      visit_empty=outer,
    )
  )(jnp.int32(start_g), size_g)
  names = outer_kernel.PLAN if outer else kernel.PLAN
  values = [np.asarray(getattr(made, name)) for name in names]
  if not outer:
    values.append(np.int32([start_g[-1] + sizes[-1]]))
  name = 'grouped_outer_fp8' if outer else 'grouped_matmul_fp8'
  return {name: dict(enumerate(values))}


def _quantized(*shape, tile):
  *lead, m, k = shape
  scales = *lead, -(-m // tile[0]), -(-k // tile[1])
  return _Quantized(
    jax.ShapeDtypeStruct(shape, quantize_fp8_ops.E4M3),
    jax.ShapeDtypeStruct(scales, jnp.float32),
    tile,
  )
