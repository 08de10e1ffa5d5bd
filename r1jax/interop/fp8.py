"""Block FP8 weights as checkpoints keep them: e4m3 and a scale a block.

w[i, j] = q[i, j] · scale[i // 128, j // 128], where [i, j] is [out, in].
`weight_scale_inv` is that multiplier, whatever its name says.

Source: DeepSeek-V3, arXiv:2412.19437, §3.3, and its released code.
"""

import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
DEFAULT_BLOCKS = (128, 128)
# What a weight's name is followed by in that of its scale.
SCALE = '_scale_inv'
_LEAST_AMAX = 1e-4  # A block of zeros must not have the scale 0.

Blocks = tuple[int, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
  """A leaf that is kept in FP8, for export; nothing computes with it.

  Attributes:
    q: float8_e4m3fn in the layout of the leaf.
    scale: [*stack, blocks of out, blocks of in] of the checkpoint's tensors,
      float32 or powers of two (float8_e8m0fnu) as they are there; parts of
      one tensor (k_up and v_up) have the same.
    blocks: Rows and columns of a block.
  """

  q: jax.Array
  scale: jax.Array
  blocks: Blocks = dataclasses.field(metadata={'static': True})

  def __jax_array__(self) -> jax.Array:
    return self.astype(None)

  def astype(self, dtype: Any) -> jax.Array:
    """What a model asks of its weights; these are refused."""
    raise TypeError(
      'weights of keep_fp8=True are for export.save alone, load them with '
      'keep_fp8=False to compute'
    )

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q.shape


def scale_shape(shape: tuple[int, ...], blocks: Blocks) -> tuple[int, ...]:
  """Blocks of a matrix; the last ones may be ragged."""
  return tuple(-(-size // b) for size, b in zip(shape, blocks, strict=True))


def dequantize(
  q_rc: np.ndarray,
  scale: np.ndarray,
  rows: np.ndarray,
  columns: np.ndarray,
  blocks: Blocks,
) -> np.ndarray:
  """Rows and columns of a matrix in float32.

  Args:
    q_rc: Those rows and columns.
    scale: Of the whole matrix.
    rows: Which rows they are.
    columns: Which columns.
    blocks: Rows and columns of a block.
  """
  out = q_rc.astype(np.float32)
  picked = scale.astype(np.float32).take(rows // blocks[0], axis=0)
  out *= picked.take(columns // blocks[1], axis=1)
  return out


def quantize(w: np.ndarray, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
  """A matrix as (q, scale): s = max(amax, 1e-4) / 448 of each block."""
  rows, columns = w.shape
  scale = np.empty(scale_shape(w.shape, blocks), np.float32)
  q = np.empty(w.shape, E4M3)
  for i in range(scale.shape[0]):
    band = np.asarray(
      w[i * blocks[0] : min((i + 1) * blocks[0], rows)], np.float32
    )
    starts = np.arange(0, columns, blocks[1])
    amax = np.maximum.reduceat(np.abs(band).max(0), starts)
    scale[i] = np.maximum(amax, _LEAST_AMAX) / np.float32(LARGEST)
    wide = np.repeat(scale[i], blocks[1])[:columns]
    # JAX and NumPy turn what is above 464 into NaN, so it is clipped first.
    scaled = np.clip(band / wide, -LARGEST, LARGEST)
    q[i * blocks[0] : i * blocks[0] + len(band)] = scaled.astype(E4M3)
  return q, scale


def is_quantized(leaf: Any) -> bool:
  return isinstance(leaf, Quantized)
