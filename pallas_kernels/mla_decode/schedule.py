"""FlashMLA's plan of which part of the machine reads which tokens, on the host.

The kernel here needs no plan, as a worker goes through the chunks of its
sequences whatever their lengths are: it is for those who place the splits of
long sequences on several devices, and whom `ops.combine` then serves.
"""

import dataclasses
from collections.abc import Sequence

BLOCK_TOKENS = 64
OVERHEAD_BLOCKS = 5  # What a request costs a part, whatever its length is.


@dataclasses.dataclass(frozen=True)
class Part:
  """What a part of the machine reads: from a token of a request to another.

  Attributes:
    begin_request: The first request.
    begin_token: Its first token that is read.
    end_request: The last request, inclusive.
    end_token: Behind its last token that is read.
    begin_split: Number of the first request's splits that came before.
  """

  begin_request: int
  begin_token: int
  end_request: int
  end_token: int
  begin_split: int


def split_plan(
  lengths: Sequence[int],
  num_parts: int,
  *,
  block_tokens: int = BLOCK_TOKENS,
  overhead_blocks: int = OVERHEAD_BLOCKS,
) -> tuple[list[Part], list[int]]:
  """Splits the tokens of all requests into parts of about the same cost.

  A part takes requests, each at the cost of its blocks and of the overhead,
  while they fit in ⌈Σ(blocks + overhead) / num_parts⌉ + overhead; of one that
  does not fit it takes what does.

  Args:
    lengths: Tokens of each request.
    num_parts: Of the machine.
    block_tokens: Tokens a block.
    overhead_blocks: Cost of a request, and of a split of it.

  Returns:
    The parts that have work, and where the splits of each request begin among
    all splits, one more than there are requests.

  Raises:
    ValueError: No parts, or a negative length.

  Source: FlashMLA, get_mla_metadata.
  """
  if num_parts < 1:
    raise ValueError(f'num_parts={num_parts} must be at least 1')
  if min(lengths, default=0) < 0:
    raise ValueError(f'lengths={list(lengths)} must not be negative')
  blocks = [-(-length // block_tokens) for length in lengths]
  costs = [count + overhead_blocks for count in blocks]
  payload = -(-sum(costs) // num_parts) + overhead_blocks
  parts, first_splits = [], [0]
  request = block = split = 0
  for _ in range(num_parts):
    if request == len(lengths):
      break
    begin = request, block * block_tokens, split
    remaining = payload
    end = request, block * block_tokens
    while request < len(lengths):
      left = blocks[request] - block
      if remaining >= left + overhead_blocks:
        remaining -= left + overhead_blocks
        end = request, lengths[request]
        first_splits.append(first_splits[-1] + split + 1)
        request, block, split = request + 1, 0, 0
        continue
      taken = remaining - overhead_blocks
      if taken > 0:
        block += taken
        split += 1
        end = request, block * block_tokens
      break
    parts.append(Part(*begin[:2], *end, begin[2]))
  return parts, first_splits
