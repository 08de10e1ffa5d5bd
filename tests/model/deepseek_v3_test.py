"""It is DeepSeek-V3: transformers' logits, and the released size."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from configs.model import deepseek_v3_671b
from r1jax import config as config_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import sharding
from tests import quick
from tests.model import hf_loader

# transformers' own prefill and decode differ by 6e-6 (float32, logits to 3.5).
_ATOL = 2e-5
_MODELS = ('deepseek_v3', 'deepseek_v3_yarn')


@functools.cache
def _load(name):
  config = hf_loader.load_config(name)
  io = np.load(hf_loader.MODELS / name / 'io.npz')
  variables = hf_loader.load_variables(name, config)
  return config, variables, {k: io[k] for k in io}


@functools.partial(quick.jit, static_argnames=('config', 'decode'))
def _logits(config, variables, tokens_BT, position_BT, cache, decode=False):
  """Float32 logits, and the cache after the tokens."""
  with jax.default_matmul_precision('highest'):
    out = transformer.Transformer(config).apply(
      variables, tokens_BT, position_BT=position_BT, cache=cache, decode=decode
    )
    head_DV = transformer.head(variables['params'], config)
    return out.hidden_BTD @ head_DV, out.cache


def _positions(start, end):
  return np.broadcast_to(
    np.arange(start, end, dtype=np.int32), (2, end - start)
  )


@pytest.mark.parametrize('name', _MODELS)
def test_loaded_weights_are_all_the_model_has(name):
  config, variables, _ = _load(name)
  shapes = sharding.unbox(
    jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  )
  expected = jax.tree.map(lambda x: x.shape, shapes)
  assert jax.tree.map(lambda x: x.shape, variables) == expected


@pytest.mark.parametrize('name', _MODELS)
def test_logits_are_those_of_transformers(name):
  config, variables, io = _load(name)

  @quick.jit
  def logits(variables, tokens_BT):
    with jax.default_matmul_precision('highest'):
      model = transformer.Transformer(config)
      return model.apply(variables, tokens_BT, method='logits')

  logits_BTV = logits(variables, io['input_ids'].astype(np.int32))
  np.testing.assert_allclose(logits_BTV, io['logits'], rtol=0, atol=_ATOL)


@pytest.mark.parametrize('name', _MODELS)
def test_prefill_and_decode_are_one_forward(name):
  config, variables, io = _load(name)
  tokens_BT = io['input_ids'].astype(np.int32)
  T, start = tokens_BT.shape[1], 5
  cache = transformer.make_cache(config, batch=2, length=T)
  logits_BTV, cache = _logits(
    config, variables, tokens_BT[:, :start], _positions(0, start), cache
  )
  parts = [logits_BTV]
  for t in range(start, T):
    logits_BTV, cache = _logits(
      config,
      variables,
      tokens_BT[:, t : t + 1],
      _positions(t, t + 1),
      cache,
      decode=True,
    )
    parts.append(logits_BTV)
  logits_BTV = np.concatenate(parts, axis=1)
  np.testing.assert_allclose(logits_BTV, io['logits'], rtol=0, atol=_ATOL)
  np.testing.assert_allclose(
    logits_BTV, io['decode_logits'], rtol=0, atol=_ATOL
  )


def _released(**changes):
  config = config_lib.from_dict(
    model_config.ModelConfig, deepseek_v3_671b.get_config().to_dict()
  )
  return dataclasses.replace(config, **changes)


def _sizes(config):
  shapes = sharding.unbox(
    jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  )
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  return count(shapes['params']), count(shapes['router'])


def test_released_size_is_671_026_419_200():
  params, biases = _sizes(_released(mtp_depth=0))
  assert params == 671_026_404_352
  assert params + biases == 671_026_419_200


def test_mtp_module_is_one_moe_block_a_projection_and_three_norms():
  without, _ = _sizes(_released(mtp_depth=0))
  with_mtp, _ = _sizes(_released(mtp_depth=1))
  D, A, C, R, H, E, F = 7168, 1536, 512, 64, 128, 256, 2048
  attention = D * A + A + A * H * 192 + D * (C + R) + C + C * H * 256
  attention += H * 128 * D
  moe = D * E + 3 * D * F * (E + 1)
  assert with_mtp - without == attention + moe + 2 * D + 2 * D * D + 3 * D
