"""Pretraining on real text: the questions and answers of GSM8K.

  python -m experiments.pretrain --config=configs/gsm8k.py \
      --config.data.paths="('…/gsm8k/train.jsonl',)" --workdir=runs/gsm8k

Data: train.jsonl of GSM8K (https://github.com/openai/grade-school-math, MIT
licence), one object with `question` and `answer` per line. For
objects with a `text` instead: --config.data.template='{text}'.

`get_config('imported')`, on a command line configs/gsm8k.py:imported, goes on
with the model, tokenizer and all, of --config.init_from=DIR, a workdir or a
Hugging Face folder; its numbers are ours and were not run.

The demo's model and tokenizer, which spells this text nearly byte by byte. In
150 steps, a minute on 2 CPU cores, held-out bits per byte fall from 4.6 (step
25) to 3.3.
"""

import ml_collections

from configs import pretrain
from configs.model import tiny


def get_config(model: str = 'tiny') -> ml_collections.ConfigDict:
  config = pretrain.get_config()
  config.data = ml_collections.ConfigDict(
    {
      'paths': ('gsm8k/train.jsonl',),
      'format': 'jsonl',
      'template': '{question}\n{answer}',
      'split_blank_lines': False,
      'held_out_fraction': 0.02,  # Of the documents.
    }
  )
  if model == 'tiny':
    config.model = tiny.get_config('wide')
    config.model.max_length = 512  # tokens
  elif model == 'imported':
    config.model = None  # That of init_from.
    config.mtp_coef = 0.0  # Its MTP, if it has one, stays as it is.
    config.optim.kind = 'adamw'
    config.optim.peak_lr = 1e-5
    config.train.bias_update_speed = 0.0  # γ, which most models do not have.
  else:
    raise ValueError(f'{model!r} is no variant, they are tiny, imported')
  config.row_length = 256  # tokens
  config.batch_size = 16  # rows
  config.train.num_steps = 150
  config.train.eval_every = 25  # steps
  config.train.checkpoint_every = 75  # steps
  return config
