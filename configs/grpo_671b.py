"""R1-Zero's GRPO on DeepSeek-V3-Base, 671B, on a pod of 1,024 v5p chips.

  python -m experiments.compile_for_tpu --config=configs/grpo_671b.py \
      --model=configs/model/deepseek_v3_671b.py --topology=v5p:8x8x16
  python -m experiments.grpo --config=configs/grpo_671b.py \
      --config.init_from=DeepSeek-V3-Base --workdir=gs://…

Source: DeepSeek-R1, arXiv:2501.12948v2, §2 and supplement: 8,192 completions
of a rollout, 16 of each prompt, in 16 minibatches; completions of up to 32,768
tokens, here a quarter of that with the prompt. The mesh is ours: with context=2
in place of tensor=4 a train step has to take 5 s, not 12, but the sampler's
weights do not fit beside the state (experiments/results/pods.md).
"""

import ml_collections

from configs import grpo_gsm8k


def get_config() -> ml_collections.ConfigDict:
  config = grpo_gsm8k.get_config()
  config.init_from = 'DeepSeek-V3-Base'
  config.rollout.update(
    num_prompts=512,
    group_size=16,  # R1-Zero.
    num_minibatches=16,  # R1-Zero.
    max_rollouts=1,
    max_prompt_tokens=1024,
    max_new_tokens=7168,
    row_length=8192,
    rows_multiple=512,
  )
  config.mesh.update({'data': 1, 'fsdp': -1, 'expert': 64, 'tensor': 4})
  return config
