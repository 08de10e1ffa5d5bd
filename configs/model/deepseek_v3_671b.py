"""DeepSeek-V3, V3-Base, R1-Zero and R1: 671 B parameters, 37 B active.

Source: DeepSeek-V3, arXiv:2412.19437, §4.2, and the released config.json.
671,026,419,200 parameters without the MTP module, router biases included.
"""

import ml_collections

from configs import mesh


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'vocab_size': 129280,
      'embed_dim': 7168,
      'num_layers': 61,
      'num_dense_layers': 3,
      'dense_dim': 18432,
      'attention': {
        'num_heads': 128,
        'q_lora_rank': 1536,
        'kv_lora_rank': 512,
        'nope_head_dim': 128,
        'rope_head_dim': 64,
        'v_head_dim': 128,
        'rope': {
          'theta': 10000.0,
          'interleaved': True,
          'scaling': {
            'factor': 40.0,
            'original_length': 4096,  # tokens
            'beta_fast': 32.0,
            'beta_slow': 1.0,
            'mscale': 1.0,
            'mscale_all_dim': 1.0,
          },
        },
      },
      'moe': {
        'num_experts': 256,
        'top_k': 8,
        'expert_dim': 2048,
        'num_shared': 1,
        'num_groups': 8,
        'top_groups': 4,
        'score': 'sigmoid',
        'group_score': 'top2',
        'normalize': True,
        'scale': 2.5,
        'implementation': 'grouped',  # ours, as 'block'.
        'block': 128,  # Rows.
        'exchange': mesh.get_exchange(),
      },
      'mtp_depth': 1,
      'norm_eps': 1e-6,
      'init_std': 0.006,
      'max_length': 163840,  # tokens
      'dtype': 'bfloat16',
      'precision': 'dtype',  # V3: 'block_fp8'.
      'fp8_implementation': 'xla',
      'attention_implementation': 'naive',  # These are chosen for the devices
      'decode_implementation': 'xla',  # of a run, see configs/pretrain_671b.py.
      'head_implementation': 'chunked',
      'remat': True,
      'scan_layers': True,
    }
  )
