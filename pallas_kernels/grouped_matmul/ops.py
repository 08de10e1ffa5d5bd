"""Grouped matmul on the contiguous layout, and the plan that makes it.

Contiguous layout (DeepGEMM's): the rows of all groups stand one group after
the other, each group padded to whole blocks, so that one block has one group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import reference, xla

_IMPLEMENTATIONS = {
  'reference': reference.grouped_matmul,
  'xla': xla.grouped_matmul,
}


def grouped_matmul(
  x_mk: jax.Array,
  w_gkn: jax.Array,
  group_of_block: jax.Array,
  *,
  implementation: str = 'xla',
) -> jax.Array:
  """Multiplies each block of rows by its group's matrix.

  out[i] = x[i] · w[group_of_block[i // block]]

  with block = m / len(group_of_block).

  Args:
    x_mk: [m, k] rows in contiguous layout; padding rows may hold anything
      finite.
    w_gkn: [g, k, n] one matrix per group.
    group_of_block: int32 [m / block], values in [0, g).
    implementation: 'xla' or 'reference'.

  Returns:
    [m, n] in the dtype of x, accumulated in float32.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.
  """
  if implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f'implementation={implementation!r}, it must be one of '
      f'{", ".join(_IMPLEMENTATIONS)}'
    )
  if x_mk.shape[0] % group_of_block.shape[0]:
    raise ValueError(
      f'{x_mk.shape[0]} rows are no whole number of rows for '
      f'{group_of_block.shape[0]} blocks'
    )
  if x_mk.shape[1] != w_gkn.shape[1]:
    raise ValueError(
      f'k={x_mk.shape[1]} of the rows is not k={w_gkn.shape[1]} of the weights'
    )
  return _IMPLEMENTATIONS[implementation](x_mk, w_gkn, group_of_block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Where each (token, choice) stands in the contiguous layout.

  Attributes:
    slot_TK: int32 row of choice k of token t.
    source_m: int32 token of each row; T for padding.
    group_of_block: int32 group of each block.
  """

  slot_TK: jax.Array
  source_m: jax.Array
  group_of_block: jax.Array


def make_plan(group_TK: jax.Array, num_groups: int, block: int) -> Plan:
  """Plans the contiguous layout without sorting: a running count per group.

  At most T*K + g*(block-1) rows, rounded up to whole blocks: exact at any
  skew.

  Args:
    group_TK: int32 [T, K] group of each choice.
    num_groups: g.
    block: Rows a block.
  """
  T, K = group_TK.shape
  num_blocks = (T * K + num_groups * (block - 1)) // block
  group_r = group_TK.reshape(-1)
  one_hot_rg = jax.nn.one_hot(group_r, num_groups, dtype=jnp.int32)
  running_rg = jnp.cumsum(one_hot_rg, axis=0)
  rank_r = jnp.sum(running_rg * one_hot_rg, axis=1) - 1
  blocks_g = -(-running_rg[-1] // block)
  end_g = jnp.cumsum(blocks_g)
  start_g = end_g - blocks_g
  slot_r = jnp.sum(one_hot_rg * start_g, axis=1) * block + rank_r
  source_m = jnp.full((num_blocks * block,), T, jnp.int32)
  source_m = source_m.at[slot_r].set(
    jnp.arange(T * K, dtype=jnp.int32) // K, unique_indices=True
  )
  # Blocks past the last group hold padding only; any group will do for them.
  group_of_block = jnp.sum(
    jnp.arange(num_blocks)[:, None] >= end_g[None, :-1], axis=1
  )
  return Plan(slot_r.reshape(T, K), source_m, group_of_block.astype(jnp.int32))


@jax.custom_vjp
def dispatch(x_TD: jax.Array, plan: Plan) -> jax.Array:
  """Copies tokens to their rows: [T, D] -> [m, D]; padding rows are 0."""
  return jnp.take(x_TD, plan.source_m, axis=0, mode='fill', fill_value=0)


def _dispatch_fwd(x_TD, plan):
  return dispatch(x_TD, plan), plan


def _dispatch_bwd(plan, grad_mD):
  # A gather, not the scatter-add that autodiff would make of it.
  return jnp.sum(grad_mD[plan.slot_TK], axis=1), None


dispatch.defvjp(_dispatch_fwd, _dispatch_bwd)


@jax.custom_vjp
def combine(y_mD: jax.Array, weight_TK: jax.Array, plan: Plan) -> jax.Array:
  """Sums each token's rows with its weights: [m, D] -> [T, D]."""
  return jnp.einsum('TKD,TK->TD', y_mD[plan.slot_TK], weight_TK)


def _combine_fwd(y_mD, weight_TK, plan):
  return combine(y_mD, weight_TK, plan), (y_mD, weight_TK, plan)


def _combine_bwd(saved, grad_TD):
  y_mD, weight_TK, plan = saved
  grad_weight_TK = jnp.einsum('TKD,TD->TK', y_mD[plan.slot_TK], grad_TD)
  weight_m = jnp.zeros(y_mD.shape[0], weight_TK.dtype)
  weight_m = weight_m.at[plan.slot_TK.reshape(-1)].set(
    weight_TK.reshape(-1), unique_indices=True
  )
  grad_mD = jnp.take(grad_TD, plan.source_m, axis=0, mode='fill', fill_value=0)
  grad_mD = (grad_mD * weight_m[:, None]).astype(y_mD.dtype)
  return grad_mD, grad_weight_TK.astype(weight_TK.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)


def grouped_swiglu(
  x_mD: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  plan: Plan,
  *,
  implementation: str = 'xla',
) -> jax.Array:
  """Each expert's down(silu(gate(x)) · up(x)) on its own rows, [m, D]."""
  matmul = functools.partial(
    grouped_matmul,
    group_of_block=plan.group_of_block,
    implementation=implementation,
  )
  # One product for gate and up: fewer and larger operations.
  gate_up_EDF = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
  gate_mF, up_mF = jnp.split(matmul(x_mD, gate_up_EDF), 2, axis=-1)
  return matmul(jax.nn.silu(gate_mF) * up_mF, down_EFD)
