"""Random-access rows become batches: shuffled, sharded, resumable."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from r1jax import config, types


class Rows(Protocol):
  """Element i is a row: tokens, mask, segment, position, each [T]."""

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


class RowSource:
  """An endless source of batches from rows, the same for the same seed.

  Every epoch is shuffled anew. A batch may span two epochs; none is dropped.
  Rows are read ahead in a thread; the state is that of what was handed out.
  """

  def __init__(
    self,
    rows: Rows,
    *,
    batch_size: int,
    shuffle_seed: int | None,
    host_index: int = 0,
    host_count: int = 1,
    reduce: Callable[[np.ndarray], np.ndarray] | None = None,
    prefetch_batches: int = 2,
  ):
    """Builds the pipeline.

    Args:
      rows: At least one row.
      batch_size: Rows of the global batch; this host yields its
        1 / host_count, every host_count-th row of it.
      shuffle_seed: Non-negative; None keeps the order of `rows`.
      host_index: This host, from 0.
      host_count: Hosts that share the batch.
      reduce: Adds a float64 [2] vector over the hosts, so that num_tokens and
        num_sequences are those of the global batch; needed when there are
        several, for example a sum over a process_allgather. It is called in
        `next`, by every host in the same order.
      prefetch_batches: How many batches to read ahead.

    Raises:
      UserError: No rows, or a batch that does not divide over the hosts.
      ValueError: Several hosts without `reduce`.
    """
    if not len(rows):
      raise config.UserError('the data has no row to draw batches from')
    if batch_size < 1 or batch_size % host_count:
      raise config.UserError(
        f'batch_size={batch_size} must be a positive multiple of the '
        f'{host_count} hosts'
      )
    if host_count > 1 and reduce is None:
      raise ValueError(f'host_count={host_count} needs reduce')
    self._fingerprint = _fingerprint(rows)
    self._reduce = reduce
    dataset = grain.MapDataset.source(rows)
    if shuffle_seed is not None:
      dataset = dataset.shuffle(seed=shuffle_seed)
    dataset = dataset.repeat()[host_index::host_count]
    self._iterator = iter(
      dataset.batch(batch_size // host_count).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch_batches)
      )
    )

  def next(self, state: Any = None) -> types.Batch:
    """Returns the next batch, as numpy arrays; `state` is not read."""
    del state
    row = next(self._iterator)
    counts = _counts(row)
    if self._reduce is not None:
      counts = self._reduce(counts)
    return _batch(row, counts)

  def get_state(self) -> dict[str, Any]:
    """Returns where the source stands: plain values, ready for JSON."""
    return {
      'iterator': self._iterator.get_state(),
      'fingerprint': self._fingerprint,
    }

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes back to where `get_state` was called.

    Raises:
      UserError: The state was taken over other rows.
    """
    if state['fingerprint'] != self._fingerprint:
      raise config.UserError(
        'the data is not what the checkpoint was written with; restore the '
        'data files or start a new workdir'
      )
    self._iterator.set_state(state['iterator'])


def evaluation_batches(rows: Rows, batch_size: int) -> list[types.Batch]:
  """Returns all rows once, in order; empty rows fill up the last batch."""
  batches = []
  for start in range(0, len(rows), batch_size):
    stop = min(start + batch_size, len(rows))
    part = [rows[i] for i in range(start, stop)]
    empty = {key: np.zeros_like(value) for key, value in part[0].items()}
    part += [empty] * (batch_size - len(part))
    stacked = _stack(part)
    batches.append(_batch(stacked, _counts(stacked)))
  return batches


def _fingerprint(rows: Rows) -> int:
  """Hashes the number of rows and three of them: changed data must show."""
  N = len(rows)
  value = zlib.crc32(str(N).encode())
  for index in (0, N // 2, N - 1):
    value = zlib.crc32(rows[index]['tokens'].tobytes(), value)
  return value


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def _counts(row: dict[str, np.ndarray]) -> np.ndarray:
  """Returns tokens and sequences: mask sum, and segments of all rows."""
  sequences = row['segment'].max(axis=-1).sum()
  return np.array([row['mask'].sum(dtype=np.float64), sequences], np.float64)


def _batch(row: dict[str, np.ndarray], counts: np.ndarray) -> types.Batch:
  return types.Batch(
    tokens_BT=row['tokens'],
    mask_BT=row['mask'],
    segment_BT=row['segment'],
    position_BT=row['position'],
    num_tokens=np.asarray(counts[0], np.float32),
    num_sequences=np.asarray(counts[1], np.float32),
  )
