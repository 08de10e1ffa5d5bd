"""Finetuning Moonlight-16B-A3B on 8 v5p chips.

  python -m experiments.compile_for_tpu --config=configs/sft_moonlight.py \
      --model=configs/model/moonlight_16b_a3b.py --topology=v5p:2x2x2
  python -m experiments.sft --config=configs/sft_moonlight.py \
      --config.init_from=Moonlight-16B-A3B \
      --config.data.paths="('chats.jsonl',)" --workdir=gs://…

Schedule and batch as configs/sft.py; rows are as long as the model's context,
the mesh is ours.
"""

import ml_collections

from configs import sft


def get_config() -> ml_collections.ConfigDict:
  config = sft.get_config()
  config.init_from = 'Moonlight-16B-A3B'
  config.data.template = 'plain'
  config.row_length = 8192  # tokens
  config.train.num_microbatches = 16  # One row for each chip at a time.
  config.mesh.update({'data': 1, 'fsdp': -1, 'expert': 4})
  return config
