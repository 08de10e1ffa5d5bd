"""Attention through JAX's splash kernels for TPUs.

Blocks of keys later than all queries of a block are not visited.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as mask_lib,
)

LANES = 128
_MAX_BLOCK = 512


def flash_attention(
  q_BTHQ: jax.Array,
  k_BSGQ: jax.Array,
  v_BSGU: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  first_query: int | jax.Array,
  scale: float,
  interpret: bool,
) -> jax.Array:
  """See ops.flash_attention."""
  T, H = q_BTHQ.shape[1:3]
  S, U = k_BSGQ.shape[1], v_BSGU.shape[-1]
  kernel = _kernel(H, T, S, first_query, interpret)
  heads_first = lambda x: jnp.moveaxis(_whole_lanes(x), 2, 1)
  out_BHTU = jax.vmap(kernel)(
    heads_first(q_BTHQ * scale),
    heads_first(k_BSGQ),
    heads_first(v_BSGU),
    kernel_lib.SegmentIds(q=segment_BT, kv=segment_BS),
  )
  return jnp.moveaxis(out_BHTU, 1, 2)[..., :U]


def _kernel(H, T, S, first_query, interpret):
  """The kernel of queries first_query … of all S.

  A kernel is made for all queries, as for devices that have T of them each,
  of which the one at hand takes its part: where that is may be traced.
  """
  block_q, block_kv = _block(T), _block(S)
  kernel = kernel_lib.make_splash_mha(
    mask=mask_lib.MultiHeadMask([mask_lib.CausalMask((S, S))] * H),
    block_sizes=kernel_lib.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
    head_shards=1,
    q_seq_shards=S // T,
    interpret=interpret,
  )
  if T == S:
    return kernel
  part = first_query // T

  def own(x, axis):
    size = x.shape[axis] * T // S
    return jax.lax.dynamic_slice_in_dim(x, part * size, size, axis)

  def own_info(info):
    # A block of mask is the same for all devices, and a causal one has none.
    return info._replace(
      data_next=own(info.data_next, 1),
      block_mask=own(info.block_mask, 1),
      mask_next=None,
      partial_mask_blocks=None,
      q_sequence=own(info.q_sequence, 0),
    )

  infos, options = kernel.tree_flatten()
  return kernel.tree_unflatten(options, [own_info(info) for info in infos])


def _whole_lanes(x):
  """Zeros behind each head's numbers, to whole lanes: 192 become 256."""
  widths = [(0, 0)] * x.ndim
  widths[-1] = 0, -x.shape[-1] % LANES
  return jnp.pad(x, widths)


def _block(size):
  """The largest power of 2 from 128 to 512 that divides the size."""
  return next(b for b in (_MAX_BLOCK, 256, LANES) if size % b == 0)
