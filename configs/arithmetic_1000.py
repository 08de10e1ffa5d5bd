"""The demo's recipe for integers within 1000: the figure that counts.

  python -m experiments.demo --config=configs/arithmetic_1000.py \
      --workdir=runs/arithmetic_1000

Aim: below 1% errors (greedy) on held-out problems, from a base with more than
10%. Hours on 2 CPU cores. What differs from the demo is ours.
"""

import ml_collections

from configs import demo, pretrain


def get_config() -> ml_collections.ConfigDict:
  config = demo.get_config()
  config.base.data = pretrain.get_corpus(maximum=1000)
  config.base.row_length = 256  # tokens
  config.base.batch_size = 16  # rows
  config.base.optim.peak_lr = 2e-3
  config.base.train.num_steps = 6000
  config.base.train.eval_every = 500  # steps
  config.base.train.checkpoint_every = 500  # steps

  config.r1_zero.task.maximum = 1000
  config.r1_zero.rollout.max_prompt_tokens = 14
  config.r1_zero.rollout.max_new_tokens = 242
  config.r1_zero.rollout.row_length = 256
  config.r1_zero.train.num_steps = 400
  config.r1_zero.train.checkpoint_every = 50

  config.evaluate.task.maximum = 1000
  config.evaluate.max_prompt_tokens = 14
  config.evaluate.max_new_tokens = 242
  return config
