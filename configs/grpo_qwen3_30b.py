"""R1-Zero's GRPO on Qwen3-30B-A3B, on 64 v6e chips.

  python -m experiments.compile_for_tpu --config=configs/grpo_qwen3_30b.py \
      --model=configs/model/qwen3.py:30b-a3b --topology=v6e:8x8
  python -m experiments.grpo --config=configs/grpo_qwen3_30b.py \
      --config.init_from=Qwen3-30B-A3B --workdir=gs://…

Sampling as configs/grpo_671b.py, with fewer prompts; lengths and mesh are
ours.
"""

import ml_collections

from configs import grpo_671b


def get_config() -> ml_collections.ConfigDict:
  config = grpo_671b.get_config()
  config.init_from = 'Qwen3-30B-A3B'
  config.template = 'qwen3'
  config.rollout.update(
    num_prompts=64,
    num_minibatches=4,
    rows_multiple=64,
  )
  config.mesh.update({'expert': 16, 'tensor': 1})
  return config
