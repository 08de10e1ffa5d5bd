"""Two processes, each with a device of the mesh, im- and export a model."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from r1jax.interop import export, fp8, huggingface, safetensors
from r1jax.recipe import convert, origin
from tests import known_answers, quick
from tests.model import tiny
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
  reports = _run_two('import', _FOLDER, tmp_path / 'run')
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


@pytest.fixture
def fp8_folder(tmp_path, monkeypatch):
  """A tiny DeepSeek with MTP in FP8, of many small blocks."""
  monkeypatch.setattr(fp8, 'DEFAULT_BLOCKS', (6, 8))
  config = tiny.config(mtp_depth=1)
  folder = tmp_path / 'fp8'
  export.save(folder, config, tiny.variables(config), dtype='fp8')
  return folder


@pytest.mark.slow
def test_fp8_with_mtp_is_imported_by_two(fp8_folder, tmp_path):
  reports = _run_two('import', fp8_folder, tmp_path / 'run')
  config, variables = huggingface.load(fp8_folder)
  assert config.mtp_depth == 1
  whole = sum(x.nbytes for x in jax.tree.leaves(variables))
  size = (fp8_folder / 'model.safetensors').stat().st_size
  for report in reports:
    assert report['held_bytes'] < 0.55 * whole
    # Its half, all scales, and of one of the two the copies.
    assert report['read_bytes'] < 0.6 * size
  found, _ = origin.load_variables(
    str(tmp_path / 'run'), config, micro.one_device(), say=print
  )
  jax.tree.map(np.testing.assert_array_equal, found, variables)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float32', 'fp8'])
def test_two_write_what_one_writes(fp8_folder, tmp_path, dtype):
  one, two = tmp_path / 'one', tmp_path / 'two'
  convert.to_huggingface(
    str(fp8_folder),
    str(one),
    mesh=micro.one_device(),
    dtype=dtype,
    shard_gib=1.0,
    say=print,
  )
  _run_two(dtype, fp8_folder, two)
  names = sorted(path.name for path in one.iterdir())
  assert names == sorted(path.name for path in two.iterdir())
  assert {'config.json', 'model.safetensors'} <= set(names)
  for name in names:
    assert (one / name).read_bytes() == (two / name).read_bytes(), name
  if dtype == 'fp8':
    assert _tensors(two) == _tensors(fp8_folder)


def _tensors(folder):
  """Dtype, shape and bytes of each tensor."""
  with safetensors.closing(folder) as reader:
    return {
      name: (entry.dtype, entry.shape, reader.read(name).tobytes())
      for name, entry in reader.entries.items()
    }
