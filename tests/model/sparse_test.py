"""Sparse attention: index, selection, and what the indexer learns from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.model import attention, sparse, transformer
from r1jax.model import config as model_config
from tests import known_answers, quick
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


@functools.partial(quick.jit, static_argnames=('config',))
def _learn(config, variables, tokens_BT, segment_BT, position_BT):
  """The indexers' loss and a stand-in for the model's, with gradients."""

  def objective(params, weight):
    out = transformer.Transformer(config).apply(
      variables | {'params': params},
      tokens_BT,
      segment_BT=segment_BT,
      position_BT=position_BT,
      indexer_loss=True,
    )
    model, indexer = jnp.sum(out.hidden_BTD**2), jnp.sum(out.indexer_LBT)
    return weight[0] * model + weight[1] * indexer, (model, indexer)

  grad = jax.grad(objective, has_aux=True)
  params = variables['params']
  of_model, losses = grad(params, (1.0, 0.0))
  of_indexer, _ = grad(params, (0.0, 1.0))
  return of_model, of_indexer, losses


@pytest.mark.parametrize('dense', [False, True])
def test_indexers_learn_from_their_loss_and_nothing_else_does(dense):
  config = _config(dense=dense)
  of_model, of_indexer, (_, loss) = _learn(
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
