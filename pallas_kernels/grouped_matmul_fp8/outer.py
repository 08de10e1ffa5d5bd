"""Sums over the rows of groups, of FP8 products, as a Pallas kernel for TPUs.

As in `kernel`, but a tile of the result is summed over the rows of a group, in
VMEM, and what is summed over is what groups are cut along.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul_fp8 import blocks as blocks_lib
from pallas_kernels.grouped_matmul_fp8 import kernel
from pallas_kernels.matmul_fp8 import tile as tile_lib

_CHUNK, _LANES, _SIZE = blocks_lib.CHUNK, blocks_lib.LANES, tile_lib.SIZE
_HBM = pl.BlockSpec(memory_space=pl.ANY)

# Of a plan, what sums over rows need.
PLAN = (
  *('num_tiles', 'visit_t', 'kind_t', 'first_t', 'rows_t', 'is_first_t'),
  'is_last_t',
)


def _outer_kernel(*refs, blocks: blocks_lib.OuterSizes):
  """All tiles of this core's columns of the weights; see `outer`.

  Plan refs (SMEM), x_ref [m, k], x_scale_ref [m/128, 1, k], y_ref [m, n],
  y_scale_ref [m/128, 1, n] -> o_ref [g, k, n], all in HBM. In VMEM x_buf [2,
  depth, width_k], x_scale_buf [2, depth/128, 1, width_k] and the same of y;
  sum_buf [2, width_k, width_n] f32, of a group each; y_nm_ref [width_n, depth]
  and scale_ref [depth/128, width_n, 128], y's in all lanes.
  """
  count = len(PLAN)
  plan = dict(zip(PLAN, refs))
  x_ref, x_scale_ref, y_ref, y_scale_ref, o_ref = refs[count : count + 5]
  x_buf, x_scale_buf, y_buf, y_scale_buf, sum_buf, *rest = refs[count + 5 :]
  y_nm_ref, scale_ref, is_stored_ref, row_sem, o_sem = rest
  width_k, width_n = blocks.width_k, blocks.width_n
  num_tiles = plan['num_tiles'][0]
  num_groups = o_ref.shape[0]
  num_k = o_ref.shape[1] // width_k
  num_columns = o_ref.shape[2] // (width_n * blocks.parts) * num_k
  first_n = pl.program_id(0) * (num_columns // num_k)

  def lanes(column):
    """Where the tile of weights is, in k and n."""
    start_k = lax.rem(column, num_k) * width_k
    start_n = (first_n + lax.div(column, num_k)) * width_n
    return tuple(
      pl.ds(pl.multiple_of(start, _LANES), width)
      for start, width in ((start_k, width_k), (start_n, width_n))
    )

  def row_copies(column, t, slot):
    rows = pl.multiple_of(plan['rows_t'][t], _SIZE)
    first = pl.multiple_of(plan['first_t'][t], _SIZE)
    there = pl.ds(lax.div(first, _SIZE), lax.div(rows, _SIZE))
    here = pl.ds(0, lax.div(rows, _SIZE))
    in_k, in_n = lanes(column)
    for i, (ref, scales, buf, scale_buf, at) in enumerate(
      (
        (x_ref, x_scale_ref, x_buf, x_scale_buf, in_k),
        (y_ref, y_scale_ref, y_buf, y_scale_buf, in_n),
      )
    ):
      yield pltpu.make_async_copy(
        ref.at[pl.ds(first, rows), at],
        buf.at[slot, pl.ds(0, rows)],
        row_sem.at[slot, 2 * i],
      )
      yield pltpu.make_async_copy(
        scales.at[there, :, at],
        scale_buf.at[slot, here],
        row_sem.at[slot, 2 * i + 1],
      )

  def fetch(column, t, slot):
    @pl.when(plan['rows_t'][t] > 0)
    def _start():
      for copy in row_copies(column, t, slot):
        copy.start()

  def wait_for_rows(t, slot):
    @pl.when(plan['rows_t'][t] > 0)
    def _wait():
      for copy in row_copies(0, t, slot):
        copy.wait()

  def o_copy(group, column, slot):
    return pltpu.make_async_copy(
      sum_buf.at[slot], o_ref.at[group, *lanes(column)], o_sem.at[slot]
    )

  def wait_for_store(slot):
    @pl.when(is_stored_ref[slot] == 1)
    def _wait():
      o_copy(0, 0, slot).wait()

    is_stored_ref[slot] = 0

  def add_tile(depth, t, slot, o_slot):
    is_first = plan['is_first_t'][t] == 1
    tile_lib.transpose(y_buf.at[slot], y_nm_ref, depth)
    for i in range(depth // _SIZE):
      scale_ref[i] = jnp.broadcast_to(
        y_scale_buf[slot, i, 0][:, None], scale_ref.shape[1:]
      )
    pieces = width_k // blocks.code_rows

    def chain(row, column, chunk):
      here, there = pl.ds(row, chunk), pl.ds(column, _LANES)

      def scaled(i, product):
        wide = tile_lib.in_lanes(scale_ref[i, there, :], chunk)
        return product * (wide * x_scale_buf[slot, i, :, here])

      total = tile_lib.total(
        y_nm_ref,
        column,
        lambda part: x_buf[slot, part, here],
        0,
        scaled,
        depth // _SIZE,
        blocks.halved,
      ).T
      sum_buf[o_slot, here, there] = total + jnp.where(
        is_first, 0.0, sum_buf[o_slot, here, there]
      )

    @pl.loop(0, pieces * (width_n // blocks.code_columns))
    def _piece(piece):
      first_row = lax.rem(piece, pieces) * blocks.code_rows
      first_column = lax.div(piece, pieces) * blocks.code_columns
      for j in range(0, blocks.code_columns, _LANES):
        for i in range(0, blocks.code_rows, _CHUNK):
          chain(
            pl.multiple_of(first_row + i, _LANES),
            pl.multiple_of(first_column + j, _LANES),
            min(_CHUNK, blocks.code_rows - i),
          )

  def do_tile(column, t):
    slot = lax.rem(column * num_tiles + t, 2)
    is_last_tile = t == num_tiles - 1
    group = plan['visit_t'][t]  # All are visited.
    o_slot = lax.rem(column * num_groups + group, 2)

    @pl.when(~(is_last_tile & (column == num_columns - 1)))
    def _fetch_next_rows():
      fetch(
        jnp.where(is_last_tile, column + 1, column),
        jnp.where(is_last_tile, 0, t + 1),
        1 - slot,
      )

    wait_for_rows(t, slot)
    # What a group before has left here: a tile later nothing is.
    wait_for_store(o_slot)
    for kind, depth in enumerate(blocks.depths):
      pl.when(plan['kind_t'][t] == kind)(
        functools.partial(add_tile, depth, t, slot, o_slot)
      )

    @pl.when(plan['rows_t'][t] == 0)
    def _empty():
      sum_buf[o_slot] = jnp.zeros_like(sum_buf[o_slot])

    @pl.when(plan['is_last_t'][t] == 1)
    def _store():
      is_stored_ref[o_slot] = 1
      o_copy(group, column, o_slot).start()

  is_stored_ref[0] = is_stored_ref[1] = 0
  fetch(0, 0, 0)

  @pl.loop(0, num_columns)
  def _column(column):
    pl.loop(0, num_tiles)(functools.partial(do_tile, column))

  wait_for_store(0)
  wait_for_store(1)


def outer(
  x_mk: jax.Array,
  x_scale_mk: jax.Array,
  y_mn: jax.Array,
  y_scale_mn: jax.Array,
  size_g: jax.Array,
  *,
  blocks: blocks_lib.OuterSizes,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  """Sums xᵀ · y over the rows of each group, float32 [g, k, n].

  Args:
    x_mk: e4m3 [m, k] rows; all sizes are multiples of 128.
    x_scale_mk: float32 [m/128, k].
    y_mn: e4m3 [m, n] as many.
    y_scale_mn: float32 [m/128, n].
    size_g: int32 [g] rows of each group, multiples of 128, one group after the
      other; without any the sum is zero.
    blocks: Sizes of the tiles.
    interpret: Run on a CPU.
  """
  (m, k), n, g = x_mk.shape, y_mn.shape[1], len(size_g)
  width_k, width_n, depth = blocks.width_k, blocks.width_n, blocks.depths[0]
  # Tiles are as high as the rows they have, which are multiples of the least
  # height, where each height is twice the next.
  plan = plan_lib.make_plan(
    jnp.cumsum(size_g) - size_g,
    size_g,
    m,
    heights=blocks.depths,
    align=kernel.ALIGN,
    visit_empty=True,
  )
  scales = depth // _SIZE
  return pl.pallas_call(
    functools.partial(_outer_kernel, blocks=blocks),
    name='grouped_outer_fp8',
    out_shape=jax.ShapeDtypeStruct((g, k, n), jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(PLAN),
      grid=(blocks.parts,),
      in_specs=[_HBM] * 4,
      out_specs=_HBM,
      # VMEM, bytes: 2 · depth · (width_k + width_n) for rows and depth/128 · 64
      # of it for their scales, 2 · width_k · width_n · 4 for sums, depth ·
      # width_n for y transposed, depth/128 · width_n · 512 for its scales.
      scratch_shapes=[
        pltpu.VMEM((2, depth, width_k), x_mk.dtype),
        pltpu.VMEM((2, scales, 1, width_k), jnp.float32),
        pltpu.VMEM((2, depth, width_n), y_mn.dtype),
        pltpu.VMEM((2, scales, 1, width_n), jnp.float32),
        pltpu.VMEM((2, width_k, width_n), jnp.float32),
        pltpu.VMEM((width_n, depth), y_mn.dtype),
        pltpu.VMEM((scales, width_n, _LANES), jnp.float32),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 4)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=kernel.semantics(blocks.parts),
      vmem_limit_bytes=blocks.vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * k * n,
      bytes_accessed=m * k * (n // width_n)
      + m * n * (k // width_k)
      + 4 * g * k * n,
      transcendentals=0,
    ),
    interpret=interpret,
  )(
    *(getattr(plan, name) for name in PLAN),
    x_mk,
    x_scale_mk[:, None],
    y_mn,
    y_scale_mn[:, None],
  )
