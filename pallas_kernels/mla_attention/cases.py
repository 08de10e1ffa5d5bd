"""The shapes of DeepSeek-V3's attention at which the kernels are compiled."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.mla_attention import blocks as blocks_lib
from pallas_kernels.mla_attention import ops

# One row of 4,096 tokens, one document; 8 of the 128 heads, as for 16 devices.
_B, _T, _H = 1, 4096, 8
_N, _R, _U = 128, 64, 128
_SCALE = (_N + _R) ** -0.5


def cases() -> tuple[common.Case, ...]:
  """Forward, and forward with backward."""
  # Half of the square of scores is useful.
  pairs = _B * _H * _T * _T / 2
  products = pairs * 2 * (_N + _R + _U)
  grad_products = pairs * 2 * (3 * (_N + _R) + 2 * _U)
  struct = jax.ShapeDtypeStruct
  # As the products beside write and read them: see ops.mla_attention.
  args = (
    struct((_B, _H, _N + _R, _T), jnp.bfloat16),
    struct((_B, _H, _T, _N), jnp.bfloat16),
    struct((_B, _T, _R), jnp.bfloat16),
    struct((_B, _H, _U, _T), jnp.bfloat16),
    struct((_B, _T), jnp.int32),
  )
  size_bytes = sum(
    x.dtype.itemsize * np.prod(x.shape, dtype=float) for x in args
  )
  out = args[3]
  out_bytes = out.dtype.itemsize * np.prod(out.shape, dtype=float)
  return (
    common.Case(
      kernel='mla_attention',
      name='forward_t4096_h8',
      implementation='pallas',
      function=_forward,
      args=args,
      flops=products,
      hbm_bytes=size_bytes + out_bytes,
      scalars={'mla_attention_forward': _scalars(backward=False)},
    ),
    common.Case(
      kernel='mla_attention',
      name='vjp_t4096_h8',
      implementation='pallas',
      function=_vjp,
      args=(*args, out),
      flops=products + grad_products,
      # Backward reads all again, with the output and its gradient.
      hbm_bytes=3 * size_bytes + 3 * out_bytes,
      scalars={
        'mla_attention_forward': _scalars(backward=False),
        'mla_attention_backward': _scalars(backward=True),
      },
    ),
  )


def _forward(q_BHQT, k_BHSN, rope_BSR, v_BHUS, segment_BT):
  out_BTHU = ops.mla_attention(
    jnp.moveaxis(q_BHQT, -1, 1),
    jnp.moveaxis(k_BHSN, 2, 1),
    rope_BSR,
    jnp.moveaxis(v_BHUS, -1, 1),
    segment_BT,
    segment_BT,
    scale=_SCALE,
  )
  return jnp.moveaxis(out_BTHU, 1, -1)


def _vjp(q_BHQT, k_BHSN, rope_BSR, v_BHUS, segment_BT, pull_BHUT):
  run = lambda *args: _forward(*args, segment_BT)
  out_BHUT, vjp = jax.vjp(run, q_BHQT, k_BHSN, rope_BSR, v_BHUS)
  return out_BHUT, vjp(pull_BHUT)


def _scalars(*, backward):
  """Those of a row with one document, see kernel.forward and backward."""
  sizes = blocks_lib.default(jnp.bfloat16, _T)
  q, k = (
    (sizes.grad_queries, sizes.grad_keys)
    if backward
    else (sizes.queries, sizes.keys)
  )
  query_blocks, key_blocks = _T // q, _T // k
  bound = (
    np.full(_B * key_blocks, query_blocks - 1)
    if backward
    else np.zeros(_B * query_blocks)
  )
  ids = np.ones(_B * query_blocks), np.ones(_B * key_blocks)
  return dict(enumerate(x.astype(np.int32) for x in (np.zeros(1), bound, *ids)))
