"""The gate, its balance loss and its bias, against known values and loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.model import config as model_config
from r1jax.model import router, transformer
from tests import known_answers

_route = jax.jit(router.route, static_argnames='config')
_scores = jax.jit(router.scores, static_argnames='kind')
_balance = jax.jit(router.sequence_balance, static_argnames='top_k')


def _config(**changes):
  values = {
    'num_experts': 8,
    'top_k': 2,
    'expert_dim': 4,
    'num_shared': 0,
    'num_groups': 4,
    'top_groups': 2,
    'scale': 2.5,
  }
  return model_config.MoeConfig(**(values | changes))


def _by_expert(expert_K, weight_K):
  return dict(zip(np.asarray(expert_K).tolist(), np.asarray(weight_K).tolist()))


def test_gate_of_v3():
  known = known_answers.load('gate')
  score_TE = _scores(np.float32(known['logits']), 'sigmoid')
  np.testing.assert_allclose(score_TE, known['sigmoid'], atol=1e-6)
  expert_TK, weight_TK = _route(
    score_TE, np.float32(known['bias']), config=_config()
  )
  for t in range(2):
    assert _by_expert(expert_TK[t], weight_TK[t]) == pytest.approx(
      _by_expert(known['topk_idx'][t], known['weights'][t]), abs=1e-6
    )


def _gate_by_loops(score_E, bias_E, c):
  """The gate as the paper tells it, for one token."""
  biased_E = score_E + bias_E
  size = c.num_experts // c.num_groups
  groups = [range(j * size, (j + 1) * size) for j in range(c.num_groups)]
  take = 2 if c.group_score == 'top2' else 1
  rank = lambda j: sum(sorted(biased_E[e] for e in groups[j])[-take:])
  kept = sorted(range(c.num_groups), key=rank)[-c.top_groups :]
  allowed = [e for j in kept for e in groups[j]]
  chosen = sorted(allowed, key=lambda e: biased_E[e])[-c.top_k :]
  total = sum(score_E[e] for e in chosen) if c.normalize else 1.0
  return {e: c.scale * score_E[e] / total for e in chosen}


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'group_score': 'max', 'score': 'softmax', 'normalize': False},
    {'num_groups': 1, 'top_groups': 1, 'score': 'softmax', 'top_k': 3},
    {'num_groups': 2, 'top_groups': 1, 'top_k': 4},
  ],
)
def test_gate_is_the_loop_over_groups_and_experts(changes):
  c, rng = _config(**changes), np.random.default_rng(0)
  logits_TE = rng.normal(size=(50, 8)).astype(np.float32)
  # Large enough to make biased scores negative: masked must not beat them.
  bias_E = rng.normal(size=8).astype(np.float32)
  score_TE = _scores(logits_TE, c.score)
  expert_TK, weight_TK = _route(score_TE, bias_E, config=c)
  for t in range(50):
    assert _by_expert(expert_TK[t], weight_TK[t]) == pytest.approx(
      _gate_by_loops(np.asarray(score_TE[t]), bias_E, c), abs=1e-5
    )


def test_softmax_scores_sum_to_one():
  logits_TE = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
  score_TE = _scores(logits_TE, 'softmax')
  np.testing.assert_allclose(score_TE.sum(-1), 1.0, atol=1e-6)


def test_bias_has_no_gradient():
  @jax.jit
  def gradients(bias_E, score_TE):
    def total(bias_E, score_TE):
      _, weight_TK = router.route(score_TE, bias_E, config=_config())
      return weight_TK[:, 0].sum()

    return jax.grad(total, argnums=(0, 1))(bias_E, score_TE)

  score_TE = np.random.default_rng(0).uniform(0.1, 0.9, (6, 8))
  grad_E, grad_TE = gradients(np.linspace(-0.1, 0.1, 8), score_TE)
  assert not np.asarray(grad_E).any()
  assert np.asarray(grad_TE).any()


def test_balance_loss_of_v3():
  known = known_answers.load('seq_balance')
  score_BTE = _scores(np.float32([known['logits']]), 'sigmoid')
  loss_B = _balance(score_BTE, np.ones((1, 3), bool), top_k=known['K'])
  np.testing.assert_allclose(loss_B, known['sum_fP'], rtol=1e-6)


def test_balance_loss_by_loops_leaves_padding_out():
  rng, K, E = np.random.default_rng(1), 2, 6
  score_BTE = rng.uniform(0.1, 0.9, size=(2, 5, E)).astype(np.float32)
  keep_BT = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
  actual_B = _balance(score_BTE, keep_BT, top_k=K)
  for b in range(2):
    tokens = [score_BTE[b, t] for t in range(5) if keep_BT[b, t]]
    expected = 0.0
    for i in range(E):
      hits = sum(i in np.argsort(-s)[:K] for s in tokens)
      f = E / (K * len(tokens)) * hits
      expected += f * np.mean([s[i] / s.sum() for s in tokens])
    np.testing.assert_allclose(actual_B[b], expected, rtol=1e-5)


def test_counts_are_choices_of_kept_tokens():
  expert_BTK = jnp.asarray([[[0, 2], [2, 1], [3, 3]], [[3, 0], [1, 1], [3, 0]]])
  keep_BT = jnp.asarray([[True, True, False], [True, False, True]])
  counts_BE = router.counts(expert_BTK, keep_BT, 4)
  np.testing.assert_array_equal(counts_BE, [[1, 1, 2, 0], [2, 0, 0, 2]])


def test_overloaded_experts_lose_bias_and_idle_ones_gain_it():
  bias_LE = jnp.full((1, 3), 0.5)
  updated_LE = router.updated_bias(bias_LE, jnp.asarray([[9.0, 0, 3]]), 0.125)
  np.testing.assert_array_equal(updated_LE, [[0.375, 0.625, 0.5 + 0.125]])
  even_LE = router.updated_bias(bias_LE, jnp.asarray([[4.0, 4, 4]]), 0.125)
  np.testing.assert_array_equal(even_LE, bias_LE)


def test_max_violation():
  counts_LE = jnp.asarray([[2.0, 2, 2, 2], [8, 0, 0, 0], [3, 1, 2, 2]])
  vio_L = router.max_violation(counts_LE)
  np.testing.assert_allclose(vio_L, [0.0, 3.0, 0.5], atol=1e-6)


def _with_bias(*shape):
  return {'moe': {'bias': np.zeros(shape, np.float32)}}


@pytest.mark.parametrize(
  'names',
  [
    ['moe', 'mtp_1', 'mtp_2'],
    [*(f'moe_{i}' for i in range(12)), 'mtp_1'],
  ],
)
def test_update_router_gives_each_layer_its_own_counts(names):
  """Main layers first, stacked or not, then one row for each MTP module."""
  E = 16
  stacked = {'moe': 2}
  router_tree, rows = {}, []
  for name in names:
    shape = (stacked[name], E) if name in stacked else (E,)
    inner = _with_bias(*shape)
    router_tree[name] = {'block': inner} if 'mtp' in name else inner
    rows += [name] * stacked.get(name, 1)
  # Layer l overloads its expert l and no other.
  counts_LE = np.eye(len(rows), E, dtype=np.float32)
  update = jax.jit(functools.partial(transformer.update_router, speed=0.5))
  updated = update(router_tree, counts_LE)
  actual_LE = np.concatenate(
    [np.reshape(jax.tree.leaves(updated[name])[0], (-1, E)) for name in names]
  )
  expected_LE = np.where(np.eye(len(rows), E) > 0, -0.5, 0.5)
  np.testing.assert_array_equal(actual_LE, expected_LE)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(updated) == shapes(router_tree)
