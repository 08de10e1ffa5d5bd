"""Text documents from JSONL, plain text and Parquet files."""

import dataclasses
import functools
import glob
import hashlib
import json
import os
import re
import string
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from r1jax import config
from r1jax.data import packing

_FORMAT_OF_SUFFIX = {
  '.jsonl': 'jsonl',
  '.ndjson': 'jsonl',
  '.txt': 'text',
  '.md': 'text',
  '.parquet': 'parquet',
}
_BLANK_LINES = re.compile(r'\r?\n(?:[ \t]*\r?\n)+')


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Which files, and what a document is.

  Attributes:
    paths: Files or globs (`**` goes into folders).
    format: 'jsonl' (an object per line), 'text', 'parquet', or 'auto': by the
      file's suffix.
    template: What a document is made of, such as '{question}\\n{answer}': names
      of JSON fields or Parquet columns; of a plain text there is only {text}.
    split_blank_lines: A plain text is one document per block between blank
      lines, not one per file.
    held_out_fraction: Share of documents, in [0, 1), kept for evaluation,
      chosen by a hash of the document's text alone.
  """

  paths: tuple[str, ...]
  format: str
  template: str
  split_blank_lines: bool
  held_out_fraction: float

  def __post_init__(self):
    if not self.paths:
      raise ValueError('paths=() must name at least one file')
    if self.format not in ('auto', *_READERS):
      raise ValueError(
        f'format={self.format!r} must be one of auto, {", ".join(_READERS)}'
      )
    if not 0 <= self.held_out_fraction < 1:
      raise ValueError(
        f'held_out_fraction={self.held_out_fraction} must be in [0, 1)'
      )
    template_fields(self.template)


def make_rows(
  text_config: TextConfig,
  tokenizer: packing.Tokenizer,
  *,
  row_length: int,
  seed: int | None,
  split: str,
) -> packing.PackedRows:
  """Reads the files and packs one split into rows.

  Args:
    text_config: What to read.
    tokenizer: See `packing.PackedRows`.
    row_length: Tokens of a row.
    seed: Of the packing order; None keeps the order of the files.
    split: 'train' or 'held_out'.

  Raises:
    UserError: As `read_documents`, or the split is empty.
  """
  held_out = {'train': False, 'held_out': True}[split]
  documents = read_documents(text_config)
  fraction = text_config.held_out_fraction
  chosen = [d for d in documents if is_held_out(d, fraction) == held_out]
  if not chosen:
    raise config.UserError(
      f'the {split} split is empty: held_out_fraction={fraction} of '
      f'{len(documents)} documents from {", ".join(text_config.paths)}'
    )
  return packing.PackedRows(chosen, tokenizer, row_length=row_length, seed=seed)


def is_held_out(document: str, fraction: float) -> bool:
  """Says by a hash of the text whether a document is for evaluation only."""
  digest = hashlib.sha256(document.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < fraction * 2**64


def read_documents(text_config: TextConfig) -> list[str]:
  """Returns the documents of all files, in the order of paths; none is empty.

  Raises:
    UserError: A file is missing, empty, truncated, not UTF-8, or lacks a
      field; the message names the file and, where there is one, the line.
  """
  documents = []
  for path in _expand(text_config.paths):
    name = text_config.format
    if name == 'auto':
      suffix = os.path.splitext(path)[1].lower()
      if suffix not in _FORMAT_OF_SUFFIX:
        raise config.UserError(
          f'{path}: cannot tell the format from the suffix {suffix!r} (known: '
          f'{", ".join(_FORMAT_OF_SUFFIX)}); set format'
        )
      name = _FORMAT_OF_SUFFIX[suffix]
    try:
      found = [d for d in _READERS[name](path, text_config) if d.strip()]
    except pa.ArrowException as e:
      reason = str(e).splitlines()[0]
      raise config.UserError(
        f'{path}: not a readable Parquet file, or truncated: {reason}'
      ) from e
    except OSError as e:
      reason = e.strerror or str(e).splitlines()[0]
      raise config.UserError(f'{path}: {reason}') from e
    if not found:
      raise config.UserError(f'{path}: the file holds no document')
    documents += found
  return documents


@functools.cache
def template_fields(template: str) -> tuple[str, ...]:
  """Returns the names in the template's braces.

  Raises:
    ValueError: There is none, or one with a conversion, format or index.
  """
  try:
    parts = list(string.Formatter().parse(template))
  except ValueError:  # An unmatched brace.
    parts = []
  names = tuple(name for _, name, _, _ in parts if name is not None)
  plain = not any(spec or conversion for *_, spec, conversion in parts)
  if not names or not plain or not all(map(_is_field, names)):
    raise ValueError(
      f'template={template!r} must hold plain field names in braces, such as '
      "'{question}\\n{answer}'"
    )
  return names


def _is_field(name: str) -> bool:
  return bool(name) and not name.isdigit() and not set(name) & set('.[]')


def _expand(paths: tuple[str, ...]) -> list[str]:
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


def _read_jsonl(path: str, text_config: TextConfig) -> Iterator[str]:
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
      yield _fill(text_config.template, record, where)


def _read_text(path: str, text_config: TextConfig) -> Iterator[str]:
  with open(path, 'rb') as f:
    data = f.read()
  text = _decode(data, path, 1)
  split = text_config.split_blank_lines
  for block in _BLANK_LINES.split(text) if split else (text,):
    if block.strip():
      block = block.strip('\r\n') if split else block
      yield _fill(text_config.template, {'text': block}, path)


def _read_parquet(path: str, text_config: TextConfig) -> Iterator[str]:
  names = list(dict.fromkeys(template_fields(text_config.template)))
  with parquet.ParquetFile(path) as file:
    _check_fields(names, file.schema_arrow.names, path)
    done = 0
    for batch in file.iter_batches(columns=names):
      try:
        records = batch.to_pylist()
      except UnicodeDecodeError as e:
        raise config.UserError(f'{path}: after row {done}: not UTF-8') from e
      for row, record in enumerate(records, start=done + 1):
        yield _fill(text_config.template, record, f'{path}: row {row}')
      done += len(records)


_READERS = {
  'jsonl': _read_jsonl,
  'text': _read_text,
  'parquet': _read_parquet,
}


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


def _check_fields(
  names: Iterable[str], present: Collection[str], where: str
) -> None:
  for name in names:
    if name not in present:
      raise config.UserError(
        f'{where}: no field {name!r}; present: {", ".join(present) or "none"}'
      )


def _fill(template: str, record: Mapping[str, Any], where: str) -> str:
  """Puts the record's fields into the template, checking each."""
  names = template_fields(template)
  _check_fields(names, record, where)
  values = {}
  for name in names:
    value = record[name]
    if not isinstance(value, str | int) or isinstance(value, bool):
      raise config.UserError(
        f'{where}: field {name!r} is a {type(value).__name__}, it must be text'
      )
    values[name] = value
  document = template.format_map(values)
  try:
    document.encode()
  except UnicodeEncodeError as e:
    raise config.UserError(
      f'{where}: a lone surrogate (\\ud800-\\udfff) is not Unicode text'
    ) from e
  return document
