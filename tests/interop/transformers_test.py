"""transformers loads what we export, silently, and gives the same logits.

Exports in float32 and bfloat16, as one file and as several. Needs another
Python with torch and transformers 5, R1JAX_TRANSFORMERS_PYTHON=…/bin/python;
skipped without.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from r1jax.interop import export, huggingface
from r1jax.model import config as model_config
from r1jax.model import transformer
from tests import known_answers
from tests.model import tiny
from tests.model.families_test import MODELS

_PYTHON = os.environ.get('R1JAX_TRANSFORMERS_PYTHON')
_ROPE = model_config.RopeConfig(theta=5e4, interleaved=True)
_YARN = model_config.YarnConfig(8.0, 16, mscale=1.0, mscale_all_dim=0.5)
_PLAIN_YARN = dataclasses.replace(_YARN, mscale=0.0, mscale_all_dim=0.0)


def _other_shapes():
  """Shapes of the families that no released model has."""
  base = tiny.config(max_length=128)  # What YaRN's factor says.
  a, moe = base.attention, base.moe
  change = dataclasses.replace
  yield (
    'v3_odd',
    change(
      base,
      norm_eps=1e-5,
      tie_embeddings=True,
      attention=change(
        a,
        num_heads=3,
        q_lora_rank=None,
        v_head_dim=10,
        rope=change(_ROPE, scaling=_YARN),
      ),
      moe=change(moe, num_groups=2, top_groups=1, top_k=3, num_shared=3),
    ),
  )
  yield (
    'v3_halves',
    change(
      base,
      attention=change(
        a, rope=change(_ROPE, interleaved=False, scaling=_PLAIN_YARN)
      ),
      moe=change(moe, normalize=False, num_groups=1, top_groups=1),
    ),
  )
  yield (
    'v32_all_experts',
    change(
      base,
      num_dense_layers=0,
      attention=change(
        a,
        rope=change(_ROPE, scaling=_YARN),
        indexer=model_config.IndexerConfig(16, 12, top_k=5),
      ),
    ),
  )
  yield (
    'v2_tied',
    change(
      base,
      tie_embeddings=True,
      attention=change(a, rope=change(_ROPE, scaling=_YARN)),
      moe=change(
        moe,
        score='softmax',
        group_score='max',
        normalize=False,
        has_bias=False,
        num_groups=2,
        top_groups=1,
      ),
    ),
  )
  gqa = model_config.GqaConfig(
    num_heads=4,  # transformers' Llama divides its width by them.
    num_kv_heads=2,
    head_dim=10,
    rope=change(_ROPE, interleaved=False),
  )
  dense = change(base, attention=gqa, moe=None, num_dense_layers=3)
  yield (
    'llama_yarn',
    change(
      dense,
      attention=change(gqa, rope=change(gqa.rope, scaling=_PLAIN_YARN)),
    ),
  )
  yield (
    'qwen2_untied',
    change(dense, attention=change(gqa, num_kv_heads=1, qkv_bias=True)),
  )
  yield (
    'qwen3_tied',
    change(dense, tie_embeddings=True, attention=change(gqa, qk_norm=True)),
  )
  yield (
    'qwen3_moe_mixed',
    change(
      base,
      num_dense_layers=1,
      attention=change(gqa, qk_norm=True),
      moe=change(
        moe,
        score='softmax',
        has_bias=False,
        num_shared=0,
        num_groups=1,
        top_groups=1,
        scale=1.0,
        normalize=False,
      ),
    ),
  )


# Of a file: one holds any of these models, or one or two tensors.
_SHARD_BYTES = {'whole': 1 << 30, 'split': 5_000}
_EXPORTS = (
  ('float32', 'whole'),
  ('float32', 'split'),
  ('bfloat16', 'whole'),
  ('bfloat16', 'split'),
)


def _models():
  """(name, config, variables, tokens) of everything that is exported."""
  for name in MODELS:
    source = known_answers.DATA / 'hf_models' / name
    tokens_BT = np.load(source / 'io.npz')['input_ids']
    yield name, *huggingface.load(source), tokens_BT
  tokens_BT = np.random.default_rng(0).integers(0, tiny.V, (2, 12))
  for name, config in _other_shapes():
    yield name, config, tiny.variables(config), tokens_BT


@functools.partial(jax.jit, static_argnames=('config',))
def _logits(config, variables, tokens_BT):
  with jax.default_matmul_precision('highest'):
    return transformer.Transformer(config).apply(
      variables, tokens_BT, method='logits'
    )


def _export(folder: pathlib.Path) -> None:
  """Exports everything, with logits of what we read back in float32."""
  for name, config, variables, tokens_BT in _models():
    for dtype, files in _EXPORTS:
      out = folder / f'{name}-{dtype}-{files}'
      export.save(
        out, config, variables, dtype=dtype, shard_bytes=_SHARD_BYTES[files]
      )
      assert len(list(out.glob('*.safetensors'))) > 5 * (files == 'split')
      again, loaded = huggingface.load(out)
      assert again == dataclasses.replace(config, moe=again.moe)
      logits_BTV = _logits(again, loaded, tokens_BT)
      np.savez(out / 'io.npz', input_ids=tokens_BT, logits=logits_BTV)


@pytest.mark.slow
@pytest.mark.skipif(
  not _PYTHON,
  reason='set R1JAX_TRANSFORMERS_PYTHON=DIR/bin/python, a virtual environment '
  'with torch and transformers 5',
)
def test_transformers_loads_every_export_and_agrees(tmp_path):
  """Logits within 2e-5, those of bfloat16 weights too: computed in float32."""
  _export(tmp_path)
  folders = sorted(tmp_path.iterdir())
  script = pathlib.Path(__file__).with_name('transformers_peer.py')
  done = subprocess.run(
    [_PYTHON, script, *folders], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  assert [row['folder'] for row in rows] == [f.name for f in folders]
  for row in rows:
    print(row)
    dtype = row['folder'].split('-')[1]
    assert row['said'] == '', row
    assert row['dtype'] == f'torch.{dtype}', row
    assert row['largest'] < 2e-5, row
