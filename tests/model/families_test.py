"""One code path for all families: transformers' logits, and released sizes."""

import dataclasses
import functools
import importlib
import math

import jax
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.interop import huggingface
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import sharding
from tests import known_answers

# transformers' own prefill and decode differ by 6e-6 (float32, logits to 3.5).
_ATOL = 2e-5
MODELS = (
  'deepseek_v2_group',
  'deepseek_v2_lite_yarn',
  'deepseek_v3',
  'deepseek_v32',
  'deepseek_v32_dense',
  'deepseek_v3_yarn',
  'llama3',
  'qwen2',
  'qwen3',
  'qwen3_moe',
)
_SIZES = {
  ('deepseek_v2', 'lite'): 15_706_484_224,
  ('deepseek_v2', '236b'): 235_741_434_880,
  ('deepseek_v3_671b',): 671_026_419_200,
  ('deepseek_v32',): 671_877_944_064,
  ('moonlight_16b_a3b',): 15_960_110_208,
  ('kimi_k2',): 1_026_408_232_448,
  ('qwen2_5', '0.5b'): 494_032_768,
  ('qwen2_5', '1.5b'): 1_543_714_304,
  ('qwen2_5', '7b'): 7_615_616_512,
  ('qwen2_5', '14b'): 14_770_033_664,
  ('qwen2_5', '32b'): 32_763_876_352,
  ('qwen2_5', 'math-1.5b'): 1_543_714_304,
  ('qwen2_5', 'math-7b'): 7_615_616_512,
  ('qwen3', '0.6b'): 596_049_920,
  ('qwen3', '1.7b'): 1_720_574_976,
  ('qwen3', '4b'): 4_022_468_096,
  ('qwen3', '8b'): 8_190_735_360,
  ('qwen3', '14b'): 14_768_307_200,
  ('qwen3', '32b'): 32_762_123_264,
  ('qwen3', '30b-a3b'): 30_532_122_624,
  ('qwen3', '235b-a22b'): 235_093_634_560,
  ('llama3', '8b'): 8_030_261_248,
  ('llama3', '70b'): 70_553_706_496,
}


@functools.cache
def _load(name):
  folder = known_answers.DATA / 'hf_models' / name
  io = np.load(folder / 'io.npz')
  return *huggingface.load(folder), {k: io[k] for k in io}


@functools.partial(jax.jit, static_argnames=('config', 'decode'))
def _logits(config, variables, tokens_BT, position_BT, cache, decode=False):
  """Float32 logits, and the cache after the tokens."""
  with jax.default_matmul_precision('highest'):
    out = transformer.Transformer(config).apply(
      variables, tokens_BT, position_BT=position_BT, cache=cache, decode=decode
    )
    head = transformer.head(variables['params'], config)
    return head.logits(out.hidden_BTD), out.cache


def _positions(start, end):
  return np.broadcast_to(
    np.arange(start, end, dtype=np.int32), (2, end - start)
  )


@pytest.mark.parametrize('name', MODELS)
def test_logits_are_those_of_transformers(name):
  config, variables, io = _load(name)

  @jax.jit
  def logits(variables, tokens_BT):
    with jax.default_matmul_precision('highest'):
      model = transformer.Transformer(config)
      return model.apply(variables, tokens_BT, method='logits')

  logits_BTV = logits(variables, io['input_ids'].astype(np.int32))
  np.testing.assert_allclose(logits_BTV, io['logits'], rtol=0, atol=_ATOL)


@pytest.mark.parametrize('name', MODELS)
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


def _config(name, *size, **changes):
  module = importlib.import_module(f'configs.model.{name}')
  config = config_lib.from_dict(
    model_config.ModelConfig, module.get_config(*size).to_dict()
  )
  return dataclasses.replace(config, **changes)


def _sizes(config):
  shapes = sharding.unbox(
    jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  )
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  return count(shapes['params']), count(shapes['router'])


@pytest.mark.parametrize('of', _SIZES, ids='-'.join)
def test_released_size(of):
  assert sum(_sizes(_config(*of, mtp_depth=0))) == _SIZES[of]


def test_router_biases_are_counted_apart():
  params, biases = _sizes(_config('deepseek_v3_671b', mtp_depth=0))
  assert (params, biases) == (671_026_404_352, 58 * 256)


@pytest.mark.parametrize('name', ['deepseek_v2', 'qwen2_5', 'qwen3', 'llama3'])
def test_an_unknown_size_lists_the_known(name):
  with pytest.raises(ValueError, match="size='9t', it must be"):
    _config(name, '9t')


def test_mtp_module_is_one_moe_block_a_projection_and_three_norms():
  without, _ = _sizes(_config('deepseek_v3_671b', mtp_depth=0))
  with_mtp, _ = _sizes(_config('deepseek_v3_671b', mtp_depth=1))
  D, A, C, R, H, E, F = 7168, 1536, 512, 64, 128, 256, 2048
  attention = D * A + A + A * H * 192 + D * (C + R) + C + C * H * 256
  attention += H * 128 * D
  moe = D * E + 3 * D * F * (E + 1)
  assert with_mtp - without == attention + moe + 2 * D + 2 * D * D + 3 * D
