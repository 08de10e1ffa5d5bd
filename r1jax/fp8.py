"""FP8 tiles of activations: e4m3, and a scale for 128 channels of a token.

Source: DeepSeek-V3, arXiv:2412.19437, §3.3.
"""

import jax
import jax.numpy as jnp

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
TILE = 128
_LEAST_AMAX = 1e-4  # A tile of zeros must not have the scale 0.


def quantize_tiles(
  x: jax.Array, *, power_of_two: bool = False
) -> tuple[jax.Array, jax.Array]:
  """Each tile as q · scale: scale = max(amax, 1e-4) / 448.

  Args:
    x: [..., D]; the last tile may be narrower.
    power_of_two: Round scales up to powers of two (UE8M0's values).

  Returns:
    q e4m3 [..., D] and scale float32 [..., ceil(D / 128)].
  """
  D = x.shape[-1]
  wide = [(0, 0)] * (x.ndim - 1) + [(0, -D % TILE)]
  tiles = jnp.pad(x.astype(jnp.float32), wide).reshape(*x.shape[:-1], -1, TILE)
  amax = jnp.maximum(jnp.abs(tiles).max(-1), _LEAST_AMAX)
  scale = amax / LARGEST
  if power_of_two:
    # From the bits, as log2 rounds: the exponent, one more if there is a rest.
    mantissa, exponent = jnp.frexp(scale)
    scale = jnp.ldexp(
      jnp.ones_like(scale), jnp.where(mantissa == 0.5, exponent - 1, exponent)
    )
  # Above 464 a cast gives nan, so it is clipped first.
  scaled = jnp.clip(tiles / scale[..., None], -LARGEST, LARGEST)
  return scaled.astype(E4M3).reshape(*x.shape[:-1], -1)[..., :D], scale


def dequantize_tiles(
  q: jax.Array, scale: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """q · scale in float32, then in `dtype`."""
  wide = jnp.repeat(scale, TILE, axis=-1)[..., : q.shape[-1]]
  return (q.astype(jnp.float32) * wide).astype(dtype)
