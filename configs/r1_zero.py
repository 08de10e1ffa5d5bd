"""R1-Zero: GRPO with rule rewards on a base model, no SFT.

  python -m experiments.grpo --config=configs/r1_zero.py \
      --config.init_from=runs/base --workdir=runs/r1_zero

Source: DeepSeek-R1, arXiv:2501.12948v2, §2 and supplement; what a paper gives
is marked, the rest is ours.
"""

import ml_collections

from configs import mesh


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'init_from': 'runs/base',
      'tokenizer': '',  # The base's.
      'task': {
        'maximum': 100,
        'languages': ('en', 'zh'),
      },
      'template': 'plain',
      'eval_problems': 1000,  # Held-out, greedy.
      'rollout': {
        'num_prompts': 32,  # R1-Zero.
        'group_size': 16,  # R1-Zero.
        'max_prompt_tokens': 12,
        'max_new_tokens': 164,
        'sampling': {
          'temperature': 1.0,  # R1-Zero.
          'top_k': 0,
          'top_p': 1.0,
        },
        'num_minibatches': 4,
        'max_rollouts': 3,
        'row_length': 176,
        'rows_multiple': 40,
        'format_weight': 1.0,  # Equal weights: R1-Zero.
        'accuracy_weight': 1.0,
        'gap_every': 10,
        'samples_every': 10,
        'redundant_experts': 0,  # Replicas, see EPLB in README.
        'rebalance_every': 1,  # batches of groups
        'load_decay': 0.9,
      },
      'loss': {
        'clip_low': 0.2,
        'clip_high': 0.28,  # DAPO.
        'kl_coef': 0.001,  # R1-Zero.
        'reduction': 'sequence_mean',  # DeepSeekMath, eq. 3.
        'advantage': 'group',
      },
      'optim': {
        'kind': 'adamw',
        'peak_lr': 4e-4,
        'warmup_steps': 10,
        'schedule': 'cosine',
        'final_lr_ratio': 0.1,
        'weight_decay': 0.0,
        'clip_norm': 1.0,
      },
      'train': {
        'num_steps': 220,
        'num_microbatches': 1,
        'bias_update_speed': 0.0,  # γ = 0 outside pretraining.
        'balance_coef': 0.0,
        'checkpoint_every': 80,
        'max_to_keep': 2,
        'eval_every': 80,
        'reference_every': 80,  # R1-Zero: 400 of 10,400 steps.
        'overlap': True,  # On TPUs, exchanges beside products.
      },
      'mesh': mesh.get_config(),
    }
  )
