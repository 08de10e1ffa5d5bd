"""FP8 tiles, as they are written: one scale for each tile of a matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
SIZE = 128
LEAST_AMAX = 1e-4  # A tile of zeros must not have the scale 0.

# Rows and columns of a tile; 0 for all of them.
Tile = tuple[int, int]
ROWS: Tile = (1, SIZE)  # Of activations that are summed over their columns,
COLUMNS: Tile = (SIZE, 1)  # over their rows.
BLOCKS: Tile = (SIZE, SIZE)  # Of weights.
TENSOR: Tile = (0, 0)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['q', 'scale'],
  meta_fields=['tile'],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
  """x ≈ q · scale.

  Attributes:
    q: e4m3 [..., m, k].
    scale: float32 [..., ⌈m / rows of a tile⌉, ⌈k / columns of a tile⌉].
    tile: Its rows and columns.
  """

  q: jax.Array
  scale: jax.Array
  tile: Tile

  @property
  def shape(self) -> tuple[int, ...]:
    return self.q.shape

  @property
  def mT(self) -> 'Quantized':
    """Of the transposed matrix: the same numbers."""
    return Quantized(self.q.mT, self.scale.mT, self.tile[::-1])

  def wide_scale(self) -> jax.Array:
    """The scale of each value, float32 [..., m, k]."""
    scale = self.scale
    for axis in (-2, -1):
      size = self.shape[axis]
      times = self.tile[axis] or size
      scale = jnp.repeat(scale, times, axis=axis)
      scale = jax.lax.slice_in_dim(scale, 0, size, axis=scale.ndim + axis)
    return scale

  def dequantized(self) -> jax.Array:
    """q · scale, float32."""
    return self.q.astype(jnp.float32) * self.wide_scale()


def scale_of(amax: jax.Array, power_of_two: bool) -> jax.Array:
  """The scale of tiles with these largest magnitudes, float32."""
  scale = jnp.maximum(amax, LEAST_AMAX) / LARGEST
  if not power_of_two:
    return scale
  # From the bits, as log2 rounds: the exponent, one more if there is a rest.
  mantissa, exponent = jnp.frexp(scale)
  power = jnp.ldexp(
    jnp.ones_like(scale), jnp.where(mantissa == 0.5, exponent - 1, exponent)
  )
  # Those of nan and inf would be 1: what is not finite must be seen.
  return jnp.where(jnp.isfinite(scale), power, scale)


def quantize(x: jax.Array, tile: Tile, power_of_two: bool) -> Quantized:
  """See ops.quantize."""
  *lead, m, k = x.shape
  rows, columns = tile[0] or m, tile[1] or k
  wide = [(0, 0)] * len(lead) + [(0, -m % rows), (0, -k % columns)]
  tiles = jnp.pad(x.astype(jnp.float32), wide).reshape(
    *lead, -(-m // rows), rows, -(-k // columns), columns
  )
  scale = scale_of(jnp.abs(tiles).max((-3, -1)), power_of_two)
  # Above 464 a cast gives nan, so it is clipped first.
  wide_scale = scale[..., :, None, :, None]
  scaled = jnp.clip(tiles / wide_scale, -LARGEST, LARGEST)
  q = scaled.astype(E4M3).reshape(*lead, m + wide[-2][1], k + wide[-1][1])
  return Quantized(q[..., :m, :k], scale, tile)


def requantize(x: Quantized, power_of_two: bool) -> Quantized:
  """See ops.requantize."""
  return quantize(x.dequantized(), COLUMNS, power_of_two)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
  """silu(gate) · up in float32, then in the dtype of gate."""
  gate32 = gate.astype(jnp.float32)
  out = gate32 * jax.nn.sigmoid(gate32) * up.astype(jnp.float32)
  return out.astype(gate.dtype)


def rms_norm(x: jax.Array, scale_k: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) · scale in float32, then in the dtype of x."""
  x32 = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  return (x32 * inverse * scale_k).astype(x.dtype)
