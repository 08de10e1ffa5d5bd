"""SFT on GSM8K with a tiny Qwen3 of random weights: does it run and fall?

  python -m experiments.sft --config=configs/sft_gsm8k.py \
      --config.data.paths="('…/gsm8k/train.jsonl',)" --workdir=runs/sft_gsm8k
"""

import ml_collections

from configs import mesh, sft


def get_config() -> ml_collections.ConfigDict:
  config = sft.get_config()
  config.init_from = ''
  config.model = {
    'vocab_size': 512,
    'embed_dim': 128,
    'num_layers': 4,
    'num_dense_layers': 4,
    'dense_dim': 384,
    'attention': {
      'num_heads': 4,
      'num_kv_heads': 2,
      'head_dim': 32,
      'rope': {'theta': 1e6, 'interleaved': False},
      'qkv_bias': False,
      'qk_norm': True,
    },
    'moe': None,
    'init_std': 0.02,
    'tie_embeddings': True,
    'max_length': 1024,  # tokens
  }
  config.data.paths = ('gsm8k/train.jsonl',)
  config.data.template = 'plain'
  config.data.messages = ''
  config.row_length = 768  # tokens
  config.batch_size = 8  # rows
  config.optim.peak_lr = 2e-3
  config.optim.warmup_steps = 20
  config.optim.final_lr_ratio = 0.1
  config.train.num_steps = 150
  config.train.eval_every = 50
  config.train.checkpoint_every = 50
  config.mesh = mesh.get_config()
  return config
