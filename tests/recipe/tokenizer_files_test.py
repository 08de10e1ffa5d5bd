"""A run keeps its tokenizer: it may be moved, and so may what it came from."""

import json
import shutil

import jax
import pytest

from r1jax import config as config_lib
from r1jax.data import hf_tokenizer, tokenizer
from r1jax.interop import export
from r1jax.model import config as model_config
from r1jax.recipe import origin, sft, tokenizer_files
from tests.data import tiny_tokenizer
from tests.recipe import foreign, micro


def _qwen() -> model_config.ModelConfig:
  return foreign.model(
    'qwen3', num_layers=1, num_dense_layers=1, tie_embeddings=False
  )


def _sft_config(init_from, paths, num_steps=1) -> sft.SftConfig:
  values = {
    'seed': 0,
    'init_from': init_from,
    'model': None,
    'data': {'paths': paths, 'template': 'auto', 'held_out_fraction': 0.0},
    'tokenizer': '',
    'row_length': 64,
    'batch_size': 2,
    'optim': micro.pretrain_dict()['optim'],
    'train': micro.pretrain_dict()['train']
    | {'num_steps': num_steps, 'bias_update_speed': 0.0},
    'mesh': {'data': -1, 'fsdp': 1},
  }
  return config_lib.from_dict(sft.SftConfig, values)


@pytest.mark.slow
def test_a_run_of_a_relative_folder_is_moved(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, 'jit', jax.jit)
  monkeypatch.chdir(tmp_path)
  export.save('hf', _qwen(), micro.variables(_qwen()), dtype='float32')
  tiny_tokenizer.write_qwen(tmp_path / 'hf')
  rows = [{'question': f'What is {i}?', 'answer': str(i)} for i in range(8)]
  (tmp_path / 'questions.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  paths = (str(tmp_path / 'questions.jsonl'),)
  config = _sft_config('hf', paths)
  with micro.on(micro.one_device()):
    sft.run(config, 'runs/sft')
    sft.run(config, 'runs/sft')  # It is finished, and it is the same.
  kept = json.loads((tmp_path / 'runs' / 'sft' / 'config.json').read_text())
  # The template is resolved, so that everybody after it asks in the same way.
  assert (kept['data']['template'], kept['tokenizer']) == ('qwen3', 'tokenizer')
  shutil.rmtree('hf')
  (tmp_path / 'runs' / 'sft').rename(tmp_path / 'moved')
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path / 'elsewhere')
  path = origin.load_tokenizer_path('../moved')
  found = hf_tokenizer.load_tokenizer(path)
  assert found.stop_ids == (2, 0)
  assert origin.find_template('../moved', _qwen(), found) == 'qwen3'
  # And it goes on: what it needs of its source it has.
  config = _sft_config('hf', paths, num_steps=2)
  with micro.on(micro.one_device()):
    state = sft.run(config, '../moved')
  assert int(state.step) == 2


def test_another_tokenizer_is_another_run(tmp_path):
  run = tmp_path / 'run'
  run.mkdir()
  folders = [tmp_path / name for name in ('a', 'b', 'c')]
  for folder in folders[:2]:
    tiny_tokenizer.write_qwen(folder)
  tiny_tokenizer.write_deepseek(folders[2])
  tokenizer_files.keep(run, str(folders[0]))
  tokenizer_files.keep(run, str(folders[1]))  # Of another name, but the same.
  with pytest.raises(
    config_lib.UserError, match='run/tokenizer is not the tokenizer of .*c, '
  ):
    tokenizer_files.keep(run, str(folders[2]))
  assert [p.name for p in run.iterdir()] == ['tokenizer']


def test_a_sentencepiece_model_is_kept_too(tmp_path):
  path, run = tmp_path / 'my.model', tmp_path / 'run'
  path.write_bytes(tokenizer.default_model())
  tokenizer_files.keep(run, str(path))
  found = hf_tokenizer.load_tokenizer(run / 'tokenizer')
  ours = tokenizer.default()
  assert found.encode('1+1=2') == ours.encode('1+1=2')
  assert found.stop_ids == ours.stop_ids


@pytest.mark.parametrize(
  ('workdir', 'path', 'expected'),
  [
    ('runs/x', 'some/hf', 'tokenizer'),
    ('runs/x', '', ''),  # The one that ships.
    ('gs://b/x', '/some/hf', '/some/hf'),
  ],
)
def test_where_a_run_says_its_tokenizer_is(workdir, path, expected):
  assert tokenizer_files.name_in(workdir, path) == expected
  if workdir.startswith('gs:'):
    tokenizer_files.keep(workdir, path)  # Does nothing.
