"""Kill -9 at any moment, start again: the same losses, bit for bit."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from r1jax.train import checkpoint, metrics
from tests.train import resume_program, toy

_PROGRAM = pathlib.Path(resume_program.__file__)
_NUM_STEPS = resume_program.NUM_STEPS


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
  """The workdir of a run that was never killed."""
  path = tmp_path_factory.mktemp('unbroken')
  resume_program.main(str(path))
  return path


def _start(workdir):
  return subprocess.Popen(
    [sys.executable, str(_PROGRAM), str(workdir)],
    stdout=subprocess.PIPE,
    text=True,
  )


def _run_until(workdir, is_time, *, kill=signal.SIGKILL):
  """Starts the program, kills it when it is time; returns its first step."""
  process = _start(workdir)
  deadline = time.monotonic() + 60
  while process.poll() is None and not is_time():
    assert time.monotonic() < deadline
    time.sleep(0.001)
  if process.poll() is None:
    os.kill(process.pid, kill)
  out, _ = process.communicate()
  return int(out.split()[1]) if out else None, process.returncode


def _has_steps(workdir, num_steps):
  path = workdir / 'metrics.jsonl'
  return lambda: path.exists() and len(path.read_text().split('\n')) > num_steps


def _is_saving(workdir, after):
  """Whether a save of a step past `after` is half done."""

  def is_time():
    names = [p.name for p in (workdir / 'checkpoints').glob('*tmp*')]
    return any(int(name.split('.')[0]) > after for name in names)

  return is_time


def _finish(workdir):
  first_step, code = _run_until(workdir, lambda: False)
  assert code == 0
  return first_step


def _compare(workdir, unbroken):
  for name in ('train/loss', 'train/grad_norm'):
    ours, expected = (
      [(r['step'], r[name]) for r in metrics.read(path)]
      for path in (workdir, unbroken)
    )
    assert ours == expected
  assert [step for step, _ in ours] == list(range(1, _NUM_STEPS + 1))
  states = []
  for path in (workdir, unbroken):
    with checkpoint.Checkpoints(
      path / 'checkpoints', max_to_keep=2
    ) as checkpoints:
      states.append(
        checkpoints.restore_latest(toy.abstract_state(with_reference=True))
      )
  (a, a_source, a_step), (b, b_source, b_step) = states
  assert a_step == b_step == _NUM_STEPS
  assert a_source == b_source
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_killed_during_a_save(unbroken, tmp_path, capsys):
  start, code = _run_until(tmp_path, _is_saving(tmp_path, 15))
  assert (start, code) == (0, -signal.SIGKILL)
  resume_program.main(str(tmp_path))  # In this process: that is faster.
  assert capsys.readouterr().out in ('start 8\n', 'start 16\n')
  _compare(tmp_path, unbroken)


@pytest.mark.slow
def test_killed_between_saves_and_terminated_during_one(unbroken, tmp_path):
  start, code = _run_until(tmp_path, _has_steps(tmp_path, 17))
  assert (start, code) == (0, -signal.SIGKILL)
  start, code = _run_until(
    tmp_path, _is_saving(tmp_path, 23), kill=signal.SIGTERM
  )
  assert start in (8, 16) and code not in (0, -signal.SIGTERM)  # It unwound.
  names = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert '24' in names and not any('tmp' in name for name in names)
  assert _finish(tmp_path) >= 24
  _compare(tmp_path, unbroken)


@pytest.mark.slow
def test_killed_at_many_random_moments(unbroken, tmp_path):
  rng = random.Random(0)
  for delay in [rng.uniform(0, 1.0) for _ in range(6)]:
    until = []

    def is_time(until=until, delay=delay):
      # Counted from when the run is under way, not from the start of Python.
      if not until and (tmp_path / 'config.json').exists():
        until.append(time.monotonic() + delay)
      return until and time.monotonic() > until[0]

    _run_until(tmp_path, is_time)
  _finish(tmp_path)
  _compare(tmp_path, unbroken)
