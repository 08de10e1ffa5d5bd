"""Random shapes of every family, made by transformers, are loaded and agree.

Needs another Python with torch and transformers 5, see transformers_test.py.
More of them: R1JAX_RANDOM_SHAPES=20 (of each family; 4 by default) and
R1JAX_RANDOM_SEED=1.
"""

import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from r1jax.interop import export, huggingface
from r1jax.model import transformer

_PYTHON = os.environ.get('R1JAX_TRANSFORMERS_PYTHON')
_COUNT = os.environ.get('R1JAX_RANDOM_SHAPES', '4')
_SEED = os.environ.get('R1JAX_RANDOM_SEED', '0')


@pytest.mark.slow
@pytest.mark.skipif(
  not _PYTHON,
  reason='set R1JAX_TRANSFORMERS_PYTHON=DIR/bin/python, a virtual environment '
  'with torch and transformers 5',
)
def test_random_shapes_are_loaded_agree_and_are_written_again(tmp_path):
  """Near to their float32, and to float64 as that is but for a factor of 4."""
  script = pathlib.Path(__file__).with_name('random_shapes_peer.py')
  made = subprocess.run(
    [_PYTHON, script, tmp_path, _COUNT, _SEED],
    capture_output=True,
    text=True,
    check=False,
  )
  assert made.returncode == 0, made.stderr
  rows = [json.loads(line) for line in made.stdout.splitlines()]
  assert len(rows) == 7 * int(_COUNT)
  wrong = []
  for row in rows:
    folder = tmp_path / row['folder']
    io = np.load(folder / 'io.npz')
    config, variables = huggingface.load(folder)

    @jax.jit
    def logits(variables, tokens_BT, config=config):
      with jax.default_matmul_precision('highest'):
        return transformer.Transformer(config).apply(
          variables, tokens_BT, method='logits'
        )

    logits_BTV = logits(variables, io['input_ids'].astype(np.int32))
    row['from_float64'] = float(np.abs(logits_BTV - io['exact']).max())
    row['from_float32'] = float(np.abs(logits_BTV - io['logits']).max())
    row['largest_logit'] = float(np.abs(io['exact']).max())
    print(row)
    if row['from_float64'] > 4 * row['noise'] + 1e-6 * row['largest_logit']:
      wrong.append(row)
    if row['from_float32'] > 2e-5 * max(row['largest_logit'], 1.0):
      wrong.append(row)
    export.save(tmp_path / 'out' / row['folder'], config, variables)
    again = huggingface.load_config(tmp_path / 'out' / row['folder'])
    assert again == config, row
  assert not wrong
