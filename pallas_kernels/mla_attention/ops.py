"""Causal attention of MLA, for training and prefill.

The keys of a head are its own 128 numbers and 64 rotated ones that all heads
share, so the rotated ones come once: no array of whole keys is ever written.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import blocks as blocks_lib
from pallas_kernels.mla_attention import kernel, reference

IMPLEMENTATIONS = ('pallas', 'reference')

_LANES = 128
# Of blocks with several documents; no document's number, and not equal.
_MIXED_QUERIES, _MIXED_KEYS = -(2**31), -(2**31) + 1


def mla_attention(
  q_BTHQ: jax.Array,
  k_BSHN: jax.Array,
  rope_BSR: jax.Array,
  v_BSHU: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  first_query: int | jax.Array = 0,
  *,
  scale: float,
  implementation: str = 'pallas',
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Attention of queries to the keys of their document up to their own slot.

  out[t] = Σ_s softmax_s(scale · q[t] · [k[s]; rope[s]]) · v[s] over the slots
  s ≤ first_query + t with segment[s] = segment[t]

  Causal by slot is causal by position where each document's tokens stand in
  order. Documents need no ids in order, and padding (0) is one of them; keys
  that come before a block's documents are skipped where ids are in order.

  The kernels want [B, H, Q, T], [B, H, S, N] and [B, H, U, S], and return
  [B, H, U, T]: a product that makes or takes such an array right there, beside
  this call, saves a copy.

  Args:
    q_BTHQ: [B, T, H, N + R] queries of slots first_query, first_query + 1, ….
    k_BSHN: [B, S, H, N] keys of all slots, the part without position; on a
      TPU N is a multiple of 128.
    rope_BSR: [B, S, R] rotated part of the keys, the same for all heads.
    v_BSHU: [B, S, H, U] values.
    segment_BT: int32 [B, T] document of each query, that of its slot.
    segment_BS: int32 [B, S] document of each key.
    first_query: Slot of the first query, at least 0.
    scale: Of the scores.
    implementation: 'pallas' (kernels for TPUs, forward and backward) or
      'reference'.
    blocks: Sizes of the kernels' pieces; by dtype and length if None.
    interpret: Run the kernels on a CPU.

  Returns:
    [B, T, H, U] in the dtype of v; softmax and sums in float32.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.

  Source: DeepSeek-V2, arXiv:2405.04434, §2.1; Dao, arXiv:2307.08691, §3.1.
  """
  _check(q_BTHQ, k_BSHN, rope_BSR, v_BSHU, segment_BT, segment_BS)
  first_query = jnp.asarray(first_query, jnp.int32)
  match implementation:
    case 'pallas':
      if blocks is None:
        blocks = blocks_lib.default(q_BTHQ.dtype, q_BTHQ.shape[1])
      static = _Static(scale, blocks, interpret)
      out_BHUT = _attend(
        jnp.moveaxis(q_BTHQ, 1, -1),
        jnp.moveaxis(k_BSHN, 1, 2),
        rope_BSR,
        jnp.moveaxis(v_BSHU, 1, -1),
        segment_BT,
        segment_BS,
        first_query,
        static,
      )
      return jnp.moveaxis(out_BHUT, -1, 1)
    case 'reference':
      return reference.mla_attention(
        q_BTHQ,
        k_BSHN,
        rope_BSR,
        v_BSHU,
        segment_BT,
        segment_BS,
        first_query,
        scale,
      )
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )


def _check(q_BTHQ, k_BSHN, rope_BSR, v_BSHU, segment_BT, segment_BS):
  B, T, H, Q = q_BTHQ.shape
  _, S, _, N = k_BSHN.shape
  expected = {
    'k': (k_BSHN, (B, S, H, N)),
    'rope': (rope_BSR, (B, S, Q - N)),
    'v': (v_BSHU, (B, S, H, v_BSHU.shape[-1])),
    'segment_BT': (segment_BT, (B, T)),
    'segment_BS': (segment_BS, (B, S)),
  }
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise ValueError(
        f'{name} of shape {array.shape} does not fit queries of shape '
        f'{q_BTHQ.shape} and keys of shape {k_BSHN.shape}: it must be {shape}'
      )
  dtypes = {str(x.dtype) for x in (q_BTHQ, k_BSHN, rope_BSR, v_BSHU)}
  if len(dtypes) > 1:
    raise ValueError(
      f'q, k, rope and v must be of one dtype, not of {sorted(dtypes)}'
    )


class _Static:
  """What is not an array: hashed by identity of its parts."""

  def __init__(
    self,
    scale: float,
    blocks: blocks_lib.BlockSizes,
    interpret: bool | pltpu.InterpretParams,
  ):
    self.scale, self.blocks, self.interpret = scale, blocks, interpret
    self._key = scale, blocks, repr(interpret)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, _Static) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attend(
  q_BHQT, k_BHSN, rope_BSR, v_BHUS, segment_BT, segment_BS, first_query, static
):
  return _forward(
    q_BHQT,
    k_BHSN,
    rope_BSR,
    v_BHUS,
    segment_BT,
    segment_BS,
    first_query,
    static,
  )[0]


def _forward(
  q_BHQT, k_BHSN, rope_BSR, v_BHUS, segment_BT, segment_BS, first_query, static
):
  """The output, and what the backward pass needs."""
  sizes, (H, T), S = static.blocks, q_BHQT.shape[1::2], k_BHSN.shape[2]
  t_cut = blocks_lib.cut(T, sizes.queries, sizes.resident_queries, _LANES)
  s_cut = blocks_lib.cut(S, sizes.keys, sizes.resident_keys, _LANES)
  documents = _Documents(segment_BT, segment_BS, t_cut, s_cut)
  out_BHUT, lse_BH1T = kernel.forward(
    documents.plan(first_query, documents.first_key()),
    _pad(q_BHQT, 3, t_cut.size),
    _pad(k_BHSN, 2, s_cut.size),
    _pad(rope_BSR, 1, s_cut.size),
    _pad(v_BHUS, 3, s_cut.size),
    documents.query_B1T,
    documents.key_B1S,
    scale=static.scale,
    t_cut=t_cut,
    s_cut=s_cut,
    heads=blocks_lib.group(H, sizes.heads),
    interpret=static.interpret,
  )
  out_BHUT, lse_BH1T = out_BHUT[..., :T], lse_BH1T[..., :T]
  args = q_BHQT, k_BHSN, rope_BSR, v_BHUS, segment_BT, segment_BS, first_query
  return out_BHUT, (args, out_BHUT, lse_BH1T)


def _backward(static, saved, pull_BHUT):
  """Of all queries, as many at a time as stay in VMEM."""
  args, out_BHUT, lse_BH1T = saved
  q_BHQT, k_BHSN, rope_BSR, v_BHUS, segment_BT, segment_BS, first_query = args
  sizes, T, S = static.blocks, q_BHQT.shape[-1], k_BHSN.shape[2]
  mean_BH1T = jnp.sum(
    out_BHUT.astype(jnp.float32) * pull_BHUT.astype(jnp.float32),
    axis=2,
    keepdims=True,
  )
  most = sizes.grad_resident_queries
  chunk = blocks_lib.cut(T, sizes.grad_queries, most, _LANES)
  s_cut = blocks_lib.cut(S, sizes.grad_keys, S, _LANES)
  grads_q, sums = [], None
  for start in range(0, T, chunk.part):
    part = functools.partial(_part, start=start, size=chunk.part)
    of_queries = [part(x, 3) for x in (q_BHQT, pull_BHUT, lse_BH1T, mean_BH1T)]
    grad_q_BHQT, *grads = _backward_part(
      *of_queries,
      k_BHSN,
      rope_BSR,
      v_BHUS,
      part(segment_BT, 1),
      segment_BS,
      first_query + start,
      static=static,
      t_cut=blocks_lib.Cut(chunk.block, chunk.per_part, 1),
      s_cut=s_cut,
      grad_dtype=q_BHQT.dtype if chunk.parts == 1 else jnp.float32,
    )
    grads_q.append(grad_q_BHQT)
    sums = grads if sums is None else [x + y for x, y in zip(sums, grads)]
  grad_k_BHNS, grad_rope_BGRS, grad_v_BHUS = (x[..., :S] for x in sums)
  grad_rope_BRS = grad_rope_BGRS.sum(1)
  return (
    jnp.concatenate(grads_q, axis=-1)[..., :T],
    jnp.moveaxis(grad_k_BHNS, 2, 3).astype(k_BHSN.dtype),
    jnp.moveaxis(grad_rope_BRS, 1, 2).astype(rope_BSR.dtype),
    grad_v_BHUS.astype(v_BHUS.dtype),
    None,
    None,
    None,
  )


def _backward_part(
  q_BHQT,
  pull_BHUT,
  lse_BH1T,
  mean_BH1T,
  k_BHSN,
  rope_BSR,
  v_BHUS,
  segment_BT,
  segment_BS,
  first_query,
  *,
  static,
  t_cut,
  s_cut,
  grad_dtype,
):
  documents = _Documents(segment_BT, segment_BS, t_cut, s_cut)
  return kernel.backward(
    documents.plan(first_query, documents.last_query()),
    _pad(q_BHQT, 3, t_cut.size),
    _pad(k_BHSN, 2, s_cut.size),
    _pad(rope_BSR, 1, s_cut.size),
    _pad(v_BHUS, 3, s_cut.size),
    # Zeros: queries of padding pull nothing.
    _pad(pull_BHUT, 3, t_cut.size),
    _pad(lse_BH1T, 3, t_cut.size),
    _pad(mean_BH1T, 3, t_cut.size),
    documents.query_B1T,
    documents.key_B1S,
    scale=static.scale,
    t_cut=t_cut,
    s_cut=s_cut,
    heads=blocks_lib.group(q_BHQT.shape[1], static.blocks.grad_heads),
    grad_dtype=grad_dtype,
    interpret=static.interpret,
  )


_attend.defvjp(_forward, _backward)


class _Documents:
  """Which documents the blocks of queries and of keys hold.

  Padding continues the last document: later than every query it is seen by
  none, and it makes no block one of several documents.
  """

  def __init__(self, segment_BT, segment_BS, t_cut, s_cut):
    segment_BT = _pad(segment_BT, 1, t_cut.size, mode='edge')
    segment_BS = _pad(segment_BS, 1, s_cut.size, mode='edge')
    self.query_B1T = segment_BT[:, None].astype(jnp.int32)
    self.key_B1S = segment_BS[:, None].astype(jnp.int32)
    self._query_Bi = _limits(self.query_B1T, t_cut.blocks)
    self._key_Bj = _limits(self.key_B1S, s_cut.blocks)

  def plan(self, first_query, bound_Bn):
    """The kernels' scalars, flat: SMEM pads every axis but one."""
    query_Bi = _only(self._query_Bi, _MIXED_QUERIES)
    key_Bj = _only(self._key_Bj, _MIXED_KEYS)
    scalars = first_query, bound_Bn, query_Bi, key_Bj
    return tuple(x.astype(jnp.int32).reshape(-1) for x in scalars)

  def first_key(self):
    """[B, i] the first block of keys with a document of the queries."""
    return jnp.argmax(self._may_meet(), axis=2)

  def last_query(self):
    """[B, j] the last block of queries with a document of the keys, or -1."""
    meet_Bij = self._may_meet()
    index_i = jnp.arange(meet_Bij.shape[1])
    return jnp.where(meet_Bij, index_i[:, None], -1).max(1)

  def _may_meet(self):
    (low_Bi, high_Bi), (low_Bj, high_Bj) = self._query_Bi, self._key_Bj
    meet_Bij = low_Bi[:, :, None] <= high_Bj[:, None]
    return meet_Bij & (low_Bj[:, None] <= high_Bi[:, :, None])


def _limits(segment_B1X, num_blocks):
  segment_Bnx = segment_B1X.reshape(len(segment_B1X), num_blocks, -1)
  return segment_Bnx.min(-1), segment_Bnx.max(-1)


def _only(limits, mixed):
  low_Bn, high_Bn = limits
  return jnp.where(low_Bn == high_Bn, low_Bn, mixed)


def _part(x, axis, start, size):
  """Up to `size` of an axis, fewer where it ends."""
  end = min(start + size, x.shape[axis])
  return jax.lax.slice_in_dim(x, start, end, axis=axis)


def _pad(x, axis, size, mode='constant'):
  """Fills an axis up to a size, with zeros if nothing else is said."""
  if x.shape[axis] == size:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = 0, size - x.shape[axis]
  return jnp.pad(x, widths, mode=mode)
