"""Kimi-K2: V3's shape, 384 experts in one group, 64 heads.

Source: arXiv:2507.20534 and the released config.
"""

import ml_collections

from configs.model import deepseek_v3_671b


def get_config() -> ml_collections.ConfigDict:
  config = deepseek_v3_671b.get_config()
  config.mtp_depth = 0
  config.vocab_size = 163840
  config.num_dense_layers = 1
  config.max_length = 131072  # tokens
  config.attention.num_heads = 64
  config.attention.rope.theta = 50000.0
  config.attention.rope.scaling.factor = 32.0
  config.attention.rope.scaling.beta_fast = 1.0  # So released; V3 has 32.
  config.moe.update(num_experts=384, num_groups=1, top_groups=1, scale=2.827)
  return config
