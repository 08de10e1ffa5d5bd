"""Decoding of DeepSeek-V3: 128 sequences of 4,096 tokens, 128 heads."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import common
from pallas_kernels.mla_decode import blocks as blocks_lib
from pallas_kernels.mla_decode import ops

_BATCH = 128
_LENGTH_TOKENS = 4096
_HEADS = 128
_LATENT_DIM, _ROPE_DIM = 512, 64
_LANES = 640  # Of a row of queries, whole.
_PAGE_TOKENS = 256
_SCALE = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2  # YaRN's.


def cases() -> tuple[common.Case, ...]:
  """One and two new tokens, of a bfloat16 and of an FP8 cache."""
  return (
    _case('bf16', num_tokens=1),
    _case('bf16_speculative', num_tokens=2),
    # What a batch of long sequences would use.
    _case('bf16_chunk2048', num_tokens=1, chunk_tokens=2048),
    _case('fp8', num_tokens=1, is_fp8=True),
    _case('fp8_speculative', num_tokens=2, is_fp8=True),
  )


def _case(name, *, num_tokens, is_fp8=False, chunk_tokens=None):
  pages = _LENGTH_TOKENS // _PAGE_TOKENS
  N, B, P = _BATCH * pages, _BATCH, _PAGE_TOKENS
  shape = jax.ShapeDtypeStruct
  dtype = jnp.float8_e4m3fn if is_fp8 else jnp.bfloat16
  scale_shape = N, _LATENT_DIM // ops.SCALE_CHANNELS, P
  cache = ops.LatentCache(
    shape((N, P, _LATENT_DIM), dtype),
    shape((N, P // 4, 4 * _ROPE_DIM), jnp.bfloat16),
    shape(scale_shape, jnp.float32) if is_fp8 else None,
  )
  blocks = None
  if chunk_tokens is not None:
    blocks = blocks_lib.BlockSizes(
      num_pages=chunk_tokens // P, num_slots=6, num_workers=2
    )
  rows = B * num_tokens * _HEADS
  row_dim = _LATENT_DIM + _ROPE_DIM
  token_bytes = 656 if is_fp8 else 2 * row_dim
  return common.Case(
    kernel='mla_decode',
    name=name,
    implementation='pallas',
    function=functools.partial(
      ops.mla_decode,
      value_dim=_LATENT_DIM,
      scale=_SCALE,
      implementation='pallas',
      blocks=blocks,
    ),
    args=(
      shape((B, num_tokens, _HEADS, _LANES), jnp.bfloat16),
      cache,
      shape((B, pages), jnp.int32),
      shape((B,), jnp.int32),
    ),
    flops=2 * rows * _LENGTH_TOKENS * (row_dim + _LATENT_DIM),
    hbm_bytes=(
      B * _LENGTH_TOKENS * token_bytes + 2 * rows * (row_dim + _LATENT_DIM)
    ),
    scalars={
      'mla_decode': {
        0: np.full(B, _LENGTH_TOKENS),
        1: np.arange(N),
      }
    },
  )
