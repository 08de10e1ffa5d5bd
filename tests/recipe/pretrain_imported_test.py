"""Pretraining that starts from a model of another tool."""

import dataclasses
from unittest import mock

import jax
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.interop import export
from r1jax.model import config as model_config
from r1jax.recipe import origin, pretrain
from r1jax.recipe import stage as stage_lib
from tests.data import tiny_tokenizer
from tests.recipe import micro


@pytest.fixture(scope='module')
def foreign(tmp_path_factory):
  """A Hugging Face folder and its model; its rope is not ours."""
  rope = dataclasses.replace(micro.model().attention.rope, theta=1e6)
  attention = dataclasses.replace(micro.model().attention, rope=rope)
  model = micro.model(attention=attention, vocab_size=320, max_length=64)
  path = tmp_path_factory.mktemp('models') / 'hf'
  export.save(path, model, micro.variables(model), dtype='float32')
  tiny_tokenizer.write_deepseek(path)
  return str(path), model


def _config(folder, **changes):
  values = micro.pretrain_dict(
    model=None, init_from=folder, batch_size=2, **changes
  )
  return config_lib.from_dict(pretrain.PretrainConfig, values)


@pytest.mark.parametrize('mtp_coef', [0.0, 0.3])
def test_a_foreign_model_need_not_be_typed_again(foreign, tmp_path, mtp_coef):
  folder, model = foreign
  with (
    micro.on(micro.one_device()),
    mock.patch.object(stage_lib, 'run') as run,
  ):
    pretrain.run(_config(folder, mtp_coef=mtp_coef), str(tmp_path / 'run'))
  stage, resolved = run.call_args.args
  assert stage.model.attention == model.attention
  assert resolved['model'] == config_lib.to_dict(stage.model)
  assert stage.tokenizer == folder
  assert stage.untrained == (() if mtp_coef else ('mtp_',))


@pytest.mark.slow
def test_modules_that_the_loss_leaves_out_stay_as_they_were(foreign, tmp_path):
  folder, model = foreign
  run = str(tmp_path / 'run')
  config = _config(
    folder,
    mtp_coef=0.0,
    optim__weight_decay=0.5,
    optim__peak_lr=0.1,
    train__num_steps=1,
  )
  with micro.on(micro.one_device()):
    params = pretrain.run(config, run).variables['params']
  start = micro.variables(model)['params']
  jax.tree.map(np.testing.assert_array_equal, params['mtp_1'], start['mtp_1'])
  assert not np.array_equal(params['head'], start['head'])
  assert origin.load_model_config(run).attention == model.attention
  assert origin.load_tokenizer_path(run) == f'{run}/tokenizer'


def test_a_model_that_computes_otherwise_than_its_weights_is_refused(
  foreign, tmp_path
):
  folder, model = foreign
  attention = dataclasses.replace(
    model.attention,
    rope=dataclasses.replace(model.attention.rope, theta=10000.0),
  )
  for changes, message in (
    (
      {'attention': attention},
      f'model.attention.rope.theta=10000.0, {folder} has 1000000.0: make them '
      'equal, or take its model with model=None',
    ),
    ({'norm_eps': 1e-5}, f'model.norm_eps=1e-05, {folder} has 1e-06: '),
    # What shows in shapes, too, before anything is read.
    ({'embed_dim': 64}, f'model.embed_dim=64, {folder} has 32: '),
  ):
    other = dataclasses.replace(model, **changes)
    values = micro.pretrain_dict(
      model=config_lib.to_dict(other), init_from=folder
    )
    config = config_lib.from_dict(pretrain.PretrainConfig, values)
    with pytest.raises(config_lib.UserError) as error:
      pretrain.run(config, str(tmp_path / 'none'))
    assert str(error.value).startswith(message)
  assert not (tmp_path / 'none').exists()


def test_how_a_model_is_computed_and_how_far_it_sees_is_free(foreign):
  folder, model = foreign
  said = []
  free = dataclasses.replace(model, dtype='bfloat16', remat=True, mtp_depth=0)
  origin.check_model(free, folder, say=said.append)
  assert not said
  yarn = model_config.YarnConfig(
    factor=4.0, original_length=16, mscale=1.0, mscale_all_dim=1.0
  )
  attention = dataclasses.replace(
    model.attention,
    rope=dataclasses.replace(model.attention.rope, scaling=yarn),
  )
  longer = dataclasses.replace(model, attention=attention, max_length=256)
  origin.check_model(longer, folder, say=said.append)
  assert len(said) == 1 and f'{folder} has None' in said[0]


def test_no_model_at_all_is_said():
  with pytest.raises(
    config_lib.UserError, match="init_from='' with model=None: give one of"
  ):
    config_lib.from_dict(
      pretrain.PretrainConfig, micro.pretrain_dict(model=None)
    )
