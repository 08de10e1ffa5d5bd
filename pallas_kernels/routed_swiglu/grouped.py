"""Routed experts as three grouped matmuls: the form that kernels speed up."""

import functools

import jax

from pallas_kernels.grouped_matmul import ops as grouped_matmul_ops
from pallas_kernels.linear_fp8 import ops as linear_fp8_ops
from pallas_kernels.routed_swiglu import layout as layout_lib


def routed_swiglu(
  x_TD: jax.Array,
  expert_TK: jax.Array,
  weight_TK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  *,
  block: int,
  max_choices: int,
  matmul: str,
  interpret: bool,
  recipe: linear_fp8_ops.Recipe | None,
) -> jax.Array:
  """See ops.routed_swiglu; each expert has whole blocks of rows."""
  layout, size_E = layout_lib.contiguous(
    expert_TK, len(gate_EDF), block, max_choices
  )
  multiply = functools.partial(
    grouped_matmul_ops.grouped_matmul,
    size_g=size_E,
    block=block,
    implementation=matmul,
    interpret=interpret,
  )
  x_mD = layout_lib.dispatch(x_TD, layout)
  if recipe is not None:
    y_mD = linear_fp8_ops.swiglu(
      x_mD,
      gate_EDF,
      up_EDF,
      down_EFD,
      linear_fp8_ops.Groups(size_E, block),
      recipe=recipe,
      power_of_two=True,
    )
    return layout_lib.combine(y_mD, weight_TK, layout)
  # Two products: one would need a copy of both weights side by side.
  hidden_mF = jax.nn.silu(multiply(x_mD, gate_EDF)) * multiply(x_mD, up_EDF)
  y_mD = multiply(hidden_mF, down_EFD)
  return layout_lib.combine(y_mD, weight_TK, layout)
