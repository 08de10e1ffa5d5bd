"""DeepSeek-V3.2(-Exp): V3 with sparse attention over 2,048 tokens.

Source: DeepSeek-V3.2-Exp report and released config.
"""

import ml_collections

from configs.model import deepseek_v3_671b


def get_config() -> ml_collections.ConfigDict:
  config = deepseek_v3_671b.get_config()
  config.attention.indexer = {
    'num_heads': 64,
    'head_dim': 128,
    'top_k': 2048,  # tokens
    'dense': False,  # True in the warm-up.
  }
  return config
