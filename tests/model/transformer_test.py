"""Two ways through the transformer agree; nothing leaks or looks ahead."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from r1jax.model import transformer
from tests.model import tiny

_B, _T = 2, 12
# Float32 sums of 50 terms in another order.
_ATOL = 2e-5
_LENGTHS = (5, 4)


def _tokens():
  """24 tokens, each another one: its embedding row tells its place."""
  order = np.random.default_rng(3).permutation(tiny.V)[: _B * _T]
  return order.reshape(_B, _T).astype(np.int32)


def _whole():
  """Segments and positions of rows that are one document."""
  position_BT = np.broadcast_to(np.arange(_T, dtype=np.int32), (_B, _T))
  return np.ones((_B, _T), np.int32), position_BT


def _target(seed=0):
  draw = np.random.default_rng(seed).normal(size=(_B, _T, 32))
  return draw.astype(np.float32)


def _rows(*documents_of_rows):
  """Packs lists of documents (token arrays); padding holds random tokens."""
  tokens_BT = np.random.default_rng(9).integers(0, tiny.V, (_B, _T))
  segment_BT, position_BT = np.zeros((2, _B, _T), np.int32)
  for b, documents in enumerate(documents_of_rows):
    start = 0
    for i, document in enumerate(documents, start=1):
      where = (b, slice(start, start + len(document)))
      tokens_BT[where] = document
      segment_BT[where] = i
      position_BT[where] = np.arange(len(document))
      start += len(document)
  return tokens_BT.astype(np.int32), segment_BT, position_BT


@functools.cache
def _pull_whole():
  c = tiny.config()
  return tiny.pull(c, tiny.variables(c), _tokens(), *_whole(), _target())


@pytest.mark.parametrize('changes', ['unrolled', 'remat'])
def test_scanned_unrolled_and_remat_give_one_result(changes):
  c = tiny.config()
  variables = tiny.variables(c)
  hidden_BTD, grads = _pull_whole()
  if changes == 'remat':
    other, unstack = dataclasses.replace(c, remat=True), lambda v: v
  else:
    other = dataclasses.replace(c, scan_layers=False)
    unstack = functools.partial(transformer.unstack_layers, config=c)
  other_BTD, other_grads = tiny.pull(
    other, unstack(variables), _tokens(), *_whole(), _target()
  )
  np.testing.assert_allclose(other_BTD, hidden_BTD, atol=_ATOL)
  tiny.assert_trees_close(other_grads, unstack(grads), atol=_ATOL)


def test_router_biases_get_no_gradient():
  _, grads = _pull_whole()
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(grads['router']))
  assert all(
    np.asarray(x).any() for x in jax.tree.leaves(grads['params']['moe'])
  )


@pytest.mark.parametrize('t', [0, 6, _T - 1])
def test_hidden_states_depend_on_the_past_of_their_row_only(t):
  """∂hidden[0, t] / ∂embedding of any later token, or other row, is 0."""
  c, tokens_BT = tiny.config(), _tokens()
  target_BTD = np.zeros_like(_target())
  target_BTD[0, t] = _target()[0, t]
  _, grads = tiny.pull(c, tiny.variables(c), tokens_BT, *_whole(), target_BTD)
  reached_V = np.asarray(grads['params']['embedding']).any(axis=1)
  np.testing.assert_array_equal(reached_V[tokens_BT[0]], np.arange(_T) <= t)
  assert not reached_V[tokens_BT[1]].any()


def test_packed_documents_are_as_if_alone():
  """Hidden states and gradients: no leak between documents, none of padding."""
  c = tiny.config()
  run = functools.partial(tiny.pull, c, tiny.variables(c))
  first, second = (_tokens()[b, :n] for b, n in enumerate(_LENGTHS))
  a, b = _LENGTHS
  target = _target()
  packed, alone = np.zeros((2, *target.shape), np.float32)
  packed[0, : a + b] = target[0, : a + b]
  alone[0, :a], alone[1, :b] = target[0, :a], target[0, a : a + b]
  packed_BTD, packed_grads = run(*_rows([first, second], []), packed)
  alone_BTD, alone_grads = run(*_rows([first], [second]), alone)
  np.testing.assert_allclose(packed_BTD[0, :a], alone_BTD[0, :a], atol=_ATOL)
  np.testing.assert_allclose(
    packed_BTD[0, a : a + b], alone_BTD[1, :b], atol=_ATOL
  )
  tiny.assert_trees_close(packed_grads, alone_grads, atol=_ATOL)


def test_padding_changes_nothing():
  c = tiny.config()
  run = functools.partial(tiny.pull, c, tiny.variables(c))
  first, second = (_tokens()[b, :n] for b, n in enumerate(_LENGTHS))
  tokens_BT, segment_BT, position_BT = _rows([first], [second])
  target_BTD = _target() * (segment_BT > 0)[..., None]
  hidden_BTD, grads = run(tokens_BT, segment_BT, position_BT, target_BTD)
  other_BT = np.where(segment_BT > 0, tokens_BT, (tokens_BT + 17) % tiny.V)
  other_BTD, other_grads = run(other_BT, segment_BT, position_BT, target_BTD)
  for b, n in enumerate(_LENGTHS):
    np.testing.assert_allclose(other_BTD[b, :n], hidden_BTD[b, :n], atol=1e-6)
  tiny.assert_trees_close(other_grads, grads, atol=_ATOL)
  for leaf in jax.tree.leaves((hidden_BTD, other_BTD)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize('scan_layers', [True, False])
def test_absorbed_attention_over_the_cache_equals_expanded(scan_layers):
  """The same packed rows at once through decode (absorbed) and without."""
  scanned = tiny.config()
  c = dataclasses.replace(scanned, scan_layers=scan_layers)
  variables = tiny.variables(scanned)
  rows = _rows(
    [_tokens()[0, :5], _tokens()[1, :6]], [_tokens()[0, 5:9], _tokens()[1, 6:]]
  )
  expanded_BTD, _ = tiny.pull(scanned, variables, *rows, _target())
  if not scan_layers:
    variables = transformer.unstack_layers(variables, scanned)
  # Three more slots than tokens: empty ones must not be seen.
  cache = transformer.make_cache(c, batch=_B, length=_T + 3)
  out = tiny.apply(c, variables, *rows, cache=cache, decode=True)
  keep_BT = rows[1] > 0
  np.testing.assert_allclose(
    out.hidden_BTD[keep_BT], expanded_BTD[keep_BT], atol=_ATOL
  )
  assert int(out.cache.slot) == _T


def test_decode_needs_a_cache():
  c = tiny.config()
  with pytest.raises(ValueError, match='decode=True needs a cache'):
    transformer.Transformer(c).apply(tiny.variables(c), _tokens(), decode=True)


def test_moe_metrics_stand_in_layer_order_and_skip_padding():
  c = tiny.config()
  rows = _rows([_tokens()[0, :5]], [_tokens()[1, :4]])
  out = tiny.apply(c, tiny.variables(c), *rows)
  assert out.moe.counts_E.shape == (2, 8)
  assert out.moe.balance_B.shape == (2, _B)
  np.testing.assert_array_equal(out.moe.counts_E.sum(1), [18, 18])


def test_tied_head_is_the_embedding():
  c = tiny.config()
  params = tiny.variables(c)['params']
  tied = dataclasses.replace(c, tie_embeddings=True)
  assert 'head' not in tiny.variables(tied)['params']
  assert transformer.head(params, c).w_DV is params['head']
  np.testing.assert_array_equal(
    transformer.head(params, tied).w_DV, np.asarray(params['embedding']).T
  )
