"""Two processes train, are ended, go on and give the losses of one."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from r1jax.train import metrics
from tests import quick

pytestmark = pytest.mark.slow

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_NUM_STEPS = 40


def _free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def _start(workdir, num_processes):
  """Four devices in all."""
  port = _free_port()
  common = [
    sys.executable,
    '-m',
    'experiments.pretrain',
    '--config=tests/experiments/micro.py:base',
    f'--workdir={workdir}',
    f'--host_devices={4 // num_processes}',
    f'--config.train.num_steps={_NUM_STEPS}',
    '--config.train.checkpoint_every=10',
    '--config.batch_size=4',
    '--config.mesh.data=2',
    '--config.mesh.fsdp=2',
  ]
  processes = []
  for i in range(num_processes):
    more = (
      f'--coordinator_address=localhost:{port}',
      f'--num_processes={num_processes}',
      f'--process_id={i}',
    )
    processes.append(
      subprocess.Popen(
        [*common, *(more if num_processes > 1 else ())],
        cwd=_ROOT,
        env={**os.environ, 'XLA_FLAGS': quick.XLA_FLAGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    )
  return processes


def _finish(processes):
  out = [p.communicate(timeout=300)[0] for p in processes]
  assert [p.returncode for p in processes] == [0] * len(out), out
  return out


def _losses(workdir):
  return [
    (row['step'], row['train/loss'])
    for row in metrics.read(workdir)
    if 'train/loss' in row
  ]


def test_two_processes_give_the_losses_of_one_and_go_on_after_a_sigterm(
  tmp_path,
):
  one, two = tmp_path / 'one', tmp_path / 'two'
  _finish(_start(one, 1))
  processes = _start(two, 2)
  is_time = lambda: len(_losses(two)) >= 12
  while all(p.poll() is None for p in processes) and not is_time():
    time.sleep(0.01)
  # A machine is told first; the others hear of it.
  processes[1].send_signal(signal.SIGTERM)
  out = _finish(processes)
  assert all('as told by SIGTERM' in text for text in out)
  step = _losses(two)[-1][0]
  assert 12 <= step < _NUM_STEPS and (two / 'checkpoints' / str(step)).exists()
  first, second = _finish(_start(two, 2))
  assert f'going on from step {step}' in first
  assert 'pretrain' not in second  # One of them speaks, and writes.
  losses, expected = _losses(two), _losses(one)
  assert [s for s, _ in losses] == list(range(1, _NUM_STEPS + 1))
  for (_, loss), (_, other) in zip(losses, expected, strict=True):
    assert abs(loss - other) < 1e-4 * other
