"""Quantisation to FP8 with a scale for each tile."""

import jax

from pallas_kernels.quantize_fp8 import reference
from pallas_kernels.quantize_fp8.reference import (
  BLOCKS,
  COLUMNS,
  E4M3,
  LARGEST,
  ROWS,
  SIZE,
  TENSOR,
  Quantized,
  Tile,
)

__all__ = (
  'BLOCKS',
  'COLUMNS',
  'E4M3',
  'LARGEST',
  'ROWS',
  'SIZE',
  'TENSOR',
  'Quantized',
  'Tile',
  'quantize',
)


def quantize(
  x: jax.Array, tile: Tile, *, power_of_two: bool = False
) -> Quantized:
  """Each tile as q · scale: scale = max(amax, 1e-4) / 448, q = e4m3(x / scale).

  Source: DeepSeek-V3, arXiv:2412.19437, §3.3.2.

  Args:
    x: [..., m, k], of any sizes: tiles at the edges are narrower.
    tile: ROWS (1 x 128), COLUMNS (128 x 1), BLOCKS (128 x 128) or TENSOR (one
      scale for each matrix).
    power_of_two: Round scales up to powers of two (UE8M0's values).
  """
  return reference.quantize(x, tile, power_of_two)
