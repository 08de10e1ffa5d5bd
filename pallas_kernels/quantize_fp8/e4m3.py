"""Tiles of e4m3 inside of a kernel: scales, and casts from and to the bits.

Everything is 2D, [rows, 128] in whole tiles of memory, so that 8-bit and
16-bit numbers can be worked on four and two at a time, as uint32.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize_fp8 import blocks as blocks_lib
from pallas_kernels.quantize_fp8 import reference

_E4M3 = reference.E4M3
# The same bits, 2⁴ times smaller: a type that v5 and v6e do read.
_SMALL_E4M3, _SMALL = jnp.float8_e4m3b11fnuz, 16.0
_EXPONENT = 0x7F800000


def _bits(x, dtype=jnp.int32):
  return pltpu.bitcast(x, dtype)


def scale(amax: jax.Array, power_of_two: bool) -> jax.Array:
  """reference.scale, of the same bits where amax is finite."""
  result = jnp.maximum(amax, reference.LEAST_AMAX) / reference.LARGEST
  if not power_of_two:
    return result
  # Twice the power below, and so that of inf and of nan is inf.
  below = (_bits(result) - 1) & _EXPONENT
  return 2 * _bits(below, jnp.float32)


def magnitude(x: jax.Array, arithmetic: blocks_lib.Arithmetic) -> jax.Array:
  """|x| of float32 or bfloat16, float32."""
  # What is cast with its sign is unpacked with it, too.
  if x.dtype == jnp.float32 or arithmetic.has_e4m3:
    return jnp.abs(x.astype(jnp.float32))
  both = _bits(x, jnp.uint32) & jnp.uint32(0x7FFF7FFF)
  return _bits(both, x.dtype).astype(jnp.float32)


def signs(x: jax.Array) -> jax.Array:
  """The signs of float32, bfloat16 or e4m3, at those of 4 e4m3: uint32."""
  if x.dtype == jnp.float32:
    x = (_bits(x, jnp.uint32) >> 24).astype(jnp.int8)
  elif x.dtype == jnp.bfloat16:
    x = _bits(_bits(x, jnp.uint32) >> 8, jnp.int16).astype(jnp.int8)
  return _bits(x, jnp.uint32) & jnp.uint32(0x80808080)


def quantized(
  x: jax.Array,
  amax: jax.Array,
  power_of_two: bool,
  arithmetic: blocks_lib.Arithmetic,
  *,
  sign: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """e4m3(x / scale) and the scale.

  Args:
    x: [rows, 128], float32 or bfloat16; its magnitude if `sign` is given.
    amax: float32, of each tile; of a shape that broadcasts to that of x.
    power_of_two: Scales are.
    arithmetic: Of the chip.
    sign: Of x, as `signs` has them.
  """
  factor = scale(amax, power_of_two)
  if arithmetic.has_e4m3:
    q = _divide(x.astype(jnp.float32), factor, power_of_two, arithmetic)
    q = jnp.clip(q, -reference.LARGEST, reference.LARGEST).astype(_E4M3)
    if sign is not None:
      q = _bits(_bits(q, jnp.uint32) | sign, _E4M3)
    return q, factor
  if sign is None:
    sign, x = signs(x), magnitude(x, arithmetic)
  q = encode(_divide(x, factor, power_of_two, arithmetic), arithmetic)
  return _bits(_bits(q, jnp.uint32) | sign, _E4M3), factor


def _divide(x, factor, power_of_two, arithmetic):
  """x / factor."""
  if arithmetic.divides:
    return x / factor
  if power_of_two:
    return x * _bits(0x7F000000 - _bits(factor), jnp.float32)
  return x * pl.reciprocal(factor, full_range=False)


def encode(y: jax.Array, arithmetic: blocks_lib.Arithmetic) -> jax.Array:
  """Codes of float32 numbers from 0 to 448, int8.

  A code is 8 · (exponent + 6) + the number in units of 2^(exponent - 3), which
  are 8 to 16 of them; below 2^-6, in units of 2^-9, 0 to 8. Adding 2^23 units
  rounds to whole ones, ties to even, and leaves their number in the last bits.
  """
  exponent = _bits(jnp.maximum(y, 2.0**-6)) & _EXPONENT
  # The exponent's bits are 127 more, and 8 · (6 - 127) is 56 in 8 bits.
  units = exponent + ((20 << 23) + 56)
  code = _bits(y + _bits(units, jnp.float32))
  if not arithmetic.has_bfloat16:
    return (code + (exponent >> 20)).astype(jnp.int8)
  # 128 · exponent as the bits of bfloat16, and from here on two at a time.
  eights = _bits(exponent, jnp.float32).astype(jnp.bfloat16)
  both = _bits(code.astype(jnp.int16), jnp.uint32)
  both += _bits(eights, jnp.uint32) >> 4
  return _bits(both, jnp.int16).astype(jnp.int8)


def decoding_scale(
  factor: jax.Array, arithmetic: blocks_lib.Arithmetic
) -> jax.Array:
  """What `decoded` needs for a scale."""
  return factor if arithmetic.has_e4m3 else _SMALL * factor


def decoded(
  q: jax.Array, factor: jax.Array, arithmetic: blocks_lib.Arithmetic
) -> jax.Array:
  """|q| · scale, float32; factor is decoding_scale(scale)."""
  q = _bits(q, jnp.uint32) & jnp.uint32(0x7F7F7F7F)
  dtype = _E4M3 if arithmetic.has_e4m3 else _SMALL_E4M3
  return _bits(q, dtype).astype(jnp.float32) * factor
