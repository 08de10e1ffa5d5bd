"""The head of DeepSeek-V3: 4,096 tokens, 7,168 wide, 129,280 columns."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import common
from pallas_kernels.linear_cross_entropy import ops

_TOKENS, _WIDTH, _COLUMNS = 4096, 7168, 129280


def cases() -> tuple[common.Case, ...]:
  """Forward, and with both gradients."""
  run = functools.partial(ops.linear_cross_entropy, implementation='pallas')

  def with_gradients(x_mD, w_DV, target_m, pull_m):
    (logp_m, entropy_m), vjp = jax.vjp(
      lambda x, w: run(x, w, target_m), x_mD, w_DV
    )
    return logp_m, entropy_m, vjp((pull_m, jnp.zeros_like(pull_m)))

  struct = jax.ShapeDtypeStruct
  x_mD = struct((_TOKENS, _WIDTH), jnp.bfloat16)
  w_DV = struct((_WIDTH, _COLUMNS), jnp.bfloat16)
  args = x_mD, w_DV, struct((_TOKENS,), jnp.int32)
  product = 2 * _TOKENS * _WIDTH * _COLUMNS
  size = 2 * (_TOKENS * _WIDTH + _WIDTH * _COLUMNS)
  make = functools.partial(
    common.Case, 'linear_cross_entropy', implementation='pallas'
  )
  return (
    make(
      name='forward', function=run, args=args, flops=product, hbm_bytes=size
    ),
    make(
      name='forward and gradients',
      function=with_gradients,
      args=(*args, struct((_TOKENS,), jnp.float32)),
      flops=3 * product,
      hbm_bytes=2 * size,
    ),
  )
