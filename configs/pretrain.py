"""A base model for the demo: arithmetic within 100, as a real corpus is.

  python -m experiments.pretrain --config=configs/pretrain.py \
      --workdir=runs/base

The corpus is a mixture on purpose: clean worked solutions are the smaller
part, so that the base knows how to reason but seldom does. All numbers ours.
"""

import ml_collections

from configs import mesh
from configs.model import tiny


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': tiny.get_config(),
      'data': get_corpus(maximum=100),
      'tokenizer': '',  # The one that ships.
      'row_length': 176,  # tokens
      'batch_size': 8,  # rows
      'eval_rows': 64,
      'mtp_coef': 0.3,  # λ, as V3's first 10 T tokens.
      'optim': {
        'kind': 'muon',  # ours: V3 has AdamW.
        'peak_lr': 3e-3,
        'warmup_steps': 40,
        'schedule': 'cosine',
        'final_lr_ratio': 0.05,
        'b1': 0.9,  # As V3, also the next three.
        'b2': 0.95,
        'weight_decay': 0.1,
        'clip_norm': 1.0,
      },
      'train': {
        'num_steps': 2250,
        'num_microbatches': 1,
        'bias_update_speed': 1e-3,  # γ, as V3.
        'balance_coef': 1e-4,  # α, as V3.
        'checkpoint_every': 500,  # steps
        'max_to_keep': 2,
        'eval_every': 500,  # steps
        'reference_every': 0,
        'overlap': True,  # On TPUs, exchanges beside products.
      },
      'mesh': mesh.get_config(),
      'init_from': '',
    }
  )


def get_corpus(maximum: int) -> ml_collections.ConfigDict:
  """The mixture; shares of documents."""
  return ml_collections.ConfigDict(
    {
      'arithmetic': {
        'maximum': maximum,  # Operands and results lie in [0, maximum].
        'languages': ('en', 'zh'),
        'good_guess': 0.7,  # Divisions that try the right digit first.
      },
      'clean': 0.10,
      'wrong': 0.07,
      'missing_tags': 0.50,
      'no_reasoning': 0.25,
      'other_language': 0.04,
      'mixed_language': 0.04,
      'uneven': 0.15,  # Divisions with a remainder.
    }
  )
