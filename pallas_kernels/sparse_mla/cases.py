"""DeepSeek-V3.2's sparse attention: prefill of one row, decoding of 128."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.sparse_mla import blocks as blocks_lib
from pallas_kernels.sparse_mla import ops

_J, _I = 64, 128
_HEADS, _LATENT_DIM, _ROPE_DIM = 128, 512, 64
_LANES = _LATENT_DIM + 128  # Of a row of queries, whole.
_TOP_K = 2048
_TOKENS = 4096  # Of a row to index.
_BATCH, _LENGTH_TOKENS, _PAGE_TOKENS = 128, 4096, 256
_PREFILL_QUERIES, _PREFILL_TOKENS = 1024, 8192
_SCALE = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2  # YaRN's.
_FP8 = jnp.float8_e4m3fn
_struct = jax.ShapeDtypeStruct


def cases() -> tuple[common.Case, ...]:
  """The indexer and attention of both."""
  return (
    _index_prefill('index_prefill_fp8', _FP8),
    _index_prefill('index_prefill_bf16', jnp.bfloat16),
    _index_decode(),
    *(
      _top_k(name, shape, implementation)
      for implementation in ('pallas', 'xla')
      for name, shape in (
        ('top_k_decode', (_BATCH, 1, _LENGTH_TOKENS)),
        ('top_k_prefill', (1, _PREFILL_QUERIES, _PREFILL_TOKENS)),
      )
    ),
    _attend_decode('pallas'),
    _attend_decode('xla'),
    _attend_prefill('attend_prefill_top2048', 'pallas'),
    # As of sequences that VMEM does not hold.
    _attend_prefill(
      'attend_prefill_top2048_hbm',
      'pallas',
      blocks_lib.AttendBlocks(workers=2),
    ),
  )


def _case(**options):
  return common.Case(kernel='sparse_mla', **options)


def _index_prefill(name, dtype):
  T = S = _TOKENS
  itemsize = jnp.dtype(dtype).itemsize

  def run(q_BJTI, k_BSI, weight_BTJ, scale_BS):
    # As what is beside writes them: see ops.index_logits.
    return ops.index_logits(
      jnp.swapaxes(q_BJTI, 1, 2),
      k_BSI,
      weight_BTJ,
      scale_BS=scale_BS,
      end_BT=jnp.arange(1, T + 1)[None],
    )

  blocks = blocks_lib.LogitsBlocks()
  first = np.arange(0, T, blocks.queries)
  last = -(-(first + blocks.queries) // blocks.keys)
  return _case(
    name=name,
    implementation='pallas',
    function=run,
    args=(
      _struct((1, _J, T, _I), dtype),
      _struct((1, S, _I), dtype),
      _struct((1, T, _J), jnp.float32),
      _struct((1, S), jnp.float32),
    ),
    # Half of the square is useful.
    flops=2 * T * S / 2 * _J * _I,
    hbm_bytes=(T * _J + S) * _I * itemsize + T * S * 4,
    dtype=jnp.dtype(dtype).name.removesuffix('fn'),
    scalars={
      'index_logits': {0: np.stack([0 * last, last], axis=1).reshape(-1)}
    },
  )


def _index_decode():
  B, P = _BATCH, _PAGE_TOKENS
  pages = _LENGTH_TOKENS // P
  N = B * pages
  return _case(
    name='index_decode_fp8',
    implementation='pallas',
    function=ops.index_logits_paged,
    args=(
      _struct((B, 1, _J, _I), _FP8),
      ops.IndexCache(
        _struct((N, P, _I), _FP8), _struct((N, 1, P), jnp.float32)
      ),
      _struct((B, 1, _J), jnp.float32),
      _struct((B, pages), jnp.int32),
      _struct((B,), jnp.int32),
    ),
    flops=2 * B * _LENGTH_TOKENS * _J * _I,
    hbm_bytes=B * _LENGTH_TOKENS * (_I + 4 + 4),
    dtype='float8_e4m3',
    scalars={
      'index_paged': {0: np.full(B, _LENGTH_TOKENS), 1: np.arange(N)},
    },
  )


def _top_k(name, shape, implementation):
  B, T, S = shape
  return _case(
    name=name,
    implementation=implementation,
    function=functools.partial(
      ops.top_k, k=_TOP_K, implementation=implementation
    ),
    args=(_struct(shape, jnp.float32),),
    flops=0,
    hbm_bytes=4 * B * T * (S + _TOP_K),
  )


def _attend_decode(implementation):
  B, P = _BATCH, _PAGE_TOKENS
  pages = _LENGTH_TOKENS // P
  tiles = _LATENT_DIM // 256 + 1
  return _case(
    name='attend_decode_top2048',
    implementation=implementation,
    function=functools.partial(
      ops.sparse_mla,
      value_dim=_LATENT_DIM,
      scale=_SCALE,
      implementation=implementation,
    ),
    args=(
      _struct((B, 1, _HEADS, _LANES), jnp.bfloat16),
      ops.RowCache(
        _struct((B * pages, P * tiles, 128), jnp.uint32),
        _LATENT_DIM,
        _ROPE_DIM,
      ),
      _struct((B, 1, _TOP_K), jnp.int32),
      _struct((B, pages), jnp.int32),
    ),
    flops=_attend_flops(B),
    hbm_bytes=B * _TOP_K * _row_bytes() + _attend_bytes(B),
    scalars=_counts(blocks_lib.attend(B, 1, _TOP_K, None), B),
  )


def _attend_prefill(name, implementation, blocks=None):
  T, S = _PREFILL_QUERIES, _PREFILL_TOKENS
  return _case(
    name=name,
    implementation=implementation,
    function=functools.partial(
      ops.sparse_mla,
      value_dim=_LATENT_DIM,
      scale=_SCALE,
      implementation=implementation,
      blocks=blocks,
    ),
    args=(
      _struct((1, T, _HEADS, _LANES), jnp.bfloat16),
      _struct((1, S, _LATENT_DIM + _ROPE_DIM), jnp.bfloat16),
      _struct((1, T, _TOP_K), jnp.int32),
    ),
    flops=_attend_flops(T),
    hbm_bytes=S * _row_bytes() + _attend_bytes(T),
    scalars=_counts(blocks or blocks_lib.attend(1, T, _TOP_K, 0), T),
  )


def _attend_flops(queries):
  return 2 * queries * _TOP_K * _HEADS * (2 * _LATENT_DIM + _ROPE_DIM)


def _attend_bytes(queries):
  """Of queries, indices and results."""
  rows = queries * _HEADS
  return rows * (2 * (2 * _LATENT_DIM + _ROPE_DIM) + 4) + queries * _TOP_K * 4


def _row_bytes():
  return 2 * (_LATENT_DIM + _ROPE_DIM)


def _counts(blocks, queries):
  """Each query has tokens in all of its blocks."""
  return {'sparse_mla_': {0: np.full(queries, _TOP_K // blocks.tokens)}}
