"""DeepSeek-V3's programs, for `make test-tpu`: devices in, Lowered out.

Those of the configs for pods with four layers in place of 61 (one of them
dense) and MTP, on as many devices as there are: all widths, all 256 experts,
the whole vocabulary. Kernels have their real shapes in their `cases.py`.
"""

from collections.abc import Sequence

import jax

from configs import grpo_671b, pretrain_671b
from configs.model import deepseek_v3_671b
from r1jax import config
from r1jax.model import config as model_config
from r1jax.recipe import grpo, pretrain, programs

# The layers that a program of 671B needs to have one of each kind.
_FEW_LAYERS = {'num_layers': 4, 'num_dense_layers': 1}


def train_step(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Pretraining, one row of 4,096 tokens a device."""
  run = pretrain_671b.get_config()
  run.model.update(_FEW_LAYERS)
  run.batch_size = len(devices)
  run.mesh.expert = 16
  run = config.from_dict(pretrain.PretrainConfig, run.to_dict())
  return programs.build('train', run, devices).trace().lower()


def decode_step(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """One token of 32 rows of 8,192 slots on each four devices of `tensor`."""
  run = grpo_671b.get_config()
  run.rollout.num_prompts = len(devices) // 2
  run.mesh.expert = 8
  run = config.from_dict(grpo.GrpoConfig, run.to_dict())
  model = deepseek_v3_671b.get_config()
  model.update(_FEW_LAYERS)
  model = config.from_dict(model_config.ModelConfig, model.to_dict())
  return programs.build('decode', run, devices, model=model).trace().lower()
