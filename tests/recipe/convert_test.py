"""Models of other tools made ours and back: what goes along, what is said."""

import dataclasses
import io
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.interop import export, huggingface
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.recipe import convert, origin
from r1jax.recipe import stage as stage_lib
from r1jax.train import optimizer
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


def _to_workdir(folder, workdir, **changes):
  arguments = {'param_dtype': 'float32', 'say': print} | changes
  mesh = micro.one_device()
  convert.to_workdir(str(folder), str(workdir), mesh=mesh, **arguments)


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


_TIKTOKEN_FILES = (
  *('tiktoken.model', 'tokenization_kimi.py', 'tool_declaration_ts.py'),
  *('tokenizer_config.json', 'chat_template.jinja'),
)


def test_a_tiktoken_folder_comes_through_whole(weights, tmp_path):
  folder = tmp_path / 'hf'
  shutil.copytree(weights, folder)
  for name in (*_TIKTOKEN_FILES, 'modeling_kimi.py'):
    (folder / name).write_text(f'{{"what": "{name}"}}')
  _to_workdir(folder, tmp_path / 'run')
  _to_huggingface(tmp_path / 'run', tmp_path / 'out')
  for name in _TIKTOKEN_FILES:
    assert _values(tmp_path / 'out', name)['what'] == name
  # It is our modelling code that wrote the weights.
  assert not (tmp_path / 'out' / 'modeling_kimi.py').exists()
  path = origin.load_tokenizer_path(str(tmp_path / 'run'))
  with pytest.raises(config_lib.UserError, match='a tiktoken file cannot be'):
    convert.hf_tokenizer.load_tokenizer(path)


def test_what_was_imported_as_bfloat16_is_bfloat16(weights, tmp_path):
  run = tmp_path / 'run'
  _to_workdir(weights, run, param_dtype='bfloat16')
  model, mesh = origin.load_model_config(str(run)), micro.one_device()
  found, step = origin.load_variables(str(run), model, mesh, say=print)
  _, expected = huggingface.load(weights, param_dtype='bfloat16')
  assert step == 0
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  dtypes = {x.dtype for x in jax.tree.leaves(found)}
  assert dtypes == {huggingface.PARAM_DTYPES['bfloat16']}
  _to_huggingface(run, tmp_path / 'out', dtype='bfloat16')
  _, again = huggingface.load(tmp_path / 'out', param_dtype='bfloat16')
  jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_training_from_bfloat16_is_in_float32(weights, tmp_path):
  run = tmp_path / 'run'
  _to_workdir(weights, run, param_dtype='bfloat16')
  train = stage_lib.TrainConfig(1, 1, 0.0, 0.0, 0, 1, 0, 0)
  stage = stage_lib.Stage(
    workdir=tmp_path / 'new',
    model=origin.load_model_config(str(run)),
    train=train,
    optim=optimizer.OptimConfig(1e-3, 0, 'constant', 1.0),
    mesh=micro.one_device(),
    seed=0,
    title='test',
    init_from=str(run),
  )
  params = stage.new_state(print).variables['params']
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  _, expected = huggingface.load(weights, param_dtype='bfloat16')
  jax.tree.map(np.testing.assert_array_equal, params, expected['params'])


@pytest.mark.parametrize('through_workdir', [False, True])
def test_mtp_may_be_left_out(tmp_path, through_workdir):
  config = tiny.config(num_layers=1, num_dense_layers=0, mtp_depth=1)
  folder = tmp_path / 'hf'
  export.save(folder, config, tiny.variables(config), dtype='float32')
  tiny_tokenizer.write_deepseek(folder)
  source = folder
  if through_workdir:
    source = tmp_path / 'run'
    _to_workdir(folder, source)
  _to_huggingface(source, tmp_path / 'with')
  _to_huggingface(source, tmp_path / 'without', mtp=False)
  assert huggingface.load_config(tmp_path / 'with').mtp_depth == 1
  assert huggingface.load_config(tmp_path / 'without').mtp_depth == 0
  _, found = huggingface.load(tmp_path / 'without')
  _, expected = huggingface.load(folder, mtp_depth=0)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  _to_workdir(folder, tmp_path / 'none', mtp=False)
  assert origin.load_model_config(str(tmp_path / 'none')).mtp_depth == 0


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
  assert there.decode_implementation == 'xla'
  mla = origin.suited(micro.model(), 'tpu')
  assert mla.attention_implementation == mla.head_implementation == 'pallas'
  assert mla.decode_implementation == 'xla'  # Its latents are 16 wide.
  experts = origin.suited(micro.model(), 'tpu').moe
  assert experts.implementation == 'pallas'
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


def test_files_that_an_index_passes_over_are_named(weights, tmp_path):
  config, variables = huggingface.load(weights)
  folder = tmp_path / 'hf'
  export.save(folder, config, variables, dtype='float32', shard_bytes=1 << 13)
  shutil.copyfile(weights / 'model.safetensors', folder / 'old.safetensors')
  said = []
  huggingface.load(folder, say=said.append)
  assert len(said) == 1 and 'does not name old.safetensors: left out' in said[0]
  (folder / 'old.safetensors').unlink()
  path = folder / 'model.safetensors.index.json'
  index = json.loads(path.read_text())['weight_map']
  last = max(index.values())
  rest = {name: file for name, file in index.items() if file != last}
  path.write_text(json.dumps({'weight_map': rest}))
  with pytest.raises(
    config_lib.UserError, match=f'lacks the tensor .*; .* does not name {last}'
  ):
    huggingface.load(folder)


def test_weights_that_are_kept_as_fp8_do_not_compute(weights, tmp_path):
  config, variables = huggingface.load(weights)
  export.save(tmp_path / 'hf', config, variables, dtype='fp8')
  config, kept = huggingface.load(tmp_path / 'hf', keep_fp8=True)
  model = transformer.Transformer(config)
  with pytest.raises(TypeError, match='load them with keep_fp8=False to'):
    model.apply(kept, np.zeros((1, 4), np.int32))


def test_keywords_that_there_are_not_are_named(weights):
  with pytest.raises(config_lib.UserError, match="dtype='float16', it must be"):
    huggingface.load(weights, param_dtype='float16')
  with pytest.raises(
    config_lib.UserError,
    match="mtp_dept=0 is no field of ModelConfig .did you mean 'mtp_depth'",
  ):
    huggingface.load(weights, mtp_dept=0)


def _saved(save, *arguments, **arrays):
  """Bytes of a file that NumPy writes."""
  file = io.BytesIO()
  save(file, *arguments, **arrays)
  return file.getvalue()


def _damaged():
  """A compressed file with a wrong byte in the numbers."""
  raw = bytearray(_saved(np.savez_compressed, input_ids=np.arange(8)))
  with zipfile.ZipFile(io.BytesIO(raw)) as file:
    (entry,) = file.infolist()
  start = entry.header_offset + 30 + len(entry.filename)
  start += int.from_bytes(raw[entry.header_offset + 28 :][:2], 'little')
  raw[start] ^= 0xFF
  return bytes(raw)


@pytest.mark.parametrize(
  ('raw', 'message'),
  [
    (b'', 'io.npz is no npz file'),
    (b'PK\x03\x04cut', 'io.npz is no npz file'),
    (b'text', 'io.npz is no npz file'),
    (_saved(np.save, np.zeros(3)), 'is no npz file: it is an array without'),
    (_damaged(), 'io.npz is no npz file: .*invalid'),
    (_saved(np.savez, input_ids=np.zeros((1, 4), int)), 'lacks an array'),
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


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('missing', 'missing does not exist, it must be a workdir or a Hugging'),
    ('', "'' does not exist, it must be a workdir or a Hugging"),
    ('file', 'file is a file, it must be a workdir or a Hugging Face folder'),
    ('file/x', 'file/x does not exist, it must be a workdir or a Hugging'),
    ('empty', 'empty holds no config.json, it must be a workdir or a Hugging'),
    ('binary', 'binary/config.json holds no model config'),
    ('deep', 'deep/config.json holds no model config'),
  ],
)
def test_what_is_no_model_is_said(tmp_path, name, message):
  (tmp_path / 'file').write_text('')
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'binary').mkdir()
  (tmp_path / 'binary' / 'config.json').write_bytes(bytes(range(128, 256)))
  (tmp_path / 'deep').mkdir()
  (tmp_path / 'deep' / 'config.json').write_text('[' * 100_000)
  folder = str(tmp_path / name) if name else ''
  _assert_refused(folder, tmp_path / 'io.npz', message)


def test_reference_logits_must_be_numbers(weights, tmp_path):
  path = tmp_path / 'io.npz'
  words = np.full((1, 4, tiny.V), 'x')
  np.savez(path, input_ids=np.zeros((1, 4), int), logits=words)
  _assert_refused(weights, path, 'logits of <U1 must be numbers')


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


def test_a_divergence_is_never_negative(weights):
  rng = np.random.default_rng(0)
  for noise in (0.0, 1e-7, 1e-4, 1.0, 30.0):
    p_TV = 3 * rng.normal(size=(8, 4096))
    q_TV = p_TV + noise * rng.normal(size=p_TV.shape)
    log = lambda x_TV: x_TV - np.log(np.exp(x_TV).sum(-1, keepdims=True))
    logp_TV, logq_TV = log(p_TV), log(q_TV)
    expected_T = (np.exp(logp_TV) * (logp_TV - logq_TV)).sum(-1)
    found_T = np.asarray(
      convert._kl(logp_TV.astype(np.float32), logq_TV.astype(np.float32))
    )
    assert (found_T >= 0).all()
    np.testing.assert_allclose(found_T, expected_T, rtol=1e-4, atol=1e-8)
