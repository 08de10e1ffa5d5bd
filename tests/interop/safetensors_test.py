"""safetensors files: written as planned, read in part, refused if damaged."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.interop import safetensors

_TENSORS = {
  'a': np.arange(6, dtype=np.float32).reshape(2, 3),
  'b': np.arange(5).astype(ml_dtypes.bfloat16),
  'c': np.arange(4).astype(ml_dtypes.float8_e4m3fn).reshape(4, 1),
}


def _write(folder, tensors=None, shard_bytes=1 << 20):
  tensors = _TENSORS if tensors is None else tensors
  folder.mkdir(exist_ok=True)
  planned = [
    safetensors.Planned(name, x.dtype, x.shape) for name, x in tensors.items()
  ]
  files = safetensors.plan_files(planned, shard_bytes)
  writer = safetensors.Writer(folder, files)
  writer.write(tensors.items())
  writer.write_index()
  return files


@pytest.mark.parametrize(
  ('shard_bytes', 'sizes'), [(1 << 20, [3]), (34, [2, 1]), (1, [1, 1, 1])]
)
def test_what_is_written_is_read(tmp_path, shard_bytes, sizes):
  files = _write(tmp_path, shard_bytes=shard_bytes)
  assert [len(planned) for planned in files.values()] == sizes
  assert (tmp_path / safetensors.INDEX).exists() == (len(sizes) > 1)
  with safetensors.closing(tmp_path) as reader:
    assert list(reader.entries) == list(_TENSORS)
    for name, expected in _TENSORS.items():
      found = reader.read(name)
      assert found.dtype == expected.dtype
      np.testing.assert_array_equal(found, expected)
      assert reader.entries[name].start % 8 == 0 or name != 'a'


def test_a_window_of_a_view_is_all_that_is_read(tmp_path):
  x = np.arange(24, dtype=np.float32).reshape(6, 4)
  _write(tmp_path, {'x': x})
  with safetensors.closing(tmp_path) as reader:
    window = (slice(1, 2), slice(0, 3), slice(2, 4))
    part = reader.read('x', (2, 3, 4), window)
    np.testing.assert_array_equal(part, x.reshape(2, 3, 4)[window])
    assert reader.bytes_read == 6 * 4


def test_what_was_not_planned_is_not_written(tmp_path):
  planned = [safetensors.Planned('a', np.dtype(np.float32), (2, 3))]
  writer = safetensors.Writer(tmp_path, safetensors.plan_files(planned, 99))
  with pytest.raises(ValueError, match='is written where'):
    writer.write([('a', np.zeros((3, 2), np.float32))])


def _header(path, change):
  """Rewrites a file's header."""
  raw = path.read_bytes()
  (length,) = struct.unpack('<Q', raw[:8])
  header = json.loads(raw[8 : 8 + length])
  change(header)
  new = json.dumps(header).encode()
  path.write_bytes(struct.pack('<Q', len(new)) + new + raw[8 + length :])


def _cut(folder):
  path = folder / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-1])


def _empty(folder):
  (folder / 'model.safetensors').write_bytes(b'')


def _no_header(folder):
  (folder / 'model.safetensors').write_bytes(b'\x20' + b'\0' * 99)


def _dtype(folder):
  change = lambda header: header['a'].update(dtype='I64')
  _header(folder / 'model.safetensors', change)


def _listed(folder):
  head = json.dumps(['a']).encode()
  raw = struct.pack('<Q', len(head)) + head
  (folder / 'model.safetensors').write_bytes(raw)


def _without(field):
  def damage(folder):
    change = lambda header: header['a'].pop(field)
    _header(folder / 'model.safetensors', change)

  return damage


def _shape(folder):
  change = lambda header: header['a'].update(shape=[2, '3'])
  _header(folder / 'model.safetensors', change)


def _before(folder):
  change = lambda header: header['a'].update(data_offsets=[-24, 0])
  _header(folder / 'model.safetensors', change)


def _named_twice(folder):
  path = folder / 'model.safetensors'
  raw = path.read_bytes()
  (length,) = struct.unpack('<Q', raw[:8])
  header = raw[8 : 8 + length].replace(b'"b":', b'"a":')
  path.write_bytes(raw[:8] + header + raw[8 + length :])


def _offsets(folder):
  change = lambda header: header['a'].update(data_offsets=[0, 8])
  _header(folder / 'model.safetensors', change)


def _twice(folder):
  raw = (folder / 'model.safetensors').read_bytes()
  (folder / 'more.safetensors').write_bytes(raw)


def _wrong_index(weight_map):
  def damage(folder):
    text = json.dumps({'weight_map': weight_map})
    (folder / safetensors.INDEX).write_text(text)

  return damage


def _no_index(folder):
  (folder / safetensors.INDEX).write_text('{"weight_map": 3}')


def _nothing(folder):
  (folder / 'model.safetensors').unlink()


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (_cut, 'model.safetensors is cut short: .* tensor c ends at'),
    (_empty, 'model.safetensors is cut short or no safetensors file: 0 bytes'),
    (_no_header, 'its header is no JSON'),
    (_dtype, 'tensor a of .* has dtype I64, known are F32, '),
    (_offsets, r'tensor a of .*: 8 bytes are no F32 \[2, 3\]'),
    (_before, r'tensor a of .*: 24 bytes are no F32 \[2, 3\]'),
    (_listed, 'model.safetensors is no safetensors file: its header is no'),
    (_without('dtype'), "no JSON object of dtypes, .*'dtype'"),
    (_without('data_offsets'), "no JSON object of dtypes, .*'data_offsets'"),
    (_shape, r'sizes \(2, .3., 0, 24\) of a are no integers'),
    (_named_twice, 'the header of .*model.safetensors has a twice'),
    (_twice, 'tensor a is both in model.safetensors and in more.safetensors'),
    (
      _wrong_index({'a': 'gone.safetensors'}),
      'names gone.safetensors, which does',
    ),
    (
      _wrong_index({'d': 'model.safetensors'}),
      'd is in model.safetensors, it is no',
    ),
    (
      _wrong_index({'a': 'model.safetensors'}),
      'model.safetensors holds b, which .*index.json does not list',
    ),
    (_no_index, 'is no safetensors index'),
    (_nothing, 'holds no safetensors file'),
  ],
)
def test_damage_is_named(tmp_path, damage, message):
  _write(tmp_path)
  damage(tmp_path)
  with pytest.raises(config_lib.UserError, match=message):
    safetensors.Reader(tmp_path)


def test_no_folder_is_said(tmp_path):
  with pytest.raises(config_lib.UserError, match='gone is no folder'):
    safetensors.Reader(tmp_path / 'gone')


def _index(folder, weight_map):
  text = json.dumps({'weight_map': weight_map})
  (folder / safetensors.INDEX).write_text(text)


@pytest.mark.parametrize(
  ('weight_map', 'message'),
  [
    ({}, 'is no safetensors index: it must hold a weight_map of tensors'),
    (['a'], 'is no safetensors index: it must hold a weight_map of tensors'),
    ({'a': 5}, 'says that a is in 5, it must be a file of the folder'),
    ({'a': '../x'}, "says that a is in '../x', it must be a file of the"),
  ],
)
def test_an_index_of_a_wrong_form(tmp_path, weight_map, message):
  _write(tmp_path)
  _index(tmp_path, weight_map)
  with pytest.raises(config_lib.UserError, match=message):
    safetensors.Reader(tmp_path)


def test_files_that_the_index_does_not_name_are_known(tmp_path):
  files = _write(tmp_path, shard_bytes=34)
  first, second = sorted(files)
  with safetensors.closing(tmp_path) as reader:
    assert not reader.stray_files
  _index(tmp_path, {'a': first, 'b': first})
  with safetensors.closing(tmp_path) as reader:
    assert list(reader.entries) == ['a', 'b']
    assert reader.stray_files == [tmp_path / second]


@pytest.mark.parametrize('is_overlapping', [False, True])
def test_tensors_do_not_share_bytes(tmp_path, is_overlapping):
  start = 4 if is_overlapping else 8
  header = {
    'b': {'dtype': 'F32', 'shape': [2], 'data_offsets': [start, start + 8]},
    'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]},
    'none': {'dtype': 'F32', 'shape': [0], 'data_offsets': [8, 8]},
  }
  if is_overlapping:
    del header['none']
  raw = json.dumps(header).encode()
  path = tmp_path / 'model.safetensors'
  path.write_bytes(struct.pack('<Q', len(raw)) + raw + bytes(16))
  if not is_overlapping:
    assert set(safetensors.Reader(tmp_path).entries) == {'a', 'b', 'none'}
    return
  with pytest.raises(
    config_lib.UserError,
    match=f'tensors a and b of {path} overlap: the first ends at byte 8, the '
    'second starts at 4',
  ):
    safetensors.Reader(tmp_path)
