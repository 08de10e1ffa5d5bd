"""Every rule of the model's config says which value broke it."""

import dataclasses

import pytest

from r1jax.model import config as model_config
from tests.model import tiny


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'top_k': 9}, 'top_k=9 of num_experts=8'),
    ({'top_k': 0}, 'top_k=0'),
    ({'num_groups': 3}, 'num_groups=3 must divide num_experts=8'),
    ({'top_groups': 5}, 'top_groups=5 must lie between 1 and num_groups=4'),
    ({'top_k': 5}, 'top_k=5 exceeds the 4 experts of top_groups=2'),
    ({'num_groups': 8}, 'group_score=top2 needs groups of 2'),
    ({'score': 'tanh'}, "score='tanh'"),
    ({'group_score': 'mean'}, "group_score='mean'"),
  ],
)
def test_moe_rules(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny.config().moe, **changes)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_dense_layers': 4}, 'num_dense_layers=4 must lie between 0 and'),
    ({'moe': None}, 'moe=None needs num_dense_layers=3'),
    ({'dtype': 'float16'}, "dtype='float16'"),
    ({'mtp_depth': -1}, 'mtp_depth=-1'),
    (
      {'attention_implementation': 'flash'},
      "attention_implementation='flash', it must be one of",
    ),
    (
      {
        'attention_implementation': 'splash',
        'attention': dataclasses.replace(
          tiny.config().attention,
          indexer=model_config.IndexerConfig(2, 8, 4),
        ),
      },
      "'splash': with an indexer it must be 'naive'",
    ),
  ],
)
def test_model_rules(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tiny.config(), **changes)


def test_attention_and_yarn_rules():
  with pytest.raises(ValueError, match='rope_head_dim=7 must be even'):
    dataclasses.replace(tiny.config().attention, rope_head_dim=7)
  for changes, message in (
    ({'factor': 0.5}, 'factor=0.5 must be at least 1'),
    ({'beta_fast': 0.0}, 'beta_fast=0.0 must be positive'),
    ({'beta_slow': -1.0}, 'beta_slow=-1.0 must be positive'),
    ({'attention_factor': 0.0}, 'attention_factor=0.0 must be positive'),
  ):
    with pytest.raises(ValueError, match=message):
      model_config.YarnConfig(**{'factor': 4.0, 'original_length': 9} | changes)


_ROPE = model_config.RopeConfig(theta=1e4, interleaved=False)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (
      lambda: model_config.GqaConfig(4, 3, 8, _ROPE),
      'num_kv_heads=3 must divide num_heads=4',
    ),
    (lambda: model_config.GqaConfig(4, 2, 7, _ROPE), 'head_dim=7 must be even'),
    (lambda: model_config.IndexerConfig(2, 8, 0), 'top_k=0 must be at least 1'),
    (
      lambda: model_config.Llama3RopeConfig(8.0, 4.0, 1.0, 8192),
      'low_freq_factor=4.0 must be positive and less than high_freq_factor=1.0',
    ),
    (
      lambda: dataclasses.replace(
        tiny.config().attention,
        q_lora_rank=None,
        indexer=model_config.IndexerConfig(2, 8, 4),
      ),
      'q_lora_rank=None: the indexer needs the query latent',
    ),
    (
      lambda: dataclasses.replace(
        tiny.config().attention, indexer=model_config.IndexerConfig(2, 4, 4)
      ),
      'indexer.head_dim=4 must be at least rope_head_dim=8',
    ),
  ],
)
def test_rules_of_the_other_families(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_yarn_without_both_mscales_scales_the_rotation_not_the_softmax():
  yarn = model_config.YarnConfig(4.0, 32, mscale=0.0, mscale_all_dim=0.0)
  assert yarn.rotation_factor == model_config.yarn_mscale(4.0, 1.0) > 1.1
  assert yarn.softmax_factor == 1.0


def test_attention_factor_takes_the_place_of_the_rotation_factor_only():
  yarn = model_config.YarnConfig(4.0, 32, mscale=0.5, attention_factor=1.5)
  assert yarn.rotation_factor == 1.5
  assert yarn.softmax_factor == model_config.yarn_mscale(4.0, 1.0) ** 2 > 1
