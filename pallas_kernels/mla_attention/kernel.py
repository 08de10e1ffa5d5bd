"""Attention of MLA forward and backward as Pallas kernels for TPUs.

Scores stand with keys in sublanes and queries in lanes: their maximum and sum
are of whole registers, the values times the weights fill the matrix unit with
128 rows to the block of weights, and what belongs to a query is a row of lanes.
Arrays whose products need no transpose come with their features in sublanes.

Scores are in units of log 2: q is multiplied by scale · log2(e) once.

Source: Dao, arXiv:2307.08691, §3.1; DeepSeek-V2, arXiv:2405.04434, §2.1.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import blocks as blocks_lib

_MASKED = -1e30  # Finite, so that a block without any key is no NaN.
_LOG2_E = math.log2(math.e)
_MIB = 2**20


def _dot(x_mk, y_kn, contract=((1,), (0,))):
  """A product in float32, exact for float32 operands."""
  exact = jax.lax.Precision.HIGHEST if x_mk.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x_mk,
    y_kn,
    (contract, ((), ())),
    precision=exact,
    preferred_element_type=jnp.float32,
  )


def _keep(query_1q, key_1k, first_slot, first_key):
  """Which keys, in sublanes, the queries see: [k, q] of bool."""
  shape = key_1k.shape[1], query_1q.shape[1]
  key_kq = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  query_kq = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  # A row of lanes becomes a column through a transpose of whole registers.
  key_k1 = jnp.broadcast_to(key_1k, (128, shape[0])).T[:, :1]
  causal_kq = key_kq - query_kq <= first_slot - first_key
  return causal_kq & (query_1q == key_k1)


def _block(ref, index, size, head=None):
  """Block `index` of the last axis."""
  span = pl.ds(pl.multiple_of(index * size, size), size)
  return ref.at[:, span] if head is None else ref.at[head, :, span]


def _keys(k_ref, rope_ref, head, start, size):
  """[size, Q] keys of a head; their halves meet between whole lanes."""
  span = pl.ds(pl.multiple_of(start, size), size)
  return jnp.concatenate([k_ref[head, span, :], rope_ref[span, :]], axis=-1)


def _forward_kernel(
  first_query_ref,  # SMEM [1]
  first_key_ref,  # SMEM [B · blocks of queries]
  query_id_ref,  # SMEM [B · blocks of queries]
  key_id_ref,  # SMEM [B · blocks of keys]
  q_ref,  # [G, Q, part of T]
  k_ref,  # [G, part of S, N]
  rope_ref,  # [part of S, R]
  v_ref,  # [G, U, part of S]
  query_ref,  # [1, part of T]
  key_ref,  # [1, part of S]
  out_ref,  # [G, U, part of T]
  lse_ref,  # [G, 1, part of T]
  scaled_ref,  # [G, Q, part of T]
  score_ref,  # [G, k, q] f32
  acc_ref,  # [G, U, q] f32
  sum_ref,  # [G, 1, q] f32
  max_ref,  # [G, 1, q] f32, of this pair
  next_max_ref,  # [G, 1, q] f32, of the next pair
  shrink_ref,  # [G, 1, q] f32
  kept_acc_ref,  # [blocks of the part, G, U, q] f32
  kept_sum_ref,  # [blocks of the part, G, 1, q] f32
  kept_max_ref,  # [blocks of the part, G, 1, q] f32
  *,
  scale,
  t_cut,
  s_cut,
):
  """The pairs of one part of the queries and one of the keys.

  They are one flat loop over all blocks of queries, and a step of it holds
  the scores of the next pair beside the softmax and the values of this one:
  neither waits for the other, and no block of queries drains the pipeline.
  What a step works on has a fixed place in VMEM, so that the compiler knows
  what may be reordered; what one part of the keys leaves to the next is kept
  elsewhere.
  """
  row, t_part, s_part = (pl.program_id(axis) for axis in (0, 2, 3))
  num_heads = q_ref.shape[0]
  q, k = t_cut.block, s_cut.block
  first_query = first_query_ref[0]
  low_j = s_part * s_cut.per_part
  high_j = low_j + s_cut.per_part - 1

  def slot(i):
    return first_query + (t_part * t_cut.per_part + i) * q

  def query_block(i):
    return row * t_cut.blocks + t_part * t_cut.per_part + i

  def last_j(i):
    # Of all parts: it grows with i.
    return jnp.minimum((slot(i + 1) - 1) // k, s_cut.blocks - 1)

  def first_j(i):
    # A block of queries whose document begins after this part visits a block
    # of it in vain, so that each has a first one.
    first = jnp.maximum(first_key_ref[query_block(i)], low_j)
    return jnp.minimum(first, jnp.minimum(last_j(i), high_j))

  def is_masked(i, j):
    same = query_id_ref[query_block(i)] == key_id_ref[row * s_cut.blocks + j]
    return jnp.logical_not(same) | ((j + 1) * k - 1 > slot(i))

  def mask(i, j):
    query_1q = _block(query_ref, i, q)[...]
    return _keep(query_1q, _block(key_ref, j - low_j, k)[...], slot(i), j * k)

  def scores(head, i, j, keep_kq):
    k_kQ = _keys(k_ref, rope_ref, head, (j - low_j) * k, k)
    score_kq = _dot(k_kQ, _block(scaled_ref, i, q, head)[...])
    if keep_kq is not None:
      score_kq = jnp.where(keep_kq, score_kq, _MASKED)
    return score_kq

  def put(head, i, score_kq, is_first):
    before_1q = jnp.where(is_first, kept_max_ref[i, head], max_ref[head])
    max_1q = jnp.maximum(before_1q, score_kq.max(0, keepdims=True))
    # 0 at a block's first keys, and after keys that were all masked.
    shrink_ref[head] = jnp.exp2(before_1q - max_1q)
    next_max_ref[head] = max_1q
    score_ref[head] = score_kq

  def step(j, following, is_last, masked):
    keep_kq = mask(*following) if masked else None
    for head in range(num_heads):
      max_1q, shrink_1q = next_max_ref[head], shrink_ref[head]
      max_ref[head] = max_1q
      next_kq = scores(head, *following, keep_kq)
      weight_kq = jnp.exp2(score_ref[head] - max_1q)
      total_1q = weight_kq.sum(0, keepdims=True)
      sum_ref[head] = sum_ref[head] * shrink_1q + total_1q
      v_Uk = _block(v_ref, j - low_j, k, head)[...]
      value_Uq = _dot(v_Uk, weight_kq.astype(v_Uk.dtype))
      acc_ref[head] = acc_ref[head] * shrink_1q + value_Uq
      put(head, following[0], next_kq, is_last)

  def store(i):
    for head in range(num_heads):
      sum_1q = sum_ref[head]
      out_Uq = acc_ref[head] * (1 / sum_1q)
      _block(out_ref, i, q, head)[...] = out_Uq.astype(out_ref.dtype)
      _block(lse_ref, i, q, head)[...] = max_ref[head] + jnp.log2(sum_1q)

  def keep(i):
    kept_acc_ref[i] = acc_ref[...]
    kept_sum_ref[i] = sum_ref[...]
    kept_max_ref[i] = max_ref[...]

  def resume(i):
    acc_ref[...] = kept_acc_ref[i]
    sum_ref[...] = kept_sum_ref[i]

  @pl.when(s_part == 0)
  def _start():
    scaled = q_ref[...].astype(jnp.float32) * (scale * _LOG2_E)
    scaled_ref[...] = scaled.astype(scaled_ref.dtype)
    kept_max_ref[...] = jnp.full_like(kept_max_ref, _MASKED)

  @pl.when((s_part == 0) & (t_part == 0))
  def _zero():
    # Later blocks forget the sums of earlier ones as they do masked keys'.
    acc_ref[...] = jnp.zeros_like(acc_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

  def loop_body(this):
    i, j = this
    is_last = j == jnp.minimum(last_j(i), high_j)
    after = jnp.where(is_last, i + 1, i)
    # After the last pair come the scores of any one, which nobody reads.
    next_i = jnp.minimum(after, t_cut.per_part - 1)
    next_j = jnp.where(is_last, first_j(next_i), j + 1)
    masked = is_masked(next_i, next_j)
    following = next_i, next_j
    pl.when(masked)(lambda: step(j, following, is_last, True))
    pl.when(jnp.logical_not(masked))(lambda: step(j, following, is_last, False))
    pl.when(is_last & (j == last_j(i)))(lambda: store(i))
    if s_cut.parts > 1:
      pl.when(is_last & (j != last_j(i)))(lambda: keep(i))
      pl.when(is_last & (s_part > 0))(lambda: resume(next_i))
    return after, next_j

  # The first block of queries that sees any key of this part.
  start = (low_j * k - first_query) // q - t_part * t_cut.per_part
  start = jnp.maximum(start, 0)

  @pl.when(start < t_cut.per_part)
  def _run():
    pair = start, first_j(start)
    keep_kq = mask(*pair)
    for head in range(num_heads):
      put(head, start, scores(head, *pair, keep_kq), True)
    if s_cut.parts > 1:
      pl.when(s_part > 0)(lambda: resume(start))
    jax.lax.while_loop(lambda this: this[0] < t_cut.per_part, loop_body, pair)


def forward(
  plan: tuple[jax.Array, ...],
  q_BHQT: jax.Array,
  k_BHSN: jax.Array,
  rope_BSR: jax.Array,
  v_BHUS: jax.Array,
  query_B1T: jax.Array,
  key_B1S: jax.Array,
  *,
  scale: float,
  t_cut: blocks_lib.Cut,
  s_cut: blocks_lib.Cut,
  heads: int,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array]:
  """Returns [B, H, U, T], and [B, H, 1, T] log-sums in units of log 2.

  Args:
    plan: int32 slot of the first query [1]; of each block of queries
      [B · blocks], the first block of keys to visit, and the document if it
      has but one; the documents of the blocks of keys. Different negative
      numbers stand for several documents.
    q_BHQT: Queries, a whole number of parts; so are the keys.
    k_BHSN: Keys without position.
    rope_BSR: Rotated keys, of all heads.
    v_BHUS: Values.
    query_B1T: int32 document of each query.
    key_B1S: int32 document of each key.
    scale: Of the scores.
    t_cut: How queries are cut.
    s_cut: How keys are cut.
    heads: At a time.
    interpret: Run on a CPU.
  """
  B, H, Q, T = q_BHQT.shape
  S, N = k_BHSN.shape[2:]
  U, R = v_BHUS.shape[2], rope_BSR.shape[-1]
  G, q, k = heads, t_cut.block, s_cut.block
  dtype, itemsize = q_BHQT.dtype, q_BHQT.dtype.itemsize

  def last_part(t_part, s_part, first_query_ref):
    # Keys after all queries stay where they are.
    last = (first_query_ref[0] + (t_part + 1) * t_cut.part - 1) // s_cut.part
    return jnp.minimum(s_part, last)

  def of_queries(*shape):
    block = (None, *shape, t_cut.part)
    if len(shape) == 1:
      return pl.BlockSpec(block, lambda b, h, t, s, *_: (b, 0, t))
    return pl.BlockSpec(block, lambda b, h, t, s, *_: (b, h, 0, t))

  # Padded to whole tiles of 128 lanes.
  lanes = -(-N // 128) * 128, -(-R // 128) * 128
  vmem_bytes = (
    2 * G * Q * t_cut.part * itemsize  # q
    + 2 * G * s_cut.part * lanes[0] * itemsize  # k
    + 2 * s_cut.part * lanes[1] * itemsize  # rope
    + 2 * G * U * s_cut.part * itemsize  # v
    + 2 * G * U * t_cut.part * itemsize  # out
    + 2 * 8 * 4 * (2 * t_cut.part + s_cut.part)  # documents, lse
    + G * Q * t_cut.part * itemsize  # scaled
    + G * k * q * 4  # scores
    + G * (U + 4 * 8) * q * 4  # acc, sum, max, shrink
    + G * (U + 2 * 8) * t_cut.part * 4  # kept
    + 6 * k * q * 4 * G  # what the compiler keeps of a step
  )
  pairs = B * H * T * S / 2
  kept = t_cut.per_part if s_cut.parts > 1 else 1
  row = pltpu.VMEM((G, 1, q), jnp.float32)
  return pl.pallas_call(
    functools.partial(_forward_kernel, scale=scale, t_cut=t_cut, s_cut=s_cut),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(plan),
      grid=(B, H // G, t_cut.parts, s_cut.parts),
      in_specs=[
        of_queries(G, Q),
        pl.BlockSpec(
          (None, G, s_cut.part, N),
          lambda b, h, t, s, first, *_: (b, h, last_part(t, s, first), 0),
        ),
        pl.BlockSpec(
          (None, s_cut.part, R),
          lambda b, h, t, s, first, *_: (b, last_part(t, s, first), 0),
        ),
        pl.BlockSpec(
          (None, G, U, s_cut.part),
          lambda b, h, t, s, first, *_: (b, h, 0, last_part(t, s, first)),
        ),
        of_queries(1),
        pl.BlockSpec(
          (None, 1, s_cut.part),
          lambda b, h, t, s, first, *_: (b, 0, last_part(t, s, first)),
        ),
      ],
      out_specs=[of_queries(G, U), of_queries(G, 1)],
      scratch_shapes=[
        pltpu.VMEM((G, Q, t_cut.part), dtype),
        pltpu.VMEM((G, k, q), jnp.float32),
        pltpu.VMEM((G, U, q), jnp.float32),
        row,
        row,
        row,
        row,
        pltpu.VMEM((kept, G, U, q), jnp.float32),
        pltpu.VMEM((kept, G, 1, q), jnp.float32),
        pltpu.VMEM((t_cut.per_part, G, 1, q), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((B, H, U, T), v_BHUS.dtype),
      jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=max(vmem_bytes, 16 * _MIB),
    ),
    cost_estimate=pl.CostEstimate(
      flops=int(2 * pairs * (Q + U)),
      transcendentals=int(pairs),
      bytes_accessed=itemsize
      * (q_BHQT.size + k_BHSN.size + rope_BSR.size + v_BHUS.size)
      + B * H * T * (U * itemsize + 4),
    ),
    interpret=interpret,
    name='mla_attention_forward',
  )(*plan, q_BHQT, k_BHSN, rope_BSR, v_BHUS, query_B1T, key_B1S)


def _backward_kernel(
  first_query_ref,  # SMEM [1]
  last_query_ref,  # SMEM [B · blocks of keys]
  query_id_ref,  # SMEM [B · blocks of queries]
  key_id_ref,  # SMEM [B · blocks of keys]
  q_ref,  # [G, Q, T]
  k_ref,  # [G, k, N]
  rope_ref,  # [k, R]
  v_ref,  # [G, U, k]
  pull_ref,  # [G, U, T]
  lse_ref,  # [G, 1, T]
  mean_ref,  # [G, 1, T]
  query_ref,  # [1, T]
  key_ref,  # [1, k]
  grad_q_ref,  # [G, Q, T]
  grad_k_ref,  # [G, N, k]
  grad_rope_ref,  # [R, k], of these heads
  grad_v_ref,  # [G, U, k]
  scaled_ref,  # [G, Q, T]
  back_k_ref,  # [G, Q, k]
  back_v_ref,  # [G, k, U]
  acc_q_ref,  # [G, Q, T] f32
  acc_k_ref,  # [G, Q, k] f32
  acc_v_ref,  # [G, U, k] f32
  *,
  scale,
  t_cut,
  s_cut,
):
  """One block of keys and all queries that see it.

  The gradient of the queries waits in VMEM for the last block of keys, so
  scores are computed once: five products a pair.
  """
  row, j = pl.program_id(0), pl.program_id(2)
  num_heads, N = q_ref.shape[0], k_ref.shape[-1]
  q, k = t_cut.block, s_cut.block
  first_query = first_query_ref[0]
  key_block = row * s_cut.blocks + j

  @pl.when(j == 0)
  def _start():
    scaled = q_ref[...].astype(jnp.float32) * (scale * _LOG2_E)
    scaled_ref[...] = scaled.astype(scaled_ref.dtype)
    acc_q_ref[...] = jnp.zeros_like(acc_q_ref)

  acc_k_ref[...] = jnp.zeros_like(acc_k_ref)
  acc_v_ref[...] = jnp.zeros_like(acc_v_ref)
  for head in range(num_heads):
    # Once for all queries, in float32 as all generations transpose that.
    k_kQ = _keys(k_ref, rope_ref, head, 0, k).astype(jnp.float32)
    back_k_ref[head] = k_kQ.T.astype(back_k_ref.dtype)
    v_Uk = v_ref[head].astype(jnp.float32)
    back_v_ref[head] = v_Uk.T.astype(back_v_ref.dtype)

  def step(i, masked):
    slot = first_query + i * q
    if masked:
      query_1q = _block(query_ref, i, q)[...]
      keep_kq = _keep(query_1q, key_ref[...], slot, j * k)
    for head in range(num_heads):
      q_Qq = _block(scaled_ref, i, q, head)[...]
      pull_Uq = _block(pull_ref, i, q, head)[...]
      score_kq = _dot(_keys(k_ref, rope_ref, head, 0, k), q_Qq)
      if masked:
        score_kq = jnp.where(keep_kq, score_kq, _MASKED)
      weight_kq = jnp.exp2(score_kq - _block(lse_ref, i, q, head)[...])
      pull_kq = _dot(back_v_ref[head], pull_Uq)
      pull_kq = weight_kq * (pull_kq - _block(mean_ref, i, q, head)[...])
      pull_kq = pull_kq.astype(q_Qq.dtype)
      along_queries = (1,), (1,)
      acc_v_ref[head] += _dot(
        pull_Uq, weight_kq.astype(pull_Uq.dtype), along_queries
      )
      acc_k_ref[head] += _dot(q_Qq, pull_kq, along_queries)
      _block(acc_q_ref, i, q, head)[...] += _dot(back_k_ref[head], pull_kq)

  def loop_body(i, _):
    same = query_id_ref[row * t_cut.blocks + i] == key_id_ref[key_block]
    plain = same & ((j + 1) * k - 1 <= first_query + i * q)
    pl.when(plain)(lambda: step(i, False))
    pl.when(jnp.logical_not(plain))(lambda: step(i, True))
    return 0

  # The first block of queries that sees a key of this one.
  start = jnp.maximum((j * k - first_query) // q, 0)
  jax.lax.fori_loop(start, last_query_ref[key_block] + 1, loop_body, 0)

  grad_rope_Rk = jnp.zeros(grad_rope_ref.shape, jnp.float32)
  for head in range(num_heads):
    # The queries were multiplied by scale · log2(e), the scores by scale.
    grad_Qk = acc_k_ref[head] * (1 / _LOG2_E)
    grad_k_ref[head] = grad_Qk[:N].astype(grad_k_ref.dtype)
    grad_rope_Rk += grad_Qk[N:]
    grad_v_ref[head] = acc_v_ref[head].astype(grad_v_ref.dtype)
  grad_rope_ref[...] = grad_rope_Rk

  @pl.when(j == pl.num_programs(2) - 1)
  def _store():
    grad_q_ref[...] = (acc_q_ref[...] * scale).astype(grad_q_ref.dtype)


def backward(
  plan: tuple[jax.Array, ...],
  q_BHQT: jax.Array,
  k_BHSN: jax.Array,
  rope_BSR: jax.Array,
  v_BHUS: jax.Array,
  pull_BHUT: jax.Array,
  lse_BH1T: jax.Array,
  mean_BH1T: jax.Array,
  query_B1T: jax.Array,
  key_B1S: jax.Array,
  *,
  scale: float,
  t_cut: blocks_lib.Cut,
  s_cut: blocks_lib.Cut,
  heads: int,
  grad_dtype: jnp.dtype,
  interpret: bool | pltpu.InterpretParams,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of q, k, rope and v.

  Args:
    plan: As forward's, but the last block of queries to visit for each block
      of keys, and in its place.
    q_BHQT: As forward's, one part, which stays in VMEM.
    k_BHSN: As forward's.
    rope_BSR: As forward's.
    v_BHUS: As forward's.
    pull_BHUT: Gradient of the output.
    lse_BH1T: Log-sums of forward.
    mean_BH1T: Σ_u out · pull.
    query_B1T: As forward's.
    key_B1S: As forward's.
    scale: Of the scores.
    t_cut: How queries are cut, into one part.
    s_cut: How keys are cut.
    heads: At a time.
    grad_dtype: Of the gradients of k and v.
    interpret: Run on a CPU.

  Returns:
    [B, H, Q, T]; [B, H, N, S]; [B, H / heads, R, S] float32, whose sum over
    the heads is the gradient; [B, H, U, S].
  """
  B, H, Q, T = q_BHQT.shape
  S, N = k_BHSN.shape[2:]
  U, R = v_BHUS.shape[2], rope_BSR.shape[-1]
  G, q, k = heads, t_cut.block, s_cut.block
  dtype, itemsize = q_BHQT.dtype, q_BHQT.dtype.itemsize
  of_queries = lambda width: pl.BlockSpec(
    (None, G, width, T), lambda b, h, j, *_: (b, h, 0, 0)
  )
  of_keys = lambda width: pl.BlockSpec(
    (None, G, width, k), lambda b, h, j, *_: (b, h, 0, j)
  )
  lanes = -(-N // 128) * 128, -(-R // 128) * 128, -(-U // 128) * 128
  vmem_bytes = (
    2 * G * (2 * Q + U) * T * itemsize  # q and its gradient, pull
    + 2 * 8 * 4 * (2 * G * T + T + k)  # lse, mean, documents
    + 2 * (G * (lanes[0] + U) + lanes[1]) * k * itemsize  # k, v, rope
    + 2 * (G * (N + U) + R) * k * 4  # their gradients
    + G * Q * T * itemsize  # scaled
    + G * (Q + lanes[2]) * k * itemsize  # back_k, back_v
    + G * (Q * T + (Q + U) * k) * 4  # acc
    + 8 * k * q * 4 * G  # what the compiler keeps of a step
  )
  pairs = B * H * T * S / 2
  return pl.pallas_call(
    functools.partial(_backward_kernel, scale=scale, t_cut=t_cut, s_cut=s_cut),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(plan),
      grid=(B, H // G, s_cut.blocks),
      in_specs=[
        of_queries(Q),
        pl.BlockSpec((None, G, k, N), lambda b, h, j, *_: (b, h, j, 0)),
        pl.BlockSpec((None, k, R), lambda b, h, j, *_: (b, j, 0)),
        of_keys(U),
        of_queries(U),
        of_queries(1),
        of_queries(1),
        pl.BlockSpec((None, 1, T), lambda b, h, j, *_: (b, 0, 0)),
        pl.BlockSpec((None, 1, k), lambda b, h, j, *_: (b, 0, j)),
      ],
      out_specs=[
        of_queries(Q),
        of_keys(N),
        pl.BlockSpec((None, None, R, k), lambda b, h, j, *_: (b, h, 0, j)),
        of_keys(U),
      ],
      scratch_shapes=[
        pltpu.VMEM((G, Q, T), dtype),
        pltpu.VMEM((G, Q, k), dtype),
        pltpu.VMEM((G, k, U), dtype),
        pltpu.VMEM((G, Q, T), jnp.float32),
        pltpu.VMEM((G, Q, k), jnp.float32),
        pltpu.VMEM((G, U, k), jnp.float32),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct(q_BHQT.shape, dtype),
      jax.ShapeDtypeStruct((B, H, N, S), grad_dtype),
      jax.ShapeDtypeStruct((B, H // G, R, S), jnp.float32),
      jax.ShapeDtypeStruct(v_BHUS.shape, grad_dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=max(vmem_bytes, 16 * _MIB),
    ),
    cost_estimate=pl.CostEstimate(
      flops=int(2 * pairs * (3 * Q + 2 * U)),
      transcendentals=int(pairs),
      bytes_accessed=itemsize
      * 2
      * (q_BHQT.size + k_BHSN.size + rope_BSR.size + v_BHUS.size)
      + itemsize * pull_BHUT.size,
    ),
    interpret=interpret,
    name='mla_attention_backward',
  )(
    *plan,
    q_BHQT,
    k_BHSN,
    rope_BSR,
    v_BHUS,
    pull_BHUT,
    lse_BH1T,
    mean_BH1T,
    query_B1T,
    key_B1S,
  )
