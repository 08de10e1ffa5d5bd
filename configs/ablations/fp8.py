"""Does block FP8 train as bfloat16 does? V3's recipe, on a tiny model.

  python -m experiments.pretrain --config=configs/ablations/fp8.py:block_fp8 \
      --config.data.paths="('…/gsm8k/train.jsonl',)" --config.seed=0 \
      --workdir=runs/fp8/block_fp8_0

The other precisions are `dtype` (bfloat16) and `tensor_fp8` (one scale for each
tensor). Emulated exactly on a CPU; all widths are whole tiles, sums over the
model's width have two. DeepSeek-V3, arXiv:2412.19437, §3.3 and appendix B.1,
reports a loss within 0.25% of bfloat16's at 16B and 230B. What came out here
stands in experiments/results/fp8.md.
"""

import ml_collections

from configs import gsm8k, pretrain


def get_config(precision: str = 'block_fp8') -> ml_collections.ConfigDict:
  if precision not in ('dtype', 'block_fp8', 'tensor_fp8'):
    raise ValueError(
      f'{precision!r} is no precision, they are dtype, block_fp8, tensor_fp8'
    )
  config = pretrain.get_config()
  model = config.model
  model.update(
    embed_dim=256,
    num_layers=2,
    dense_dim=512,
    mtp_depth=0,
    dtype='bfloat16',
    precision=precision,
  )
  model.attention.update(
    num_heads=4, q_lora_rank=128, kv_lora_rank=128, nope_head_dim=32
  )
  model.moe.update(expert_dim=128, implementation='grouped', block=128)
  config.mtp_coef = 0.0
  # Real text, of which a little is learned at each step. Where a skill is
  # learned, as in arithmetic, its day differs between any two runs, and losses
  # by percents.
  config.data = gsm8k.get_config().data
  config.row_length = 256
  config.batch_size = 4
  config.eval_rows = 64
  config.optim.update(
    kind='adamw',  # As V3.
    peak_lr=1e-3,
    warmup_steps=100,
    final_lr_ratio=0.01,
  )
  config.train.update(num_steps=1200, eval_every=20, checkpoint_every=600)
  return config
