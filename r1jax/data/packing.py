"""Sequences of tokens packed into rows, with random access to every row."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

# First fit looks at this many rows: past it, fuller rows cost only time.
_OPEN_ROWS = 32


class Tokenizer(Protocol):
  """What packing needs of a tokenizer."""

  bos_id: int | None
  eos_id: int
  pad_id: int

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text."""


class PackedRows:
  """Rows of `row_length` tokens holding whole sequences where they fit.

  A sequence longer than a row is cut into pieces, each a segment of its own
  with positions from 0; a later piece starts with the last token of the one
  before, as context only, so that every token but the first is predicted
  exactly once.

  The packing is drawn once from the seed; what changes from epoch to epoch is
  the order of the rows, which is `loader.RowSource`'s to draw.

  Attributes:
    num_documents: Sequences in all rows together.
    num_bytes: UTF-8 bytes of their texts. Bits per byte of one pass over the
      rows = (sum of nats over mask 1) / ln 2 / num_bytes; the nats of <eos>
      are counted in, its zero bytes are not.
  """

  def __init__(
    self,
    sequences: Sequence[Sequence[int]],
    *,
    pad_id: int,
    row_length: int,
    seed: int | None,
    targets: Sequence[Sequence[bool]] | None = None,
    num_bytes: int = 0,
  ):
    """Packs tokens.

    Args:
      sequences: Ids of each.
      pad_id: Fills up rows.
      row_length: Tokens of a row, at least 2.
      seed: Of the order in which sequences are packed; None keeps theirs.
      targets: Which tokens to learn; all, if not given. A sequence's first
        token never is.
      num_bytes: See above.
    """
    if row_length < 2:
      raise ValueError(f'row_length={row_length} must be at least 2')
    self.num_documents, self.num_bytes = len(sequences), num_bytes
    self._row_length, self._pad_id = row_length, pad_id
    order = range(len(sequences))
    if seed is not None:
      order = np.random.default_rng(seed).permutation(len(sequences)).tolist()
    self._tokens_N = _concatenate(sequences, order, np.int32)
    self._target_N = None
    if targets is not None:
      self._target_N = _concatenate(targets, order, np.float32)
    lengths = np.array([len(sequences[i]) for i in order], np.int64)
    self._pieces_M2 = split(lengths, row_length)
    self._rows = first_fit(
      self._pieces_M2[:, 1] - self._pieces_M2[:, 0], row_length
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns tokens, mask, segment and position, each [row_length]."""
    T = self._row_length
    row = {
      'tokens': np.full(T, self._pad_id, np.int32),
      'mask': np.zeros(T, np.float32),
      'segment': np.zeros(T, np.int32),
      'position': np.zeros(T, np.int32),
    }
    begin = 0
    for segment, piece in enumerate(self._rows[index], start=1):
      start, stop = self._pieces_M2[piece]
      end = begin + stop - start
      row['tokens'][begin:end] = self._tokens_N[start:stop]
      row['mask'][begin + 1 : end] = (
        1 if self._target_N is None else self._target_N[start + 1 : stop]
      )
      row['segment'][begin:end] = segment
      row['position'][begin:end] = np.arange(stop - start)
      begin = end
    return row


def pack_documents(
  documents: Sequence[str],
  tokenizer: Tokenizer,
  *,
  row_length: int,
  seed: int | None,
) -> PackedRows:
  """Packs texts as [bos] + ids + [eos]; without bos if there is none."""
  bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
  encoded = tokenizer.encode_batch(list(documents))
  return PackedRows(
    [[*bos, *ids, tokenizer.eos_id] for ids in encoded],
    pad_id=tokenizer.pad_id,
    row_length=row_length,
    seed=seed,
    num_bytes=sum(len(text.encode()) for text in documents),
  )


def _concatenate(parts, order, dtype) -> np.ndarray:
  return np.fromiter(
    (value for i in order for value in parts[i]), dtype, count=-1
  )


def split(length_N: np.ndarray, row_length: int) -> np.ndarray:
  """Cuts documents laid end to end into pieces of at most row_length tokens.

  Args:
    length_N: Tokens of each document.
    row_length: Most tokens of a piece.

  Returns:
    int64 [pieces, 2]: start and stop of each in the concatenation; pieces of
    one document overlap by one token.
  """
  stop_N = np.cumsum(length_N)
  start_N = stop_N - length_N
  count_N = np.maximum(1, -(-(length_N - 1) // (row_length - 1)))
  first_N = np.cumsum(count_N) - count_N
  part_M = np.arange(count_N.sum()) - np.repeat(first_N, count_N)
  start_M = np.repeat(start_N, count_N) + part_M * (row_length - 1)
  stop_M = np.minimum(start_M + row_length, np.repeat(stop_N, count_N))
  return np.stack([start_M, stop_M], axis=1)


def first_fit(length_M: np.ndarray, row_length: int) -> list[list[int]]:
  """Assigns pieces, in order, to the first open row with room.

  A bounded number of rows is open; where none has room the fullest closes.

  Returns:
    The pieces of each row.
  """
  rows, open_rows = [], []  # open_rows: [room, pieces].
  for piece, length in enumerate(length_M.tolist()):
    row = next((row for row in open_rows if row[0] >= length), None)
    if row is None:
      if len(open_rows) == _OPEN_ROWS:
        open_rows.remove(min(open_rows, key=lambda row: row[0]))
      row = [row_length, []]
      open_rows.append(row)
      rows.append(row[1])
    row[0] -= length
    row[1].append(piece)
  return rows
