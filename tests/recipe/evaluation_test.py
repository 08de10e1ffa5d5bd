"""Evaluations of a model in a workdir of their own: who may claim it."""

import json
import shutil

import pytest

from r1jax import config as config_lib
from r1jax.interop import export
from r1jax.recipe import evaluation
from tests.data import tiny_tokenizer
from tests.recipe import micro


def _config(init_from):
  values = {
    'init_from': str(init_from),
    'seed': 0,
    'tokenizer': '',
    'task': {'maximum': 100},
    'template': 'plain',
    'rule': 'tags',
    'num_problems': 8,
    'num_samples': 1,
    'max_prompt_tokens': 40,  # Byte by byte.
    'max_new_tokens': 4,
    'sampling': {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0},
    'batch_size': 8,
    'mesh': {'data': -1, 'fsdp': 1},
  }
  return config_lib.from_dict(evaluation.EvaluateConfig, values)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A Hugging Face folder of a tiny model."""
  path = tmp_path_factory.mktemp('models') / 'hf'
  model = micro.model(mtp_depth=0, vocab_size=320)
  export.save(path, model, micro.variables(model), dtype='float32')
  tiny_tokenizer.write_deepseek(path)
  return path


def test_a_truncated_model_leaves_the_workdir_to_the_right_one(
  folder, tmp_path, monkeypatch
):
  broken = tmp_path / 'broken'
  shutil.copytree(folder, broken)
  weights = broken / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-1])
  workdir = tmp_path / 'evaluated'
  with micro.on(micro.one_device()):
    with pytest.raises(config_lib.UserError, match='is cut short'):
      evaluation.run(_config(broken), str(workdir), print)
    assert not workdir.exists()
    # The right one then gets there; what comes after loading is not run.
    monkeypatch.setattr(evaluation.run_lib, 'evaluate', _stop)
    with pytest.raises(ZeroDivisionError):
      evaluation.run(_config(folder), str(workdir), print)
    kept = json.loads((workdir / 'config.json').read_text())
    assert kept['evaluate']['init_from'] == str(folder)
    # And another's results are refused before its weights are read.
    with pytest.raises(config_lib.UserError, match='belongs to another config'):
      evaluation.run(_config(broken), str(workdir), print)


def _stop(*args, **kwargs):
  raise ZeroDivisionError
