"""Two processes, each with a device of the mesh, import a model together."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from r1jax.interop import huggingface
from r1jax.recipe import origin
from tests import known_answers, quick
from tests.recipe import micro

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FOLDER = known_answers.DATA / 'hf_models' / 'qwen3'


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def _run_two(*arguments):
  """Returns what each process reports."""
  port = str(_free_port())
  environment = {
    **os.environ,
    'JAX_NUM_CPU_DEVICES': '1',
    'XLA_FLAGS': quick.XLA_FLAGS,
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-m', 'tests.recipe.two_processes', rank, port]
      + [str(argument) for argument in arguments],
      cwd=_ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for rank in ('0', '1')
  ]
  try:
    texts = [process.communicate(timeout=200)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0], texts
  return [json.loads(text.splitlines()[-1]) for text in texts]


@pytest.mark.slow
def test_each_process_reads_its_shards_and_the_checkpoint_is_whole(tmp_path):
  reports = _run_two(_FOLDER, tmp_path / 'run')
  config, variables = huggingface.load(_FOLDER)
  whole = sum(x.nbytes for x in jax.tree.leaves(variables))
  for report in reports:
    assert report['step'] == 0
    # Replicated norms aside, a half.
    assert report['read_bytes'] == report['held_bytes'] < 0.55 * whole
  # All that is split is held once, what is replicated twice.
  assert sum(report['held_bytes'] for report in reports) >= whole
  assert sorted(p.name for p in tmp_path.iterdir()) == ['run']
  found, _ = origin.load_variables(
    str(tmp_path / 'run'), config, micro.one_device(), say=print
  )
  jax.tree.map(np.testing.assert_array_equal, found, variables)
