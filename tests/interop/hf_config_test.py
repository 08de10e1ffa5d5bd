"""config.json and ModelConfig say the same."""

import dataclasses
import json

import pytest

from r1jax import config as config_lib
from r1jax.interop import hf_config
from r1jax.model import config as model_config
from tests import known_answers
from tests.model.families_test import _SIZES, MODELS, _config


def _read(name):
  path = known_answers.DATA / 'hf_models' / name / 'config.json'
  return json.loads(path.read_text())


def _plain(config):
  """Without what config.json does not say."""
  moe = config.moe and dataclasses.replace(
    config.moe, block=32, implementation='xla'
  )
  return dataclasses.replace(
    config, moe=moe, dtype='float32', remat=False, scan_layers=True
  )


@pytest.mark.parametrize('name', MODELS)
def test_what_is_written_is_read(name):
  config = hf_config.read(_read(name))
  assert hf_config.read(hf_config.write(config)) == config
  assert hf_config.write(config)['model_type'] == _read(name)['model_type']


@pytest.mark.parametrize('of', _SIZES, ids='-'.join)
def test_released_models_are_written_and_read(of):
  config = _plain(_config(*of))
  assert hf_config.read(hf_config.write(config)) == config


def test_kimi_is_a_v3_by_another_name():
  values = _read('deepseek_v3')
  assert hf_config.read(values | {'model_type': 'kimi_k2'}) == hf_config.read(
    values
  )


def test_both_spellings_of_rope_are_read():
  values = _read('deepseek_v3_yarn')
  rope = values.pop('rope_parameters')
  theta = rope.pop('rope_theta')
  rope['type'] = rope.pop('rope_type')
  released = values | {'rope_theta': theta, 'rope_scaling': rope}
  expected = hf_config.read(_read('deepseek_v3_yarn'))
  assert hf_config.read(released) == expected
  assert isinstance(expected.attention.rope.scaling, model_config.YarnConfig)


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('qwen2', {'use_sliding_window': True}, 'use_sliding_window=true is not'),
    ('qwen3_moe', {'mlp_only_layers': [1]}, r'mlp_only_layers=\[1\] is not'),
    ('qwen3_moe', {'decoder_sparse_step': 2}, 'decoder_sparse_step=2 is not'),
    ('llama3', {'mlp_bias': True}, 'mlp_bias=True is not supported'),
    ('llama3', {'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
    ('deepseek_v2_group', {'topk_method': 'x'}, "topk_method='x' is not supp"),
    ('deepseek_v3', {'num_key_value_heads': 2}, 'num_key_value_heads=2 is not'),
    ('deepseek_v3', {'num_experts_per_tok': 9}, 'top_k=9 of num_experts=8'),
    ('deepseek_v3', {'rope_parameters': {}}, "lacks 'rope_theta'"),
    ('deepseek_v3', {'vocab_size': None}, 'config.json.vocab_size=None is a'),
    ('deepseek_v3', {'kv_lora_rank': 'x'}, "kv_lora_rank='x' is a str"),
  ],
)
def test_what_is_not_supported_is_said(name, changes, message):
  with pytest.raises(config_lib.UserError, match=message):
    hf_config.read(_read(name) | changes)
