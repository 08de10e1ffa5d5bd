"""Evaluation on GSM8K's test questions, of an imported model or a run.

  python -m experiments.evaluate --config=configs/evaluate_gsm8k.py \
      --config.init_from=DIR --workdir=runs/evaluated \
      --config.task.eval_paths="('…/gsm8k/test.jsonl',)"

Sampling is R1's: temperature 0.6, top-p 0.95.
"""

import ml_collections

from configs import evaluate, grpo_gsm8k


def get_config() -> ml_collections.ConfigDict:
  config = evaluate.get_config()
  config.task = grpo_gsm8k.get_config().task
  config.task.paths = ()
  config.rule = 'boxed'
  config.num_problems = 1319  # All of them.
  config.num_samples = 4
  config.max_prompt_tokens = 512
  config.max_new_tokens = 1024
  config.sampling = {'temperature': 0.6, 'top_k': 0, 'top_p': 0.95}
  config.batch_size = 128
  return config
