"""Llama 3.1 and 3.3, the bases of the Llama distills: get_config('8b').

Source: arXiv:2407.21783, table 3, and the released configs.
"""

import ml_collections

# Layers, width, feed-forward, query heads.
_SIZES = {
  '8b': (32, 4096, 14336, 32),
  '70b': (80, 8192, 28672, 64),
}


def get_config(size: str = '8b') -> ml_collections.ConfigDict:
  if size not in _SIZES:
    raise ValueError(f'size={size!r}, it must be one of {", ".join(_SIZES)}')
  layers, width, dense, heads = _SIZES[size]
  return ml_collections.ConfigDict(
    {
      'vocab_size': 128256,
      'embed_dim': width,
      'num_layers': layers,
      'num_dense_layers': layers,
      'dense_dim': dense,
      'attention': {
        'num_heads': heads,
        'num_kv_heads': 8,
        'head_dim': 128,
        'rope': {
          'theta': 5e5,
          'interleaved': False,
          'scaling': {
            'factor': 8.0,
            'low_freq_factor': 1.0,
            'high_freq_factor': 4.0,
            'original_length': 8192,  # tokens
          },
        },
      },
      'moe': None,
      'norm_eps': 1e-5,
      'init_std': 0.02,
      'max_length': 131072,  # tokens
      'dtype': 'bfloat16',
      'remat': True,
      'scan_layers': True,
    }
  )
