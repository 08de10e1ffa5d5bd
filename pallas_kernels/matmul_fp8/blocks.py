"""Sizes of the tiles that the kernel works on, and what bounds it.

Each 128 of k is a product of its own: its numbers are multiplied by their
scales and added, which is two operations for each, or three where each column
of b has scales of its own, and one more on v5e to v6e, whose matrix units read
e4m3fn as a format with other exponents. These give as many numbers a cycle for
128 of k as for their whole depth:

  numbers a cycle and core       v5e, v5p   v6e     tpu7x
  matrix units, 128 of k         512        1,024   2,048
  vector unit, 128 · 128 scales  1,365      1,365   2,048
  vector unit, 128 · 1 scales    1,024      1,024   1,365
  the least of these, of the     1          1/2     1
  bfloat16 peak                                     (2/3 with 128 · 1 scales)

So it is nowhere faster than bfloat16 but in what it reads, tpu7x's FP8 units
included: of their 256 rows, blocks of 128 fill half.
"""

import dataclasses

from jax.experimental.pallas import tpu as pltpu

LANES = 128
CHUNK = 256  # Rows of a in one product; columns of b are LANES.
_MIB = 2**20
_OLDEST = 5  # Generation of TPUs whose matrix units take e4m3.
# Cycles of the matrix units in one piece of straight-line code: about 500 are
# lost at its ends, but it takes long to compile.
_CYCLES = 7168
_MOST_ROWS, _MOST_COLUMNS, _MOST_DEPTH = 2048, 512, 16384


@dataclasses.dataclass(frozen=True)
class Chip:
  """What matters of a TPU core.

  Attributes:
    generation: 5 for v5e and v5p.
    vmem_bytes: Of one core.
    cores: Cores that one device's kernel runs on.
  """

  generation: int
  vmem_bytes: int
  cores: int

  @property
  def product_cycles(self) -> int:
    """Of the matrix units for one product, CHUNK · LANES · 128."""
    return {5: 64, 6: 32}.get(self.generation, 16)


# Compiles for all of these, where no device says which it is.
ANY_CHIP = Chip(generation=6, vmem_bytes=64 * _MIB, cores=2)


def chip() -> Chip:
  """Of the device at hand, or of those of the mesh that is set."""
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    return ANY_CHIP
  return Chip(info.generation, info.vmem_capacity_bytes, info.num_cores)


def chip_with_fp8() -> Chip:
  """The same; raises ValueError for a TPU that does not multiply e4m3."""
  on = chip()
  if on.generation < _OLDEST:
    raise ValueError(
      f'implementation=pallas needs a TPU v{_OLDEST} or later: matrix units of '
      f'v{on.generation} do not take float8_e4m3fn'
    )
  return on


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Cost only; results differ by rounding alone.

  Attributes:
    rows: Of a tile of a, a multiple of CHUNK.
    columns: Of a tile of b, a multiple of LANES.
    depth: Of both tiles along k, a multiple of 1,024 unless it is all of k.
    code_rows: Rows that one piece of straight-line code does; it divides rows.
    code_columns: Columns that it does; it divides columns.
    halved: So many products out of so many are done in two halves, which takes
      the matrix units of tpu7x twice as long. Without it they get ahead of the
      vector unit, and what waits for it is spilled.
    vmem_limit_bytes: For the compiler.
  """

  rows: int
  columns: int
  depth: int
  code_rows: int
  code_columns: int
  halved: tuple[int, int] = (0, 1)
  vmem_limit_bytes: int = 60 * _MIB

  def __post_init__(self):
    for name, unit in (
      ('rows', CHUNK),
      ('columns', LANES),
      ('depth', LANES),
      ('code_rows', CHUNK),
      ('code_columns', LANES),
    ):
      size = getattr(self, name)
      if size < unit or size % unit:
        raise ValueError(f'{name}={size} must be a multiple of {unit}')
    for name, of in (('code_rows', 'rows'), ('code_columns', 'columns')):
      if getattr(self, of) % getattr(self, name):
        raise ValueError(
          f'{name}={getattr(self, name)} does not divide '
          f'{of}={getattr(self, of)}'
        )

  def check(self, k: int) -> None:
    """Raises ValueError for a depth that k does not allow."""
    if self.depth % 1024 and self.depth < k:
      raise ValueError(
        f'depth={self.depth} must be a multiple of 1024 or k={k}'
      )


def default(
  m: int,
  k: int,
  n: int,
  out_bytes: int,
  by_column: bool,
  on: Chip,
) -> BlockSizes:
  """Sizes for a [m, k] and b [k, n].

  Args:
    m: Rows of the result.
    k: What is summed over.
    n: Columns of the result.
    out_bytes: Of one number of the result, and of what it is added to.
    by_column: Each column of b has its scales.
    on: What it runs on.
  """
  depth = _up(k, LANES)
  if depth > _MOST_DEPTH:
    parts = -(-depth // _MOST_DEPTH)
    depth = _up(-(-depth // parts), 1024)
  columns = _columns(n, on.cores)
  tiles = -(-m // _MOST_ROWS)
  while True:
    rows = _up(-(-m // tiles), CHUNK)
    need = _vmem(rows, columns, depth, k, out_bytes, by_column)
    if rows == CHUNK or need <= on.vmem_bytes * 3 // 4:
      break
    tiles += 1
  # What spills there takes the compiler minutes.
  cycles = _CYCLES // 2 if by_column and on.generation > 6 else _CYCLES
  products = max(1, cycles // (on.product_cycles * (depth // LANES)))
  chunks = _largest_divisor(rows // CHUNK, products)
  stripes = _largest_divisor(columns // LANES, products // chunks)
  halved = 0, 1
  if on.generation > 6:
    # Where sums are short, more is to be done for what leaves.
    halved = (1, 2 if by_column else 8 if depth <= 2048 else 16)
  return BlockSizes(
    rows,
    columns,
    depth,
    chunks * CHUNK,
    stripes * LANES,
    halved,
    on.vmem_bytes * 15 // 16,
  )


def _columns(n, cores):
  """The widest tile of those that give no core more columns than others do."""

  def most(columns):
    tiles = -(-n // columns)
    return -(-tiles // cores) * columns if cores > 1 else 0

  widths = range(LANES, min(_MOST_COLUMNS, _up(n, LANES)) + 1, LANES)
  return min(reversed(widths), key=most)


def _vmem(rows, columns, depth, k, out_bytes, by_column):
  """Bytes of all buffers; see kernel.multiply."""
  scales = 512 * columns if by_column else 4 * rows * (columns // LANES)
  return (
    2 * depth * (rows + columns)
    + depth * columns
    + depth // LANES * scales
    + 2 * rows * columns * out_bytes
    + (4 * rows * columns if depth < k else 0)
  )


def _up(size, multiple):
  return -(-size // multiple) * multiple


def _largest_divisor(size, most):
  return max(i for i in range(1, max(1, min(size, most)) + 1) if size % i == 0)
