"""FP8 where the model uses it: linears, experts, and tokens that travel.

Source: DeepSeek-V3, arXiv:2412.19437, §3.3.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.linear_fp8 import ops as linear_fp8_ops
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

E4M3 = quantize_fp8_ops.E4M3
TILE = quantize_fp8_ops.SIZE

# How linears and experts multiply: in the compute type, or from FP8 operands
# with a scale for each tile (V3's recipe) or for each tensor.
PRECISIONS = ('dtype', 'block_fp8', 'tensor_fp8')
IMPLEMENTATIONS = linear_fp8_ops.IMPLEMENTATIONS
Recipe = linear_fp8_ops.Recipe
_SCALINGS = {'block_fp8': 'block', 'tensor_fp8': 'tensor'}


def quantize_tiles(
  x: jax.Array, *, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Each tile of 128 channels of a token as q · scale.

  Args:
    x: [..., D]; the last tile may be narrower.
    power_of_two: Round scales up to powers of two (UE8M0's values).

  Returns:
    q e4m3 [..., D] and scale float32 [..., ceil(D / 128)].
  """
  flat = quantize_fp8_ops.quantize(
    x.reshape(-1, x.shape[-1]),
    quantize_fp8_ops.ROWS,
    power_of_two=power_of_two,
  )
  return flat.q.reshape(x.shape), flat.scale.reshape(*x.shape[:-1], -1)


def dequantize_tiles(
  q: jax.Array, scale: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """q · scale in float32, then in `dtype`."""
  tiles = quantize_fp8_ops.Quantized(
    q.reshape(-1, q.shape[-1]),
    scale.reshape(-1, scale.shape[-1]),
    quantize_fp8_ops.ROWS,
  )
  return tiles.dequantized().reshape(q.shape).astype(dtype)


def recipe(precision: str, implementation: str) -> Recipe | None:
  """For one of PRECISIONS; None for products in the compute type."""
  if precision not in _SCALINGS:
    return None
  return Recipe(_SCALINGS[precision], implementation)


def weight_dtype(dtype: jnp.dtype, recipe: Recipe | None) -> jnp.dtype:
  """What weights are read in: FP8 is made of the float32 they are kept in.

  So that their gradients are float32, too.
  """
  return dtype if recipe is None else jnp.dtype('float32')


def einsum(
  formula: str,
  x: jax.Array,
  w: jax.Array,
  *,
  recipe: Recipe | None,
  power_of_two: bool = False,
) -> jax.Array:
  """A linear: jnp.einsum of activations and a weight.

  Args:
    formula: As 'BTHU,DHU->BTD': what is summed comes last in x, and the axes of
      the result are x's others, then the weight's others.
    x: Activations.
    w: The weight.
    recipe: Of FP8; None for the dtype of x.
    power_of_two: Scales of x are powers of two, in FP8.

  Returns:
    In the dtype of x.
  """
  if recipe is None:
    return jnp.einsum(formula, x, w)
  first, order = _parse(formula)
  w = w.transpose(order)
  inner = math.prod(x.shape[first:])
  y_mn = linear_fp8_ops.linear(
    x.reshape(-1, inner),
    w.reshape(inner, -1),
    recipe=recipe,
    power_of_two=power_of_two,
  )
  return y_mn.reshape(*x.shape[:first], *w.shape[x.ndim - first :])


def rounded(
  formula: str, w: jax.Array, dtype: jnp.dtype, recipe: Recipe | None
) -> jax.Array:
  """A weight as `einsum` multiplies it, where it is applied in another order.

  Args:
    formula: That einsum's.
    w: The weight.
    dtype: Of the result.
    recipe: As that einsum's.
  """
  if recipe is None:
    return w
  first, order = _parse(formula)
  moved = w.transpose(order)
  num_summed = formula.index(',') - first
  inner = math.prod(moved.shape[:num_summed])
  flat = linear_fp8_ops.rounded(moved.reshape(inner, -1), recipe)
  back = sorted(range(len(order)), key=order.__getitem__)
  return flat.reshape(moved.shape).transpose(back).astype(dtype)


def _parse(formula: str) -> tuple[int, list[int]]:
  """Where the summed axes of x begin, and the weight's axes, those first."""
  names, out = formula.split('->')
  of_x, of_w = names.split(',')
  summed = [a for a in of_x if a in of_w]
  kept = [a for a in of_w if a not in of_x]
  first = len(of_x) - len(summed)
  if [*of_x[first:]] != summed or [*out] != [*of_x[:first], *kept]:
    raise ValueError(f'{formula} is no linear: see `einsum`')
  return first, [of_w.index(a) for a in summed + kept]
