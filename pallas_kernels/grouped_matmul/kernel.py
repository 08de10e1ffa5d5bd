"""The grouped products as Pallas kernels for TPUs.

All arrays stay in HBM, and the kernels copy: rows in as many as a group has,
weights once for all rows of a group, and both while the unit works on what
came before. Which tile is whose is planned outside (plan.py).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import blocks as blocks_lib
from pallas_kernels.grouped_matmul import plan as plan_lib

_HBM = pl.BlockSpec(memory_space=pl.ANY)


def _precision(dtype):
  return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def _semantics(parts):
  return ('parallel',) if parts > 1 else ('arbitrary',)


def _matmul_kernel(
  *refs, blocks: blocks_lib.BlockSizes, transposed: bool, is_aligned: bool
):
  """All tiles of this core's columns; see `multiply`.

  plan refs (SMEM), x_ref [m, k], w_ref [g, k, n] or [g, n, k] if transposed
  -> o_ref [m, n], all in HBM. In VMEM x_buf [2, height, k] and o_buf
  [2, height, width], a tile of rows each; w_buf [2, chunks, k, chunk] (or
  […, chunk, k]), a tile of weights each; edge_buf [align, width] rows that
  this group shares with the next.
  """
  plan = plan_lib.Plan(*refs[: len(_PLAN)])
  x_ref, w_ref, o_ref, x_buf, w_buf, o_buf, edge_buf, *rest = refs[len(_PLAN) :]
  stored_ref, x_sem, w_sem, o_sem = rest
  align, width = edge_buf.shape
  chunks, chunk = w_buf.shape[1], blocks.chunk
  num_tiles, num_visits = plan.num_tiles[0], plan.num_visits[0]
  num_columns = o_ref.shape[1] // (width * blocks.parts)
  first_column = pl.program_id(0) * num_columns

  def x_copy(t, slot):
    rows = pl.multiple_of(plan.rows_t[t], align)
    return pltpu.make_async_copy(
      x_ref.at[pl.ds(pl.multiple_of(plan.first_t[t], align), rows)],
      x_buf.at[slot, pl.ds(0, rows)],
      x_sem.at[slot],
    )

  def w_copy(column, visit, slot, c):
    start = (first_column + column) * width + c * chunk
    columns = pl.ds(pl.multiple_of(start, blocks_lib.LANES), chunk)
    source = w_ref.at[plan.group_v[visit]]
    return pltpu.make_async_copy(
      source.at[columns] if transposed else source.at[:, columns],
      w_buf.at[slot, c],
      w_sem.at[slot, c],
    )

  def fetch_weights(column, visit, slot):
    pl.loop(0, chunks)(lambda c: w_copy(column, visit, slot, c).start())

  def o_copy(column, first, rows, slot):
    rows = pl.multiple_of(rows, align)
    start = (first_column + column) * width
    return pltpu.make_async_copy(
      o_buf.at[slot, pl.ds(0, rows)],
      o_ref.at[
        pl.ds(pl.multiple_of(first, align), rows),
        pl.ds(pl.multiple_of(start, blocks_lib.LANES), width),
      ],
      o_sem.at[slot],
    )

  def wait_for_store(slot):
    @pl.when(stored_ref[slot] > 0)
    def _wait():
      o_copy(0, 0, stored_ref[slot], slot).wait()

  def start_store(column, t, rows, slot):
    stored_ref[slot] = rows

    @pl.when(rows > 0)
    def _start():
      o_copy(column, plan.first_t[t], rows, slot).start()

  def multiply_tile(height, slot, w_slot, is_new):
    @pl.loop(0, chunks)
    def _chunk(c):
      @pl.when(is_new)
      def _wait():
        w_copy(0, 0, w_slot, c).wait()

      columns = pl.ds(pl.multiple_of(c * chunk, blocks_lib.LANES), chunk)
      product = lax.dot_general(
        x_buf[slot, :height],
        w_buf[w_slot, c],
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=_precision(x_buf.dtype),
        preferred_element_type=jnp.float32,
      )
      o_buf[slot, :height, columns] = product.astype(o_buf.dtype)

  def join_edges(t, slot):
    """Adds rows of the group before; keeps those that are to be completed.

    Returns the rows that are complete.
    """
    begin, end, rows = plan.begin_t[t], plan.end_t[t], plan.rows_t[t]

    @pl.when(begin > 0)
    def _add():
      row = lax.broadcasted_iota(jnp.int32, edge_buf.shape, 0)
      o_buf[slot, :align] = jnp.where(
        row < begin, edge_buf[...], o_buf[slot, :align]
      )

    is_complete = (end == rows) | (t == num_tiles - 1)

    @pl.when(~is_complete)
    def _keep():
      start = pl.multiple_of(rows - align, align)
      edge_buf[...] = o_buf[slot, pl.ds(start, align)]

    return jnp.where(is_complete, rows, rows - align)

  def do_tile(column, t):
    step = column * num_tiles + t
    slot = lax.rem(step, 2)
    visit = plan.visit_t[t]
    w_slot = lax.rem(column * num_visits + visit, 2)
    is_new = plan.is_first_t[t] == 1
    is_last_tile = t == num_tiles - 1
    is_last_visit = visit == num_visits - 1
    is_last_column = column == num_columns - 1

    @pl.when(~(is_last_tile & is_last_column))
    def _fetch_next_rows():
      x_copy(jnp.where(is_last_tile, 0, t + 1), 1 - slot).start()

    @pl.when(is_new & ~(is_last_visit & is_last_column))
    def _fetch_next_weights():
      fetch_weights(
        jnp.where(is_last_visit, column + 1, column),
        jnp.where(is_last_visit, 0, visit + 1),
        1 - w_slot,
      )

    x_copy(t, slot).wait()
    wait_for_store(slot)
    for kind, height in enumerate(blocks.heights):
      pl.when(plan.kind_t[t] == kind)(
        functools.partial(multiply_tile, height, slot, w_slot, is_new)
      )
    rows = plan.rows_t[t] if is_aligned else join_edges(t, slot)
    start_store(column, t, rows, slot)

  @pl.when(num_tiles > 0)
  def _fetch_first():
    stored_ref[0] = stored_ref[1] = 0
    x_copy(0, 0).start()
    fetch_weights(0, 0, 0)

    @pl.loop(0, num_columns)
    def _column(column):
      pl.loop(0, num_tiles)(functools.partial(do_tile, column))

    wait_for_store(0)
    wait_for_store(1)


_PLAN = tuple(field.name for field in dataclasses.fields(plan_lib.Plan))


def multiply(
  x_mk: jax.Array,
  w: jax.Array,
  start_g: jax.Array,
  size_g: jax.Array,
  *,
  blocks: blocks_lib.BlockSizes,
  transposed: bool,
  is_aligned: bool,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  """Multiplies rows by their group's weights, [m, k] -> [m, n].

  Args:
    x_mk: [m, k] rows.
    w: [g, k, n], or [g, n, k] if transposed.
    start_g: int32 [g] first row of each group, rising.
    size_g: int32 [g] its rows.
    blocks: Sizes of the tiles.
    transposed: Multiplies by the transposed weights.
    is_aligned: All groups start at whole tiles of memory.
    interpret: Run on a CPU.
  """
  m, k = x_mk.shape
  n = w.shape[1 if transposed else 2]
  itemsize = x_mk.dtype.itemsize
  align = blocks_lib.align(itemsize)
  heights, width, chunk = blocks.heights, blocks.width, blocks.chunk
  plan = plan_lib.make_plan(
    start_g, size_g, m, heights=heights, align=align, visit_empty=False
  )
  w_shape = (chunk, k) if transposed else (k, chunk)
  return pl.pallas_call(
    functools.partial(
      _matmul_kernel,
      blocks=blocks,
      transposed=transposed,
      is_aligned=is_aligned,
    ),
    name='grouped_matmul',
    out_shape=jax.ShapeDtypeStruct((m, n), x_mk.dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(_PLAN),
      grid=(blocks.parts,),
      in_specs=[_HBM, _HBM],
      out_specs=_HBM,
      # VMEM, bytes: 2 · highest · k · itemsize for rows, 2 · k · width ·
      # itemsize for weights, 2 · highest · width · itemsize for results, and
      # what the compiler spills, about highest · chunk · 4.
      scratch_shapes=[
        pltpu.VMEM((2, heights[0], k), x_mk.dtype),
        pltpu.VMEM((2, width // chunk, *w_shape), w.dtype),
        pltpu.VMEM((2, heights[0], width), x_mk.dtype),
        pltpu.VMEM((align, width), x_mk.dtype),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2, width // chunk)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=_semantics(blocks.parts),
      vmem_limit_bytes=blocks.vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * k * n,
      bytes_accessed=(m * k * (n // width) + w.size + m * n) * itemsize,
      transcendentals=0,
    ),
    interpret=interpret,
  )(*(getattr(plan, name) for name in _PLAN), x_mk, w)


def _gradient_kernel(*refs, blocks: blocks_lib.GradBlockSizes):
  """All tiles of this core's rows of the weights; see `weight_gradient`.

  plan refs (SMEM), x_ref [m, k], y_ref [m, n] -> o_ref [g, k, n], all in HBM.
  In VMEM x_buf [2, height, width_k] and y_buf [2, height, width_n], some rows
  each; acc_ref [chunks, width_k, chunk] f32 the sum over a group's rows;
  o_buf [2, width_k, chunk] what leaves.
  """
  plan = plan_lib.Plan(*refs[: len(_PLAN)])
  x_ref, y_ref, o_ref, x_buf, y_buf, acc_ref, o_buf, *rest = refs[len(_PLAN) :]
  is_stored_ref, row_sem, o_sem = rest
  align = blocks_lib.align(x_buf.dtype.itemsize)
  width_k, width_n, chunk = blocks.width_k, blocks.width_n, blocks.chunk
  chunks = width_n // chunk
  num_tiles = plan.num_tiles[0]
  columns_n = o_ref.shape[2] // width_n
  num_columns = o_ref.shape[1] // (width_k * blocks.parts) * columns_n
  first_k = pl.program_id(0) * (num_columns // columns_n)

  def lanes(start, size):
    return pl.ds(pl.multiple_of(start, blocks_lib.LANES), size)

  def columns_of(column):
    """Where the tile of weights begins, in k and n."""
    return (
      (first_k + lax.div(column, columns_n)) * width_k,
      lax.rem(column, columns_n) * width_n,
    )

  def row_copies(column, t, slot):
    rows = pl.multiple_of(plan.rows_t[t], align)
    source = pl.ds(pl.multiple_of(plan.first_t[t], align), rows)
    start_k, start_n = columns_of(column)
    for ref, buf, columns in (
      (x_ref, x_buf, lanes(start_k, width_k)),
      (y_ref, y_buf, lanes(start_n, width_n)),
    ):
      yield pltpu.make_async_copy(
        ref.at[source, columns],
        buf.at[slot, pl.ds(0, rows)],
        row_sem.at[slot],
      )

  def fetch(column, t, slot):
    @pl.when(plan.rows_t[t] > 0)
    def _start():
      for copy in row_copies(column, t, slot):
        copy.start()

  def wait_for_rows(t, slot):
    @pl.when(plan.rows_t[t] > 0)
    def _wait():
      for copy in row_copies(0, t, slot):
        copy.wait()

  def o_copy(group, column, c, slot):
    start_k, start_n = columns_of(column)
    return pltpu.make_async_copy(
      o_buf.at[slot],
      o_ref.at[
        group, lanes(start_k, width_k), lanes(start_n + c * chunk, chunk)
      ],
      o_sem.at[slot],
    )

  def wait_for_store(slot):
    @pl.when(is_stored_ref[slot] == 1)
    def _wait():
      o_copy(0, 0, 0, slot).wait()

    is_stored_ref[slot] = 0

  def start_store(group, column, c, slot):
    is_stored_ref[slot] = 1
    o_copy(group, column, c, slot).start()

  def clear_others(height, t, slot):
    """Zeros in the rows that are not the group's, whatever they hold."""
    begin, end = plan.begin_t[t], plan.end_t[t]

    def clear(i):
      start = pl.multiple_of(i * align, align)
      for buf in (x_buf, y_buf):
        part = buf[slot, pl.ds(start, align)]
        row = start + lax.broadcasted_iota(jnp.int32, part.shape, 0)
        keep = (begin <= row) & (row < end)
        buf[slot, pl.ds(start, align)] = jnp.where(keep, part, 0)

    pl.when(begin > 0)(lambda: clear(0))
    pl.loop(lax.div(end, align), height // align)(clear)

  def add_tile(height, group, column, t, slot):
    is_first, is_last = plan.is_first_t[t] == 1, plan.is_last_t[t] == 1
    clear_others(height, t, slot)

    @pl.loop(0, chunks)
    def _chunk(c):
      o_slot = lax.rem(c, 2)
      wait_for_store(o_slot)
      product = lax.dot_general(
        x_buf[slot, :height],
        y_buf[slot, :height, lanes(c * chunk, chunk)],
        (((0,), (0,)), ((), ())),
        precision=_precision(x_buf.dtype),
        preferred_element_type=jnp.float32,
      )
      total = product + jnp.where(is_first, 0.0, acc_ref[c])
      # Both without a branch: the stores hide behind the product.
      acc_ref[c] = total
      o_buf[o_slot] = total.astype(o_buf.dtype)
      pl.when(is_last)(lambda: start_store(group, column, c, o_slot))

  def clear_group(group, column):
    @pl.loop(0, chunks)
    def _chunk(c):
      o_slot = lax.rem(c, 2)
      wait_for_store(o_slot)
      o_buf[o_slot] = jnp.zeros_like(o_buf[o_slot])
      start_store(group, column, c, o_slot)

  def do_tile(column, t):
    slot = lax.rem(column * num_tiles + t, 2)
    is_last_tile = t == num_tiles - 1
    group = plan.visit_t[t]  # All are visited.

    @pl.when(~(is_last_tile & (column == num_columns - 1)))
    def _fetch_next_rows():
      fetch(
        jnp.where(is_last_tile, column + 1, column),
        jnp.where(is_last_tile, 0, t + 1),
        1 - slot,
      )

    wait_for_rows(t, slot)
    for kind, height in enumerate(blocks.heights):
      pl.when(plan.kind_t[t] == kind)(
        functools.partial(add_tile, height, group, column, t, slot)
      )
    pl.when(plan.rows_t[t] == 0)(lambda: clear_group(group, column))

  is_stored_ref[0] = is_stored_ref[1] = 0
  fetch(0, 0, 0)

  @pl.loop(0, num_columns)
  def _column(column):
    pl.loop(0, num_tiles)(functools.partial(do_tile, column))

  wait_for_store(0)
  wait_for_store(1)


def weight_gradient(
  x_mk: jax.Array,
  y_mn: jax.Array,
  start_g: jax.Array,
  size_g: jax.Array,
  *,
  blocks: blocks_lib.GradBlockSizes,
  dtype: jnp.dtype,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  """Sums x[i]^T · y[i] over the rows of each group, [g, k, n].

  Args:
    x_mk: [m, k] rows.
    y_mn: [m, n] as many.
    start_g: int32 [g] first row of each group, rising.
    size_g: int32 [g] its rows; without any the sum is zero.
    blocks: Sizes of the tiles.
    dtype: Of the result; sums are float32.
    interpret: Run on a CPU.
  """
  (m, k), n, g = x_mk.shape, y_mn.shape[1], len(size_g)
  itemsize = x_mk.dtype.itemsize
  heights, chunk = blocks.heights, blocks.chunk
  width_k, width_n = blocks.width_k, blocks.width_n
  plan = plan_lib.make_plan(
    start_g,
    size_g,
    m,
    heights=heights,
    align=blocks_lib.align(itemsize),
    visit_empty=True,
  )
  return pl.pallas_call(
    functools.partial(_gradient_kernel, blocks=blocks),
    name='grouped_matmul_gradient',
    out_shape=jax.ShapeDtypeStruct((g, k, n), dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(_PLAN),
      grid=(blocks.parts,),
      in_specs=[_HBM, _HBM],
      out_specs=_HBM,
      # VMEM, bytes: 2 · highest · (width_k + width_n) · itemsize for rows,
      # width_k · width_n · 4 for the sum, and 2 · width_k · chunk · itemsize
      # for what leaves.
      scratch_shapes=[
        pltpu.VMEM((2, heights[0], width_k), x_mk.dtype),
        pltpu.VMEM((2, heights[0], width_n), y_mn.dtype),
        pltpu.VMEM((width_n // chunk, width_k, chunk), jnp.float32),
        pltpu.VMEM((2, width_k, chunk), dtype),
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.SemaphoreType.DMA((2,)),
      ],
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=_semantics(blocks.parts),
      vmem_limit_bytes=blocks.vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * k * n,
      bytes_accessed=(
        m * k * (n // width_n) + m * n * (k // width_k) + g * k * n
      )
      * itemsize,
      transcendentals=0,
    ),
    interpret=interpret,
  )(*(getattr(plan, name) for name in _PLAN), x_mk, y_mn)
