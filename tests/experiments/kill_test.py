"""The real programs killed and started again: the same losses."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from r1jax.train import metrics
from tests import quick
from tests.experiments import policy_workdir

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_BASE = ('base', ('train.checkpoint_every=10', 'train.num_steps=60'))
_MINIBATCHES = 2
# The save at step 25 comes after the first of two minibatches of a rollout.
_GRPO = ('r1_zero', ('train.checkpoint_every=25', 'train.num_steps=60'))


def _start(stage, workdir, changes):
  program = {'base': 'pretrain', 'r1_zero': 'grpo'}[stage]
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      f'experiments.{program}',
      f'--config=tests/experiments/micro.py:{stage}',
      f'--workdir={workdir}',
      '--host_devices=2',
      *(f'--config.{change}' for change in changes),
    ],
    cwd=_ROOT,
    env={**os.environ, 'XLA_FLAGS': quick.XLA_FLAGS},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def _run(stage, workdir, changes):
  process = _start(stage, workdir, changes)
  out, _ = process.communicate(timeout=600)
  assert process.returncode == 0, out
  return out


def _run_until(is_time, stage, workdir, changes):
  """Starts a program and kills it when it is time, before it is done."""
  process = _start(stage, workdir, changes)
  while process.poll() is None and not is_time():
    time.sleep(0.001)
  os.kill(process.pid, signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL


def _losses(workdir):
  """Everything measured but the speed, in order."""
  return [
    {k: v for k, v in row.items() if not k.startswith('perf/')}
    for row in metrics.read(workdir)
  ]


def _last_step(workdir):
  return max((row['step'] for row in metrics.read(workdir)), default=0)


def _is_saving(workdir, after):
  def is_time():
    names = [p.name for p in (workdir / 'checkpoints').glob('*tmp*')]
    return any(int(name.split('.')[0]) > after for name in names)

  return is_time


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The workdir of a pretraining run that was never killed."""
  path = tmp_path_factory.mktemp('run') / 'base'
  _run(*_arguments(_BASE, path))
  return path


def _arguments(stage, workdir, *more):
  name, changes = stage
  return name, workdir, (*changes, *more)


def test_pretraining_killed_during_a_save_and_at_a_random_moment(
  base, tmp_path
):
  workdir = tmp_path / 'base'
  arguments = _arguments(_BASE, workdir)
  _run_until(_is_saving(workdir, 15), *arguments)
  step = random.Random(0).randrange(30, 50)
  _run_until(lambda: _last_step(workdir) >= step, *arguments)
  assert _last_step(workdir) >= step
  out = _run(*arguments)
  assert 'pretrain: going on from step ' in out
  losses = _losses(workdir)
  assert losses == _losses(base)
  steps = [row['step'] for row in losses if 'train/loss' in row]
  assert steps == list(range(1, 61))


def test_a_machine_that_is_taken_away_saves_and_another_shape_goes_on(
  base, tmp_path
):
  workdir = tmp_path / 'base'
  name, workdir, changes = _arguments(_BASE, workdir)
  process = _start(name, workdir, changes)
  while process.poll() is None and _last_step(workdir) < 13:
    time.sleep(0.001)
  start = time.monotonic()
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 0, out
  assert time.monotonic() - start < 30  # The least grace period there is.
  (line,) = [x for x in out.splitlines() if 'told by SIGTERM' in x]
  step = int(line.split('after step ')[1].split(',')[0])
  assert step >= 13 and (workdir / 'checkpoints' / str(step)).exists()
  # Saved on two devices that had half of the experts each, or all of them.
  out = _run(name, workdir, (*changes, 'mesh.data=1', 'mesh.expert=2'))
  assert f'going on from step {step}' in out
  for row, expected in zip(_losses(workdir), _losses(base), strict=True):
    assert row['step'] == expected['step']
    if 'train/loss' in expected:
      loss = expected['train/loss']
      assert abs(row['train/loss'] - loss) < 1e-4 * loss


def test_grpo_killed_between_two_minibatches_of_a_rollout(tmp_path):
  policy_workdir.make(tmp_path / 'base')  # It earns rewards that differ.
  start = f'init_from={tmp_path}/base'
  unkilled, workdir = tmp_path / 'unkilled', tmp_path / 'killed'
  _run(*_arguments(_GRPO, unkilled, start))
  arguments = _arguments(_GRPO, workdir, start)
  _run_until((workdir / 'checkpoints' / '25').exists, *arguments)
  out = _run(*arguments)
  assert 'grpo: going on from step 25' in out
  losses = _losses(workdir)
  assert losses == _losses(unkilled)
  rewards = {
    row['step']: row['rl/reward'] for row in losses if 'rl/reward' in row
  }
  assert list(rewards) == list(range(1, 60, _MINIBATCHES))
  assert len(set(rewards.values())) > 1
