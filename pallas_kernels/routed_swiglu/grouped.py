"""Routed experts as two grouped matmuls: the form that kernels speed up."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import ops as grouped_matmul_ops
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
  mean_choices: int,
  max_choices: int,
) -> jax.Array:
  """See ops.routed_swiglu; each expert has whole blocks of rows."""
  E = gate_EDF.shape[0]
  layout, expert_of_block = layout_lib.contiguous(
    expert_TK, E, min(block, max(mean_choices // E, 1)), max_choices
  )
  matmul = functools.partial(
    grouped_matmul_ops.grouped_matmul, group_of_block=expert_of_block
  )
  # One product for gate and up: fewer and larger operations.
  gate_up_EDF = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
  x_mD = layout_lib.dispatch(x_TD, layout)
  gate_mF, up_mF = jnp.split(matmul(x_mD, gate_up_EDF), 2, axis=-1)
  y_mD = matmul(jax.nn.silu(gate_mF) * up_mF, down_EFD)
  return layout_lib.combine(y_mD, weight_TK, layout)
