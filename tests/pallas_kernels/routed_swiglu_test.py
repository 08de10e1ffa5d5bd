"""Routed experts: all forms are one sum, and the layouts are exact."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels.routed_swiglu import layout as layout_lib
from pallas_kernels.routed_swiglu import ops

_E, _D, _F = 8, 6, 4

# Tokens, choices, rows a block; and the chance of each expert.
SHAPES = (
  (40, 2, 4, 'even'),
  (40, 2, 4, 'one pair'),  # Six experts are idle, two have every token.
  (40, 2, 3, 'skewed'),
  (48, 1, 64, 'one expert'),  # The tail is one block, larger than itself.
  (3, 2, 4, 'skewed'),  # Decoding: no tail.
  (1, 1, 1, 'even'),
)


def _inputs(T, K, skew):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  favour_E = {
    'even': np.zeros(_E),
    'skewed': 3 * rng.normal(size=_E),
    'one pair': 99.0 * (np.arange(_E) >= _E - 2),
    'one expert': 99.0 * (np.arange(_E) == 3),
  }[skew]
  chance_TE = favour_E + rng.gumbel(size=(T, _E))
  expert_TK = np.argsort(-chance_TE, axis=1)[:, :K].astype(np.int32)
  weights = draw(_E, _D, _F), draw(_E, _D, _F), draw(_E, _F, _D)
  return expert_TK, (draw(T, _D), draw(T, K), *weights), draw(T, _D)


@functools.partial(jax.jit, static_argnames=('block', 'implementation'))
def _with_gradients(expert_TK, args, pull_TD, **options):
  def run(x_TD, weight_TK, *weights):
    return ops.routed_swiglu(
      x_TD, expert_TK, weight_TK, *weights, interpret=True, **options
    )

  out_TD, vjp = jax.vjp(run, *args)
  return out_TD, vjp(pull_TD)


@pytest.mark.parametrize(
  ('T', 'K', 'block', 'skew', 'implementation'),
  [
    *((*s, i) for s in SHAPES for i in ('xla', 'grouped', 'megablox')),
    (*SHAPES[1], 'pallas'),
  ],
)
def test_all_forms_and_their_vjps_are_the_references(
  T, K, block, skew, implementation
):
  expert_TK, args, pull_TD = _inputs(T, K, skew)
  run = functools.partial(
    _with_gradients, expert_TK, args, pull_TD, block=block
  )
  out_TD, grads = run(implementation=implementation)
  expected_TD, expected = run(implementation='reference')
  np.testing.assert_allclose(out_TD, expected_TD, atol=1e-4)
  for grad, other in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-4)
    assert np.abs(other).max() > 0.1
  idle_E = ~np.isin(np.arange(_E), expert_TK)
  assert not np.asarray(grads[2])[idle_E].any()


def test_reference_is_a_loop_by_hand():
  expert_TK, args, _ = _inputs(40, 2, 'skewed')
  x_TD, weight_TK, gate_EDF, up_EDF, down_EFD = args
  out_TD = ops.routed_swiglu(
    x_TD, expert_TK, *args[1:], block=1, implementation='reference'
  )
  for t in (0, 39):
    by_hand_D = np.zeros(_D)
    for k, e in enumerate(expert_TK[t]):
      gate_F, up_F = x_TD[t] @ gate_EDF[e], x_TD[t] @ up_EDF[e]
      hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
      by_hand_D += weight_TK[t, k] * (hidden_F @ down_EFD[e])
    np.testing.assert_allclose(out_TD[t], by_hand_D, atol=1e-4)


@pytest.mark.parametrize('implementation', ['xla', 'grouped', 'megablox'])
def test_bfloat16_rows_stay_near_the_sum_in_float32(implementation):
  expert_TK, args, pull_TD = _inputs(40, 2, 'skewed')
  half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), args)
  out_TD, grads = _with_gradients(
    expert_TK,
    half,
    jnp.asarray(pull_TD, jnp.bfloat16),
    block=4,
    implementation=implementation,
  )
  expected_TD, expected = _with_gradients(
    expert_TK, args, pull_TD, block=4, implementation='reference'
  )
  pairs = zip((out_TD, *grads), (expected_TD, *expected), strict=True)
  for got, wanted in pairs:
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float32(got) - wanted) / np.linalg.norm(wanted)
    assert error < 0.02  # Of eight bits: 2^-8 = 0.004 a rounding.


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'block': 4, 'implementation': 'mosaic'}, "implementation='mosaic'"),
    ({'block': 0, 'implementation': 'xla'}, 'block=0 must be at least 1'),
  ],
)
def test_what_does_not_fit_raises(options, message):
  expert_TK, args, _ = _inputs(3, 2, 'even')
  with pytest.raises(ValueError, match=message):
    ops.routed_swiglu(args[0], expert_TK, *args[1:], **options)


_contiguous = jax.jit(layout_lib.contiguous, static_argnums=(1, 2))
_head_and_tail = jax.jit(layout_lib.head_and_tail, static_argnums=(1, 2, 3))

# (tokens, choices, experts, rows a block): few, each compiles once.
_SIZES = ((6, 2, 4, 3), (1, 1, 3, 4), (5, 3, 3, 1), (7, 1, 1, 4))


@st.composite
def _choices(draw):
  """Experts of each choice at any skew, E for none: draws from a few."""
  T, K, E, block = draw(st.sampled_from(_SIZES))
  used = draw(st.lists(st.integers(0, E), min_size=1, max_size=E))
  one = st.sampled_from(used)
  flat = draw(st.lists(one, min_size=T * K, max_size=T * K))
  return np.int32(flat).reshape(T, K), E, block


@hypothesis.given(_choices())
def test_contiguous_gives_each_choice_a_row_of_its_expert(choices):
  expert_TK, E, block = choices
  T, K = expert_TK.shape
  layout, size_E = jax.device_get(_contiguous(expert_TK, E, block))
  m = len(layout.source_m)
  assert (size_E % block == 0).all()
  assert size_E.sum() <= m
  expert_m = np.repeat(np.arange(E), size_E)
  assert T * K <= m <= T * K + E * (block - 1)
  slots = layout.slot_TK[expert_TK < E]
  assert len(set(slots.tolist())) == len(slots)
  assert ((0 <= slots) & (slots < m)).all()
  assert (layout.slot_TK[expert_TK == E] >= m).all()
  for t in range(T):
    for k in np.flatnonzero(expert_TK[t] < E):
      slot = layout.slot_TK[t, k]
      assert layout.source_m[slot] == t
      assert expert_m[slot] == expert_TK[t, k]
  assert (np.delete(layout.source_m, slots) == T).all()


@hypothesis.given(_choices(), st.sampled_from((1, 3)))
def test_head_and_tail_have_each_choice_once(choices, head):
  expert_TK, E, block = choices
  T, K = expert_TK.shape
  layout, tail = jax.device_get(_head_and_tail(expert_TK, E, head, block))
  m = E * head
  assert layout.source_m.shape == (m,)
  n = tail.num_blocks
  in_tail = []
  for choice_b, e in zip(tail.choice_nb[:n], tail.expert_n[:n], strict=True):
    real_b = choice_b[choice_b < T * K]
    assert real_b.size
    assert (expert_TK.reshape(-1)[real_b] == e).all()
    in_tail += real_b.tolist()
  assert (tail.choice_nb[n:] == T * K).all()
  slots = layout.slot_TK.reshape(-1)
  in_head = np.flatnonzero(slots < m)
  real_r = np.flatnonzero(expert_TK < E)
  assert sorted([*in_tail, *in_head]) == real_r.tolist()
  for r in in_head:
    assert slots[r] // head == expert_TK.reshape(-1)[r]
    assert layout.source_m[slots[r]] == r // K
  assert (slots[in_tail] == m).all()
  assert (np.delete(layout.source_m, slots[in_head]) == T).all()
  # No more than the surplus of each expert, in whole blocks.
  count_E = np.bincount(expert_TK.ravel(), minlength=E)[:E]
  surplus_E = np.maximum(count_E - head, 0)
  assert n == np.sum(-(-surplus_E // block))


def _layout_inputs(kind):
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  expert_TK = np.int32([[0, 3], [3, 0], [1, 3], [3, 2], [0, 1], [3, 1]])
  if kind == 'contiguous':
    layout, _ = _contiguous(expert_TK, 4, 3)
  else:  # Two choices of expert 3 have no row.
    layout, _ = _head_and_tail(expert_TK, 4, 3, 3)
  m = len(layout.source_m)
  return layout, draw(6, 5), draw(m, 5), draw(6, 2), draw(m, 5), draw(6, 5)


_KINDS = pytest.mark.parametrize('kind', ['contiguous', 'head'])


@_KINDS
def test_dispatch_and_its_vjp_are_a_plain_gathers(kind):
  layout, x_TD, _, _, pull_mD, _ = _layout_inputs(kind)

  def plain(x_TD):
    return jnp.concatenate([x_TD, jnp.zeros((1, 5))])[layout.source_m]

  @jax.jit
  def both(x_TD):
    return [
      (out, vjp(pull_mD))
      for out, vjp in (
        jax.vjp(lambda x: layout_lib.dispatch(x, layout), x_TD),
        jax.vjp(plain, x_TD),
      )
    ]

  (out_mD, grad), (expected_mD, expected) = both(x_TD)
  real_m = np.asarray(layout.source_m) < 6
  np.testing.assert_array_equal(out_mD[real_m], expected_mD[real_m])
  assert np.isfinite(out_mD).all()
  np.testing.assert_allclose(grad[0], expected[0], atol=1e-6)


@_KINDS
def test_combine_and_its_vjp_are_a_plain_weighted_gathers(kind):
  layout, _, y_mD, weight_TK, _, pull_TD = _layout_inputs(kind)

  def plain(y_mD, weight_TK):
    y_mD = jnp.concatenate([y_mD, jnp.zeros((1, 5))])
    return (y_mD[layout.slot_TK] * weight_TK[..., None]).sum(1)

  @jax.jit
  def both(y_mD, weight_TK):
    return [
      (out, vjp(pull_TD))
      for out, vjp in (
        jax.vjp(lambda y, w: layout_lib.combine(y, w, layout), y_mD, weight_TK),
        jax.vjp(plain, y_mD, weight_TK),
      )
    ]

  (out_TD, grads), (expected_TD, expected) = both(y_mD, weight_TK)
  np.testing.assert_allclose(out_TD, expected_TD, atol=1e-6)
  for grad, other in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-6)


@pytest.mark.parametrize('num_tokens', [5, 1024, 2500])
def test_a_weighted_sum_is_that_of_all_choices_however_many_tokens(num_tokens):
  rng = np.random.default_rng(0)
  rows_mD = rng.normal(size=(7, 3)).astype(np.float32)
  slot_TK = rng.integers(0, 9, (num_tokens, 4)).astype(np.int32)
  weight_TK = rng.normal(size=slot_TK.shape).astype(np.float32)
  found_TD = jax.jit(layout_lib.weighted_sum)(rows_mD, slot_TK, weight_TK)
  # A slot past the last row is the last.
  each_TKD = rows_mD[np.minimum(slot_TK, 6)]
  expected_TD = np.einsum('TKD,TK->TD', each_TKD, weight_TK)
  np.testing.assert_allclose(found_TD, expected_TD, atol=1e-5)
