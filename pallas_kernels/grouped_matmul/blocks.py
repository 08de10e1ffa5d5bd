"""Sizes of the tiles that the kernels work on."""

import dataclasses
import math

from jax.experimental.pallas import tpu as pltpu

LANES = 128
_MIB = 2**20
# Heights of tiles of rows, the largest first: of all such sets, with code for
# no more rows together, the one that cuts groups of 821 to 1,227 rows at the
# least cost. A matrix unit takes as long for fewer than 128 rows as for 128:
# the weights have to get into it.
_HEIGHTS = 512, 480, 416, 160
_HEIGHTS_IN_BLOCKS = 512, 384, 256, 128
# Multiplications of one product at most: its code is written out, so this
# bounds the time to compile. Not below half of it: the matrix unit idles some
# 300 cycles between one product and the next, out of 16,384 for this many.
_PRODUCT = 2**32
_PRODUCT_MXU = 256


@dataclasses.dataclass(frozen=True)
class Chip:
  """What matters of a TPU core.

  Attributes:
    vmem_bytes: Of one core.
    mxu_size: Rows and columns of a matrix unit.
    cores: Cores that one device's kernel runs on.
  """

  vmem_bytes: int
  mxu_size: int
  cores: int


CHIPS = {
  'v5e': Chip(vmem_bytes=128 * _MIB, mxu_size=128, cores=1),
  'v5p': Chip(vmem_bytes=64 * _MIB, mxu_size=128, cores=2),
  'v6e': Chip(vmem_bytes=128 * _MIB, mxu_size=256, cores=1),
  'tpu7x': Chip(vmem_bytes=64 * _MIB, mxu_size=256, cores=1),
}
# Compiles for all of these, where no device says which it is.
ANY_CHIP = Chip(vmem_bytes=64 * _MIB, mxu_size=256, cores=2)


def chip() -> Chip:
  """Of the device at hand, or of those of the mesh that is set."""
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    return ANY_CHIP
  return Chip(info.vmem_capacity_bytes, info.mxu_column_size, info.num_cores)


def align(itemsize: int) -> int:
  """Rows of a tile of memory, which are moved as one."""
  return 32 // itemsize


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Of a product of rows and weights, x [m, k] · w [k, n].

  Attributes:
    heights: Rows of a tile, the largest first.
    width: Columns of a tile of weights, a divisor of n.
    chunk: Columns of one product, a divisor of the width.
    parts: Cores that share the columns.
    vmem_limit_bytes: For the compiler.
  """

  heights: tuple[int, ...]
  width: int
  chunk: int
  parts: int
  vmem_limit_bytes: int = 32 * _MIB

  def check(self, n: int, itemsize: int) -> None:
    """Raises ValueError for sizes that do not fit together."""
    _check_heights(self.heights, itemsize)
    _check_divides('width * parts', self.width * self.parts, 'n', n)
    _check_divides('chunk', self.chunk, 'width', self.width)

  def vmem_bytes(self, k: int, itemsize: int) -> int:
    """Rows and results, weights, and about what the compiler spills."""
    rows = 2 * self.heights[0] * (k + self.width)
    weights = 2 * k * self.width
    return (rows + weights) * itemsize + 4 * self.heights[0] * self.chunk


@dataclasses.dataclass(frozen=True)
class GradBlockSizes:
  """Of the gradient of weights, x [m, k] transposed · y [m, n] by group.

  Attributes:
    heights: Rows that are summed at once, the largest first.
    width_k: Rows of a tile of weights, a divisor of k.
    width_n: Columns of a tile of weights, a divisor of n.
    chunk: Columns of one product, a divisor of width_n.
    parts: Cores that share the rows of the weights.
    vmem_limit_bytes: For the compiler.
  """

  heights: tuple[int, ...]
  width_k: int
  width_n: int
  chunk: int
  parts: int
  vmem_limit_bytes: int = 32 * _MIB

  def check(self, k: int, n: int, itemsize: int) -> None:
    """Raises ValueError for sizes that do not fit together."""
    _check_heights(self.heights, itemsize)
    _check_divides('width_k * parts', self.width_k * self.parts, 'k', k)
    _check_divides('width_n', self.width_n, 'n', n)
    _check_divides('chunk', self.chunk, 'width_n', self.width_n)

  def vmem_bytes(self, itemsize: int) -> int:
    """Rows, what leaves, and the sum."""
    rows = 2 * self.heights[0] * (self.width_k + self.width_n)
    leaving = 2 * self.width_k * self.chunk
    return (rows + leaving) * itemsize + 4 * self.width_k * self.width_n


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Of a grouped product and its gradients."""

  forward: BlockSizes
  grad_x: BlockSizes
  grad_w: GradBlockSizes


def default(
  m: int, k: int, n: int, itemsize: int, block: int, on: Chip
) -> Blocks:
  """Sizes for x [m, k] and w [g, k, n], k and n in whole lanes.

  Args:
    m: Rows.
    k: Columns of the rows.
    n: Columns of the result.
    itemsize: Bytes of a number.
    block: What the sizes of groups are multiples of.
    on: What it runs on.
  """
  return Blocks(
    forward=product(m, k, n, itemsize, block, on),
    grad_x=product(m, n, k, itemsize, block, on),
    grad_w=gradient(m, k, n, itemsize, on),
  )


def product(
  m: int, k: int, n: int, itemsize: int, block: int, on: Chip
) -> BlockSizes:
  """The widest tile of weights whose two buffers fill half of VMEM.

  The rows are read once for each tile of columns, the weights once.
  """
  heights = _HEIGHTS if block % 128 else _HEIGHTS_IN_BLOCKS
  most_rows = on.vmem_bytes // 4 // (2 * k * itemsize)
  heights = _heights(heights, min(m, most_rows), itemsize)
  parts = _parts(n, on)
  options = [
    (width, _chunk(width, heights[0] * k, itemsize, on))
    for width in _divisors(n // parts)
    if width == LANES or 2 * k * width * itemsize <= on.vmem_bytes // 2
  ]
  least = _most_product(itemsize, on) / 2
  enough = [
    (width, chunk)
    for width, chunk in options
    if heights[0] * k * chunk >= least
  ]
  width, chunk = max(enough or options)
  return BlockSizes(heights, width, chunk, parts, _limit(on))


def gradient(m: int, k: int, n: int, itemsize: int, on: Chip) -> GradBlockSizes:
  """The tile of weights in float32 that reads rows the fewest times."""
  # Rows are the depth of the matrix unit here, best filled to the last one.
  step = on.mxu_size
  heights = _heights(tuple(range(512, 0, -step)), m, itemsize)
  parts = _parts(k, on)
  options = []
  for width_k in _divisors(k // parts):
    for width_n in _divisors(n):
      chunk = _chunk(width_n, heights[0] * width_k, itemsize, on)
      sizes = GradBlockSizes(
        heights, width_k, width_n, chunk, parts, _limit(on)
      )
      if not options or sizes.vmem_bytes(itemsize) <= 0.8 * on.vmem_bytes:
        options.append(sizes)
  reads = lambda sizes: 1 / sizes.width_n + 1 / sizes.width_k
  return min(options, key=reads)


def masked(room: int, k: int, n: int, itemsize: int, on: Chip) -> BlockSizes:
  """Sizes for groups of so many rows at most, which may be few."""
  return product(room, k, n, itemsize, 128, on)


def _heights(heights, most, itemsize):
  """Those of at most so many rows, one of them high enough for all."""
  unit = align(itemsize)
  most = max(-(-most // unit) * unit, unit)
  return tuple(h for h in heights if h <= most) or (most,)


def _parts(size, on):
  return math.gcd(on.cores, size // LANES)


def _most_product(itemsize, on):
  # As many cycles for each matrix unit; float32 is several of bfloat16.
  most = _PRODUCT * on.mxu_size**2 // _PRODUCT_MXU**2
  return most // (8 if itemsize == 4 else 1)


def _chunk(width, depth, itemsize, on):
  """Columns of one product: the most of a bounded size, whole matrix units."""
  most = _most_product(itemsize, on)
  sizes = _divisors(width)
  fitting = [size for size in sizes if size * depth <= most] or sizes[:1]
  whole = [size for size in fitting if size % on.mxu_size == 0]
  return max(whole or fitting)


def _limit(on):
  return on.vmem_bytes * 15 // 16


def _divisors(size):
  """Widths in whole lanes that divide a size, in rising order."""
  lanes = size // LANES
  return [LANES * i for i in range(1, lanes + 1) if lanes % i == 0]


def _check_heights(heights, itemsize):
  unit = align(itemsize)
  if list(heights) != sorted(set(heights), reverse=True) or not heights:
    raise ValueError(f'heights={heights} must fall')
  if any(height % unit or height < unit for height in heights):
    raise ValueError(f'heights={heights} must be multiples of {unit} rows')


def _check_divides(name, size, of_name, of):
  if size < 1 or of % size:
    raise ValueError(f'{name}={size} does not divide {of_name}={of}')
