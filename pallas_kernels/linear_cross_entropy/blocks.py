"""Tiles of linear_cross_entropy's kernels."""

import dataclasses

LANES = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Tokens and columns of a tile; the width is whole.

  With D = 7,168 in bfloat16, 512 tokens and 640 columns, the largest kernels
  hold in VMEM: the gradient of the head a tile of it (8.75 MiB), two of hidden
  states (2 · 7 MiB), the sum (17.5 MiB), a result (8.75 MiB) and the scores
  (512 · 640 · 4 bytes, three times: 3.75 MiB), 53 MiB; that of hidden states
  7 + 2 · 8.75 + 14 + 7 + 3.75, 49 MiB.

  Attributes:
    tokens: A multiple of 8.
    columns: A multiple of 128.
  """

  tokens: int
  columns: int

  def __post_init__(self):
    if self.tokens < 8 or self.tokens % 8:
      raise ValueError(f'tokens={self.tokens} must be a multiple of 8')
    if self.columns < LANES or self.columns % LANES:
      raise ValueError(f'columns={self.columns} must be a multiple of {LANES}')


def default(num_columns: int) -> BlockSizes:
  """Tiles of which a head is a whole number, if there are any.

  So that it need not be padded, which copies it: V3's 129,280 are 202 · 640.
  """
  for columns in range(5 * LANES, 0, -LANES):
    if num_columns % columns == 0:
      return BlockSizes(512, columns)
  return BlockSizes(512, 4 * LANES)
