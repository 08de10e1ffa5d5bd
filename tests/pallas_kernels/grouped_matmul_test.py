"""Grouped matmul: xla equals the reference, and the plan is exact."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import ops
from tests import quick

# (k, n, groups, rows a block, group of each block)
SHAPES = (
  (4, 6, 3, 2, (0, 0, 1, 2)),
  (4, 6, 3, 2, (0, 2, 2, 2)),  # Group 1 is empty.
  (5, 3, 2, 1, (1,)),  # A single row.
  (3, 3, 1, 4, (0, 0)),
)


@functools.partial(quick.jit, static_argnames='implementation')
def _with_gradients(x_mk, w_gkn, group_of_block, pull_mn, *, implementation):
  def run(x_mk, w_gkn):
    return ops.grouped_matmul(
      x_mk, w_gkn, group_of_block, implementation=implementation
    )

  out_mn, vjp = jax.vjp(run, x_mk, w_gkn)
  return out_mn, vjp(pull_mn)


@pytest.mark.parametrize(('k', 'n', 'g', 'block', 'groups'), SHAPES)
def test_xla_and_its_vjp_are_the_references(k, n, g, block, groups):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  m = block * len(groups)
  args = (draw(m, k), draw(g, k, n), np.int32(groups), draw(m, n))
  out_mn, grads = _with_gradients(*args, implementation='xla')
  expected_mn, expected = _with_gradients(*args, implementation='reference')
  np.testing.assert_allclose(out_mn, expected_mn, atol=1e-5)
  for grad, other in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-5)
  for i in range(m):
    by_hand_n = args[0][i] @ args[1][groups[i // block]]
    np.testing.assert_allclose(out_mn[i], by_hand_n, atol=1e-5)


@pytest.mark.parametrize(
  ('x_shape', 'w_shape', 'num_blocks', 'implementation', 'message'),
  [
    ((5, 4), (3, 4, 6), 2, 'xla', '5 rows are no whole number'),
    ((4, 5), (3, 4, 6), 2, 'xla', 'k=5 of the rows is not k=4'),
    ((4, 4), (3, 4, 6), 2, 'mosaic', "implementation='mosaic'"),
  ],
)
def test_what_does_not_fit_raises(
  x_shape, w_shape, num_blocks, implementation, message
):
  with pytest.raises(ValueError, match=message):
    ops.grouped_matmul(
      np.zeros(x_shape),
      np.zeros(w_shape),
      np.zeros(num_blocks, np.int32),
      implementation=implementation,
    )


_make_plan = quick.jit(ops.make_plan, static_argnums=(1, 2))

# (tokens, choices, groups, rows a block): few, each compiles once.
_PLANS = ((6, 2, 4, 3), (1, 1, 3, 4), (5, 3, 3, 1), (7, 1, 1, 4))


@st.composite
def _choices(draw):
  """Groups of each choice at any skew: all draws from a few groups."""
  T, K, g, block = draw(st.sampled_from(_PLANS))
  used = draw(st.lists(st.integers(0, g - 1), min_size=1, max_size=g))
  one = st.sampled_from(used)
  flat = draw(st.lists(one, min_size=T * K, max_size=T * K))
  return np.int32(flat).reshape(T, K), g, block


@hypothesis.given(_choices())
def test_plan_gives_each_choice_a_row_of_its_group(choices):
  group_TK, g, block = choices
  T, K = group_TK.shape
  plan = jax.device_get(_make_plan(group_TK, g, block))
  m = len(plan.source_m)
  assert m == len(plan.group_of_block) * block
  assert T * K <= m <= T * K + g * (block - 1)
  slots = plan.slot_TK.reshape(-1)
  assert len(set(slots.tolist())) == T * K
  assert ((0 <= slots) & (slots < m)).all()
  for t in range(T):
    for k in range(K):
      slot = plan.slot_TK[t, k]
      assert plan.source_m[slot] == t
      assert plan.group_of_block[slot // block] == group_TK[t, k]
  assert (np.delete(plan.source_m, slots) == T).all()
  assert (np.diff(plan.group_of_block) >= 0).all()
  assert ((0 <= plan.group_of_block) & (plan.group_of_block < g)).all()


def _plan_inputs():
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  group_TK = np.int32([[0, 3], [3, 0], [1, 3], [3, 3], [0, 1], [3, 1]])
  plan = _make_plan(group_TK, 4, 3)
  m = len(plan.source_m)
  return plan, draw(6, 5), draw(m, 5), draw(6, 2), draw(m, 5), draw(6, 5)


def test_dispatch_and_its_vjp_are_a_plain_gathers():
  plan, x_TD, _, _, pull_mD, _ = _plan_inputs()

  def plain(x_TD):
    return jnp.concatenate([x_TD, jnp.zeros((1, 5))])[plan.source_m]

  @quick.jit
  def both(x_TD):
    return [
      (out, vjp(pull_mD))
      for out, vjp in (
        jax.vjp(lambda x: ops.dispatch(x, plan), x_TD),
        jax.vjp(plain, x_TD),
      )
    ]

  (out_mD, grad), (expected_mD, expected) = both(x_TD)
  np.testing.assert_array_equal(out_mD, expected_mD)
  np.testing.assert_allclose(grad[0], expected[0], atol=1e-6)


def test_combine_and_its_vjp_are_a_plain_weighted_gathers():
  plan, _, y_mD, weight_TK, _, pull_TD = _plan_inputs()

  def plain(y_mD, weight_TK):
    return (y_mD[plan.slot_TK] * weight_TK[..., None]).sum(1)

  @quick.jit
  def both(y_mD, weight_TK):
    return [
      (out, vjp(pull_TD))
      for out, vjp in (
        jax.vjp(lambda y, w: ops.combine(y, w, plan), y_mD, weight_TK),
        jax.vjp(plain, y_mD, weight_TK),
      )
    ]

  (out_TD, grads), (expected_TD, expected) = both(y_mD, weight_TK)
  np.testing.assert_allclose(out_TD, expected_TD, atol=1e-6)
  for grad, other in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-6)
