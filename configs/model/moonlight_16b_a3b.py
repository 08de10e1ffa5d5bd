"""Moonlight-16B-A3B: V3's shape with one expert group.

Source: arXiv:2502.16982 and the released config.
"""

import ml_collections

from configs.model import deepseek_v3_671b


def get_config() -> ml_collections.ConfigDict:
  config = deepseek_v3_671b.get_config()
  config.mtp_depth = 0
  config.vocab_size = 163840
  config.embed_dim = 2048
  config.num_layers = 27
  config.num_dense_layers = 1
  config.dense_dim = 11264
  config.norm_eps = 1e-5
  config.max_length = 8192  # tokens
  config.attention.num_heads = 16
  config.attention.q_lora_rank = None
  config.attention.rope.theta = 50000.0
  config.attention.rope.scaling = None
  config.moe.update(
    num_experts=64,
    top_k=6,
    expert_dim=1408,
    num_shared=2,
    num_groups=1,
    top_groups=1,
    scale=2.446,
  )
  return config
