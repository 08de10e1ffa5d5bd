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
) -> jax.Array:
  """See ops.routed_swiglu; `block` rows of the tail make a turn."""
  T, K = expert_TK.shape
  E = gate_EDF.shape[0]
  head = min(T, max(math.ceil(_HEAD_SHARE * T * K / E), _SMALL_HEAD))
  # One product for gate and up: fewer and larger operations.
  gate_up_EDF = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
  layout, tail = layout_lib.head_and_tail(expert_TK, E, head, block)
  args = x_TD, weight_TK, gate_up_EDF, down_EFD
  if head == T:  # There is no tail.
    return _run_head(*args, layout)
  return _run_both(*args, layout, tail)


def _run_head(
  x_TD: jax.Array,
  weight_TK: jax.Array,
  gate_up_EDF: jax.Array,
  down_EFD: jax.Array,
  layout: layout_lib.Layout,
) -> jax.Array:
  """Sum over the choices of the head, [T, D]."""
  E, D, _ = gate_up_EDF.shape
  x_ECD = layout_lib.dispatch(x_TD, layout).reshape(E, -1, D)
  y_mD = _swiglu(x_ECD, gate_up_EDF, down_EFD).reshape(-1, D)
  return layout_lib.combine(y_mD, weight_TK, layout)


def _swiglu(x, gate_up, down):
  """Batched over any leading axes that all three have."""
  gate, up = jnp.split(_matmul(x, gate_up), 2, axis=-1)
  return _matmul(jax.nn.silu(gate) * up, down)


def _matmul(x, w):
  product = jnp.matmul(x, w, preferred_element_type=jnp.float32)
  return product.astype(x.dtype)


@jax.custom_vjp
def _run_both(
  x_TD: jax.Array,
  weight_TK: jax.Array,
  gate_up_EDF: jax.Array,
  down_EFD: jax.Array,
  layout: layout_lib.Layout,
  tail: layout_lib.Tail,
) -> jax.Array:
  """Sum over all choices: the tail adds to the head's sum, as do its gradients.

  Sums of their own would be filled with zeros, carried and added, which costs
  more than a short tail does.
  """
  args = x_TD, weight_TK, gate_up_EDF, down_EFD
  return _add_tail(_run_head(*args, layout), args, tail)


def _run_both_fwd(x_TD, weight_TK, gate_up_EDF, down_EFD, layout, tail):
  args = x_TD, weight_TK, gate_up_EDF, down_EFD
  out_TD, pull_head = jax.vjp(lambda *a: _run_head(*a, layout), *args)
  return _add_tail(out_TD, args, tail), (pull_head, args, tail)


def _run_both_bwd(saved, pull_TD):
  """Runs each block of the tail again: nothing of it is kept."""
  pull_head, args, tail = saved
  x_TD, weight_TK, gate_up_EDF, down_EFD = args

  def add_block(i, grads):
    rows = _Rows(tail, i, weight_TK)
    _, vjp = jax.vjp(
      _run_block,
      rows.of_tokens(x_TD),
      rows.of_choices(weight_TK),
      _at(gate_up_EDF, rows.expert),
      _at(down_EFD, rows.expert),
    )
    pulled = vjp(rows.of_tokens(pull_TD).astype(jnp.float32))
    return (
      rows.add_to_tokens(grads[0], pulled[0]),
      rows.add_to_choices(grads[1], pulled[1]),
      grads[2].at[rows.expert].add(pulled[2]),
      grads[3].at[rows.expert].add(pulled[3]),
    )

  of_head = tuple(g.astype(jnp.float32) for g in pull_head(pull_TD))
  grads = jax.lax.fori_loop(0, tail.num_blocks, add_block, of_head)
  return *(g.astype(a.dtype) for g, a in zip(grads, args)), None, None


_run_both.defvjp(_run_both_fwd, _run_both_bwd)


def _add_tail(out_TD, args, tail):
  x_TD, weight_TK, gate_up_EDF, down_EFD = args

  def add_block(i, out_TD):
    rows = _Rows(tail, i, weight_TK)
    out_bD = _run_block(
      rows.of_tokens(x_TD),
      rows.of_choices(weight_TK),
      _at(gate_up_EDF, rows.expert),
      _at(down_EFD, rows.expert),
    )
    return rows.add_to_tokens(out_TD, out_bD)

  out_TD = jax.lax.fori_loop(
    0, tail.num_blocks, add_block, out_TD.astype(jnp.float32)
  )
  return out_TD.astype(x_TD.dtype)


def _run_block(x_bD, weight_b, gate_up_DF, down_FD):
  """Weighted outputs of one expert, float32 [b, D]."""
  y_bD = _swiglu(x_bD, gate_up_DF, down_FD)
  return y_bD.astype(jnp.float32) * weight_b[:, None]


class _Rows:
  """The rows of one block of the tail; padding reads 0 and adds nothing."""

  def __init__(self, tail, i, weight_TK):
    K = weight_TK.shape[1]
    self.expert = tail.expert_n[i]
    self._choice_b = _at(tail.choice_nb, i)
    self._token_b = self._choice_b // K  # Of padding T, as its choice is T · K.

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
