"""The grouped products of DeepSeek-V3's experts, to be compiled and measured.

8 groups: the experts of a device, or DeepGEMM's shapes (8 groups of 4,096 rows
there). K 7,168 and N 4,096 are gate and up side by side, K 2,048 and N 7,168
down.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.grouped_matmul import blocks as blocks_lib
from pallas_kernels.grouped_matmul import ops
from pallas_kernels.grouped_matmul import plan as plan_lib

# Rows, k, n: gate and up side by side, and down.
_GATE_UP = 8192, 7168, 4096
_DOWN = 8192, 2048, 7168
# Rows of each group: equally many, in blocks of 128, or as a router has it.
EVEN = (1024,) * 8
UNEVEN = (1227, 821, 1103, 945, 1180, 868, 1071, 977)
# A decoding step: room for 256 rows a group, about half of it taken.
_ROOM = 256
_DECODED = (128, 17, 256, 0, 96, 141, 64, 200)
_ITEMSIZE = 2


def cases() -> tuple[common.Case, ...]:
  """Forward, gradients of rows and of weights, and a decoding step.

  One of each for each generation: what control flow reads depends on the
  heights of the tiles.
  """
  return tuple(
    case
    for generation in blocks_lib.CHIPS
    for ending, widths in (('', _GATE_UP), ('_down', _DOWN))
    for case in (
      *_contiguous(generation, ending, EVEN, widths, block=128),
      *_contiguous(generation, '_uneven' + ending, UNEVEN, widths, block=1),
      _masked(generation, ending, widths),
    )
  )


def _contiguous(generation, ending, sizes, widths, block):
  """A product and both of its gradients."""
  m, k, n = widths
  g = len(sizes)
  blocks = blocks_lib.default(
    m, k, n, _ITEMSIZE, block, blocks_lib.CHIPS[generation]
  )
  multiply = functools.partial(
    ops.grouped_matmul, block=block, implementation='pallas', blocks=blocks
  )

  def grad_rows(x_mk, w_gkn, size_g, pull_mn):
    _, vjp = jax.vjp(lambda x_mk: multiply(x_mk, w_gkn, size_g), x_mk)
    return vjp(pull_mn)[0]

  def grad_weights(x_mk, w_gkn, size_g, pull_mn):
    _, vjp = jax.vjp(lambda w_gkn: multiply(x_mk, w_gkn, size_g), w_gkn)
    return vjp(pull_mn)[0]

  args = _struct(m, k), _struct(g, k, n), _struct(g, dtype=jnp.int32)
  start_g = tuple(int(x) for x in np.cumsum(sizes) - sizes)
  for name, function, given, sizes_of in (
    ('forward', multiply, args, blocks.forward),
    ('grad_rows', grad_rows, (*args, _struct(m, n)), blocks.grad_x),
    ('grad_weights', grad_weights, (*args, _struct(m, n)), blocks.grad_w),
  ):
    yield common.Case(
      kernel='grouped_matmul',
      name=name + ending,
      implementation='pallas',
      function=function,
      args=given,
      flops=2 * m * k * n,
      hbm_bytes=_ITEMSIZE * (m * k + g * k * n + m * n),
      scalars=functools.partial(
        _scalars, start_g, sizes, m, sizes_of.heights, name == 'grad_weights'
      ),
      generations=(generation,),
    )


def _masked(generation, ending, widths):
  """A decoding step."""
  _, k, n = widths
  g, m = len(_DECODED), sum(_DECODED)
  blocks = blocks_lib.masked(
    _ROOM, k, n, _ITEMSIZE, blocks_lib.CHIPS[generation]
  )
  return common.Case(
    kernel='grouped_matmul',
    name='masked' + ending,
    implementation='pallas',
    function=functools.partial(
      ops.grouped_matmul_masked, implementation='pallas', blocks=blocks
    ),
    args=(
      _struct(g, _ROOM, k),
      _struct(g, k, n),
      _struct(g, dtype=jnp.int32),
    ),
    flops=2 * m * k * n,
    hbm_bytes=_ITEMSIZE * (m * k + np.count_nonzero(_DECODED) * k * n + m * n),
    scalars=functools.partial(
      _scalars,
      tuple(range(0, _ROOM * g, _ROOM)),
      _DECODED,
      _ROOM * g,
      blocks.heights,
      False,
    ),
    generations=(generation,),
  )


@functools.cache
def _scalars(start_g, size_g, m, heights, visit_empty):
  """The plan, by place among the operands of the kernel."""
  make = functools.partial(
    plan_lib.make_plan,
    max_rows=m,
    heights=heights,
    align=blocks_lib.align(_ITEMSIZE),
    visit_empty=visit_empty,
  )
  values = jax.tree.leaves(jax.jit(make)(jnp.int32(start_g), jnp.int32(size_g)))
  return {'grouped_matmul': {i: np.asarray(x) for i, x in enumerate(values)}}


def _struct(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)
