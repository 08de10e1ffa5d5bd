"""Sparse attention: index, selection, and what the indexer learns from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.model import attention, sparse, transformer
from r1jax.model import config as model_config
from tests import known_answers
from tests.model import tiny

# Many heads: with few, scores tie at exactly 0 and the choice is arbitrary.
_INDEXER = model_config.IndexerConfig(num_heads=16, head_dim=16, top_k=4)


def _config(**changes):
  return tiny.config(
    attention=dataclasses.replace(
      tiny.config().attention,
      indexer=dataclasses.replace(_INDEXER, **changes),
    )
  )


def test_index_scores_are_the_known_ones():
  known = known_answers.load('dsa_index')
  array = lambda name: np.asarray(known[name], np.float32)
  index = sparse.Index(
    q_BTJI=array('q')[None],
    k_BSI=array('k')[None],
    weight_BTJ=array('w')[None],
  )
  np.testing.assert_allclose(index.scores()[0], known['I'], atol=1e-6)


def test_divergence_is_the_known_one():
  known = known_answers.load('dsa_kl')
  score_BHTS = jnp.log(jnp.asarray(known['head_probs']))[None, :, 0, None]
  mask_BTS = np.ones((1, 1, 3), bool)
  target_BTS = attention.mean_probability(score_BHTS, mask_BTS)
  np.testing.assert_allclose(target_BTS[0], known['target'], atol=1e-6)
  index_BTS = jnp.asarray(known['index_logits'], jnp.float32)[None]
  kl_BT = sparse.divergence(target_BTS, index_BTS, mask_BTS)
  np.testing.assert_allclose(kl_BT[0, 0], known['kl'], atol=1e-6)


def test_the_best_allowed_keys_are_selected():
  index_BTS = jnp.asarray([[[9.0, 1.0, 5.0, 3.0], [0.0, 0.0, 7.0, -1.0]]])
  mask_BTS = jnp.asarray([[[False, True, True, True], [False] * 3 + [True]]])
  chosen = sparse.selected(index_BTS, mask_BTS, 2)
  np.testing.assert_array_equal(
    chosen[0], [[False, False, True, True], [False, False, False, True]]
  )
  assert sparse.selected(index_BTS, mask_BTS, 4) is mask_BTS


def _tokens(B=2, T=12):
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, tiny.V, (B, T)).astype(np.int32)
  position_BT = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  return tokens_BT, np.ones((B, T), np.int32), position_BT


def _learn(config, variables, *tokens):
  """Gradients of a stand-in for the model's loss, then of the indexers'."""
  of_model, _ = _gradient(config, variables, (1.0, 0.0), *tokens)
  of_indexer, loss = _gradient(config, variables, (0.0, 1.0), *tokens)
  return of_model, of_indexer, loss


@functools.partial(jax.jit, static_argnames=('config',))
def _gradient(config, variables, weight, tokens_BT, segment_BT, position_BT):
  """Of both losses' weighted sum; and the indexers' loss."""

  def objective(params):
    out = transformer.Transformer(config).apply(
      variables | {'params': params},
      tokens_BT,
      segment_BT=segment_BT,
      position_BT=position_BT,
      indexer_loss=True,
    )
    model, indexer = jnp.sum(out.hidden_BTD**2), jnp.sum(out.indexer_LBT)
    return weight[0] * model + weight[1] * indexer, indexer

  return jax.grad(objective, has_aux=True)(variables['params'])


@pytest.mark.parametrize('dense', [False, True])
def test_indexers_learn_from_their_loss_and_nothing_else_does(dense):
  config = _config(dense=dense)
  of_model, of_indexer, loss = _learn(
    config, tiny.variables(config), *_tokens()
  )
  assert float(loss) > 0.1

  def check(path, model, indexer):
    name = jax.tree_util.keystr(path)
    if 'indexer' in name:
      assert not np.any(model), name
      assert np.any(indexer), name
    else:
      assert np.any(model) or 'embedding' in name, name
      assert not np.any(indexer), name

  params = ('dense', 'moe')
  pick = lambda tree: {k: tree[k] for k in params}
  jax.tree_util.tree_map_with_path(check, pick(of_model), pick(of_indexer))


def test_a_warm_up_attends_to_everything():
  config = _config(dense=True)
  variables = tiny.variables(config)
  without = tiny.config()
  plain = jax.tree_util.tree_map_with_path(lambda _, x: x, variables)
  for stack in ('dense', 'moe'):
    plain['params'][stack] = {
      **plain['params'][stack],
      'attention': {
        k: v
        for k, v in plain['params'][stack]['attention'].items()
        if k != 'indexer'
      },
    }
  tokens = _tokens()
  out = tiny.apply(config, variables, *tokens)
  expected = tiny.apply(without, plain, *tokens)
  np.testing.assert_allclose(out.hidden_BTD, expected.hidden_BTD, atol=1e-5)
  sparse_out = tiny.apply(_config(), variables, *tokens)
  assert np.abs(sparse_out.hidden_BTD - expected.hidden_BTD).max() > 1e-2


def test_decoding_several_tokens_gathers_for_each_its_own_keys():
  """As speculation does: 8 tokens are known, 4 more come at once."""
  config = _config()
  variables = tiny.variables(config)
  tokens_BT, segment_BT, position_BT = _tokens()
  whole = tiny.apply(config, variables, tokens_BT, segment_BT, position_BT)
  part = lambda x, *at: x[:, slice(*at)]
  cache = transformer.make_cache(config, 2, 12)
  inputs = (tokens_BT, segment_BT, position_BT)
  first = tiny.apply(
    config, variables, *(part(x, 0, 8) for x in inputs), cache=cache
  )
  then = tiny.apply(
    config,
    variables,
    *(part(x, 8, 12) for x in inputs),
    cache=first.cache,
    decode=True,
  )
  np.testing.assert_allclose(
    then.hidden_BTD, whole.hidden_BTD[:, 8:], atol=2e-5
  )


# ---- What the indexers have to learn ---------------------------------------


def _norm(x, scale, eps=1e-6):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _pairs(x, first, second, position, theta=10000.0):
  """Rotates the pairs (x[first[i]], x[second[i]])."""
  frequency = theta ** (-np.arange(len(first)) / len(first))
  out = x.copy()
  c, s = np.cos(position * frequency), np.sin(position * frequency)
  out[first] = x[first] * c - x[second] * s
  out[second] = x[second] * c + x[first] * s
  return out


def _softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def _divergence_by_hand(config, variables, tokens, segment, position):
  """KL(p ‖ softmax I) of each query of one row of one layer, float64."""
  a, c = config.attention, config.attention.indexer
  N, R, C = a.nope_head_dim, a.rope_head_dim, a.kv_lora_rank
  wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
  params = wide(variables['params'])
  layer = jax.tree.map(lambda x: x[0], params['dense'])
  w, i = layer['attention'], layer['attention']['indexer']
  x_TD = _norm(params['embedding'][tokens], layer['attention_norm']['scale'])
  latent_TA = _norm(x_TD @ w['q_down'], w['q_norm']['scale'])
  down_TC = x_TD @ w['kv_down']
  kv_TC = _norm(down_TC[:, :C], w['kv_norm']['scale'])
  even, odd = np.arange(0, R, 2), np.arange(1, R, 2)
  low, high = np.arange(R // 2), np.arange(R // 2, R)

  def key(s):
    """The indexer's."""
    k = x_TD[s] @ i['key']
    k = (k - k.mean()) / np.sqrt(k.var() + 1e-6)
    k = k * i['key_norm']['scale'] + i['key_norm']['bias']
    return _pairs(k, low, high, position[s])

  out = np.zeros(len(tokens))
  for t in range(len(tokens)):
    seen = [
      s
      for s in range(len(tokens))
      if segment[s] == segment[t] > 0 and position[s] <= position[t]
    ]
    if not seen:
      continue
    weight_J = x_TD[t] @ i['weight'] / np.sqrt(c.num_heads * c.head_dim)
    index = dict.fromkeys(seen, 0.0)
    for j in range(c.num_heads):
      q = _pairs(latent_TA[t] @ i['q_up'][:, j], low, high, position[t])
      for s in seen:
        index[s] += weight_J[j] * max(q @ key(s), 0.0)
    if not c.dense:
      seen = sorted(seen, key=index.get, reverse=True)[: c.top_k]
    p = np.zeros(len(seen))
    for h in range(a.num_heads):
      q = latent_TA[t] @ w['q_up'][:, h]
      q_rope = _pairs(q[N:], even, odd, position[t])
      score = [
        q[:N] @ (kv_TC[s] @ w['k_up'][:, h])
        + q_rope @ _pairs(down_TC[s, C:], even, odd, position[s])
        for s in seen
      ]
      p += _softmax(np.array(score) / np.sqrt(N + R)) / a.num_heads
    q = _softmax(np.array([index[s] for s in seen]))
    out[t] = np.sum(p * np.log(p / q))
  return out


@pytest.mark.parametrize('dense', [True, False])
def test_the_indexer_loss_is_the_papers_sum(dense):
  """Over all visible keys in the warm-up, over the selected ones after it."""
  config = dataclasses.replace(
    _config(dense=dense), num_layers=1, num_dense_layers=1, moe=None
  )
  variables = tiny.variables(config)
  tokens_BT, segment_BT, position_BT = _tokens()
  # A row of one document; one of two, 7 and 4 tokens, and padding.
  segment_BT[1] = [1] * 7 + [2] * 4 + [0]
  position_BT[1] = [*range(7), *range(4), 0]
  inputs = tokens_BT, segment_BT, position_BT
  actual_BT = _indexer_loss(config, variables, *inputs)[0]
  expected_BT = np.stack(
    [_divergence_by_hand(config, variables, *row) for row in zip(*inputs)]
  )
  assert expected_BT[0, 5:].min() > 1e-2 and expected_BT[1, -1] == 0
  # float32 sums of some dozen terms of size 1 against float64.
  np.testing.assert_allclose(actual_BT, expected_BT, rtol=0, atol=2e-5)


@functools.partial(jax.jit, static_argnames=('config',))
def _indexer_loss(config, variables, tokens_BT, segment_BT, position_BT):
  with jax.default_matmul_precision('highest'):
    return (
      transformer.Transformer(config)
      .apply(
        variables,
        tokens_BT,
        segment_BT=segment_BT,
        position_BT=position_BT,
        indexer_loss=True,
      )
      .indexer_LBT
    )
