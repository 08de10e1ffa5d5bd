"""What a user may get wrong in a real program: one line, exit code 2."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import pytest

from r1jax import config as config_lib
from r1jax.interop import export
from r1jax.recipe import demo, evaluation, grpo, pretrain
from r1jax.recipe import stage as stage_lib
from r1jax.train import loop, metrics
from tests.experiments import micro
from tests.recipe import micro as recipe_micro

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_CONFIG = 'tests/experiments/micro.py'
_CLASSES = {
  '': demo.DemoConfig,
  'base': pretrain.PretrainConfig,
  'r1_zero': grpo.GrpoConfig,
  'evaluate': evaluation.EvaluateConfig,
}


def _load(stage, changes):
  """The config of a stage with `a__b=c` as on a command line."""
  values = micro.get_config(stage)
  values.update_from_flattened_dict(changes)
  return config_lib.from_dict(_CLASSES[stage], values.to_dict())


@pytest.fixture
def base(tmp_path):
  """A workdir that knows its model and has no checkpoint yet."""
  path = tmp_path / 'base'
  path.mkdir()
  config = config_lib.to_dict(_load('base', {}))
  (path / 'config.json').write_text(json.dumps(config))
  return str(path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'model.moe.top_k': 9},
      'model.moe: top_k=9 of num_experts=4: top_k must lie between 1 and the '
      'number of experts',
    ),
    (
      {'batch_size': 12},
      'batch_size=12 does not divide over 8 devices; on a CPU '
      '--host_devices=1 makes it one device',
    ),
    (
      {'train.num_microbatches': 3},
      'batch_size=8 must be a multiple of train.num_microbatches=3',
    ),
    (
      {'train.num_microbatches': 2},
      'batch_size=8 in 2 microbatches does not divide over 8 devices; on a '
      'CPU --host_devices=1 makes it one device',
    ),
    (
      {'row_length': 65},
      'row_length=65 exceeds model.max_length=64',
    ),
    (
      {'mesh.data': 1, 'mesh.context': 8, 'row_length': 60},
      'row_length=60 must be a multiple of mesh.context=8',
    ),
    (
      {'mesh.data': 1, 'mesh.expert': 8},
      r'parameter .* mesh axis expert=8 does not divide 4, a divisor of it '
      'would do',
    ),
    (
      {'mesh.data': 3, 'mesh.fsdp': 2},
      'mesh data=3 x fsdp=2 needs 6 devices, there are 8; data=4 would do',
    ),
    (
      {'mesh.data': 3, 'mesh.expert': 3},
      'mesh data=3 x fsdp=1 x expert=3 needs 9 devices, there are 8; data=8 '
      'and 1 for all others would do',
    ),
    (
      {'mesh.data': 4, 'mesh.pipe': 2, 'mesh.pipeline.schedule': 'dualpipe'},
      'mesh.pipe=2, train.num_microbatches=1: DualPipe: num_microbatches=1 '
      r'must be even and at least 2 \* num_ranks; 4 would do',
    ),
    (
      {
        'mesh.data': 2,
        'mesh.pipe': 4,
        'mesh.pipeline.schedule': 'dualpipe_v',
        'train.num_microbatches': 8,
        'batch_size': 16,
      },
      'mesh.pipe=4, train.num_microbatches=8: 8 stages for 2 layers: a '
      'pipeline of at most 2 stages would do',
    ),
    (
      {'mesh.data': 4, 'mesh.pipe': 2, 'train.num_microbatches': 4},
      'batch_size=8 in 4 microbatches does not divide over 4 devices; on a '
      'CPU --host_devices=1 makes it one device',
    ),
    (
      {'mesh.data': 3},
      'mesh data=3 x fsdp=1 needs 3 devices, there are 8; data=8 would do',
    ),
    (
      {'model.vocab_size': 100},
      r'model.vocab_size=100 is smaller than the \d+ ids of the tokenizer',
    ),
  ],
)
def test_impossible_sizes_of_pretraining(tmp_path, changes, message):
  with pytest.raises(config_lib.UserError) as e:
    pretrain.run(_load('base', changes), str(tmp_path / 'run'))
  assert str(e.value) == message or re.fullmatch(message, str(e.value))
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'rollout.group_size': 3},
      'rollout.num_prompts x group_size=12 does not divide over 8 devices; '
      'on a CPU --host_devices=1 makes it one device',
    ),
    (
      {'rollout.rows_multiple': 4},
      'rollout.rows_multiple=4 does not divide over 8 devices; on a CPU '
      '--host_devices=1 makes it one device',
    ),
    (
      {'rollout.row_length': 65},
      'rollout.row_length = 65 tokens exceeds model.max_length=64',
    ),
    ({'init_from': ''}, "init_from='' must name the workdir of a base model"),
    (
      {'init_from': '/nowhere'},
      '/nowhere does not exist, it must be a workdir or a Hugging Face folder',
    ),
  ],
)
def test_impossible_grpo(tmp_path, base, changes, message):
  with pytest.raises(config_lib.UserError) as e:
    grpo.run(
      _load('r1_zero', {'init_from': base, **changes}), str(tmp_path / 'run')
    )
  assert str(e.value) == message
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'num_problems': 10**6},
      r'num_problems=1000000, but maximum=100 has only \d+ held-out problems',
    ),
    (
      {'batch_size': 9},
      'batch_size=9 does not divide over 8 devices; on a CPU '
      '--host_devices=1 makes it one device',
    ),
    (
      {'max_new_tokens': 53},
      r'max_prompt_tokens \+ max_new_tokens = 65 tokens exceeds '
      'model.max_length=64',
    ),
    (
      {'max_prompt_tokens': 4},
      r'prompt .* has \d+ tokens, max_prompt_tokens is 4',
    ),
    ({}, '.*/checkpoints is not a directory of checkpoints'),
  ],
)
def test_impossible_evaluations(base, changes, message):
  with pytest.raises(config_lib.UserError) as e:
    evaluation.run(_load('evaluate', changes), base, print)
  assert re.fullmatch(message, str(e.value))
  assert os.listdir(base) == ['config.json']


def test_evaluating_what_is_no_run(tmp_path):
  with pytest.raises(config_lib.UserError, match='holds no config.json, it mu'):
    evaluation.run(_load('evaluate', {}), str(tmp_path), print)
  (tmp_path / 'config.json').write_text('{"model"')
  with pytest.raises(config_lib.UserError, match='holds no model config'):
    evaluation.run(_load('evaluate', {}), str(tmp_path), print)


def test_results_are_not_written_beside_the_weights_of_others(tmp_path):
  folder = tmp_path / 'weights'
  model = recipe_micro.model()
  export.save(folder, model, recipe_micro.variables(model), dtype='float32')
  before = sorted(os.listdir(folder))
  with pytest.raises(config_lib.UserError, match='give it as init_from='):
    evaluation.run(_load('evaluate', {}), str(folder), print)
  assert sorted(os.listdir(folder)) == before


def test_results_of_one_model_are_not_written_over_those_of_another(
  tmp_path, base
):
  # A run's own workdir neither.
  other = tmp_path / 'other'
  shutil.copytree(base, other)
  config = _load('evaluate', {'init_from': str(other)})
  with pytest.raises(config_lib.UserError, match='belongs to another config'):
    evaluation.run(config, base, print)
  assert os.listdir(base) == ['config.json']


def _text(path):
  values = config_lib.to_dict(_load('base', {}))
  values['data'] = {
    'paths': [str(path)],
    'format': 'auto',
    'template': '{question}\n{answer}',
    'split_blank_lines': False,
    'held_out_fraction': 0.1,
  }
  return config_lib.from_dict(pretrain.PretrainConfig, values)


def test_missing_or_truncated_data_is_named_with_its_line(tmp_path):
  path = tmp_path / 'train.jsonl'
  with pytest.raises(config_lib.UserError, match=f'{path}: no such file'):
    pretrain.run(_text(path), str(tmp_path / 'run'))
  line = json.dumps({'question': '1+1?', 'answer': '2'})
  path.write_text(f'{line}\n{line}\n{line[:20]}')
  with pytest.raises(config_lib.UserError, match=f'{path}:3: .*truncated'):
    pretrain.run(_text(path), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_a_workdir_of_another_config_is_left_alone(base):
  with pytest.raises(
    config_lib.UserError,
    match='belongs to another config: mtp_coef is 0.3 there, 0.5 here; use',
  ):
    pretrain.run(_load('base', {'mtp_coef': 0.5}), base)
  assert os.listdir(base) == ['config.json']


def _program(name, *arguments):
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{name}', *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.parametrize(
  ('name', 'arguments', 'message'),
  [
    (
      'demo',
      ('--config.base.optim.peek_lr=1', '--workdir=x'),
      "--config.base.optim.peek_lr: config.base.optim has no key 'peek_lr' "
      "(did you mean 'peak_lr'?); valid keys here: ",
    ),
    ('demo', ('--config=none.py',), '--config=none.py: there is no file none'),
    (
      'grpo',
      ('--config.init_from=/nowhere', '--workdir=/nowhere/run'),
      '/nowhere does not exist, it must be a workdir or a Hugging Face folder',
    ),
    ('evaluate', (), '--workdir is required'),
    (
      'generate',
      ('--workdir={base}', '--prompt', '1' * 70),
      'the prompt has 72 tokens, model.max_length=64 must hold it and a',
    ),
  ],
)
def test_programs_say_it_in_one_line(base, name, arguments, message):
  result = _program(name, *(a.format(base=base) for a in arguments))
  lines = [x for x in result.stderr.splitlines() if not x.startswith('jax ')]
  assert len(lines) == 1 and lines[0].startswith(f'error: {message}')
  assert (result.returncode, result.stdout) == (2, '')


@pytest.mark.slow
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(jax, 'jit', jax.jit)
  mesh = recipe_micro.one_device()
  monkeypatch.setattr(stage_lib, 'make_mesh', lambda config: mesh)
  config = _load(
    'base',
    {
      'optim.peak_lr': 1e30,
      'optim.warmup_steps': 0,
      'train.checkpoint_every': 1,
      'train.eval_every': 0,
    },
  )
  with pytest.raises(loop.NonFiniteError) as e:
    pretrain.run(config, str(tmp_path))
  found = re.fullmatch(
    r'train/\w+ is (nan|inf) at step (\d+); the run stops here, its last '
    'checkpoint is kept',
    str(e.value),
  )
  last = int(found[2]) - 1
  assert last >= 1
  assert max(map(int, os.listdir(tmp_path / 'checkpoints'))) == last
  rows = [r for r in metrics.read(tmp_path) if 'train/loss' in r]
  assert rows[-1]['step'] == last + 1
