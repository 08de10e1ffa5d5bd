"""The TPU kernel of attention to selected tokens of a sequence that VMEM holds.

A token costs a load and a store, at less than half of the time of a copy from
HBM: for prefills, whose queries share the sequence.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.sparse_mla import attend as attend_lib
from pallas_kernels.sparse_mla import blocks as blocks_lib

_LANES = 128
_VMEM_LIMIT_BYTES = 60 * 2**20  # Of 64 MiB of v5p and tpu7x.


def attend(
  count_R: jax.Array,
  row_g1k: jax.Array,
  index_R1K: jax.Array,
  q_RHC: jax.Array,
  word_BIL: jax.Array,
  *,
  scale: float,
  blocks: blocks_lib.AttendBlocks,
  interpret,
) -> tuple[jax.Array, jax.Array]:
  """Attends with each of R = B · T queries to its own tokens.

  Args and results are those of `attend.attend`, but for
    row_g1k: places in the words of the query's own sequence.
    word_BIL: the words of each sequence.
    blocks: `workers` divides T, and K is an even number of blocks.
  """
  R, H, Q = q_RHC.shape
  B, I, _ = word_BIL.shape
  K, k = index_R1K.shape[-1], row_g1k.shape[-1]
  C = Q - _LANES
  tiles = C // (2 * _LANES) + 1
  W, lse_rows = blocks.workers, pl.cdiv(H, _LANES)
  per_worker = R // B // W

  def of_row(*shape):
    return pl.BlockSpec(
      (1, *shape), lambda b, w, t, *_: ((b * W + w) * per_worker + t, 0, 0)
    )

  return pl.pallas_call(
    functools.partial(
      _resident_kernel, scale=scale, is_unrolled=blocks.is_unrolled
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(B, W, per_worker),
      in_specs=[
        pl.BlockSpec(memory_space=pltpu.HBM),
        of_row(1, K),
        of_row(H, Q),
        # VMEM, for 8,192 tokens of 512 latents 12 MiB, and for 128 heads:
        pl.BlockSpec(
          (1, I, _LANES),
          lambda b, *_: (b, 0, 0),
          pipeline_mode=pl.Buffered(1),
        ),
      ],
      out_specs=[of_row(H, C), of_row(lse_rows, _LANES)],
      scratch_shapes=[
        # Blocks of 1,024 tokens: words 2 · 1.5 MiB, pairs of tokens 1.3 MiB.
        pltpu.VMEM((2, k * tiles, _LANES), jnp.uint32),
        pltpu.VMEM((Q // _LANES, k // 2, _LANES), jnp.uint32),
        # Largest score and sum of weights 2 · 64 KiB, values 256 KiB.
        pltpu.VMEM((H, _LANES), jnp.float32),
        pltpu.VMEM((H, _LANES), jnp.float32),
        pltpu.VMEM((H, C), jnp.float32),
        # Where tokens are: 8 KiB of SMEM.
        *[pltpu.SMEM((1, k), jnp.int32)] * (K // k),
        pltpu.SemaphoreType.DMA((K // k,)),
      ],
      # Queries 2 · 160 KiB, results 2 · 128 KiB, indices 2 · 64 KiB, scores
      # and weights of a block 512 and 256 KiB: together 18 MiB.
    ),
    out_shape=[
      jax.ShapeDtypeStruct((R, H, C), q_RHC.dtype),
      jax.ShapeDtypeStruct((R, lse_rows, _LANES), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      # Workers share nothing, so that v5p gives half of them to each core.
      dimension_semantics=('parallel', 'parallel', 'arbitrary'),
      vmem_limit_bytes=_VMEM_LIMIT_BYTES,
      disable_bounds_checks=True,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * R * H * K * (Q + C),
      transcendentals=R * H * K,
      bytes_accessed=word_BIL.nbytes + q_RHC.nbytes + R * (H * C * 2 + 8 * K),
    ),
    interpret=interpret,
    name='sparse_mla_resident',
  )(count_R, row_g1k, index_R1K, q_RHC, word_BIL)


def _resident_kernel(
  count_ref,  # SMEM [R]
  row_hbm,  # [R · blocks, 1, k]
  index_ref,  # [1, 1, K]
  q_ref,  # [1, H, C + 128]
  word_ref,  # [1, I, 128] u32
  out_ref,  # [1, H, C]
  lse_ref,  # [1, rows, 128]
  word_buf,  # [2, k · tiles, 128] u32
  x_ref,  # [C / 128 + 1, k / 2, 128] u32
  m_ref,  # [H, 128] f32
  l_ref,  # [H, 128] f32, to be summed over lanes
  acc_ref,  # [H, C] f32
  *rest,  # SMEM [1, k] of each block, and their semaphores
  scale,
  is_unrolled,
):
  """One query: beside a block's products the next block's tokens are loaded.

  Behind the last block comes the first one of the next query. Places of tokens
  come block by block, as SMEM gets free. All addresses but the tokens' are
  constants, because the scalar unit has to find one for each token.
  """
  *row_bufs, row_sem = rest
  num_blocks, k = len(row_bufs), row_bufs[0].shape[1]
  tiles = word_buf.shape[1] // k
  b, worker, step = (pl.program_id(axis) for axis in range(3))
  per_worker = pl.num_programs(2)
  row = (b * pl.num_programs(1) + worker) * per_worker + step
  count = count_ref[row]

  last_row = row - step + per_worker - 1

  def rows_copy(r, i):
    # At the end, once more the last ones, in vain.
    r = jnp.minimum(r, last_row)
    return pltpu.make_async_copy(
      row_hbm.at[r * num_blocks + i], row_bufs[i], row_sem.at[i]
    )

  def gather(i):
    words = word_buf.at[i % 2]

    @pl.loop(0, k, unroll=k if is_unrolled else 1)
    def _(j):
      words[pl.ds(j * tiles, tiles), :] = word_ref[
        0, pl.ds(row_bufs[i][0, j], tiles), :
      ]

  def add(i):
    attend_lib.words_to_bfloat16(word_buf.at[i % 2], x_ref)
    attend_lib.add_block(
      i == 0,
      index_ref[0, :, i * k : (i + 1) * k],
      q_ref[0],
      x_ref,
      m_ref,
      l_ref,
      acc_ref,
      scale,
    )

  @pl.when(step == 0)
  def _start():
    for i in range(num_blocks):
      rows_copy(row, i).start()
    rows_copy(row, 0).wait()
    gather(0)
    rows_copy(row + 1, 0).start()

  for i in range(num_blocks):
    following = (i + 1) % num_blocks
    gathered = row + (following == 0)
    rows_copy(gathered, following).wait()
    gather(following)
    add(i)
    rows_copy(gathered + 1, following).start()
  attend_lib.finish(count > 0, m_ref, l_ref, acc_ref, out_ref, lse_ref)

  @pl.when(step == per_worker - 1)
  def _drain():
    for i in range(num_blocks):
      rows_copy(row, i).wait()
