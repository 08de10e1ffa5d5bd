"""Routed experts in plain XLA for a CPU: an even head and a short tail.

Each expert's first choices, as many as it has on average, are the head: one
batched product that copies no weights. What busy experts get beyond is the
tail: blocks of rows, done by a loop of as many turns as there are blocks.
Exact at any skew, and cheap where load is balanced, as the router's bias sees
to: the head has T · K rows, the tail what is above the average, and at most
block - 1 rows of padding for each expert.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.routed_swiglu import layout as layout_lib

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
  E, D, _ = gate_EDF.shape
  head = min(T, max(-(-T * K // E), _SMALL_HEAD))
  # One product for gate and up: fewer and larger operations.
  gate_up_EDF = jnp.concatenate([gate_EDF, up_EDF], axis=-1)
  layout, tail = layout_lib.head_and_tail(expert_TK, E, head, block)

  x_ECD = layout_lib.dispatch(x_TD, layout).reshape(E, head, D)
  y_mD = _swiglu(x_ECD, gate_up_EDF, down_EFD).reshape(E * head, D)
  out_TD = layout_lib.combine(y_mD, weight_TK, layout)
  if head < T:
    out_TD += _run_tail(x_TD, weight_TK, gate_up_EDF, down_EFD, tail)
  return out_TD


def _swiglu(x, gate_up, down):
  """Batched over any leading axes that all three have."""
  gate, up = jnp.split(_matmul(x, gate_up), 2, axis=-1)
  return _matmul(jax.nn.silu(gate) * up, down)


def _matmul(x, w):
  product = jnp.matmul(x, w, preferred_element_type=jnp.float32)
  return product.astype(x.dtype)


@jax.custom_vjp
def _run_tail(
  x_TD: jax.Array,
  weight_TK: jax.Array,
  gate_up_EDF: jax.Array,
  down_EFD: jax.Array,
  tail: layout_lib.Tail,
) -> jax.Array:
  """Sum over the choices of the tail, [T, D]."""

  def add_block(i, out_TD):
    rows = _Rows(tail, i, weight_TK)
    out_bD = _run_block(
      rows.of_tokens(x_TD),
      rows.of_choices(weight_TK),
      _at(gate_up_EDF, rows.expert),
      _at(down_EFD, rows.expert),
    )
    return rows.add_to_tokens(out_TD, out_bD)

  zero_TD = jnp.zeros(x_TD.shape, jnp.float32)
  out_TD = jax.lax.fori_loop(0, tail.num_blocks, add_block, zero_TD)
  return out_TD.astype(x_TD.dtype)


def _run_tail_fwd(*args):
  return _run_tail(*args), args


def _run_tail_bwd(args, pull_TD):
  """Runs each block again: nothing of the tail is kept."""
  x_TD, weight_TK, gate_up_EDF, down_EFD, tail = args

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

  zeros = tuple(jnp.zeros(a.shape, jnp.float32) for a in args[:4])
  grads = jax.lax.fori_loop(0, tail.num_blocks, add_block, zeros)
  return *(g.astype(a.dtype) for g, a in zip(grads, args)), None


_run_tail.defvjp(_run_tail_fwd, _run_tail_bwd)


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
