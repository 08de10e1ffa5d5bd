"""The demo's model: DeepSeek-V3's parts at a millionth of its size.

0.65 M parameters with the MTP module; `tiny.py:wide` has 1.08 M. Every choice
here is ours; what V3 uses stands in deepseek_v3_671b.py.
"""

import ml_collections

from configs import mesh


def get_config(width: str = 'demo') -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      'vocab_size': 376,  # 370 of the arithmetic tokenizer, rounded up to 8s.
      'embed_dim': 96,
      'num_layers': 3,
      'num_dense_layers': 1,
      'dense_dim': 288,
      'attention': {
        'num_heads': 2,
        'q_lora_rank': 48,
        'kv_lora_rank': 32,
        'nope_head_dim': 32,
        'rope_head_dim': 16,
        'v_head_dim': 32,
        'rope': {'theta': 10000.0, 'interleaved': True},
      },
      'moe': {
        'num_experts': 8,
        'top_k': 2,
        'expert_dim': 48,
        'num_shared': 1,
        'scale': 2.5,  # As V3.
        'implementation': 'xla',  # 'pallas' on a TPU, 'grouped' on a GPU.
        'block': 32,  # Rows.
        'exchange': mesh.get_exchange(),
      },
      'mtp_depth': 1,  # As V3.
      'init_std': 0.02,  # ours: V3's 0.006 suits its width, not this one.
      'max_length': 256,
      'dtype': 'float32',
      'precision': 'dtype',
      'fp8_implementation': 'xla',
      'attention_implementation': 'naive',  # 'pallas' on a TPU, also these.
      'decode_implementation': 'xla',
      'head_implementation': 'chunked',
      'remat': False,
      'scan_layers': True,
    }
  )
  if width == 'wide':
    config.update(embed_dim=128, dense_dim=384)
    config.attention.update(
      num_heads=4, q_lora_rank=64, nope_head_dim=16, v_head_dim=16
    )
    config.moe.expert_dim = 64
  elif width != 'demo':
    raise ValueError(f'{width!r} is no variant, they are demo, wide')
  return config
