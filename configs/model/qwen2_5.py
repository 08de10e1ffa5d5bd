"""Qwen2.5 base models, those of the Qwen distills among them.

  get_config('1.5b'), get_config('math-7b')

R1-Distill-Qwen-1.5B and 7B start from Qwen2.5-Math ('math-1.5b', 'math-7b':
θ = 1e4, a context of 4,096), 14B and 32B from Qwen2.5 ('14b', '32b'), whose
norms have an epsilon of 1e-5. Instruct models, all with 1e-6 and 32,768
tokens, and the distills have config.json files of their own: import them.

Source: arXiv:2412.15115 and the released configs; θ and the contexts of the
Math models unverified.
"""

import ml_collections

# Layers, width, feed-forward, query and key-value heads, head, vocabulary.
_SHAPES = {
  '0.5b': (24, 896, 4864, 14, 2, 64, 151936),
  '1.5b': (28, 1536, 8960, 12, 2, 128, 151936),
  '7b': (28, 3584, 18944, 28, 4, 128, 152064),
  '14b': (48, 5120, 13824, 40, 8, 128, 152064),
  '32b': (64, 5120, 27648, 40, 8, 128, 152064),
}
# Shape, θ, context in tokens, epsilon.
_SIZES = {
  '0.5b': ('0.5b', 1e6, 32768, 1e-6),
  '1.5b': ('1.5b', 1e6, 131072, 1e-6),
  '7b': ('7b', 1e6, 131072, 1e-6),
  '14b': ('14b', 1e6, 131072, 1e-5),
  '32b': ('32b', 1e6, 131072, 1e-5),
  'math-1.5b': ('1.5b', 1e4, 4096, 1e-6),
  'math-7b': ('7b', 1e4, 4096, 1e-6),
}


def get_config(size: str = '1.5b') -> ml_collections.ConfigDict:
  if size not in _SIZES:
    raise ValueError(f'size={size!r}, it must be one of {", ".join(_SIZES)}')
  shape, theta, max_length, eps = _SIZES[size]
  layers, width, dense, heads, kv_heads, head_dim, vocab = _SHAPES[shape]
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
        'rope': {'theta': theta, 'interleaved': False},
        'qkv_bias': True,
        'qk_norm': False,
      },
      'moe': None,
      'norm_eps': eps,
      'init_std': 0.02,
      'tie_embeddings': shape in ('0.5b', '1.5b'),
      'max_length': max_length,  # tokens
      'dtype': 'bfloat16',
      'remat': True,
      'scan_layers': True,
    }
  )
