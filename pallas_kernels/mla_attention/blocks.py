"""Sizes of what the kernels work on at a time.

A pair of a block of queries and one of keys is one piece of straight-line code
for several heads, so that the products of one head run beside the exponentials
of another. Larger pairs hide more of the latency at both ends of that code,
but waste more on the diagonal.
"""

import dataclasses

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Cost only; results differ by rounding alone.

  Attributes:
    heads: Most heads at a time; what divides the heads is used.
    queries: Of a pair, forward.
    keys: Of a pair, forward.
    resident_queries: Most in VMEM at a time, forward.
    resident_keys: Most in VMEM at a time, forward.
    grad_heads: As heads, backward.
    grad_queries: Of a pair, backward.
    grad_keys: Of a pair, backward.
    grad_resident_queries: Most in VMEM at a time, backward. Longer rows take
      several kernels, whose gradients of the keys are added up.
  """

  heads: int = 4
  queries: int = 512
  keys: int = 512
  resident_queries: int = 2048
  resident_keys: int = 4096
  grad_heads: int = 4
  grad_queries: int = 512
  grad_keys: int = 512
  grad_resident_queries: int = 4096

  def __post_init__(self):
    for field in dataclasses.fields(self):
      size = getattr(self, field.name)
      if size < 1:
        raise ValueError(f'{field.name}={size} must be at least 1')


def default(dtype: jnp.dtype, num_queries: int) -> BlockSizes:
  """For widths 192 and 128, and VMEM of 64 MiB: fine on all generations.

  Four heads of 4,096 queries fit backward, and two of 8,192. Float32 takes
  twice the memory of bfloat16.
  """
  if jnp.dtype(dtype).itemsize == 2:
    is_long = num_queries > 4096
    return BlockSizes(
      grad_heads=2 if is_long else 4,
      grad_resident_queries=8192 if is_long else 4096,
    )
  return BlockSizes(
    heads=2,
    queries=256,
    keys=256,
    grad_heads=1,
    grad_queries=256,
    grad_keys=256,
    grad_resident_queries=4096,
  )


@dataclasses.dataclass(frozen=True)
class Cut:
  """A length cut into equal parts of whole blocks.

  Attributes:
    block: Size of a block.
    per_part: Blocks of a part.
    parts: Number of parts.
  """

  block: int
  per_part: int
  parts: int

  @property
  def part(self) -> int:
    return self.block * self.per_part

  @property
  def blocks(self) -> int:
    return self.per_part * self.parts

  @property
  def size(self) -> int:
    """At least the length that was cut; the rest is padding."""
    return self.part * self.parts


def cut(length: int, block: int, most: int, lanes: int) -> Cut:
  """Cuts a length, with less than one block of padding per part.

  Args:
    length: To be cut.
    block: Size of a block; smaller where the length is.
    most: Of a part's size, if a block has not more.
    lanes: That blocks are whole multiples of where the length is smaller.
  """
  block = min(block, -(-length // lanes) * lanes)
  blocks = -(-length // block)
  parts = -(-blocks // max(most // block, 1))
  return Cut(block, -(-blocks // parts), parts)


def group(heads: int, most: int) -> int:
  """The largest number of heads that divides them and is not above `most`."""
  return max(size for size in range(1, most + 1) if heads % size == 0)
