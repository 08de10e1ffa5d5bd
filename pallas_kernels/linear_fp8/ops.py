"""Linear layers whose three products are FP8's, and the SwiGLU made of them.

What is kept for the way back is FP8: a layer's input, and of a SwiGLU what
enters the activation, which is computed again. The gradient of a weight sums
over tokens, so that its operands have tiles along them: the kept input is
dequantised, and quantised anew.

Source: DeepSeek-V3, arXiv:2412.19437, §3.3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import ops as grouped_matmul_ops
from pallas_kernels.matmul_fp8 import ops as matmul_fp8_ops
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

SCALINGS = ('block', 'tensor')


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['size_g'],
  meta_fields=['block', 'implementation'],
)
@dataclasses.dataclass(frozen=True)
class Groups:
  """Which rows have which of the weights [g, k, n]; see grouped_matmul.

  Attributes:
    size_g: int32 [g] rows of each group, whole blocks.
    block: Rows a block; a multiple of 128, so that no tile has two groups.
    implementation: Of grouped_matmul.
  """

  size_g: jax.Array
  block: int
  implementation: str

  def multiply(self, x_mk: jax.Array, w_gkn: jax.Array) -> jax.Array:
    return grouped_matmul_ops.grouped_matmul(
      x_mk,
      w_gkn,
      self.size_g,
      block=self.block,
      implementation=self.implementation,
    )


def linear(
  x_mk: jax.Array,
  w_kn: jax.Array,
  groups: Groups | None = None,
  *,
  scaling: str = 'block',
  power_of_two: bool = False,
) -> jax.Array:
  """x · w, and both gradients, from FP8 operands.

  Args:
    x_mk: [m, k].
    w_kn: [k, n]; [g, k, n] for groups of rows.
    groups: Of the rows.
    scaling: 'block' (1 x 128 of activations, 128 x 128 of weights) or 'tensor'
      (one scale for each, of each group's weights).
    power_of_two: Scales of x are powers of two.

  Returns:
    [m, n] in the dtype of x. The weight's gradient is in the weight's dtype.
  """
  return _linear(x_mk, w_kn, groups, scaling, power_of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x_mk, w_kn, groups, scaling, power_of_two):
  return _linear_fwd(x_mk, w_kn, groups, scaling, power_of_two)[0]


def _linear_fwd(x_mk, w_kn, groups, scaling, power_of_two):
  x = _rows(x_mk, scaling, power_of_two)
  y_mn = _product(x, _blocks(w_kn, scaling), groups)
  return y_mn.astype(x_mk.dtype), (x, w_kn, groups)


def _linear_bwd(scaling, power_of_two, saved, pull_mn):
  del power_of_two
  x, w_kn, groups = saved
  w = _blocks(w_kn, scaling)
  grad_mk = _product(_rows(pull_mn, scaling), w.mT, groups)
  grad_kn = _outer(
    _columns(x.dequantized(), scaling), _columns(pull_mn, scaling), groups
  )
  return grad_mk.astype(pull_mn.dtype), grad_kn.astype(w_kn.dtype), None


_linear.defvjp(_linear_fwd, _linear_bwd)


def swiglu(
  x_mk: jax.Array,
  gate_kn: jax.Array,
  up_kn: jax.Array,
  down_nk: jax.Array,
  groups: Groups | None = None,
  *,
  scaling: str = 'block',
  power_of_two: bool = False,
) -> jax.Array:
  """down(silu(gate(x)) · up(x)), and all gradients, from FP8 operands.

  The scales of the gradient that enters `down` are powers of two.

  Args:
    x_mk: [m, k].
    gate_kn: [k, n]; [g, k, n] for groups of rows, and so the others.
    up_kn: [k, n].
    down_nk: [n, k].
    groups: Of the rows.
    scaling: As that of `linear`.
    power_of_two: Scales of x are powers of two: what is sent to experts.

  Returns:
    [m, k] in the dtype of x. Weights' gradients are in the weights' dtype.
  """
  return _swiglu(x_mk, gate_kn, up_kn, down_nk, groups, scaling, power_of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _swiglu(x_mk, gate_kn, up_kn, down_nk, groups, scaling, power_of_two):
  args = x_mk, gate_kn, up_kn, down_nk, groups, scaling, power_of_two
  return _swiglu_fwd(*args)[0]


def _swiglu_fwd(x_mk, gate_kn, up_kn, down_nk, groups, scaling, power_of_two):
  x = _rows(x_mk, scaling, power_of_two)
  gate_mn = _product(x, _blocks(gate_kn, scaling), groups).astype(x_mk.dtype)
  up_mn = _product(x, _blocks(up_kn, scaling), groups).astype(x_mk.dtype)
  h = _rows(_activate(gate_mn, up_mn), scaling)
  y_mk = _product(h, _blocks(down_nk, scaling), groups)
  kept = x, _rows(gate_mn, scaling), _rows(up_mn, scaling)
  return y_mk.astype(x_mk.dtype), (kept, (gate_kn, up_kn, down_nk), groups)


def _swiglu_bwd(scaling, power_of_two, saved, pull_mk):
  del power_of_two
  (x, gate, up), weights, groups = saved
  dtype = pull_mk.dtype
  gate_w, up_w, down_w = (_blocks(w, scaling) for w in weights)
  pull = _rows(pull_mk, scaling, power_of_two=True)
  back_mn = _product(pull, down_w.mT, groups).astype(dtype)
  h_mn, vjp = jax.vjp(
    _activate,
    gate.dequantized().astype(dtype),
    up.dequantized().astype(dtype),
  )
  grads = vjp(back_mn)
  grad_mk = sum(
    _product(_rows(grad_mn, scaling), w.mT, groups)
    for grad_mn, w in zip(grads, (gate_w, up_w), strict=True)
  )
  x_columns = _columns(x.dequantized(), scaling)
  of_weights = [_outer(x_columns, _columns(g, scaling), groups) for g in grads]
  of_weights.append(
    _outer(_columns(h_mn, scaling), _columns(pull_mk, scaling), groups)
  )
  cast = (g.astype(w.dtype) for g, w in zip(of_weights, weights, strict=True))
  return grad_mk.astype(dtype), *cast, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def rounded(w_kn: jax.Array, scaling: str) -> jax.Array:
  """What a weight is multiplied as, in its dtype."""
  return _blocks(w_kn, scaling).dequantized().astype(w_kn.dtype)


def _activate(gate, up):
  return jax.nn.silu(gate) * up


def _rows(x_mk, scaling, power_of_two=False):
  return _quantize(x_mk, quantize_fp8_ops.ROWS, scaling, power_of_two)


def _columns(x_mk, scaling):
  return _quantize(x_mk, quantize_fp8_ops.COLUMNS, scaling)


def _blocks(w_kn, scaling):
  return _quantize(w_kn, quantize_fp8_ops.BLOCKS, scaling)


def _quantize(x, tile, scaling, power_of_two=False):
  match scaling:
    case 'block':
      pass
    case 'tensor':
      tile = quantize_fp8_ops.TENSOR
    case _:
      raise ValueError(
        f'scaling={scaling!r}, it must be one of {", ".join(SCALINGS)}'
      )
  return quantize_fp8_ops.quantize(x, tile, power_of_two=power_of_two)


def _product(a_mk, w_kn, groups):
  """a · w, float32."""
  if groups is None:
    return matmul_fp8_ops.matmul_fp8(a_mk, w_kn, implementation='xla')
  return groups.multiply(a_mk.dequantized(), w_kn.dequantized())


def _outer(x_mk, pull_mn, groups):
  """The gradient of a weight, float32: xᵀ · pull, of each group's rows."""
  if groups is None:
    return matmul_fp8_ops.matmul_fp8(x_mk.mT, pull_mn, implementation='xla')
  shape = (len(groups.size_g), x_mk.shape[1], pull_mn.shape[1])
  x_mk = x_mk.dequantized()
  # Linear in the weights, whatever they are.
  _, vjp = jax.vjp(
    lambda w_gkn: groups.multiply(x_mk, w_gkn),
    jnp.zeros(shape, x_mk.dtype),
  )
  return vjp(pull_mn.dequantized())[0]
