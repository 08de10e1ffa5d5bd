"""V3.2's sparse attention taught to a model without: get_config('warm_up').

  python -m experiments.pretrain --config=configs/sparse_attention.py:warm_up \
      --config.init_from=DIR --config.tokenizer=DIR \
      --config.data.paths="('text.jsonl',)" --workdir=runs/warm_up
  python -m experiments.pretrain --config=configs/sparse_attention.py:sparse \
      --config.init_from=runs/warm_up --config.tokenizer=DIR \
      --config.data.paths="('text.jsonl',)" --workdir=runs/sparse

DIR: a Hugging Face folder of V3's shape (DeepSeek-V3.1's); its indexers begin
with random weights. The warm-up trains them alone, on attention over all
tokens: 2.1 B tokens. Then everything is trained on the selected 2,048 tokens
a query: 943.7 B tokens. Not run at this size.

Source: DeepSeek-V3.2-Exp report, §2.1; what it leaves open is marked.
"""

import ml_collections

from configs.model import deepseek_v32

# Learning rate, steps, rows.
_STAGES = {
  'warm_up': (1e-3, 1000, 16),
  'sparse': (7.3e-6, 15000, 480),
}


def get_config(stage: str = 'warm_up') -> ml_collections.ConfigDict:
  if stage not in _STAGES:
    raise ValueError(f'{stage!r} is no variant, they are {", ".join(_STAGES)}')
  peak_lr, num_steps, batch_size = _STAGES[stage]
  is_warm_up = stage == 'warm_up'
  model = deepseek_v32.get_config()
  model.attention.indexer.dense = is_warm_up
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'model': model,
      'data': {
        'paths': ('text.jsonl',),
        'format': 'auto',
        'template': '{text}',
        'split_blank_lines': False,
        'held_out_fraction': 0.001,  # ours
      },
      'tokenizer': 'DeepSeek-V3.1',
      'row_length': 131072,  # tokens
      'batch_size': batch_size,  # rows
      'eval_rows': 16,
      # λ, ours: as V3's last 4.8 T tokens. The warm-up's loss is without it,
      # but the module has an indexer to learn.
      'mtp_coef': 0.1,
      'optim': {
        'kind': 'adamw',
        'peak_lr': peak_lr,
        'warmup_steps': 0,  # ours, as the next three and the constant rate.
        'b1': 0.9,
        'b2': 0.95,
        'weight_decay': 0.1,
        'schedule': 'constant',
        'final_lr_ratio': 1.0,
        'clip_norm': 1.0,  # ours
        'trainable': 'indexer' if is_warm_up else '',
      },
      'train': {
        'num_steps': num_steps,
        'num_microbatches': 1,
        'bias_update_speed': 0.0,  # γ, ours: as V3's last 500 B tokens.
        'balance_coef': 0.0 if is_warm_up else 1e-4,  # α, as V3.
        'checkpoint_every': 100,
        'max_to_keep': 2,
        'eval_every': 1000,
        'reference_every': 0,
        'overlap': True,  # On TPUs, exchanges beside products.
      },
      'mesh': {'data': 1, 'fsdp': -1},
      'init_from': 'DeepSeek-V3.1',
    }
  )
