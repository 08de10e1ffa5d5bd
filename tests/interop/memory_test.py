"""Importing takes the variables and little more, however large the files."""

import json
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from r1jax.interop import fp8, hf_config, safetensors
from r1jax.interop import mapping as mapping_lib
from r1jax.model import config as model_config
from tests.model import tiny

_MIB = 1 << 20
# Beyond the variables: a slice as it is and in float32, and the allocator's.
_ROOM = 64 * _MIB
_IMPORT = """
import pathlib, sys
import jax
from r1jax.interop import huggingface

def kib(name):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(int(l.split()[1]) for l in lines if l.startswith(name + ':'))

huggingface.load(sys.argv[1], param_dtype='bfloat16')  # Starts everything up.
before = kib('VmRSS')
_, variables = huggingface.load(sys.argv[2], param_dtype='bfloat16')
jax.block_until_ready(variables)
size = sum(x.nbytes for x in jax.tree.leaves(variables))
print(size, 1024 * (kib('VmHWM') - before))
"""


def _config(width: int) -> model_config.ModelConfig:
  """3 MoE layers of 63 matrices each, an embedding as large as 32."""
  base = tiny.config()
  moe = model_config.MoeConfig(
    num_experts=20, top_k=2, expert_dim=width, num_shared=1, num_groups=1
  )
  return model_config.ModelConfig(
    vocab_size=32 * width,
    embed_dim=width,
    num_layers=4,
    num_dense_layers=1,
    dense_dim=2 * width,
    attention=base.attention,
    moe=moe,
  )


def _write(folder: pathlib.Path, width: int, shard_bytes: int) -> int:
  """Writes an FP8 checkpoint of numbers that cost nothing; its bytes."""
  config = _config(width)
  tensors = {}
  for leaf in mapping_lib.make_mapping(config).leaves:
    for source in leaf.sources.values():
      name, shape = source.name, source.shape
      if leaf.path[-1] in ('gate', 'up', 'down') and len(shape) == 2:
        tensors[name] = np.full(shape, 1.5, fp8.E4M3)
        scale = fp8.scale_shape(shape, fp8.DEFAULT_BLOCKS)
        tensors[name + fp8.SCALE] = np.full(scale, 0.01, np.float32)
      else:
        tensors[name] = np.full(shape, 0.01, ml_dtypes.bfloat16)
  planned = [
    safetensors.Planned(name, x.dtype, x.shape) for name, x in tensors.items()
  ]
  folder.mkdir()
  files = safetensors.plan_files(planned, shard_bytes)
  writer = safetensors.Writer(folder, files)
  writer.write(tensors.items())
  writer.write_index()
  values = hf_config.write(config) | {
    'quantization_config': {
      'quant_method': 'fp8',
      'fmt': 'e4m3',
      'weight_block_size': list(fp8.DEFAULT_BLOCKS),
    }
  }
  (folder / 'config.json').write_text(json.dumps(values))
  return sum(t.num_bytes for t in planned)


@pytest.mark.slow
@pytest.mark.skipif(
  not pathlib.Path('/proc/self/status').exists(), reason='no /proc'
)
def test_a_large_checkpoint_takes_little_beyond_its_variables(tmp_path):
  _write(tmp_path / 'small', 128, 1 << 20)
  num_bytes = _write(tmp_path / 'large', 1024, 32 * _MIB)
  assert num_bytes > 256 * _MIB
  assert len(list((tmp_path / 'large').glob('*.safetensors'))) > 8
  done = subprocess.run(
    [sys.executable, '-c', _IMPORT, tmp_path / 'small', tmp_path / 'large'],
    capture_output=True,
    text=True,
    check=True,
  )
  size, peak = map(int, done.stdout.split())
  print(f'{num_bytes / _MIB:.0f} MiB of files, {size / _MIB:.0f} of variables')
  print(f'at most {(peak - size) / _MIB:.0f} MiB beyond them')
  # The files beside the variables would be five times the room, all of it in
  # float32 once sixteen times.
  assert 5 * _ROOM <= num_bytes and 16 * _ROOM < 2 * size
  assert peak < size + _ROOM
