"""configs/model: every number of the released models that we know."""

import importlib
import math

import pytest

from r1jax import config as config_lib
from r1jax.model import config as model_config


def _config(name, *size) -> model_config.ModelConfig:
  module = importlib.import_module(f'configs.model.{name}')
  return config_lib.from_dict(
    model_config.ModelConfig, module.get_config(*size).to_dict()
  )


# DeepSeek's shape: of the model, of its attention, of its rotation, its
# experts, its routing. None: no query latent, or no YaRN.
_MODEL = (
  *('vocab_size', 'embed_dim', 'num_layers', 'num_dense_layers'),
  *('dense_dim', 'norm_eps', 'max_length', 'mtp_depth'),
)
_MOE = (
  *('expert_dim', 'num_experts', 'num_shared', 'top_k'),
  *('num_groups', 'top_groups', 'scale'),
)
_V3_ROUTING = ('sigmoid', 'top2', True, True)
_V2_ROUTING = ('softmax', 'max', False, False)
_V3 = {
  'model': (129280, 7168, 61, 3, 18432, 1e-6, 163840, 1),
  'heads': (128, 1536),
  'rope': (10000.0, (40.0, 4096, 32.0, 1.0, 1.0, 1.0)),
  'moe': (2048, 256, 1, 8, 8, 4, 2.5),
  'routing': _V3_ROUTING,
}
_MLA = {
  ('deepseek_v2', 'lite'): {
    'model': (102400, 2048, 27, 1, 10944, 1e-6, 163840, 0),
    'heads': (16, None),
    'rope': (10000.0, (40.0, 4096, 32.0, 1.0, 0.707, 0.707)),
    'moe': (1408, 64, 2, 6, 1, 1, 1.0),
    'routing': _V2_ROUTING,
  },
  ('deepseek_v2', '236b'): {
    'model': (102400, 5120, 60, 1, 12288, 1e-6, 163840, 0),
    'heads': (128, 1536),
    'rope': (10000.0, (40.0, 4096, 32.0, 1.0, 0.707, 0.707)),
    'moe': (1536, 160, 2, 6, 8, 3, 16.0),
    'routing': _V2_ROUTING,
  },
  ('deepseek_v3_671b',): _V3,
  ('deepseek_v32',): _V3,
  ('moonlight_16b_a3b',): {
    'model': (163840, 2048, 27, 1, 11264, 1e-5, 8192, 0),
    'heads': (16, None),
    'rope': (50000.0, None),
    'moe': (1408, 64, 2, 6, 1, 1, 2.446),
    'routing': _V3_ROUTING,
  },
  ('kimi_k2',): {
    'model': (163840, 7168, 61, 1, 18432, 1e-6, 131072, 0),
    'heads': (64, 1536),
    'rope': (50000.0, (32.0, 4096, 1.0, 1.0, 1.0, 1.0)),
    'moe': (2048, 384, 1, 8, 1, 1, 2.827),
    'routing': _V3_ROUTING,
  },
}


@pytest.mark.parametrize('of', _MLA, ids='-'.join)
def test_deepseeks_shape(of):
  config, released = _config(*of), _MLA[of]
  pick = lambda x, names: tuple(getattr(x, name) for name in names)
  a, moe = config.attention, config.moe
  assert pick(config, _MODEL) == released['model']
  assert not config.tie_embeddings
  assert config.init_std == 0.006
  assert (a.num_heads, a.q_lora_rank) == released['heads']
  assert a.kv_lora_rank == 512
  assert (a.nope_head_dim, a.rope_head_dim, a.v_head_dim) == (128, 64, 128)
  assert a.norm_eps == 1e-6 and a.rope.interleaved
  theta, yarn = released['rope']
  assert a.rope.theta == theta
  if yarn is None:
    assert a.rope.scaling is None
  else:
    fields = ('factor', 'original_length', 'beta_fast', 'beta_slow')
    fields += ('mscale', 'mscale_all_dim')
    assert pick(a.rope.scaling, fields) == yarn
  assert pick(moe, _MOE) == released['moe']
  routing = ('score', 'group_score', 'normalize', 'has_bias')
  assert pick(moe, routing) == released['routing']
  indexer = None
  if of == ('deepseek_v32',):
    indexer = model_config.IndexerConfig(num_heads=64, head_dim=128, top_k=2048)
  assert a.indexer == indexer


def test_softmax_scales():
  """192^-½ times YaRN's mscale squared."""
  scale = lambda *of: _config(*of).attention.softmax_scale
  assert math.isclose(scale('deepseek_v3_671b'), 0.1352337788608801)
  assert math.isclose(scale('deepseek_v2', 'lite'), 0.11472139, rel_tol=1e-7)
  assert math.isclose(scale('moonlight_16b_a3b'), 0.07216878364870322)


# Layers, width, feed-forward, query and key-value heads, head width,
# vocabulary, tied, θ, epsilon, context.
_QWEN2_5 = {
  '0.5b': (24, 896, 4864, 14, 2, 64, 151936, True, 1e6, 1e-6, 32768),
  '1.5b': (28, 1536, 8960, 12, 2, 128, 151936, True, 1e6, 1e-6, 131072),
  '7b': (28, 3584, 18944, 28, 4, 128, 152064, False, 1e6, 1e-6, 131072),
  '14b': (48, 5120, 13824, 40, 8, 128, 152064, False, 1e6, 1e-5, 131072),
  '32b': (64, 5120, 27648, 40, 8, 128, 152064, False, 1e6, 1e-5, 131072),
  'math-1.5b': (28, 1536, 8960, 12, 2, 128, 151936, True, 1e4, 1e-6, 4096),
  'math-7b': (28, 3584, 18944, 28, 4, 128, 152064, False, 1e4, 1e-6, 4096),
}
_QWEN3 = {
  '0.6b': (28, 1024, 3072, 16, 8, 128, 151936, True, 1e6, 1e-6, 40960),
  '1.7b': (28, 2048, 6144, 16, 8, 128, 151936, True, 1e6, 1e-6, 40960),
  '4b': (36, 2560, 9728, 32, 8, 128, 151936, True, 1e6, 1e-6, 40960),
  '8b': (36, 4096, 12288, 32, 8, 128, 151936, False, 1e6, 1e-6, 40960),
  '14b': (40, 5120, 17408, 40, 8, 128, 151936, False, 1e6, 1e-6, 40960),
  '32b': (64, 5120, 25600, 64, 8, 128, 151936, False, 1e6, 1e-6, 40960),
  '30b-a3b': (48, 2048, 768, 32, 4, 128, 151936, False, 1e6, 1e-6, 40960),
  '235b-a22b': (94, 4096, 1536, 64, 4, 128, 151936, False, 1e6, 1e-6, 40960),
}
_LLAMA3 = {
  '8b': (32, 4096, 14336, 32, 8, 128, 128256, False, 5e5, 1e-5, 131072),
  '70b': (80, 8192, 28672, 64, 8, 128, 128256, False, 5e5, 1e-5, 131072),
}
_GQA = [
  *(('qwen2_5', size, numbers) for size, numbers in _QWEN2_5.items()),
  *(('qwen3', size, numbers) for size, numbers in _QWEN3.items()),
  *(('llama3', size, numbers) for size, numbers in _LLAMA3.items()),
]


@pytest.mark.parametrize(
  ('name', 'size', 'numbers'), _GQA, ids=['-'.join(g[:2]) for g in _GQA]
)
def test_qwens_and_llamas_shape(name, size, numbers):
  config = _config(name, size)
  a, moe = config.attention, config.moe
  assert numbers == (
    config.num_layers,
    config.embed_dim,
    config.dense_dim if moe is None else moe.expert_dim,
    a.num_heads,
    a.num_kv_heads,
    a.head_dim,
    config.vocab_size,
    config.tie_embeddings,
    a.rope.theta,
    config.norm_eps,
    config.max_length,
  )
  assert a.qkv_bias == (name == 'qwen2_5') and a.qk_norm == (name == 'qwen3')
  assert not a.rope.interleaved and not config.mtp_depth
  scaling = None
  if name == 'llama3':
    scaling = model_config.Llama3RopeConfig(8.0, 1.0, 4.0, 8192)
  assert a.rope.scaling == scaling
  if '-a' not in size:
    assert moe is None and config.num_dense_layers == config.num_layers
    return
  assert config.num_dense_layers == 0
  assert (moe.num_experts, moe.top_k, moe.num_shared) == (128, 8, 0)
  assert (moe.num_groups, moe.score, moe.scale) == (1, 'softmax', 1.0)
  assert moe.normalize and not moe.has_bias
