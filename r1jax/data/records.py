"""Records of JSONL, plain text and Parquet files, each with where it stands."""

import glob
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from r1jax import config

_FORMAT_OF_SUFFIX = {
  '.jsonl': 'jsonl',
  '.ndjson': 'jsonl',
  '.txt': 'text',
  '.md': 'text',
  '.parquet': 'parquet',
}
FORMATS = ('auto', 'jsonl', 'text', 'parquet')
_BLANK_LINES = re.compile(r'\r?\n(?:[ \t]*\r?\n)+')

Record = Mapping[str, Any]


def read(
  path: str,
  format_name: str,
  *,
  fields: Collection[str],
  split_blank_lines: bool = False,
) -> Iterator[tuple[str, Record]]:
  """Yields (where, record) of one file; where is 'path:line' or the like.

  Args:
    path: The file.
    format_name: One of FORMATS; 'auto' goes by the suffix.
    fields: What a record must have; of Parquet only these columns are read.
    split_blank_lines: A plain text is a record per block between blank lines,
      not one as a whole; its only field is 'text'.

  Raises:
    UserError: The file is missing, truncated, not UTF-8, or a record lacks a
      field; the message names the file and, where there is one, the line.
  """
  if format_name == 'auto':
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _FORMAT_OF_SUFFIX:
      raise config.UserError(
        f'{path}: cannot tell the format from the suffix {suffix!r} (known: '
        f'{", ".join(_FORMAT_OF_SUFFIX)}); set format'
      )
    format_name = _FORMAT_OF_SUFFIX[suffix]
  try:
    match format_name:
      case 'jsonl':
        found = _read_jsonl(path)
      case 'text':
        found = _read_text(path, split_blank_lines)
      case 'parquet':
        found = _read_parquet(path, list(dict.fromkeys(fields)))
    for where, record in found:
      check_fields(fields, record, where)
      yield where, record
  except pa.ArrowException as e:
    reason = str(e).splitlines()[0]
    raise config.UserError(
      f'{path}: not a readable Parquet file, or truncated: {reason}'
    ) from e
  except OSError as e:
    reason = e.strerror or str(e).splitlines()[0]
    raise config.UserError(f'{path}: {reason}') from e


def expand(paths: tuple[str, ...]) -> list[str]:
  """Returns the files that the paths and globs name, each once."""
  found = {}
  for path in paths:
    matches = (
      [path]
      if os.path.exists(path)
      else sorted(glob.glob(path, recursive=True))
    )
    files = [match for match in matches if os.path.isfile(match)]
    if os.path.isdir(path):
      raise config.UserError(
        f'{path}: a folder; name its files, such as {os.path.join(path, "*")}'
      )
    if not files:
      what = 'no file matches' if glob.has_magic(path) else 'no such file'
      raise config.UserError(f'{path}: {what}')
    found.update(dict.fromkeys(files))
  return list(found)


def text_of(record: Record, name: str, where: str) -> str:
  """A field that is text, or a whole number written as text.

  Raises:
    UserError: It is something else, or not Unicode.
  """
  value = record[name]
  if not isinstance(value, str | int) or isinstance(value, bool):
    raise config.UserError(
      f'{where}: field {name!r} is a {type(value).__name__}, it must be text'
    )
  try:
    str(value).encode()
  except UnicodeEncodeError as e:
    raise config.UserError(
      f'{where}: a lone surrogate (\\ud800-\\udfff) is not Unicode text'
    ) from e
  return str(value)


def check_fields(
  names: Iterable[str], present: Collection[str], where: str
) -> None:
  """Raises UserError if a field is missing."""
  for name in names:
    if name not in present:
      raise config.UserError(
        f'{where}: no field {name!r}; present: {", ".join(present) or "none"}'
      )


def _read_jsonl(path: str) -> Iterator[tuple[str, Record]]:
  with open(path, 'rb') as f:
    for number, line in enumerate(f, start=1):
      where = f'{path}:{number}'
      text = _decode(line, path, number)
      if not text.strip():
        continue
      try:
        record = json.loads(text)
      except json.JSONDecodeError as e:
        cut = '' if line.endswith(b'\n') else ' (is the file truncated?)'
        raise config.UserError(
          f'{where}: not valid JSON: {e.msg} at column {e.colno}{cut}'
        ) from e
      except (ValueError, RecursionError) as e:
        raise config.UserError(f'{where}: JSON out of bounds: {e}') from e
      if not isinstance(record, dict):
        raise config.UserError(
          f'{where}: a JSON {type(record).__name__}, it must be an object'
        )
      yield where, record


def _read_text(path: str, split: bool) -> Iterator[tuple[str, Record]]:
  with open(path, 'rb') as f:
    data = f.read()
  text = _decode(data, path, 1)
  for block in _BLANK_LINES.split(text) if split else (text,):
    if block.strip():
      yield path, {'text': block.strip('\r\n') if split else block}


def _read_parquet(path: str, names: list[str]) -> Iterator[tuple[str, Record]]:
  with parquet.ParquetFile(path) as file:
    check_fields(names, file.schema_arrow.names, path)
    done = 0
    for batch in file.iter_batches(columns=names):
      try:
        found = batch.to_pylist()
      except UnicodeDecodeError as e:
        raise config.UserError(f'{path}: after row {done}: not UTF-8') from e
      for row, record in enumerate(found, start=done + 1):
        yield f'{path}: row {row}', record
      done += len(found)


def _decode(data: bytes, path: str, line: int) -> str:
  """Decodes what starts at `line` of the file, less a byte order mark."""
  try:
    return data.decode('utf-8').removeprefix('\ufeff')
  except UnicodeDecodeError as e:
    line += data.count(b'\n', 0, e.start)
    offset = e.start - data.rfind(b'\n', 0, e.start) - 1
    raise config.UserError(
      f'{path}:{line}: not UTF-8 at byte {offset} of the line'
    ) from e
