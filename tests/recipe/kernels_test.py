"""The demo's model trained with every kernel, interpreted, and without."""

import dataclasses
from unittest import mock

import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from configs import pretrain as pretrain_config
from configs import r1_zero
from r1jax import config as config_lib
from r1jax.recipe import config_check, grpo, pretrain
from r1jax.train import metrics
from tests.recipe import micro

_KERNELS = {
  'attention_implementation': 'pallas',
  'decode_implementation': 'pallas',
  'head_implementation': 'pallas',
}


def _base(with_kernels):
  config = pretrain_config.get_config()
  config.update(batch_size=2, eval_rows=2, mtp_coef=0.0)
  config.model.update(num_layers=2, mtp_depth=0)  # Interpreters are slow.
  config.model.attention.kv_lora_rank = 128  # mla_decode's least.
  config.train.num_steps = 3
  if with_kernels:
    config.model.moe.implementation = 'pallas'
    config.model.update(_KERNELS)
  return config_lib.from_dict(pretrain.PretrainConfig, config.to_dict())


def _policy(init_from):
  config = r1_zero.get_config()
  config.update(init_from=init_from, eval_problems=0)
  config.rollout.update(
    num_prompts=2,
    group_size=4,
    max_new_tokens=8,
    num_minibatches=2,
    row_length=24,
    rows_multiple=2,
    gap_every=1,
  )
  config.train.num_steps = 2
  return config_lib.from_dict(grpo.GrpoConfig, config.to_dict())


def _figures(workdir, *, with_kernels):
  """Of the steps of both stages, by name."""
  base, policy = str(workdir / 'base'), str(workdir / 'policy')
  with (
    micro.on(micro.one_device()),
    pltpu.force_tpu_interpret_mode(),
    mock.patch.object(config_check, 'check_kernels', lambda *args: None),
  ):
    pretrain.run(_base(with_kernels), base)
    grpo.run(_policy(base), policy)
  found = {}
  for name, of in (
    ('train/loss', base),
    ('train/grad_norm', base),
    ('rl/entropy', policy),
    ('rl/reward', policy),
    ('rl/length', policy),
  ):
    rows = metrics.read(of)
    found[name, of is base] = [r[name] for r in rows if name in r]
  return found


@pytest.mark.slow
def test_both_stages_go_the_same_way(tmp_path):
  kernels = _figures(tmp_path / 'kernels', with_kernels=True)
  plain = _figures(tmp_path / 'plain', with_kernels=False)
  assert kernels.keys() == plain.keys()
  for name, expected in plain.items():
    assert expected, name
    np.testing.assert_allclose(
      kernels[name], expected, rtol=2e-4, atol=1e-6, err_msg=str(name)
    )


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (
      {'attention_implementation': 'pallas'},
      "model.attention_implementation='pallas' is a kernel for TPUs, and these "
      "devices are cpu: 'naive' or 'chunked' would do",
    ),
    ({'head_implementation': 'pallas'}, "'chunked' would do"),
    (
      {
        'moe': dataclasses.replace(micro.model().moe, implementation='megablox')
      },
      "model.moe.implementation='megablox' is",
    ),
  ],
)
def test_kernels_for_tpus_need_tpus(changes, said):
  model = dataclasses.replace(micro.model(), **changes)
  with pytest.raises(config_lib.UserError, match=said):
    config_check.check_kernels(model, micro.one_device())
  config_check.check_kernels(micro.model(), micro.one_device())
