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

from pallas_kernels.grouped_matmul_fp8 import ops as grouped_matmul_fp8_ops
from pallas_kernels.matmul_fp8 import ops as matmul_fp8_ops
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

SCALINGS = ('block', 'tensor')
IMPLEMENTATIONS = ('xla', 'pallas')


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How numbers become FP8, and how they are multiplied.

  Attributes:
    scaling: 'block' (1 x 128 of activations, 128 x 128 of weights) or 'tensor'
      (one scale for each, of each group's weights).
    implementation: 'xla' (exact emulation in float32, for any device) or
      'pallas' (kernels for TPUs).
    interpret: Run the kernels on a CPU.
  """

  scaling: str = 'block'
  implementation: str = 'xla'
  interpret: bool = False

  def __post_init__(self):
    for name, valid in (
      ('scaling', SCALINGS),
      ('implementation', IMPLEMENTATIONS),
    ):
      if getattr(self, name) not in valid:
        raise ValueError(
          f'{name}={getattr(self, name)!r}, it must be one of '
          f'{", ".join(valid)}'
        )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['size_g'],
  meta_fields=['block'],
)
@dataclasses.dataclass(frozen=True)
class Groups:
  """Which rows have which of the weights [g, k, n]; see grouped_matmul_fp8.

  Attributes:
    size_g: int32 [g] rows of each group, whole blocks.
    block: Rows a block; a multiple of 128, so that no tile has two groups.
  """

  size_g: jax.Array
  block: int


def linear(
  x_mk: jax.Array,
  w_kn: jax.Array,
  groups: Groups | None = None,
  *,
  recipe: Recipe,
  power_of_two: bool = False,
) -> jax.Array:
  """x · w, and both gradients, from FP8 operands.

  Args:
    x_mk: [m, k].
    w_kn: [k, n]; [g, k, n] for groups of rows.
    groups: Of the rows.
    recipe: Scales, and kernels or none.
    power_of_two: Scales of x are powers of two.

  Returns:
    [m, n] in the dtype of x. The weight's gradient is in the weight's dtype.
  """
  return _linear(x_mk, w_kn, groups, recipe, power_of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _linear(x_mk, w_kn, groups, recipe, power_of_two):
  return _linear_fwd(x_mk, w_kn, groups, recipe, power_of_two)[0]


def _linear_fwd(x_mk, w_kn, groups, recipe, power_of_two):
  x = _rows(x_mk, recipe, power_of_two)
  y_mn = _product(x, _blocks(w_kn, recipe), groups, recipe)
  return y_mn.astype(x_mk.dtype), (x, w_kn, groups)


def _linear_bwd(recipe, power_of_two, saved, pull_mn):
  del power_of_two
  x, w_kn, groups = saved
  w = _blocks(w_kn, recipe)
  grad_mk = _product(_rows(pull_mn, recipe), w, groups, recipe, transposed=True)
  grad_kn = _outer(_again(x, recipe), _columns(pull_mn, recipe), groups, recipe)
  return grad_mk.astype(pull_mn.dtype), grad_kn.astype(w_kn.dtype), None


_linear.defvjp(_linear_fwd, _linear_bwd)


def swiglu(
  x_mk: jax.Array,
  gate_kn: jax.Array,
  up_kn: jax.Array,
  down_nk: jax.Array,
  groups: Groups | None = None,
  *,
  recipe: Recipe,
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
    recipe: Scales, and kernels or none.
    power_of_two: Scales of x are powers of two: what is sent to experts.

  Returns:
    [m, k] in the dtype of x. Weights' gradients are in the weights' dtype.
  """
  return _swiglu(x_mk, gate_kn, up_kn, down_nk, groups, recipe, power_of_two)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _swiglu(x_mk, gate_kn, up_kn, down_nk, groups, recipe, power_of_two):
  args = x_mk, gate_kn, up_kn, down_nk, groups, recipe, power_of_two
  return _swiglu_fwd(*args)[0]


def _swiglu_fwd(x_mk, gate_kn, up_kn, down_nk, groups, recipe, power_of_two):
  x = _rows(x_mk, recipe, power_of_two)
  multiply = lambda a, w: _product(a, _blocks(w, recipe), groups, recipe)
  gate_mn = multiply(x, gate_kn).astype(x_mk.dtype)
  up_mn = multiply(x, up_kn).astype(x_mk.dtype)
  y_mk = multiply(_activated(gate_mn, up_mn, recipe), down_nk)
  kept = x, _rows(gate_mn, recipe), _rows(up_mn, recipe)
  return y_mk.astype(x_mk.dtype), (kept, (gate_kn, up_kn, down_nk), groups)


def _swiglu_bwd(recipe, power_of_two, saved, pull_mk):
  del power_of_two
  (x, gate, up), weights, groups = saved
  dtype = pull_mk.dtype
  gate_w, up_w, down_w = (_blocks(w, recipe) for w in weights)
  pull = _rows(pull_mk, recipe, power_of_two=True)
  back = functools.partial(
    _product, groups=groups, recipe=recipe, transposed=True
  )
  back_mn = back(pull, down_w).astype(dtype)
  h_mn, vjp = jax.vjp(
    _activate,
    gate.dequantized().astype(dtype),
    up.dequantized().astype(dtype),
  )
  grads = vjp(back_mn)
  grad_mk = sum(
    back(_rows(grad_mn, recipe), w)
    for grad_mn, w in zip(grads, (gate_w, up_w), strict=True)
  )
  outer = lambda a, b: _outer(a, _columns(b, recipe), groups, recipe)
  x_columns = _again(x, recipe)
  of_weights = [outer(x_columns, g) for g in grads]
  of_weights.append(outer(_columns(h_mn, recipe), pull_mk))
  cast = (g.astype(w.dtype) for g, w in zip(of_weights, weights, strict=True))
  return grad_mk.astype(dtype), *cast, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def rounded(w_kn: jax.Array, recipe: Recipe) -> jax.Array:
  """What a weight is multiplied as, in its dtype."""
  return _blocks(w_kn, recipe).dequantized().astype(w_kn.dtype)


def _activate(gate_mn, up_mn):
  """In float32, rounded once, as it is quantised."""
  gate, up = gate_mn.astype(jnp.float32), up_mn.astype(jnp.float32)
  return (jax.nn.silu(gate) * up).astype(gate_mn.dtype)


def _activated(gate_mn, up_mn, recipe):
  """The activation, FP8."""
  if recipe.scaling == 'tensor':
    return _rows(_activate(gate_mn, up_mn), recipe)
  return quantize_fp8_ops.swiglu_quantize(gate_mn, up_mn, **_how(recipe))


def _again(x, recipe):
  """Of kept FP8, for sums over its rows."""
  if recipe.scaling == 'tensor':
    return _columns(x.dequantized(), recipe)
  return quantize_fp8_ops.requantize(x, **_how(recipe))


def _rows(x_mk, recipe, power_of_two=False):
  return _quantize(x_mk, quantize_fp8_ops.ROWS, recipe, power_of_two)


def _columns(x_mk, recipe):
  return _quantize(x_mk, quantize_fp8_ops.COLUMNS, recipe)


def _blocks(w_kn, recipe):
  return _quantize(w_kn, quantize_fp8_ops.BLOCKS, recipe)


def _quantize(x, tile, recipe, power_of_two=False):
  if recipe.scaling == 'tensor':
    return quantize_fp8_ops.quantize(
      x, quantize_fp8_ops.TENSOR, power_of_two=power_of_two
    )
  return quantize_fp8_ops.quantize(
    x, tile, power_of_two=power_of_two, **_how(recipe)
  )


def _product(a_mk, w_kn, groups, recipe, *, transposed=False):
  """a · w, or a · wᵀ, float32."""
  if groups is None:
    return matmul_fp8_ops.matmul_fp8(
      a_mk, w_kn, contract=(1, 1 if transposed else 0), **_how(recipe)
    )
  return grouped_matmul_fp8_ops.grouped_matmul_fp8(
    a_mk,
    w_kn,
    groups.size_g,
    block=groups.block,
    transposed=transposed,
    **_how(recipe),
  )


def _outer(x_mk, pull_mn, groups, recipe):
  """The gradient of a weight, float32: xᵀ · pull, of each group's rows."""
  if groups is None:
    return matmul_fp8_ops.matmul_fp8(
      x_mk, pull_mn, contract=(0, 0), **_how(recipe)
    )
  return grouped_matmul_fp8_ops.grouped_outer_fp8(
    x_mk, pull_mn, groups.size_g, block=groups.block, **_how(recipe)
  )


def _how(recipe):
  return {
    'implementation': recipe.implementation,
    'interpret': recipe.interpret,
  }
