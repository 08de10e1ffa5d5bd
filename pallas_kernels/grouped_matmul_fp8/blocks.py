"""Sizes of the tiles that the kernels work on; matmul_fp8's say what bounds."""

import dataclasses

from pallas_kernels.matmul_fp8 import blocks as matmul_fp8_blocks

LANES, CHUNK = matmul_fp8_blocks.LANES, matmul_fp8_blocks.CHUNK
Chip = matmul_fp8_blocks.Chip
chip_with_fp8 = matmul_fp8_blocks.chip_with_fp8
_MIB = 2**20
# Cycles of the matrix units in one piece of straight-line code: some 500 are
# lost at its ends, and it takes long to compile.
_CYCLES = 7168
_OUTER_CYCLES = 3584  # Its code is there for each depth.
_VECTOR_CYCLES = 24  # Of the vector unit for a product with scales by column.
MOST_ROWS, _LEAST_WIDTH = 1024, 512
# Each twice the next: rows of a group are cut without a rest.
DEPTHS = 1024, 512, 256, 128
_MOST_WIDTH_N = 512


@dataclasses.dataclass(frozen=True)
class ProductSizes:
  """Of a product of rows and weights; results do not depend on them.

  Attributes:
    rows: Of a tile of rows, a multiple of CHUNK.
    width: Columns of a tile of weights, which with parts divide all.
    code_columns: Columns that one piece of straight-line code does; it divides
      width.
    parts: Cores that share the columns.
    halved: See matmul_fp8.
    vmem_limit_bytes: For the compiler.
  """

  rows: int
  width: int
  code_columns: int
  parts: int
  halved: tuple[int, int] = (0, 1)
  vmem_limit_bytes: int = 60 * _MIB

  def check(self, n: int) -> None:
    """Raises ValueError for sizes that do not fit together."""
    _check_multiple('rows', self.rows, CHUNK)
    _check_multiple('code_columns', self.code_columns, LANES)
    _check_divides('code_columns', self.code_columns, 'width', self.width)
    _check_divides('width * parts', self.width * self.parts, 'n', n)

  def vmem_bytes(self, k: int, out_bytes: int) -> int:
    """Of all buffers; see kernel.multiply."""
    of_rows = self.rows * k * 33 // 16
    of_weights = 4 * k * self.width + k * 12
    results = 2 * self.rows * self.width * out_bytes
    scales = k // LANES * (self.width // LANES) * self.rows * 4
    return of_rows + of_weights + results + scales


@dataclasses.dataclass(frozen=True)
class OuterSizes:
  """Of sums over rows, x [m, k] transposed · y [m, n] by group.

  Attributes:
    depths: Rows that are summed at once, each twice the next, the last 128.
    width_k: Columns of a tile of x, which divides k.
    width_n: Columns of a tile of y, which with parts divide n.
    code_rows: Columns of x that one piece of straight-line code does; it
      divides width_k.
    code_columns: Columns of y that it does; it divides width_n.
    parts: Cores that share the columns of y.
    halved: See matmul_fp8.
    vmem_limit_bytes: For the compiler.
  """

  depths: tuple[int, ...]
  width_k: int
  width_n: int
  code_rows: int
  code_columns: int
  parts: int
  halved: tuple[int, int] = (0, 1)
  vmem_limit_bytes: int = 60 * _MIB

  def check(self, k: int, n: int) -> None:
    """Raises ValueError for sizes that do not fit together."""
    wanted = tuple(LANES << i for i in reversed(range(len(self.depths))))
    if not self.depths or self.depths != wanted:
      raise ValueError(f'depths={self.depths} must halve down to {LANES}')
    _check_multiple('code_rows', self.code_rows, LANES)
    _check_multiple('code_columns', self.code_columns, LANES)
    _check_divides('code_rows', self.code_rows, 'width_k', self.width_k)
    _check_divides('code_columns', self.code_columns, 'width_n', self.width_n)
    _check_divides('width_k', self.width_k, 'k', k)
    _check_divides('width_n * parts', self.width_n * self.parts, 'n', n)

  def vmem_bytes(self) -> int:
    """Of all buffers; see kernel.outer."""
    depth = self.depths[0]
    of_rows = depth * (self.width_k + self.width_n) * 5 // 2
    sums = 2 * self.width_k * self.width_n * 4
    return of_rows + sums + depth * self.width_n * 5


def product(m: int, k: int, n: int, out_bytes: int, on: Chip) -> ProductSizes:
  """Sizes for x [m, k] and w [g, k, n], all in whole lanes.

  Args:
    m: Most rows of a group.
    k: What is summed over.
    n: Columns of the result.
    out_bytes: Of one of its numbers.
    on: What it runs on.
  """
  parts = _parts(n, on)
  halved = (1, 16) if on.generation > 6 else (0, 1)
  limit = on.vmem_bytes * 15 // 16
  rows = min(MOST_ROWS, -(-m // CHUNK) * CHUNK)
  # A product's code is as long where it takes half as many cycles.
  cycles = _CYCLES if on.generation < 7 else _CYCLES // 2
  most = max(1, cycles // (on.product_cycles * (k // LANES))) * LANES
  while True:
    for width in reversed(_divisors(n // parts)):
      # Wide enough for the longest code, and for rows to be read a few times.
      if width > max(most, 4 * _LEAST_WIDTH):
        continue
      code = max(size for size in _divisors(width) if size <= most)
      sizes = ProductSizes(rows, width, code, parts, halved, limit)
      fits = sizes.vmem_bytes(k, out_bytes) <= on.vmem_bytes * 13 // 16
      if fits and (width >= _LEAST_WIDTH or width == n // parts):
        return sizes
      if (fits or width == LANES) and rows == CHUNK:
        return sizes
    rows = max(CHUNK, rows // 2 // CHUNK * CHUNK)


def outer(k: int, n: int, on: Chip) -> OuterSizes:
  """Sizes for x [m, k] and y [m, n], all in whole lanes."""
  parts = _parts(n, on)
  halved = (3, 4) if on.generation > 6 else (0, 1)
  width_n = max(x for x in _divisors(n // parts) if x <= _MOST_WIDTH_N)
  cycles = max(on.product_cycles, _VECTOR_CYCLES) * (DEPTHS[0] // LANES)
  chains = _OUTER_CYCLES // cycles
  for width_k in reversed(_divisors(k)):
    fitting = [
      size
      for size in _divisors(width_k)
      if -(-size // CHUNK) <= max(1, chains)
      and (size % CHUNK == 0 or width_k % CHUNK)
    ]
    rows = max(fitting, default=LANES)
    columns = max(
      size
      for size in _divisors(width_n)
      if size == LANES or -(-rows // CHUNK) * (size // LANES) <= chains
    )
    sizes = OuterSizes(
      DEPTHS,
      width_k,
      width_n,
      rows,
      columns,
      parts,
      halved,
      on.vmem_bytes * 15 // 16,
    )
    if sizes.vmem_bytes() <= on.vmem_bytes * 3 // 4 or width_k == LANES:
      return sizes
  raise AssertionError('a width of one lane always fits')


def _parts(n, on):
  return on.cores if n // LANES % on.cores == 0 else 1


def _divisors(size):
  """Widths in whole lanes that divide a size, in rising order."""
  lanes = size // LANES
  return [LANES * i for i in range(1, lanes + 1) if lanes % i == 0]


def _check_multiple(name, size, unit):
  if size < unit or size % unit:
    raise ValueError(f'{name}={size} must be a multiple of {unit}')


def _check_divides(name, size, of_name, of):
  if size < 1 or of % size:
    raise ValueError(f'{name}={size} does not divide {of_name}={of}')
