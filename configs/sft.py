"""Supervised finetuning as R1's: cold start and the 800 K samples.

  python -m experiments.sft --config=configs/sft.py \
      --config.init_from=DIR --config.data.paths="('chats.jsonl',)" \
      --workdir=runs/sft

Source: DeepSeek-R1, arXiv:2501.12948v2, supplement: 2-3 epochs, cosine from
5e-5 to 5e-6, batch 128, context 32,768. `get_config('v3')` has DeepSeek-V3's,
arXiv:2412.19437, §5.1: 2 epochs, cosine from 5e-6 to 1e-6; its batch is not
stated, ours is R1's.
"""

import ml_collections

from configs import mesh


def get_config(of: str = 'r1') -> ml_collections.ConfigDict:
  rates = {'r1': (5e-5, 5e-6), 'v3': (5e-6, 1e-6)}
  if of not in rates:
    raise ValueError(f'{of!r} is no variant, they are {", ".join(rates)}')
  peak, final = rates[of]
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'init_from': 'runs/base',
      'model': None,  # That of init_from.
      'data': {
        'paths': ('chats.jsonl',),
        'template': 'auto',  # That of init_from.
        'messages': 'messages',  # '' for question and answer.
        'question': 'question',
        'answer': 'answer',
        'system': '',
        'held_out_fraction': 0.02,  # 0 for no evaluation.
        'format': 'auto',
        'turns': 'all',  # Of the assistant; 'last' for the last one alone.
      },
      'tokenizer': '',  # That of init_from.
      'row_length': 32768,  # tokens
      'batch_size': 128,  # Rows.
      'optim': {
        'kind': 'adamw',
        'peak_lr': peak,
        'warmup_steps': 0,
        'schedule': 'cosine',
        'final_lr_ratio': final / peak,
        'weight_decay': 0.1,
        'clip_norm': 1.0,
      },
      'train': {
        'num_steps': 1000,  # 2-3 epochs of your data.
        'num_microbatches': 1,
        'bias_update_speed': 0.0,  # γ = 0 outside pretraining.
        'balance_coef': 0.0,
        'checkpoint_every': 100,
        'max_to_keep': 2,
        'eval_every': 100,
        'reference_every': 0,
        'overlap': True,  # On TPUs, exchanges beside products.
      },
      'mesh': mesh.get_config(data=1, fsdp=-1),
    }
  )
