"""Routed experts in plain XLA for a CPU: an even head and a short tail.

Each expert's first choices, an eighth more than it has on average, are the
head: one batched product that copies no weights. What busy experts get beyond
is the tail: blocks of rows, done by a loop of as many turns as there are
blocks. Exact at any skew, and cheap where load is balanced, as the router's
bias sees to: the head has 1.125 · T · K rows, the tail what is above that, and
at most block - 1 rows of padding for each expert.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.routed_swiglu import layout as layout_lib

# Rows of an expert in the head over the average: what busy experts get beyond
# costs more in the tail, idle rows cost a little.
_HEAD_SHARE = 1.125
# Up to so many rows, every expert has room for all tokens and there is no
# tail: a step of decoding.
_SMALL_HEAD = 16


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
  """See ops.routed_swiglu; `block` rows of the tail make a turn."""
  T, E = len(x_TD), len(gate_EDF)
  head = min(T, max(math.ceil(_HEAD_SHARE * mean_choices / E), _SMALL_HEAD))
  layout, tail = layout_lib.head_and_tail(
    expert_TK, E, head, block, max_choices
  )
  return _run(
    x_TD,
    weight_TK,
    gate_EDF,
    up_EDF,
    down_EFD,
    layout,
    None if head == T else tail,  # There is none.
  )


@jax.custom_vjp
def _run(*args) -> jax.Array:
  """Sum over all choices, [T, D]: the head's, to which the tail adds its own.

  Kept for the way back is what the head's experts computed first, before the
  activation; the rest is cheaper to compute again than to carry. The tail runs
  each block again. Its gradients add to the head's: sums of their own would be
  filled with zeros, carried and added, which costs more than a short tail.
  """
  return _forward(*args)[0]


def _forward(x_TD, weight_TK, gate_EDF, up_EDF, down_EFD, layout, tail):
  x_ECD = _rows(x_TD, layout, gate_EDF)
  gate_up = _matmul(x_ECD, gate_EDF), _matmul(x_ECD, up_EDF)
  y_ECD = _matmul(_activate(*gate_up), down_EFD)
  out_TD = layout_lib.combine(
    y_ECD.reshape(-1, y_ECD.shape[-1]), weight_TK, layout
  )
  args = x_TD, weight_TK, gate_EDF, up_EDF, down_EFD, layout, tail
  if tail is not None:
    out_TD = _add_tail(
      out_TD, x_TD, weight_TK, (gate_EDF, up_EDF, down_EFD), tail
    )
  return out_TD, (args, gate_up)


def _backward(saved, pull_TD):
  args, gate_up = saved
  x_TD, weight_TK, gate_EDF, up_EDF, down_EFD, layout, tail = args
  E, C, _ = gate_up[0].shape

  x_ECD = _rows(x_TD, layout, gate_EDF)
  pull_ECD = _rows(pull_TD, layout, gate_EDF)
  weight_EC1 = layout_lib.of_rows(weight_TK, layout).reshape(E, C, 1)
  hidden_ECF, pull_activation = jax.vjp(_activate, *gate_up)
  back_ECF = _matmul(pull_ECD, down_EFD.mT)
  back_gate_ECF, back_up_ECF = pull_activation(back_ECF * weight_EC1)
  grad_x_ECD = _matmul(back_gate_ECF, gate_EDF.mT)
  grad_x_ECD += _matmul(back_up_ECF, up_EDF.mT)
  grads = (
    layout_lib.sum_of_rows(grad_x_ECD.reshape(E * C, -1), layout),
    layout_lib.of_choices(
      jnp.sum(hidden_ECF * back_ECF, axis=-1).reshape(-1), layout
    ),
    _outer(x_ECD, back_gate_ECF),
    _outer(x_ECD, back_up_ECF),
    _outer(hidden_ECF * weight_EC1, pull_ECD),
  )
  if tail is not None:
    grads = _add_tail_grads(
      grads, pull_TD, x_TD, weight_TK, (gate_EDF, up_EDF, down_EFD), tail
    )
  pairs = zip(grads, args)
  return *(g.astype(a.dtype) for g, a in pairs), None, None


_run.defvjp(_forward, _backward)


def _rows(x_TD, layout, w_EDF):
  """The head's rows of each expert, [E, C, D]."""
  E, D = len(w_EDF), x_TD.shape[-1]
  return layout_lib.dispatch(x_TD, layout).reshape(E, -1, D)


def _activate(gate, up):
  return jax.nn.silu(gate) * up


def _matmul(x, w):
  product = jnp.matmul(x, w, preferred_element_type=jnp.float32)
  return product.astype(x.dtype)


def _outer(x_ECD, y_ECF):
  """Gradient of each expert's weights, float32 [E, D, F]."""
  return jnp.matmul(x_ECD.mT, y_ECF, preferred_element_type=jnp.float32)


# ---- The tail -------------------------------------------------------------


def _add_tail(out_TD, x_TD, weight_TK, weights, tail):
  def add_block(i, out_TD):
    rows = _Rows(tail, i, weight_TK)
    out_bD = _run_block(*rows.of(x_TD, weight_TK, weights))
    return rows.add_to_tokens(out_TD, out_bD)

  total_TD = jax.lax.fori_loop(
    0, tail.num_blocks, add_block, out_TD.astype(jnp.float32)
  )
  return total_TD.astype(out_TD.dtype)


def _add_tail_grads(grads, pull_TD, x_TD, weight_TK, weights, tail):
  def add_block(i, grads):
    rows = _Rows(tail, i, weight_TK)
    args = rows.of(x_TD, weight_TK, weights)
    _, vjp = jax.vjp(_run_block, *args)
    pulled = vjp(rows.of_tokens(pull_TD).astype(jnp.float32))
    return (
      rows.add_to_tokens(grads[0], pulled[0]),
      rows.add_to_choices(grads[1], pulled[1]),
      *(g.at[rows.expert].add(p) for g, p in zip(grads[2:], pulled[2:])),
    )

  grads = tuple(g.astype(jnp.float32) for g in grads)
  return jax.lax.fori_loop(0, tail.num_blocks, add_block, grads)


def _run_block(x_bD, weight_b, gate_DF, up_DF, down_FD):
  """Weighted outputs of one expert, float32 [b, D]."""
  hidden_bF = _activate(_matmul(x_bD, gate_DF), _matmul(x_bD, up_DF))
  y_bD = _matmul(hidden_bF, down_FD)
  return y_bD.astype(jnp.float32) * weight_b[:, None]


class _Rows:
  """The rows of one block of the tail; padding reads 0 and adds nothing."""

  def __init__(self, tail, i, weight_TK):
    K = weight_TK.shape[1]
    self.expert = tail.expert_n[i]
    self._choice_b = _at(tail.choice_nb, i)
    self._token_b = self._choice_b // K  # Of padding T, as its choice is T · K.

  def of(self, x_TD, weight_TK, weights):
    """What the block computes with."""
    return (
      self.of_tokens(x_TD),
      self.of_choices(weight_TK),
      *(_at(w, self.expert) for w in weights),
    )

  def of_tokens(self, x_TD):
    return jnp.take(x_TD, self._token_b, axis=0, mode='fill', fill_value=0)

  def of_choices(self, weight_TK):
    return jnp.take(
      weight_TK.reshape(-1), self._choice_b, mode='fill', fill_value=0
    )

  def add_to_tokens(self, sum_TD, x_bD):
    return sum_TD.at[self._token_b].add(x_bD, mode='drop')

  def add_to_choices(self, sum_TK, x_b):
    sum_r = sum_TK.reshape(-1).at[self._choice_b].add(x_b, mode='drop')
    return sum_r.reshape(sum_TK.shape)


def _at(x, i):
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
