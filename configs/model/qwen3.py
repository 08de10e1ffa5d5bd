"""Qwen3, dense and with experts: get_config('0.6b'), get_config('30b-a3b').

Source: arXiv:2505.09388, tables 1 and 2, and the released configs.
"""

import ml_collections

# Layers, width, feed-forward (of an expert), query and key-value heads.
_DENSE = {
  '0.6b': (28, 1024, 3072, 16, 8),
  '1.7b': (28, 2048, 6144, 16, 8),
  '4b': (36, 2560, 9728, 32, 8),
  '8b': (36, 4096, 12288, 32, 8),
  '14b': (40, 5120, 17408, 40, 8),
  '32b': (64, 5120, 25600, 64, 8),
}
_MOE = {
  '30b-a3b': (48, 2048, 768, 32, 4),
  '235b-a22b': (94, 4096, 1536, 64, 4),
}


def get_config(size: str = '0.6b') -> ml_collections.ConfigDict:
  sizes = _DENSE | _MOE
  if size not in sizes:
    raise ValueError(f'size={size!r}, it must be one of {", ".join(sizes)}')
  layers, width, hidden, heads, kv_heads = sizes[size]
  config = ml_collections.ConfigDict(
    {
      'vocab_size': 151936,
      'embed_dim': width,
      'num_layers': layers,
      'num_dense_layers': layers,
      'dense_dim': hidden,
      'attention': {
        'num_heads': heads,
        'num_kv_heads': kv_heads,
        'head_dim': 128,
        'rope': {'theta': 1e6, 'interleaved': False},
        'qkv_bias': False,
        'qk_norm': True,
      },
      'moe': None,
      'norm_eps': 1e-6,
      'init_std': 0.02,
      'tie_embeddings': size in ('0.6b', '1.7b', '4b'),
      'max_length': 40960,  # tokens
      'dtype': 'bfloat16',
      'remat': True,
      'scan_layers': True,
    }
  )
  if size in _MOE:
    config.num_dense_layers = 0
    config.moe = {
      'num_experts': 128,
      'top_k': 8,
      'expert_dim': hidden,
      'num_shared': 0,
      'score': 'softmax',
      'normalize': True,
      'has_bias': False,
      'implementation': 'grouped',
      'block': 128,  # Rows.
    }
  return config
