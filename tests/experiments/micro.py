"""The demo's config with a model and stages that take seconds.

micro.py gives the demo's, micro.py:base and so on one stage's.
"""

import ml_collections

from configs import demo


def get_config(stage: str = '') -> ml_collections.ConfigDict:
  """Returns the whole config, or that of 'base', 'r1_zero', 'evaluate'."""
  config = demo.get_config()
  model = config.base.model
  model.update({'embed_dim': 32, 'num_layers': 2, 'dense_dim': 32})
  model.attention.update({'num_heads': 2, 'q_lora_rank': 16})
  model.attention.update({'kv_lora_rank': 16, 'v_head_dim': 8})
  model.moe.update({'num_experts': 4, 'expert_dim': 16, 'block': 16})
  model.max_length = 64
  config.base.update({'batch_size': 8, 'row_length': 64, 'eval_rows': 8})
  config.base.train.update(
    {'num_steps': 6, 'checkpoint_every': 2, 'eval_every': 3}
  )
  rollout = config.r1_zero.rollout
  rollout.update({'num_prompts': 4, 'group_size': 4, 'max_new_tokens': 20})
  rollout.update({'row_length': 32, 'rows_multiple': 8, 'max_rollouts': 1})
  rollout.update({'num_minibatches': 2, 'gap_every': 1, 'samples_every': 1})
  config.r1_zero.train.update(
    {'num_steps': 4, 'checkpoint_every': 1, 'reference_every': 2}
  )
  config.r1_zero.train.eval_every = 2
  config.r1_zero.eval_problems = 8
  config.evaluate.update({'num_problems': 8, 'num_samples': 2})
  config.evaluate.update({'max_new_tokens': 20, 'batch_size': 8})
  return config[stage] if stage else config
