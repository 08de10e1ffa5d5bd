"""Qwen2.5, the bases of the Qwen distills: get_config('7b').

Source: arXiv:2412.15115 and the released configs.
"""

import ml_collections

# Layers, width, feed-forward, query and key-value heads, head, vocabulary.
_SIZES = {
  '0.5b': (24, 896, 4864, 14, 2, 64, 151936),
  '1.5b': (28, 1536, 8960, 12, 2, 128, 151936),
  '7b': (28, 3584, 18944, 28, 4, 128, 152064),
  '14b': (48, 5120, 13824, 40, 8, 128, 152064),
  '32b': (64, 5120, 27648, 40, 8, 128, 152064),
}


def get_config(size: str = '1.5b') -> ml_collections.ConfigDict:
  if size not in _SIZES:
    raise ValueError(f'size={size!r}, it must be one of {", ".join(_SIZES)}')
  layers, width, dense, heads, kv_heads, head_dim, vocab = _SIZES[size]
  return ml_collections.ConfigDict(
    {
      'vocab_size': vocab,
      'embed_dim': width,
      'num_layers': layers,
      'num_dense_layers': layers,
      'dense_dim': dense,
      'attention': {
        'num_heads': heads,
        'num_kv_heads': kv_heads,
        'head_dim': head_dim,
        'rope': {'theta': 1e6, 'interleaved': False},
        'qkv_bias': True,
        'qk_norm': False,
      },
      'moe': None,
      'norm_eps': 1e-6,
      'init_std': 0.02,
      'tie_embeddings': size in ('0.5b', '1.5b'),
      'max_length': 32768,  # tokens
      'dtype': 'bfloat16',
      'remat': True,
      'scan_layers': True,
    }
  )
