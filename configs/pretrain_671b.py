"""Pretraining DeepSeek-V3 671B on a pod, at sequence length 4,096.

  python -m experiments.compile_for_tpu --config=configs/pretrain_671b.py \
      --topology=v5p:8x8x16
  python -m experiments.pretrain --config=configs/pretrain_671b.py \
      --config.data.paths="('gs://…/*.jsonl',)" --config.tokenizer=FOLDER \
      --workdir=gs://…

Source: DeepSeek-V3, arXiv:2412.19437, §4.2: AdamW, peak 2.2e-4, the schedule
of 14.8 T tokens, γ = 0.001, α = 0.0001, λ = 0.3. Its batch grows from 3,072 to
15,360 rows; here it is one row for each of 1,024 chips, and
`--config.batch_size=15360 --config.train.num_microbatches=15` has V3's. The
mesh is ours.
"""

import ml_collections

from configs import pretrain
from configs.model import deepseek_v3_671b


def get_config() -> ml_collections.ConfigDict:
  config = pretrain.get_config()
  config.model = deepseek_v3_671b.get_config()
  config.model.attention_implementation = 'pallas'
  config.model.head_implementation = 'pallas'
  config.model.moe.update(implementation='pallas', block=16)
  config.model.moe.exchange = {
    'kind': 'ragged',
    'receive_factor': 2.0,  # Times the mean; ours.
    'on_overflow': 'stop',
    'fp8': False,
    'tokens_at_once': 1024,  # Of 4,096; 1,024 rows for an expert on average.
  }
  config.data = {
    'paths': ('corpus.jsonl',),
    'format': 'auto',
    'template': '{text}',
    'split_blank_lines': False,
    'held_out_fraction': 0.001,
  }
  config.tokenizer = 'DeepSeek-V3'  # Its folder.
  config.row_length = 4096  # tokens
  config.batch_size = 1024  # rows
  config.optim.update(
    kind='adamw',
    peak_lr=2.2e-4,
    warmup_steps=2000,
    schedule='v3',
  )
  config.train.num_steps = 3_529_000  # 14.8 T tokens of 1,024 x 4,096.
  config.mesh.update({'data': 1, 'fsdp': -1, 'expert': 32})
  return config
