"""How the kernel cuts its work."""

import dataclasses

from pallas_kernels.mla_decode import cache as cache_lib

# A chunk is whole lanes of tokens of each of the four that share a row of rope.
MULTIPLE_TOKENS = 128 * cache_lib.ROPE_TOKENS
# Once a chunk the matrix units wait for some 200 cycles: twice the tokens are
# 10 % less time on tpu7x. But the last chunk of a sequence is computed whole.
_CHUNK_TOKENS = 1024
_LONG_TABLE_TOKENS = 16_384


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Of a call.

  Attributes:
    num_pages: Pages a chunk; their tokens are a multiple of 512.
    num_slots: Chunks that have room in VMEM: of two the scores are computed, of
      two the values are summed, and the others are on their way.
    num_workers: Parts of the batch, for the cores of a chip: it must divide
      the batch.
    num_splits: Parts of each sequence, whose results are combined: for cores
      that the batch does not fill.
  """

  num_pages: int
  num_slots: int = 8
  num_workers: int = 1
  num_splits: int = 1

  def __post_init__(self):
    for name, least in (
      ('num_pages', 1),
      ('num_slots', 5),
      ('num_workers', 1),
      ('num_splits', 1),
    ):
      value = getattr(self, name)
      if value < least:
        raise ValueError(f'{name}={value} must be at least {least}')


def default(page_tokens: int, table_shape: tuple[int, int]) -> BlockSizes:
  """For pages of a size and a block table [B, pages a sequence].

  Two workers are for the two cores of v5p. Where there is one core they come
  one after the other, at the cost of a pipeline's start.
  """
  batch, most_pages = table_shape
  is_long = most_pages * page_tokens >= _LONG_TABLE_TOKENS
  chunk_tokens = _CHUNK_TOKENS * (2 if is_long else 1)
  return BlockSizes(
    num_pages=max(1, chunk_tokens // page_tokens),
    num_slots=6 if is_long else 8,
    num_workers=1 if batch % 2 else 2,
    num_splits=2 if batch == 1 else 1,
  )
