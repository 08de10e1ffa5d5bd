"""A workdir takes one config and refuses others in one line."""

import json

import pytest

from r1jax import config
from r1jax.train import workdir

_CONFIG = {
  'seed': 0,
  'num_steps': 100,
  'optim': {'peak_lr': 0.001, 'schedule': 'v3'},
  'mesh': {'data': 1, 'fsdp': 2},
  'languages': ('en', 'zh'),
  'empty': {},
}


def _changed(**changes):
  return json.loads(json.dumps(_CONFIG)) | changes


def test_first_and_second_use(tmp_path):
  path = tmp_path / 'runs' / 'a'
  assert workdir.prepare(path, _CONFIG) is False
  assert json.loads((path / 'config.json').read_text()) == _changed()
  assert workdir.prepare(path, _CONFIG) is True
  assert [p.name for p in path.iterdir()] == ['config.json']


def test_another_config_is_refused_with_both_values(tmp_path):
  workdir.prepare(tmp_path, _CONFIG)
  other = _changed(optim={'peak_lr': 0.002, 'schedule': 'v3'})
  with pytest.raises(config.UserError) as e:
    workdir.prepare(tmp_path, other)
  assert str(e.value) == (
    f'workdir {tmp_path} belongs to another config: optim.peak_lr is 0.001 '
    'there, 0.002 here; use another --workdir'
  )
  assert json.loads((tmp_path / 'config.json').read_text()) == _changed()


def test_many_differences_are_counted_and_missing_keys_named(tmp_path):
  workdir.prepare(tmp_path, {'a': 1, 'b': 2, 'c': 3, 'd': 4, 'gone': None})
  with pytest.raises(config.UserError) as e:
    workdir.prepare(tmp_path, {'new': 0, 'a': 0, 'b': 0, 'c': 0, 'd': 4})
  assert 'new is absent there, 0 here, a is 1 there' in str(e.value)
  assert ' and 2 more; use' in str(e.value)


def test_what_may_differ_is_taken_over(tmp_path):
  workdir.prepare(tmp_path, _CONFIG)
  other = _changed(num_steps=200, mesh={'data': 8, 'fsdp': 1})
  keys = {'num_steps', 'mesh'}
  assert workdir.prepare(tmp_path, other, may_differ=keys) is True
  assert json.loads((tmp_path / 'config.json').read_text()) == other
  with pytest.raises(config.UserError, match='num_steps is 200 there'):
    workdir.prepare(tmp_path, _CONFIG, may_differ={'num', 'mesh'})


def test_a_place_that_cannot_be_used_is_one_line(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('x')
  for path in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    with pytest.raises(config.UserError, match=f'cannot use workdir {path}: '):
      workdir.prepare(path, _CONFIG)
  monkeypatch.setattr(workdir.os, 'access', lambda path, mode: False)
  with pytest.raises(config.UserError, match='Permission denied'):
    workdir.prepare(tmp_path, _CONFIG)


def test_a_broken_config_file_is_one_line(tmp_path):
  (tmp_path / 'config.json').write_text('{"a": ')
  with pytest.raises(config.UserError, match='not valid JSON'):
    workdir.prepare(tmp_path, _CONFIG)


def test_a_config_that_is_no_text_is_named(tmp_path):
  (tmp_path / 'config.json').write_bytes(bytes(range(128, 256)))
  with pytest.raises(config.UserError, match='config.json is not valid JSON'):
    workdir.prepare(tmp_path, {'steps': 1})
