"""Reads and writes safetensors files, one slice at a time.

The file: 8 bytes with the length of a JSON header, the header (for each tensor
its dtype, shape and where its bytes lie), then the bytes. Files are mapped,
not read: of the disk only the pages of a slice are asked for, and they are let
go of at once, so that a checkpoint of any size costs no memory.

Source: the format's own description, huggingface/safetensors.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from r1jax import config as config_lib

DTYPES = {
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'
_LARGEST_HEADER = 100 << 20  # Bytes, the format's own limit.
_FIELDS = ('dtype', 'shape', 'data_offsets')
# Buffers that old checkpoints carry and nobody needs.
IGNORED = ('rotary_emb.inv_freq',)
_PAGE = mmap.PAGESIZE
# Linux may heed no more of one advice.
_ADVICE_PAGES = (128 << 10) // _PAGE


@dataclasses.dataclass(frozen=True)
class Entry:
  """Where a tensor lies.

  Attributes:
    file: Its file.
    dtype: Of its numbers.
    shape: Its shape.
    start: First byte of its numbers in the file.
  """

  file: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  start: int

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Reader:
  """All tensors of a folder's safetensors files.

  Attributes:
    entries: By name.
    bytes_read: Of the slices that were taken.
    stray_files: Safetensors files that the index does not name.
  """

  def __init__(self, folder: pathlib.Path):
    """Reads the headers.

    Raises:
      UserError: No weights, a file that the index names and nobody has, one
        that is cut short or no safetensors file, a tensor in two files, or
        an index that is wrong about a tensor or none.
    """
    self.entries: dict[str, Entry] = {}
    self.bytes_read = 0
    self._maps: dict[pathlib.Path, mmap.mmap] = {}
    index = _read_index(folder)
    files = _files(folder, index)
    there = folder.glob('*.safetensors')
    self.stray_files = sorted(set(there) - set(files))
    for file in files:
      for name, entry in _read_header(file):
        if name in self.entries:
          raise config_lib.UserError(
            f'tensor {name} is both in {self.entries[name].file.name} and in '
            f'{file.name} of {folder}'
          )
        self.entries[name] = entry
    for name, file in index.items():
      entry = self.entries.get(name)
      if entry is None or entry.file.name != file:
        raise config_lib.UserError(
          f'{folder / INDEX} says that {name} is in {file}, it is '
          f'{"nowhere" if entry is None else "in " + entry.file.name}'
        )
    unlisted = sorted(self.entries.keys() - index.keys()) if index else ()
    for name in unlisted:
      if not name.endswith(IGNORED):
        raise config_lib.UserError(
          f'{self.entries[name].file} holds {name}, which {folder / INDEX} '
          'does not list'
        )

  def read(
    self,
    name: str,
    view: tuple[int, ...] | None = None,
    window: tuple[slice, ...] | None = None,
  ) -> np.ndarray:
    """Copies a slice of a tensor.

    Args:
      name: Of the tensor.
      view: Shape to see it in first; its own if None.
      window: Slices of that shape's axes, with both ends; all of it if None.
    """
    entry = self.entries[name]
    mapped = self._map(entry.file)
    view = view or entry.shape
    window = window or tuple(slice(0, size) for size in view)
    whole = np.frombuffer(
      mapped, entry.dtype, math.prod(entry.shape), entry.start
    ).reshape(view)
    part = whole[window]
    if view and part.size:
      _ask_for(mapped, entry, *_runs(view, window))
    out = np.array(part, order='C')
    self.bytes_read += out.nbytes
    del whole, part
    _let_go(mapped, entry)
    return out

  def close(self) -> None:
    for mapped in self._maps.values():
      mapped.close()
    self._maps.clear()

  def _map(self, file: pathlib.Path) -> mmap.mmap:
    if file not in self._maps:
      with file.open('rb') as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
      if hasattr(mmap, 'MADV_RANDOM'):
        mapped.madvise(mmap.MADV_RANDOM)  # `_ask_for` knows better.
      self._maps[file] = mapped
    return self._maps[file]


def _runs(
  view: tuple[int, ...], window: tuple[slice, ...]
) -> tuple[np.ndarray, int]:
  """First numbers of a window's parts that lie together, and their length."""
  axis = len(view) - 1
  while axis and window[axis] == slice(0, view[axis]):
    axis -= 1
  starts = np.zeros(1, np.int64)
  for size, part in zip(view[:axis], window[:axis], strict=True):
    rows = np.arange(part.start, part.stop)
    starts = (starts[:, None] * size + rows).ravel()
  inner, part = math.prod(view[axis + 1 :]), window[axis]
  starts = (starts * view[axis] + part.start) * inner
  return starts, (part.stop - part.start) * inner


def _ask_for(
  mapped: mmap.mmap, entry: Entry, starts: np.ndarray, length: int
) -> None:
  """Has the pages of these numbers read, all at once, and no others."""
  if not hasattr(mmap, 'MADV_WILLNEED'):
    return
  size = entry.dtype.itemsize
  firsts = (entry.start + starts * size) // _PAGE
  ends = (entry.start + (starts + length) * size - 1) // _PAGE + 1
  is_apart = firsts[1:] > ends[:-1]
  firsts = firsts[np.append(True, is_apart)].tolist()
  ends = ends[np.append(is_apart, True)].tolist()
  for first, end in zip(firsts, ends, strict=True):
    for page in range(first, end, _ADVICE_PAGES):
      count = min(_ADVICE_PAGES, end - page)
      mapped.madvise(mmap.MADV_WILLNEED, page * _PAGE, count * _PAGE)


def _let_go(mapped: mmap.mmap, entry: Entry) -> None:
  """Gives a tensor's pages back, so that they do not count as ours."""
  first = entry.start - entry.start % _PAGE
  if hasattr(mmap, 'MADV_DONTNEED') and entry.num_bytes:
    mapped.madvise(
      mmap.MADV_DONTNEED, first, entry.start + entry.num_bytes - first
    )


def _read_index(folder: pathlib.Path) -> dict[str, str]:
  """File of each tensor, if the folder has an index."""
  path = folder / INDEX
  if not path.exists():
    return {}
  try:
    values = json.loads(path.read_text())
  except OSError as e:
    raise config_lib.UserError(f'{path}: {e.strerror}') from e
  except (ValueError, RecursionError) as e:
    raise config_lib.UserError(f'{path} is no JSON: {e}') from e
  index = values.get('weight_map') if isinstance(values, dict) else None
  if not isinstance(index, dict) or not index:
    raise config_lib.UserError(
      f'{path} is no safetensors index: it must hold a weight_map of tensors '
      'and their files'
    )
  for name, file in index.items():
    is_name = isinstance(file, str) and pathlib.PurePath(file).name == file
    if not is_name or file in ('', '..'):
      raise config_lib.UserError(
        f'{path} says that {name} is in {file!r}, it must be a file of the '
        'folder'
      )
  return index


def _files(
  folder: pathlib.Path, index: Mapping[str, str]
) -> list[pathlib.Path]:
  if not folder.is_dir():
    raise config_lib.UserError(f'{folder} is no folder')
  if index:
    files = [folder / name for name in sorted(set(index.values()))]
    for file in files:
      if not os.path.exists(file):  # Nor if the name is too long for one.
        raise config_lib.UserError(
          f'{folder / INDEX} names {file.name}, which does not exist'
        )
    return files
  files = sorted(folder.glob('*.safetensors'))
  if not files:
    raise config_lib.UserError(f'{folder} holds no safetensors file')
  return files


def _read_header(file: pathlib.Path) -> Iterator[tuple[str, Entry]]:
  """Yields the tensors of a file whose size is what its header says."""
  size, raw = _read_head(file)
  header, length = _parse_header(file, raw), len(raw)
  for name, (dtype, shape, start, end) in header.items():
    if dtype not in DTYPES:
      raise config_lib.UserError(
        f'tensor {name} of {file} has dtype {dtype}, known are '
        f'{", ".join(DTYPES)}'
      )
    entry = Entry(file, DTYPES[dtype], shape, 8 + length + start)
    if end - start != entry.num_bytes or start < 0:
      raise config_lib.UserError(
        f'tensor {name} of {file}: {end - start} bytes are no '
        f'{dtype} {list(shape)}'
      )
    if entry.start + entry.num_bytes > size:
      raise config_lib.UserError(
        f'{file} is cut short: {size} bytes, tensor {name} ends at '
        f'{entry.start + entry.num_bytes}'
      )
    yield name, entry
  _refuse_overlaps(file, header)


def _read_head(file: pathlib.Path) -> tuple[int, bytes]:
  """Size of a file, and its header."""
  try:
    size = file.stat().st_size
    with file.open('rb') as f:
      head = f.read(8)
      (length,) = struct.unpack('<Q', head) if len(head) == 8 else (0,)
      if 2 <= length <= min(_LARGEST_HEADER, max(size - 8, 0)):
        return size, f.read(length)
  except OSError as e:
    raise config_lib.UserError(f'{file}: {e.strerror}') from e
  raise config_lib.UserError(
    f'{file} is cut short or no safetensors file: {size} bytes with a header '
    f'of {length}'
  )


def _refuse_overlaps(
  file: pathlib.Path,
  header: Mapping[str, tuple[str, tuple[int, ...], int, int]],
) -> None:
  """No byte belongs to two tensors."""
  spans = sorted(
    (start, end, name) for name, (_, _, start, end) in header.items()
  )
  for (_, end, name), (start, _, following) in itertools.pairwise(spans):
    if start < end:
      raise config_lib.UserError(
        f'tensors {name} and {following} of {file} overlap: the first ends at '
        f'byte {end}, the second starts at {start}'
      )


def _parse_header(
  file: pathlib.Path, raw: bytes
) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
  """Dtype, shape, start and end of each tensor."""

  def once(pairs):
    names = collections.Counter(name for name, _ in pairs)
    for name, count in names.items():
      if count > 1:
        raise config_lib.UserError(f'the header of {file} has {name} twice')
    return dict(pairs)

  try:
    header = json.loads(raw, object_pairs_hook=once)
    header.pop('__metadata__', None)
    parsed = {}
    for name, fields in header.items():
      dtype, shape, (start, end) = (fields[field] for field in _FIELDS)
      if not isinstance(dtype, str):
        raise TypeError(f'dtype {dtype} of {name} is no text')
      sizes = (*shape, start, end)
      if not all(type(size) is int for size in sizes):
        raise ValueError(f'sizes {sizes} of {name} are no integers')
      parsed[name] = dtype, tuple(shape), start, end
  except config_lib.UserError:
    raise
  except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as e:
    raise config_lib.UserError(
      f'{file} is no safetensors file: its header is no JSON object of '
      f'dtypes, shapes and offsets ({e})'
    ) from e
  return parsed


@dataclasses.dataclass(frozen=True)
class Planned:
  """A tensor that is to be written."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def plan_files(
  tensors: Iterable[Planned], shard_bytes: int
) -> dict[str, list[Planned]]:
  """Spreads tensors over files of at most so many bytes, by file name.

  A tensor that is larger has a file of its own.
  """
  shards: list[list[Planned]] = []
  room = 0
  for tensor in tensors:
    if not shards or tensor.num_bytes > room:
      shards.append([])
      room = shard_bytes
    shards[-1].append(tensor)
    room -= tensor.num_bytes
  if len(shards) == 1:
    return {_SINGLE: shards[0]}
  total = len(shards)
  return {
    f'model-{i:05}-of-{total:05}.safetensors': shard
    for i, shard in enumerate(shards, 1)
  }


class Writer:
  """Writes planned tensors in order, one at a time; one file is open."""

  def __init__(self, folder: pathlib.Path, files: dict[str, list[Planned]]):
    self._folder, self._files = folder, files

  def write(self, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    """Takes (name, numbers) in the order of the plan.

    Raises:
      ValueError: Another name, dtype or shape than planned.
    """
    tensors = iter(tensors)
    for file_name, planned in self._files.items():
      with (self._folder / file_name).open('wb') as f:
        f.write(_header(planned))
        for expected in planned:
          _write_tensor(f, expected, *next(tensors))

  def write_index(self) -> None:
    """Writes the index, which a single file does not have."""
    if len(self._files) == 1:
      return
    index = {
      'metadata': {
        'total_size': sum(
          t.num_bytes for planned in self._files.values() for t in planned
        )
      },
      'weight_map': {
        t.name: file for file, planned in self._files.items() for t in planned
      },
    }
    (self._folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _header(planned: list[Planned]) -> bytes:
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for tensor in planned:
    start, end = end, end + tensor.num_bytes
    header[tensor.name] = {
      'dtype': _NAMES[tensor.dtype],
      'shape': list(tensor.shape),
      'data_offsets': [start, end],
    }
  raw = json.dumps(header, separators=(',', ':')).encode()
  raw += b' ' * (-len(raw) % 8)  # Numbers begin at a multiple of 8.
  return struct.pack('<Q', len(raw)) + raw


def _write_tensor(
  f: BinaryIO, expected: Planned, name: str, array: np.ndarray
) -> None:
  given = Planned(name, array.dtype, array.shape)
  if given != expected:
    raise ValueError(f'{given} is written where {expected} was planned')
  f.write(np.ascontiguousarray(array).view(np.uint8).data)


def closing(folder: pathlib.Path) -> contextlib.closing[Reader]:
  """A Reader that is closed at the end of a `with`."""
  return contextlib.closing(Reader(folder))
