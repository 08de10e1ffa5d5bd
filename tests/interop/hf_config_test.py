"""config.json and ModelConfig say the same."""

import dataclasses
import json
import operator
import os
import subprocess

import jax
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.interop import hf_config
from r1jax.model import config as model_config
from r1jax.model import rope as rope_lib
from r1jax.model import transformer
from tests import known_answers
from tests.model.families_test import _SIZES, MODELS, _config

_PYTHON = os.environ.get('R1JAX_TRANSFORMERS_PYTHON')


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


# ---- What a config.json means to transformers -----------------------------

_OUT = object()  # The key is left out.
_YARN = {'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32}
_THETA = 'attention.rope.theta'
_SCALING = 'attention.rope.scaling'
_WINDOW = {'use_sliding_window': True, 'sliding_window': 4}
_MIXED = ['dense', 'dense', 'sparse']


def _yarn(**changes):
  fields = {'mscale': 0.0, 'mscale_all_dim': 0.0} | changes
  return model_config.YarnConfig(4.0, 32, **fields)


def _scaled(**changes):
  return {'rope_scaling': _YARN | changes}


# Fixture, changes of its config.json, where that shows in ours and how.
_MEANINGS = [
  # rope_scaling takes the place of rope_parameters, its theta included.
  ('qwen3', _scaled(), _SCALING, _yarn()),
  ('qwen3', _scaled(), _THETA, 1e4),
  ('qwen3', _scaled() | {'rope_theta': 7e5}, _THETA, 7e5),
  ('qwen3', _scaled(rope_theta=3e5) | {'rope_theta': 7e5}, _THETA, 3e5),
  ('qwen3', {'rope_scaling': None, 'rope_theta': 7e5}, _THETA, 1e6),
  ('qwen3', {'rope_parameters': _OUT, 'rope_theta': 7e5}, _THETA, 7e5),
  ('llama3', {'rope_parameters': _OUT}, 'attention.rope.scaling', None),
  ('llama3', {'rope_parameters': _OUT}, _THETA, 1e4),
  ('qwen3', _scaled(rope_type='default'), _SCALING, None),
  ('qwen3', _scaled(rope_type='yarn', type='linear'), _SCALING, _yarn()),
  ('qwen3', _scaled(factor=None), f'{_SCALING}.factor', 2.0),
  ('qwen3', _scaled(partial_rotary_factor=1.0), _SCALING, _yarn()),
  ('qwen3', _scaled(beta_fast=None, beta_slow=0), _SCALING, _yarn()),
  ('qwen3', _scaled(mscale=0.7), _SCALING, _yarn(mscale=0.7)),
  ('qwen3', _scaled(truncate=False), _SCALING, _yarn(truncate=False)),
  ('qwen3', _scaled(truncate=None), _SCALING, _yarn(truncate=False)),
  (
    'qwen3',
    _scaled(attention_factor=1.5),
    _SCALING,
    _yarn(attention_factor=1.5),
  ),
  (
    'deepseek_v3',
    _scaled(attention_factor=1.5, mscale=0.5, mscale_all_dim=1.2),
    _SCALING,
    _yarn(attention_factor=1.5, mscale=0.5, mscale_all_dim=1.2),
  ),
  (
    'qwen3',
    {'rope_scaling': {'type': 'yarn', 'factor': 4.0}},
    f'{_SCALING}.original_length',
    64,
  ),
  (
    'qwen3',
    _scaled() | {'original_max_position_embeddings': 16},
    f'{_SCALING}.original_length',
    16,
  ),
  # What counts in one family only.
  ('deepseek_v32', {'first_k_dense_replace': _OUT}, 'num_dense_layers', 1),
  ('deepseek_v32', {'mlp_layer_types': _MIXED}, 'num_dense_layers', 2),
  ('deepseek_v32', {'mlp_layer_types': _OUT}, 'num_dense_layers', 1),
  ('deepseek_v3', {'mlp_layer_types': _MIXED}, 'num_dense_layers', 1),
  (
    'deepseek_v32',
    {'rope_interleave': False},
    'attention.rope.interleaved',
    True,
  ),
  ('qwen2', {'attention_bias': True}, 'attention.qkv_bias', True),
  ('qwen2', {'hidden_act': 'swish'}, 'attention.qkv_bias', True),
  ('deepseek_v3', {'n_shared_experts': 0}, 'moe.num_shared', 0),
  # Windows that no layer has.
  ('qwen2', _WINDOW | {'max_window_layers': 0}, 'num_layers', 2),
  (
    'qwen2',
    _WINDOW | {'max_window_layers': 2, 'layer_types': _OUT},
    'num_layers',
    2,
  ),
  ('qwen3_moe', _WINDOW | {'sliding_window': None}, 'num_layers', 2),
  # Dense layers first.
  ('qwen3_moe', {'decoder_sparse_step': 2}, 'num_dense_layers', 1),
  ('qwen3_moe', {'decoder_sparse_step': 3}, 'num_dense_layers', 2),
  ('qwen3_moe', {'mlp_only_layers': [1, 0]}, 'num_dense_layers', 2),
  (
    'qwen3_moe',
    {'decoder_sparse_step': 2, 'mlp_only_layers': [0, 9]},
    'num_dense_layers',
    1,
  ),
  (
    'qwen3_moe',
    {'num_local_experts': _OUT, 'num_experts': 4},
    'moe.num_experts',
    4,
  ),
]
# What a key that is left out means, family by family.
_DEFAULTS = {
  'llama3': {
    'num_key_value_heads': ('attention.num_kv_heads', 4),
    'head_dim': ('attention.head_dim', 8),
    'rms_norm_eps': ('norm_eps', 1e-6),
    'initializer_range': ('init_std', 0.02),
    'max_position_embeddings': ('max_length', 2048),
  },
  'qwen3': {
    'tie_word_embeddings': ('tie_embeddings', False),
    'head_dim': ('attention.head_dim', 128),
    'max_position_embeddings': ('max_length', 32768),
  },
  'qwen3_moe': {
    'head_dim': ('attention.head_dim', 8),
    'num_key_value_heads': ('attention.num_kv_heads', 4),
    'decoder_sparse_step': ('num_dense_layers', 0),
    'mlp_only_layers': ('num_dense_layers', 0),
    'norm_topk_prob': ('moe.normalize', False),
    'moe_intermediate_size': ('moe.expert_dim', 768),
    'num_experts_per_tok': ('moe.top_k', 8),
  },
  'deepseek_v2_group': {
    'num_key_value_heads': ('attention.num_heads', 4),
    'q_lora_rank': ('attention.q_lora_rank', 1536),
    'kv_lora_rank': ('attention.kv_lora_rank', 512),
    'qk_nope_head_dim': ('attention.nope_head_dim', 128),
    'qk_rope_head_dim': ('attention.rope_head_dim', 64),
    'v_head_dim': ('attention.v_head_dim', 128),
    'first_k_dense_replace': ('num_dense_layers', 0),
    'topk_method': ('moe.num_groups', 1),
    'n_shared_experts': ('moe.num_shared', 2),
    'routed_scaling_factor': ('moe.scale', 1.0),
    'max_position_embeddings': ('max_length', 2048),
    'moe_intermediate_size': ('moe.expert_dim', 1407),
  },
  'deepseek_v3': {
    'num_key_value_heads': ('attention.num_heads', 4),
    'first_k_dense_replace': ('num_dense_layers', 3),
    'moe_intermediate_size': ('moe.expert_dim', 2048),
    'n_shared_experts': ('moe.num_shared', 1),
    'routed_scaling_factor': ('moe.scale', 2.5),
    'norm_topk_prob': ('moe.normalize', True),
    'rope_interleave': ('attention.rope.interleaved', True),
    'max_position_embeddings': ('max_length', 4096),
  },
  'deepseek_v32': {
    'index_topk': ('attention.indexer.top_k', 2048),
    'index_n_heads': ('attention.indexer.num_heads', 64),
    'index_head_dim': ('attention.indexer.head_dim', 128),
    'max_position_embeddings': ('max_length', 163840),
  },
}
_MEANINGS += [
  (name, {key: _OUT}, *meaning)
  for name, defaults in _DEFAULTS.items()
  for key, meaning in defaults.items()
]
_MEANINGS += [
  (
    'qwen2',
    {'use_sliding_window': _OUT, 'layer_types': _OUT},
    'num_layers',
    2,
  ),
  (
    'qwen2',
    {'num_key_value_heads': _OUT, 'num_attention_heads': 64, 'head_dim': 8},
    'attention.num_kv_heads',
    32,
  ),
  (
    'deepseek_v3',
    {'n_routed_experts': 16, 'n_group': _OUT, 'topk_group': _OUT},
    'moe.num_groups',
    8,
  ),
  (
    'deepseek_v3',
    {'topk_group': 4, 'num_experts_per_tok': _OUT},
    'moe.top_k',
    8,
  ),
]


def _changed(name, changes):
  values = _read(name) | changes
  return {key: value for key, value in values.items() if value is not _OUT}


@pytest.mark.parametrize(('name', 'changes', 'where', 'expected'), _MEANINGS)
def test_meaning(name, changes, where, expected):
  config = hf_config.read(_changed(name, changes))
  assert operator.attrgetter(where)(config) == expected
  assert hf_config.read(hf_config.write(config)) == config


def test_no_shared_experts_may_be_null():
  values = _read('deepseek_v3') | {'n_shared_experts': None}
  assert hf_config.read(values).moe.num_shared == 0


def test_rope_is_written_for_every_reader():
  values = _changed('deepseek_v3', _scaled(mscale=0.5))
  written = hf_config.write(hf_config.read(values))['rope_scaling']
  expected = _YARN | {'beta_fast': 32, 'beta_slow': 1, 'mscale': 0.5}
  assert written == expected | {'rope_type': 'yarn'}


_SCRIPT = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM

for values in json.load(sys.stdin):
  kind = type(AutoConfig.for_model(values['model_type']))
  model = AutoModelForCausalLM.from_config(kind.from_dict(values))
  config, body = model.config, model.model
  get = lambda name: getattr(config, name, None)
  is_greedy = get('topk_method') == 'greedy'  # Then no group counts.
  is_v3 = kind.model_type == 'deepseek_v3'  # Only it reads rope_interleave.
  print(json.dumps({
    'params': sum(p.numel() for p in model.parameters()),
    'frequency': body.rotary_emb.inv_freq.tolist(),
    'rotation': body.rotary_emb.attention_scaling,
    'softmax_scale': body.layers[0].self_attn.scaling,
    'windows': [get('sliding_window')] * (
      'sliding_attention' in (get('layer_types') or ['sliding_attention'])),
    'norm_eps': body.norm.variance_epsilon,
    'max_length': config.max_position_embeddings,
    'init_std': config.initializer_range,
    'dense': [not hasattr(layer.mlp, 'experts') for layer in body.layers],
    'top_k': get('num_experts_per_tok'),
    'normalize': get('norm_topk_prob'),
    'scale': get('routed_scaling_factor'),
    'num_groups': 1 if is_greedy else get('n_group'),
    'top_groups': 1 if is_greedy else get('topk_group'),
    'interleaved': get('rope_interleave') if is_v3 else None,
  }))
"""


@pytest.mark.slow
@pytest.mark.skipif(not _PYTHON, reason='no R1JAX_TRANSFORMERS_PYTHON')
def test_transformers_understands_the_same():
  cases = [_changed(name, changes) for name, changes, *_ in _MEANINGS]
  done = subprocess.run(
    [_PYTHON, '-c', _SCRIPT],
    input=json.dumps(cases),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == len(cases)
  for (*case, _, _), values, line in zip(_MEANINGS, cases, lines):
    _compare(hf_config.read(values), json.loads(line), case)


def _compare(config, theirs, case):
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes['params'])]
  a, scaling = config.attention, config.attention.rope.scaling
  is_yarn = isinstance(scaling, model_config.YarnConfig)
  ours = {
    'params': sum(sizes),
    'rotation': scaling.rotation_factor if is_yarn else 1.0,
    'softmax_scale': a.softmax_scale,
    'norm_eps': config.norm_eps,
    'max_length': config.max_length,
    'init_std': config.init_std,
    'dense': [i < config.num_dense_layers for i in range(config.num_layers)],
  }
  if config.moe is not None:
    ours |= {'top_k': config.moe.top_k, 'normalize': config.moe.normalize}
  if isinstance(a, model_config.MlaConfig):
    ours |= {
      name: getattr(config.moe, name)
      for name in ('scale', 'num_groups', 'top_groups')
    }
  for name, value in ours.items():
    assert value == pytest.approx(theirs[name], rel=1e-12), (case, name)
  assert theirs['windows'] in ([], [None]), case
  assert theirs['interleaved'] in (None, a.rope.interleaved), case
  np.testing.assert_allclose(
    rope_lib.frequencies(a.rope, a.rotated_dim),
    theirs['frequency'],
    rtol=1e-6,
    err_msg=str(case),
  )


# ---- What is refused ------------------------------------------------------


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    (
      'qwen2',
      _WINDOW | {'layer_types': None, 'max_window_layers': 1},
      'use_sliding_window=true with sliding_window=4 from layer 1 on is not',
    ),
    (
      'qwen3_moe',
      _WINDOW | {'max_window_layers': 48},
      'from layer 0 on is not',
    ),
    (
      'qwen2',
      {'layer_types': ['full_attention', 'sliding_attention']},
      'layer_types with sliding_attention are not supported',
    ),
    (
      'qwen3_moe',
      {'mlp_only_layers': [1]},
      r'decoder_sparse_step=1 with mlp_only_layers=\[1\] of 2 layers is not',
    ),
    (
      'qwen3_moe',
      {'decoder_sparse_step': 2, 'num_hidden_layers': 3},
      r'decoder_sparse_step=2 with mlp_only_layers=\[\] of 3 layers is not',
    ),
    (
      'qwen3_moe',
      {'decoder_sparse_step': 0},
      'decoder_sparse_step=0 must be an integer, at least 1',
    ),
    (
      'deepseek_v32',
      {'mlp_layer_types': ['sparse', 'dense', 'sparse']},
      r"mlp_layer_types=\['sparse', 'dense', 'sparse'\] of 3 layers is not",
    ),
    (
      'deepseek_v32',
      {'mlp_layer_types': ['dense']},
      r"mlp_layer_types=\['dense'\] of 3 layers is not",
    ),
    ('llama3', {'mlp_bias': True}, 'mlp_bias=True is not supported'),
    ('llama3', {'attention_bias': True}, 'attention_bias=True is not supp'),
    ('llama3', {'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported"),
    ('deepseek_v2_group', {'topk_method': 'x'}, "topk_method='x' is not supp"),
    ('deepseek_v3', {'num_key_value_heads': 2}, 'num_key_value_heads=2 is not'),
    ('deepseek_v3', {'num_experts_per_tok': 9}, 'top_k=9 of num_experts=8'),
    ('deepseek_v2_group', {'num_experts_per_tok': _OUT}, "v2 lacks 'num_exp"),
    ('llama3', {'vocab_size': _OUT}, "model_type=llama lacks 'vocab_size'"),
    ('llama3', {'hidden_size': _OUT}, "model_type=llama lacks 'hidden_size'"),
    ('deepseek_v3', {'vocab_size': None}, 'config.json.vocab_size=None is a'),
    ('deepseek_v3', {'kv_lora_rank': 'x'}, "kv_lora_rank='x' is a str"),
    (
      'deepseek_v3',
      {'first_k_dense_replace': None},
      'first_k_dense_replace=None must be an integer, at least 0',
    ),
    ('llama3', {'num_attention_heads': 0}, 'num_attention_heads=0 must be an'),
    ('qwen3', _scaled(rope_type='mrope'), "rope type 'mrope' is not supported"),
    ('qwen3', _scaled(type='linear'), "rope type 'linear' is not supported"),
    ('qwen3', _scaled(type='dynamic'), "rope type 'dynamic' is not supported"),
    ('qwen3', _scaled(rope_theta=None), 'rope_theta=None must be a number'),
    (
      'qwen3',
      {'rope_scaling': 'yarn'},
      "rope_scaling='yarn' must be an object",
    ),
    (
      'qwen3',
      {'rope_parameters': {'full_attention': {'rope_theta': 1e6}}},
      'rope_parameters with one each for full_attention is not supported',
    ),
    (
      'qwen3',
      _scaled(partial_rotary_factor=0.5),
      'partial_rotary_factor=0.5 is not supported, only 1 is',
    ),
    (
      'qwen3',
      {'partial_rotary_factor': 0.5},
      'partial_rotary_factor=0.5 is not supported, only 1 is',
    ),
    ('qwen3', {'rope_scaling': {'type': 'yarn'}}, "qwen3 lacks 'factor'"),
    ('qwen3', _scaled(beta_fast='x'), "beta_fast='x' must be a number"),
    ('qwen3', _scaled(attention_factor=0), 'attention_factor=0.0 must be pos'),
    (
      'qwen3',
      _scaled(original_max_position_embeddings=None),
      'original_max_position_embeddings=None must be an integer, at least 1',
    ),
  ],
)
def test_what_is_not_supported_is_said(name, changes, message):
  with pytest.raises(config_lib.UserError, match=message) as raised:
    hf_config.read(_changed(name, changes))
  assert '\n' not in str(raised.value)
