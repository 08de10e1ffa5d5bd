"""safetensors files: written as planned, read in part, refused if damaged."""

import json
import mmap
import os
import pathlib
import struct

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

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


def _read_from_disk(folder, window):
  """Bytes that come from the disk when nothing of the file is in memory."""
  with (folder / 'model.safetensors').open('rb') as f:
    os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

  def count():
    lines = pathlib.Path('/proc/self/io').read_text().splitlines()
    return int(next(x for x in lines if x.startswith('read_bytes')).split()[1])

  with safetensors.closing(folder) as reader:
    before = count()
    reader.read('x', window=window)
    return count() - before


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/io').exists(), reason='no /proc'
)
def test_only_the_pages_of_a_window_come_from_the_disk(tmp_path):
  rows, columns, page = 256, 16 * mmap.PAGESIZE, mmap.PAGESIZE
  _write(tmp_path, {'x': np.ones((rows, columns), ml_dtypes.float8_e4m3fn)})
  os.sync()
  everything = slice(0, rows), slice(0, columns)
  if _read_from_disk(tmp_path, everything) < rows * columns // 2:
    pytest.skip('the disk does not count what is read')
  some_columns = slice(0, rows), slice(columns // 2, columns // 2 + 100)
  # A page or two a row, and those of the header.
  assert _read_from_disk(tmp_path, some_columns) <= (2 * rows + 32) * page
  some_rows = slice(rows // 2, rows // 2 + 2), slice(0, columns)
  assert _read_from_disk(tmp_path, some_rows) <= (2 * 16 + 33) * page


@hypothesis.given(st.data())
def test_runs_are_a_window_s_numbers_in_order(data):
  view = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
  window = []
  for size in view:
    start = data.draw(st.integers(0, size - 1))
    window.append(slice(start, data.draw(st.integers(start + 1, size))))
  starts, length = safetensors._runs(view, tuple(window))
  found = (starts[:, None] + np.arange(length)).ravel()
  numbers = np.arange(np.prod(view)).reshape(view)
  np.testing.assert_array_equal(found, numbers[tuple(window)].ravel())
  # As long as they can be: none goes on where the one before ends.
  gaps = np.diff(starts) - length
  assert (gaps > 0).all()


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


def _listed_dtype(folder):
  change = lambda header: header['a'].update(dtype=['F32'])
  _header(folder / 'model.safetensors', change)


def _deep(folder):
  raw = b'{"a":' + b'[' * 100_000 + b'}'
  head = struct.pack('<Q', len(raw)) + raw
  (folder / 'model.safetensors').write_bytes(head)


def _dangling(folder):
  path = folder / 'model.safetensors'
  path.unlink()
  path.symlink_to('nowhere')


def _folder(folder):
  path = folder / 'model.safetensors'
  path.unlink()
  path.mkdir()


def _deep_index(folder):
  (folder / safetensors.INDEX).write_text('[' * 100_000)


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
    (
      _listed_dtype,
      r"header is no JSON object of .*dtype \['F32'\] of a is no",
    ),
    (_deep, 'model.safetensors is no safetensors file: its header is no JSON'),
    (_dangling, 'model.safetensors: No such file'),
    (_folder, 'model.safetensors: Is a directory'),
    (_deep_index, 'index.json is no JSON: maximum recursion depth'),
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
    (_wrong_index({'a': 'x' * 300}), 'names x+, which does not exist'),
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
    ({'a': '..'}, r"says that a is in '\.\.', it must be a file of the folder"),
    ({'a': '.'}, r"says that a is in '\.', it must be a file of the folder"),
    ({'a': ''}, "says that a is in '', it must be a file of the folder"),
    ({'a': '../x'}, "says that a is in '../x', it must be a file of the"),
  ],
)
def test_an_index_of_a_wrong_form(tmp_path, weight_map, message):
  _write(tmp_path)
  _index(tmp_path, weight_map)
  with pytest.raises(config_lib.UserError, match=message):
    safetensors.Reader(tmp_path)


def test_an_index_may_pass_over_what_nobody_needs(tmp_path):
  buffer = 'model.layers.0.self_attn.rotary_emb.inv_freq'
  _write(tmp_path, {'a': _TENSORS['a'], buffer: _TENSORS['b']})
  _index(tmp_path, {'a': 'model.safetensors'})
  with safetensors.closing(tmp_path) as reader:
    np.testing.assert_array_equal(reader.read('a'), _TENSORS['a'])


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
