"""Evaluation on held-out arithmetic: pass@1, pass@k, cons@16, greedy.

  python -m experiments.evaluate --config=configs/evaluate.py \
      --workdir=runs/r1_zero
"""

import ml_collections

from configs import mesh


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'init_from': '',  # The workdir itself.
      'seed': 0,
      'tokenizer': '',  # The workdir's.
      'task': {
        'maximum': 100,
        'languages': ('en', 'zh'),
      },
      'template': 'auto',
      'rule': 'tokens',
      'num_problems': 1000,  # Distinct held-out problems.
      'num_samples': 16,  # k, as R1-Zero's cons@16.
      'max_prompt_tokens': 12,
      'max_new_tokens': 164,
      'sampling': {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0},
      'batch_size': 1000,  # Completions sampled at once.
      'mesh': mesh.get_config(),
    }
  )
