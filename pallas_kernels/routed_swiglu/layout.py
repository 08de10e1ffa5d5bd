"""Where the rows of experts stand, and how tokens get there and back.

A layout has one row for each choice (token, expert), rows of one expert side
by side. No sorting: a running count per expert gives each choice its rank.
"""

import dataclasses

import jax
import jax.numpy as jnp

# Tokens whose sums are held in float32.
_TOKENS_AT_ONCE = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
  """Rows of experts.

  Attributes:
    slot_TK: int32 row of choice k of token t; m if it has none.
    choice_m: int32 choice t · K + k of each row; T · K for padding.
  """

  slot_TK: jax.Array
  choice_m: jax.Array

  @property
  def source_m(self) -> jax.Array:
    """int32 token of each row; T for padding."""
    return self.choice_m // self.slot_TK.shape[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
  """Blocks of choices, each block of one expert.

  Attributes:
    choice_nb: int32 choice t · K + k of each row of each block; T · K for
      padding.
    expert_n: int32 expert of each block.
    num_blocks: int32 scalar; blocks from there on hold padding only.
  """

  choice_nb: jax.Array
  expert_n: jax.Array
  num_blocks: jax.Array


def contiguous(
  expert_TK: jax.Array,
  num_experts: int,
  block: int,
  max_choices: int | None = None,
) -> tuple[Layout, jax.Array]:
  """Contiguous layout (DeepGEMM's): each expert has whole blocks of rows.

  max_choices + E · (block - 1) rows, rounded to whole blocks: exact at any
  skew of so many choices.

  Args:
    expert_TK: int32 [T, K] expert of each choice, E for none.
    num_experts: E.
    block: Rows a block.
    max_choices: Choices there may be; T · K if None.

  Returns:
    The layout, and int32 [E] the rows of each expert, whole blocks.
  """
  T, K = expert_TK.shape
  num_blocks = ((max_choices or T * K) + num_experts * (block - 1)) // block
  rank_r, count_E = _ranks(expert_TK, num_experts)
  start_E, end_E = _spans(-(-count_E // block))
  expert_r = expert_TK.reshape(-1)
  slot_r = jnp.where(
    expert_r < num_experts,
    start_E[expert_r] * block + rank_r,
    num_blocks * block,
  )
  return (
    _layout(slot_r.reshape(T, K), num_blocks * block),
    block * jnp.diff(jnp.minimum(end_E, num_blocks), prepend=0),
  )


def head_and_tail(
  expert_TK: jax.Array,
  num_experts: int,
  head: int,
  block: int,
  max_choices: int | None = None,
) -> tuple[Layout, Tail]:
  """The first choices of each expert in equal shares, the rest in blocks.

  Args:
    expert_TK: int32 [T, K] expert of each choice, E for none.
    num_experts: E.
    head: Rows of each expert in the layout.
    block: Rows of a block of the tail.
    max_choices: Choices there may be; T · K if None.

  Returns:
    A layout of E · head rows, and the choices that it has no row for.
  """
  T, K = expert_TK.shape
  expert_r = expert_TK.reshape(-1)
  rank_r, count_E = _ranks(expert_TK, num_experts)
  is_choice_r = expert_r < num_experts
  slot_r = jnp.where(
    is_choice_r & (rank_r < head),
    expert_r * head + rank_r,
    num_experts * head,
  )
  layout = _layout(slot_r.reshape(T, K), num_experts * head)

  start_E, end_E = _spans(-(-jnp.maximum(count_E - head, 0) // block))
  num_blocks = (
    (max_choices or T * K) + num_experts * (block - 1)
  ) // block  # Enough.
  place_r = jnp.where(
    is_choice_r & (rank_r >= head),
    start_E[expert_r] * block + rank_r - head,
    num_blocks * block,
  )
  choice_n = _inverse(place_r, num_blocks * block)
  return layout, Tail(
    choice_nb=choice_n.reshape(num_blocks, block),
    expert_n=_expert_of_block(end_E, num_blocks),
    num_blocks=jnp.minimum(end_E[-1], num_blocks),
  )


@jax.custom_vjp
def dispatch(x_TD: jax.Array, layout: Layout) -> jax.Array:
  """Copies tokens to their rows: [T, D] -> [m, D].

  Padding rows hold a copy of some token: `combine` does not read them, and
  gives them no gradient.
  """
  return _take(x_TD, layout.source_m)


def sum_of_rows(y_mD: jax.Array, layout: Layout) -> jax.Array:
  """Sums each token's rows: [m, D] -> [T, D], what `dispatch` pulls back.

  A gather, not the scatter-add that autodiff would make of it.
  """
  has_row_TK = layout.slot_TK < len(layout.choice_m)
  return weighted_sum(y_mD, layout.slot_TK, has_row_TK)


dispatch.defvjp(
  lambda x_TD, layout: (dispatch(x_TD, layout), layout),
  lambda layout, grad_mD: (sum_of_rows(grad_mD, layout), None),
)


def of_rows(value_TK: jax.Array, layout: Layout) -> jax.Array:
  """The value of each row's choice, [m]; 0 for padding."""
  return jnp.take(
    value_TK.reshape(-1), layout.choice_m, mode='fill', fill_value=0
  )


def of_choices(value_m: jax.Array, layout: Layout) -> jax.Array:
  """The value of each choice's row, [T, K]; 0 where it has none."""
  return _masked(_take(value_m, layout.slot_TK), layout)


@jax.custom_vjp
def combine(y_mD: jax.Array, weight_TK: jax.Array, layout: Layout) -> jax.Array:
  """Sums each token's rows with its weights: [m, D] -> [T, D]."""
  return weighted_sum(y_mD, layout.slot_TK, _masked(weight_TK, layout))


def _combine_fwd(y_mD, weight_TK, layout):
  return combine(y_mD, weight_TK, layout), (y_mD, weight_TK, layout)


def _combine_bwd(saved, grad_TD):
  y_mD, weight_TK, layout = saved
  pull_mD = _take(grad_TD, layout.source_m)
  # By row, of which there are fewer than choices where most are elsewhere.
  grad_weight_m = jnp.einsum(
    'mD,mD->m', y_mD, pull_mD, preferred_element_type=jnp.float32
  )
  grad_mD = pull_mD * of_rows(weight_TK, layout)[:, None]
  return (
    grad_mD.astype(y_mD.dtype),
    of_choices(grad_weight_m, layout).astype(weight_TK.dtype),
    None,
  )


combine.defvjp(_combine_fwd, _combine_bwd)


def weighted_sum(
  rows_mD: jax.Array, slot_TK: jax.Array, weight_TK: jax.Array
) -> jax.Array:
  """Σ_k weight[t, k] · rows[slot[t, k]], [T, D] in the dtype of the rows.

  Summed in float32, one choice of each token after the other: all of them at
  once would be K times the result. Of many tokens some at a time, so that no
  float32 sum of all is ever held. A slot past the last row is the last row.
  """

  def of_tokens(slot_TK, weight_TK):
    total_TD = jnp.zeros((len(slot_TK), rows_mD.shape[1]), jnp.float32)
    for slot_T, weight_T in zip(slot_TK.T, weight_TK.T, strict=True):
      row_TD = _take(rows_mD, slot_T).astype(jnp.float32)
      total_TD += row_TD * weight_T.astype(jnp.float32)[:, None]
    return total_TD.astype(rows_mD.dtype)

  T = len(slot_TK)
  if T <= _TOKENS_AT_ONCE:
    return of_tokens(slot_TK, weight_TK)
  padded = lambda x: jnp.pad(x, ((0, -T % _TOKENS_AT_ONCE), (0, 0)))
  parts = lambda x: padded(x).reshape(-1, _TOKENS_AT_ONCE, x.shape[1])
  out_pTD = jax.lax.map(
    lambda xs: of_tokens(*xs), (parts(slot_TK), parts(weight_TK))
  )
  return out_pTD.reshape(-1, rows_mD.shape[1])[:T]


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
  """Rows by number; one past the last is the last, cheaper than zeros."""
  return jnp.take(rows, index, axis=0, mode='clip')


def _masked(value_TK: jax.Array, layout: Layout) -> jax.Array:
  """Values of choices that have a row; 0 for the others."""
  return jnp.where(layout.slot_TK < len(layout.choice_m), value_TK, 0)


def _ranks(
  expert_TK: jax.Array, num_experts: int
) -> tuple[jax.Array, jax.Array]:
  """Each choice's rank among those of its expert, [T · K]; counts, [E]."""
  one_hot_rE = jax.nn.one_hot(
    expert_TK.reshape(-1), num_experts, dtype=jnp.int32
  )
  running_rE = jnp.cumsum(one_hot_rE, axis=0)
  return jnp.sum(running_rE * one_hot_rE, axis=1) - 1, running_rE[-1]


def _spans(size_E: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Start and end of things of these sizes that stand side by side."""
  end_E = jnp.cumsum(size_E)
  return end_E - size_E, end_E


def _expert_of_block(end_E: jax.Array, num_blocks: int) -> jax.Array:
  # Blocks past the last expert's hold padding only; any expert will do.
  passed_nE = jnp.arange(num_blocks)[:, None] >= end_E[None, :-1]
  return jnp.sum(passed_nE, axis=1, dtype=jnp.int32)


def _inverse(place_r: jax.Array, size: int) -> jax.Array:
  """What stands at each place, [size]; len(place_r) where nothing does."""
  nothing = jnp.full((size,), len(place_r), jnp.int32)
  numbers = jnp.arange(len(place_r), dtype=jnp.int32)
  return nothing.at[place_r].set(numbers, mode='drop')


def _layout(slot_TK: jax.Array, m: int) -> Layout:
  return Layout(slot_TK, _inverse(slot_TK.reshape(-1), m))
