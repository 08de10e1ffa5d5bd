"""What DeepSeek-V3's layers quantise of 8,192 tokens, and a weight."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.quantize_fp8 import ops

_TOKENS, _WIDTH, _EXPERT_WIDTH = 8192, 7168, 2048
_EPS = 1e-6


def cases() -> tuple[common.Case, ...]:
  """Each form once: of activations in bfloat16, of a weight in float32."""
  x_mk = _struct(_TOKENS, _WIDTH)
  h_mn = _struct(_TOKENS, _EXPERT_WIDTH)
  # Gate and up side by side, as they are kept.
  w_kn = _struct(_WIDTH, 2 * _EXPERT_WIDTH, dtype=jnp.float32)
  weight_k = _struct(_WIDTH, dtype=jnp.float32)
  kept = ops.Quantized(
    _struct(_TOKENS, _WIDTH, dtype=ops.E4M3),
    _struct(_TOKENS, _WIDTH // ops.SIZE, dtype=jnp.float32),
    ops.ROWS,
  )
  quantize = lambda tile: lambda x, **options: ops.quantize(x, tile, **options)
  return (
    _case('rows', quantize(ops.ROWS), x_mk),
    _case('rows_power_of_two', quantize(ops.ROWS), x_mk, power_of_two=True),
    _case('columns', quantize(ops.COLUMNS), x_mk),
    _case('blocks', quantize(ops.BLOCKS), w_kn),
    _case('requantize', ops.requantize, kept),
    _case('swiglu', ops.swiglu_quantize, h_mn, h_mn),
    _case(
      'rms_norm',
      functools.partial(ops.rms_norm_quantize, eps=_EPS),
      x_mk,
      weight_k,
    ),
  )


def _case(name, function, *args, **options):
  """Vector work only, so that what it takes is to move the numbers."""
  function = functools.partial(function, **options)
  out = jax.eval_shape(function, *args)
  return common.Case(
    kernel='quantize_fp8',
    name=name,
    implementation='pallas',
    function=functools.partial(function, implementation='pallas'),
    args=args,
    flops=0,
    hbm_bytes=sum(
      x.size * x.dtype.itemsize for x in jax.tree.leaves((args, out))
    ),
  )


def _struct(*shape, dtype=jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)
