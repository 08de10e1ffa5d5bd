"""Models of other tools made ours and back: what goes along, what is said."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.interop import export
from r1jax.model import config as model_config
from r1jax.recipe import convert, origin
from tests.data import tiny_tokenizer
from tests.model import tiny
from tests.recipe import micro


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """A tiny Llama without a tokenizer."""
  config = tiny.config(num_layers=1, num_dense_layers=1, moe=None)
  rope = dataclasses.replace(config.attention.rope, interleaved=False)
  attention = model_config.GqaConfig(2, 1, 8, rope)
  config = dataclasses.replace(config, attention=attention)
  folder = tmp_path_factory.mktemp('weights') / 'llama'
  export.save(folder, config, tiny.variables(config), dtype='float32')
  return folder


@pytest.fixture
def folder(weights, tmp_path):
  """The same with its tokenizer; it says in config.json alone where to stop."""
  folder = tmp_path / 'hf'
  shutil.copytree(weights, folder)
  tiny_tokenizer.write_llama3(folder)
  path = folder / 'config.json'
  ids = {'bos_token_id': 0, 'eos_token_id': [1, 7]}
  path.write_text(json.dumps(json.loads(path.read_text()) | ids))
  return folder


def _to_workdir(folder, workdir):
  convert.to_workdir(
    str(folder),
    str(workdir),
    mesh=micro.one_device(),
    param_dtype='float32',
    say=print,
  )


def _to_huggingface(source, folder, **changes):
  arguments = {'dtype': 'float32', 'shard_gib': 1.0} | changes
  mesh = micro.one_device()
  convert.to_huggingface(
    str(source), str(folder), mesh=mesh, say=print, **arguments
  )


def _values(folder, name='config.json'):
  return json.loads((folder / name).read_text())


# ---- What goes along ------------------------------------------------------


def test_a_workdir_may_be_moved(folder, tmp_path):
  _to_workdir(folder, tmp_path / 'run')
  shutil.rmtree(folder)
  (tmp_path / 'run').rename(tmp_path / 'moved')
  path = origin.load_tokenizer_path(str(tmp_path / 'moved'))
  assert path == str(tmp_path / 'moved' / 'tokenizer')
  found = convert.hf_tokenizer.load_tokenizer(path)
  assert found.stop_ids == (1, 7)  # Though only config.json said so.


@pytest.mark.parametrize('through_workdir', [True, False])
def test_token_ids_and_tokenizer_come_through(
  folder, tmp_path, through_workdir
):
  source = folder
  if through_workdir:
    source = tmp_path / 'run'
    _to_workdir(folder, source)
  _to_huggingface(source, tmp_path / 'out')
  values = _values(tmp_path / 'out')
  assert values['bos_token_id'] == 0 and values['eos_token_id'] == [1, 7]
  assert 'pad_token_id' not in values
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (tmp_path / 'out' / name).read_text() == (folder / name).read_text()


def test_a_run_with_our_tokenizer_is_exported_with_it(weights, tmp_path):
  run = tmp_path / 'run'
  _to_workdir(weights, run)
  # As SFT or pretraining leaves it.
  values = {'model': _values(run)['model'], 'tokenizer': ''}
  (run / 'config.json').write_text(json.dumps(values))
  _to_huggingface(run, tmp_path / 'out')
  ours = tokenizer_lib.default()
  raw = (tmp_path / 'out' / 'tokenizer.model').read_bytes()
  assert raw == tokenizer_lib.default_model()
  written = _values(tmp_path / 'out')
  ids = [written[key] for key in ('bos_token_id', 'eos_token_id')]
  assert ids == [ours.bos_id, ours.eos_id]


def test_a_foreign_model_suits_its_devices_wherever_it_was_imported(
  weights, tmp_path, monkeypatch
):
  _to_workdir(weights, tmp_path / 'run')
  run = str(tmp_path / 'run')
  model = origin.load_model_config(run)
  assert origin.for_mesh(model, run, micro.one_device()) == model

  class Tpu:
    platform = 'tpu'

  class Mesh:
    devices = np.array([Tpu()])

  there = origin.for_mesh(model, run, Mesh())
  assert there.dtype == 'bfloat16' and there.remat
  assert there.attention_implementation == 'splash'
  experts = origin.suited(micro.model(), Mesh()).moe
  assert experts.implementation == 'megablox'
  assert experts.exchange.kind == 'ragged'
  # What was trained here stays as it was trained.
  values = _values(tmp_path / 'run')
  del values['from_hf']
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(values))
  assert origin.for_mesh(model, run, Mesh()) == model


# ---- What is said ---------------------------------------------------------


def test_nothing_is_loaded_in_vain(weights, tmp_path, monkeypatch):
  _to_workdir(weights, tmp_path / 'run')
  monkeypatch.setattr(origin, 'load_variables', None)
  (tmp_path / 'used').mkdir()
  (tmp_path / 'used' / 'file').write_text('')
  with pytest.raises(config_lib.UserError, match='used exists and is not empt'):
    _to_huggingface(tmp_path / 'run', tmp_path / 'used')
  values = _values(tmp_path / 'run')
  values['tokenizer'] = str(tmp_path / 'gone')
  (tmp_path / 'run' / 'config.json').write_text(json.dumps(values))
  with pytest.raises(config_lib.UserError, match='gone, does not exist'):
    _to_huggingface(tmp_path / 'run', tmp_path / 'out')


def test_folders_are_of_this_machine(weights):
  with pytest.raises(config_lib.UserError, match='gs://b/run must be a folder'):
    _to_workdir(weights, 'gs://b/run')
  with pytest.raises(config_lib.UserError, match='gs://b/out must be a folder'):
    _to_huggingface(weights, 'gs://b/out')


def test_a_file_is_no_folder(weights):
  with pytest.raises(config_lib.UserError, match='safetensors is no folder'):
    convert.huggingface.load(weights / 'model.safetensors')


@pytest.mark.parametrize(
  ('raw', 'message'),
  [
    (b'', 'io.npz is no npz file'),
    (b'PK\x03\x04cut', 'io.npz is no npz file'),
    (b'text', 'io.npz is no npz file'),
  ],
)
def test_a_reference_that_is_no_file(weights, tmp_path, raw, message):
  path = tmp_path / 'io.npz'
  path.write_bytes(raw)
  _assert_refused(weights, path, message)


@pytest.mark.parametrize(
  ('shape', 'dtype', 'message'),
  [
    ((4,), np.int64, r'input_ids \[4\] of int64 must be integers \[B, T\]'),
    ((0, 4), np.int64, r'input_ids \[0, 4\] of int64 must be'),
    ((1, 4), np.float32, r'input_ids \[1, 4\] of float32 must be'),
  ],
)
def test_a_reference_of_the_wrong_shape(
  weights, tmp_path, shape, dtype, message
):
  logits = np.zeros((*shape, tiny.V), np.float32)
  path = tmp_path / 'io.npz'
  np.savez(path, input_ids=np.zeros(shape, dtype), logits=logits)
  _assert_refused(weights, path, message)


def _assert_refused(folder, path, message):
  with pytest.raises(config_lib.UserError, match=message):
    convert.check_logits(str(folder), str(path), mesh=micro.one_device())


def test_logits_that_are_no_numbers_are_not_near(weights, tmp_path):
  logits = np.zeros((2, 4, tiny.V), np.float32)
  logits[0, 1, 2] = np.nan  # Of the first row: the second must not hide it.
  path = tmp_path / 'io.npz'
  np.savez(path, input_ids=np.zeros((2, 4), np.int64), logits=logits)
  check = convert.check_logits(str(weights), str(path), mesh=micro.one_device())
  assert np.isnan(check.largest) and not check.largest <= 1e9
