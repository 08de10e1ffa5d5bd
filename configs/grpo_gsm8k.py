"""R1-Zero's GRPO on GSM8K, for an imported model or one finetuned before.

  python -m experiments.grpo --config=configs/grpo_gsm8k.py \
      --config.init_from=DIR \
      --config.task.paths="('…/gsm8k/train.jsonl',)" \
      --config.task.eval_paths="('…/gsm8k/test.jsonl',)" --workdir=runs/rl

Sampling and loss as configs/r1_zero.py; learning rate and penalty are R1's,
arXiv:2501.12948v2, supplement; lengths are ours.
"""

import ml_collections

from configs import mesh, r1_zero


def get_config() -> ml_collections.ConfigDict:
  config = r1_zero.get_config()
  config.task = {
    'paths': ('gsm8k/train.jsonl',),
    'eval_paths': ('gsm8k/test.jsonl',),
    'question': 'question',
    'answer': 'answer',
    'gold': '#### (.+)',
    # As R1's users are told to ask; '' with template 'r1_zero'.
    'instruction': 'Please reason step by step, and put your final answer '
    r'within \boxed{}.',
    'language': 'en',
    'held_out_fraction': 0.0,
    'format': 'auto',
  }
  config.template = 'auto'  # That of init_from.
  config.eval_problems = 512
  config.rollout.rule = 'boxed'  # 'tags' with template 'r1_zero'.
  config.rollout.max_prompt_tokens = 512
  config.rollout.max_new_tokens = 1024
  config.rollout.row_length = 2048
  config.rollout.rows_multiple = 8
  config.optim.peak_lr = 3e-6
  config.optim.schedule = 'constant'
  config.train.num_steps = 1000
  config.train.checkpoint_every = 50
  config.train.eval_every = 100
  config.train.reference_every = 400
  config.mesh = mesh.get_config(data=1, fsdp=-1)
  return config
