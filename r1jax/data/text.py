"""Text documents from JSONL, plain text and Parquet files."""

import dataclasses
import functools
import hashlib
import string

from r1jax import config
from r1jax.data import packing, records


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
    if self.format not in records.FORMATS:
      raise ValueError(
        f'format={self.format!r} must be one of {", ".join(records.FORMATS)}'
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
    tokenizer: See `packing.pack_documents`.
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
  return packing.pack_documents(
    chosen, tokenizer, row_length=row_length, seed=seed
  )


def is_held_out(document: str, fraction: float) -> bool:
  """Says by a hash of the text whether a document is for evaluation only."""
  digest = hashlib.sha256(document.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < fraction * 2**64


def read_documents(text_config: TextConfig) -> list[str]:
  """Returns the documents of all files, in the order of paths; none is empty.

  Raises:
    UserError: As `records.read`, or a file holds no document.
  """
  documents = []
  names = template_fields(text_config.template)
  for path in records.expand(text_config.paths):
    found = records.read(
      path,
      text_config.format,
      fields=names,
      split_blank_lines=text_config.split_blank_lines,
    )
    texts = [
      _fill(text_config.template, record, where) for where, record in found
    ]
    texts = [text for text in texts if text.strip()]
    if not texts:
      raise config.UserError(f'{path}: the file holds no document')
    documents += texts
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


def _fill(template: str, record: records.Record, where: str) -> str:
  """Puts the record's fields into the template, checking each."""
  names = template_fields(template)
  return template.format_map(
    {name: records.text_of(record, name, where) for name in names}
  )
