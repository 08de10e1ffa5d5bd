"""How much the kernels work on at once, and how a chip gets to FP8."""

import dataclasses

from jax.experimental.pallas import tpu as pltpu

LANES = 128
_ROWS = 32  # Rows of an e4m3 tile of memory.
# Of a block: 64 tiles of 128 x 128, whose code is written out. With half of
# them the compiler's schedule starts and ends twice as often, at 200 to 500
# cycles each; with twice of them it takes twice as long to compile, which is
# bearable where casts are no code.
_NUMBERS = 2**20
# A block has all columns, or some with whole lanes of scales. V3's widest, of
# 18,432, fits: 128 rows of float32 take 2 · 9 MiB.
_MOST_WHOLE, _SOME_COLUMNS = 160 * LANES, LANES * LANES
SCALE_ROWS = 8  # Rows of a float32 tile of memory.


@dataclasses.dataclass(frozen=True)
class Arithmetic:
  """What a chip's vector unit can do.

  Attributes:
    has_e4m3: It casts to and from e4m3. Others take 18 operations for a cast
      to it where the kernel's own, from the bits, takes 6.
    has_bfloat16: It packs two float32 into bfloat16 at once.
    divides: Its reciprocal is as exact as float32, so that a division is two
      operations; else it takes 13, and a product with a reciprocal refined
      once is the same number on the chip, though not on a CPU.
  """

  has_e4m3: bool
  has_bfloat16: bool
  divides: bool


ARITHMETIC = {
  5: Arithmetic(has_e4m3=False, has_bfloat16=False, divides=False),
  6: Arithmetic(has_e4m3=False, has_bfloat16=True, divides=True),
  7: Arithmetic(has_e4m3=True, has_bfloat16=True, divides=True),
}
# Right on all of them, where no device says which it is.
ANY = ARITHMETIC[6]


def arithmetic() -> Arithmetic:
  """Of the device at hand, or of those of the mesh that is set."""
  try:
    generation = pltpu.get_tpu_info().generation
  except ValueError:
    return ANY
  return ARITHMETIC.get(generation, ANY)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Of a call.

  Attributes:
    rows: Of a block; a multiple of 32.
    columns: Of a block; a multiple of 128.
    arithmetic: Of the chip.
  """

  rows: int
  columns: int
  arithmetic: Arithmetic

  def __post_init__(self):
    for name, multiple in (('rows', _ROWS), ('columns', LANES)):
      value = getattr(self, name)
      if value < multiple or value % multiple:
        raise ValueError(f'{name}={value} must be a multiple of {multiple}')


def _columns(k):
  return k if k <= _MOST_WHOLE else _SOME_COLUMNS


def rows(m: int, k: int) -> BlockSizes:
  """For tiles of rows: whole rows, as their scales are narrow.

  Args:
    m: Rows, a multiple of 32.
    k: Columns, a multiple of 128.
  """
  on = arithmetic()
  return _rows(m, k, 2 * _NUMBERS if on.has_e4m3 else _NUMBERS, on)


def made_rows(m: int, k: int, num_inputs: int) -> BlockSizes:
  """As `rows`, of numbers that the kernel makes from so many others each."""
  return _rows(m, k, _NUMBERS // num_inputs, arithmetic())


def _rows(m, k, numbers, on):
  columns = _columns(k)
  fitting = numbers // columns
  unit = LANES if fitting >= LANES else _ROWS
  most = max(fitting // unit, 1) * unit
  return BlockSizes(min(m, most), columns, on)


def columns(m: int, k: int) -> BlockSizes:
  """For tiles of columns: 8 rows of scales, if there are as many."""
  num_rows = min(m, SCALE_ROWS * LANES)
  fitting = _NUMBERS // num_rows // LANES * LANES
  return BlockSizes(num_rows, min(k, fitting), arithmetic())


def requantized(m: int, k: int) -> BlockSizes:
  """For tiles of columns from tiles of rows: a part of 8 rows of scales."""
  columns = _columns(k)
  fitting = max(1, 2 * _NUMBERS // LANES // columns)
  # A power of two of them, which divides the 8.
  parts = min(2 ** (fitting.bit_length() - 1), SCALE_ROWS, m // LANES)
  return BlockSizes(parts * LANES, columns, arithmetic())


def blocks(k: int) -> BlockSizes:
  """For square tiles."""
  return BlockSizes(LANES, _columns(k), arithmetic())
