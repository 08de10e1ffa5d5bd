"""How the kernels cut their work."""

import dataclasses

_LANES = 128
GROUP = 64  # Queries whose rows go through the matrix units together.
_CHUNK_TOKENS = 4096  # Of index keys.
_ATTEND_TOKENS = 512
_RESIDENT_TOKENS = 1024
RESIDENT_BYTES = 36 * 2**20  # Of 64 MiB, 24,576 tokens of DeepSeek-V3.
_RESIDENT_QUERIES = 8
_SELECT_NUMBERS = 2**20  # Of four arrays of as many, 16 MiB.
_MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class AttendBlocks:
  """Of `sparse_mla`.

  Attributes:
    tokens: Selected tokens at a time, a multiple of 128.
    workers: Parts of the queries, of each sequence if it is resident, for the
      cores of a chip: it divides them.
    is_resident: Whether VMEM holds a sequence, to load tokens from there; else
      they are copied from HBM.
    is_unrolled: Whether each token of a block has its own code, so that the
      products run beside it; else there is less of it, as for a CPU.
  """

  tokens: int = 512
  workers: int = 1
  is_resident: bool = False
  is_unrolled: bool = True


@dataclasses.dataclass(frozen=True)
class LogitsBlocks:
  """Of `index_logits`.

  Attributes:
    queries: At a time, a multiple of 8.
    keys: At a time, a multiple of 128.
  """

  queries: int = 256
  keys: int = 512


@dataclasses.dataclass(frozen=True)
class PagedBlocks:
  """Of `index_logits_paged`.

  Attributes:
    pages: At a time.
    slots: Groups of pages that have room in VMEM, a power of two: one is
      computed and the others are on their way.
    workers: Parts of the batch, for the cores of a chip: it divides the batch.
  """

  pages: int
  slots: int = 8
  workers: int = 1


def fit_logits(blocks: LogitsBlocks, num_queries: int, num_keys: int):
  """Not larger than what there is, in whole groups."""
  return LogitsBlocks(
    min(blocks.queries, -(-num_queries // GROUP) * GROUP),
    min(blocks.keys, -(-num_keys // _LANES) * _LANES),
  )


def paged(page_tokens: int, table_shape: tuple[int, int]) -> PagedBlocks:
  """For pages of a size and a block table [B, pages a sequence]."""
  batch, most_pages = table_shape
  return PagedBlocks(
    pages=max(1, min(_CHUNK_TOKENS // page_tokens, most_pages)),
    workers=1 if batch % 2 else 2,
  )


def attend(
  num_sequences: int,
  num_queries: int,
  num_selected: int,
  sequence_bytes: int | None,
) -> AttendBlocks:
  """For a batch of sequences.

  Two workers are for the two cores of v5p. Where there is one core they come
  one after the other, at the cost of a pipeline's start.

  Args:
    num_sequences: Of the batch.
    num_queries: Of each sequence.
    num_selected: Tokens of each query.
    sequence_bytes: Of a sequence whose tokens are contiguous, else None.
  """
  is_resident = (
    sequence_bytes is not None
    and sequence_bytes <= RESIDENT_BYTES
    # Loading all of it must be worth it.
    and num_queries >= _RESIDENT_QUERIES
  )
  lanes = lambda size: -(-size // _LANES) * _LANES
  if is_resident:
    tokens = min(_RESIDENT_TOKENS, lanes(-(-num_selected // 2)))
    return AttendBlocks(tokens, 1 if num_queries % 2 else 2, True)
  tokens = min(_ATTEND_TOKENS, lanes(num_selected))
  return AttendBlocks(tokens, 1 if num_sequences * num_queries % 2 else 2)


def selected_rows(num_queries: int, num_keys: int) -> int:
  """Queries at a time of `top_k`: with more, less of the time is latency."""
  most = max(8, _SELECT_NUMBERS // num_keys // 8 * 8)
  return min(most, _MOST_ROWS, -(-num_queries // 8) * 8)
