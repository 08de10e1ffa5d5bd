"""DeepSeek-V2 and V2-Lite: softmax gates, groups by their best expert.

  get_config('236b') or get_config('lite')

Source: arXiv:2405.04434, §3.1 and appendix B. The factor 0.707 of YaRN is the
paper's; a released config that leaves it out means the same.
"""

import ml_collections

from configs.model import deepseek_v3_671b


def get_config(size: str = '236b') -> ml_collections.ConfigDict:
  config = deepseek_v3_671b.get_config()
  config.mtp_depth = 0
  config.vocab_size = 102400
  config.num_dense_layers = 1
  config.attention.rope.scaling.mscale = 0.707
  config.attention.rope.scaling.mscale_all_dim = 0.707
  config.moe.update(
    num_shared=2,
    top_k=6,
    score='softmax',
    group_score='max',
    normalize=False,
    has_bias=False,
  )
  match size:
    case '236b':
      config.embed_dim = 5120
      config.num_layers = 60
      config.dense_dim = 12288
      config.moe.update(
        num_experts=160, expert_dim=1536, num_groups=8, top_groups=3, scale=16.0
      )
    case 'lite':  # 15.7 B.
      config.embed_dim = 2048
      config.num_layers = 27
      config.dense_dim = 10944
      config.attention.num_heads = 16
      config.attention.q_lora_rank = None
      config.moe.update(
        num_experts=64, expert_dim=1408, num_groups=1, top_groups=1, scale=1.0
      )
    case _:
      raise ValueError(f"size={size!r}, it must be '236b' or 'lite'")
  return config
