"""R1-Zero on a laptop: a base model, GRPO on it, both evaluated.

  make demo            # or: python -m experiments.demo --workdir=runs/demo

On 2 CPU cores some ten minutes; README has what was measured.
"""

import ml_collections

from configs import evaluate, pretrain, r1_zero


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict(
    {
      'base': pretrain.get_config(),
      'r1_zero': r1_zero.get_config(),
      'evaluate': evaluate.get_config(),
    }
  )
  return config
