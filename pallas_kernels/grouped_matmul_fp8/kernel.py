"""The grouped FP8 product as a Pallas kernel for TPUs.

As in matmul_fp8 the result is computed transposed, in tiles of 128 columns by
256 rows that are summed over all of k in registers. As in grouped_matmul all
arrays stay in HBM and the kernels copy, each group's rows in as many as there
are and its weights once; which tile is whose is planned outside.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul_fp8 import blocks as blocks_lib
from pallas_kernels.matmul_fp8 import tile as tile_lib

ALIGN = 128  # Rows that are moved as one: of a tile of scales.
_CHUNK, _LANES, _SIZE = blocks_lib.CHUNK, blocks_lib.LANES, tile_lib.SIZE
_HBM = pl.BlockSpec(memory_space=pl.ANY)


def semantics(parts: int) -> tuple[str]:
  """Of a grid of so many cores."""
  return ('parallel',) if parts > 1 else ('arbitrary',)


# Of a plan, what a product needs.
PLAN = (
  *('num_tiles', 'num_visits', 'group_v', 'visit_t', 'first_t', 'rows_t'),
  'is_first_t',
)


def _product_kernel(
  *refs, blocks: blocks_lib.ProductSizes, transposed: bool, fill: bool
):
  """All tiles of this core's columns; see `multiply`.

  Plan refs and end_ref [1] (SMEM), x_ref [m, k], x_scale_ref [k/128, m],
  w_ref [g, k, n] or [g, n, k] if transposed, w_scale_ref [g, tiles, k/128,
  width/128] -> o_ref [m, n], all in HBM. In VMEM x_buf [2, rows, k],
  x_scale_buf [2, k/128, rows], w_buf [2, k, width] or [2, width, k],
  w_scale_buf [3, k/128, width/128], o_buf [2, rows, width]; scale_ref
  [width/128, k/128, rows] products of both scales. If w is not so already,
  w_nk_ref [width, k] is what is multiplied; while it is, w_next_ref becomes
  the same of the next weights, of which ready_ref [1] parts are.
  """
  count = len(PLAN)
  plan = dict(zip(PLAN, refs))
  end_ref, x_ref, x_scale_ref, w_ref, w_scale_ref, o_ref = refs[
    count : count + 6
  ]
  x_buf, x_scale_buf, w_buf, w_scale_buf, o_buf, scale_ref, *rest = refs[
    count + 6 :
  ]
  if not transposed:
    w_nk_ref, w_next_ref, ready_ref = rest[:3]
    del rest[:3]
  stored_ref, x_sem, w_sem, o_sem = rest
  num_tiles, num_visits = plan['num_tiles'][0], plan['num_visits'][0]
  width, depth = blocks.width, x_ref.shape[1]
  num_columns = o_ref.shape[1] // (width * blocks.parts)
  num_loads = num_columns * num_visits  # Of tiles of weights.
  first_column = pl.program_id(0) * num_columns

  def lanes(column):
    start = (first_column + column) * width
    return pl.ds(pl.multiple_of(start, _LANES), width)

  def some_rows(start, rows):
    return pl.ds(pl.multiple_of(start, ALIGN), pl.multiple_of(rows, ALIGN))

  def x_copies(t, slot):
    there = some_rows(plan['first_t'][t], plan['rows_t'][t])
    here = some_rows(0, plan['rows_t'][t])
    return (
      pltpu.make_async_copy(
        x_ref.at[there], x_buf.at[slot, here], x_sem.at[slot, 0]
      ),
      pltpu.make_async_copy(
        x_scale_ref.at[:, there],
        x_scale_buf.at[slot, :, here],
        x_sem.at[slot, 1],
      ),
    )

  def w_copies(load):
    """Of a tile of weights, by its place among all of this core's."""
    column, group = lax.div(load, num_visits), lax.rem(load, num_visits)
    slot, group = lax.rem(load, 2), plan['group_v'][group]
    source = w_ref.at[group]
    return (
      pltpu.make_async_copy(
        source.at[lanes(column)] if transposed else source.at[:, lanes(column)],
        w_buf.at[slot],
        w_sem.at[slot, 0],
      ),
      pltpu.make_async_copy(
        w_scale_ref.at[group, first_column + column],
        w_scale_buf.at[lax.rem(load, 3)],
        w_sem.at[slot, 1],
      ),
    )

  def start(copies):
    for copy in copies:
      copy.start()

  def wait(copies):
    for copy in copies:
      copy.wait()

  def o_copy(column, first, rows, slot):
    return pltpu.make_async_copy(
      o_buf.at[slot, some_rows(0, rows)],
      o_ref.at[some_rows(first, rows), lanes(column)],
      o_sem.at[slot],
    )

  def wait_for_store(slot):
    @pl.when(stored_ref[slot] > 0)
    def _wait():
      o_copy(0, 0, stored_ref[slot], slot).wait()

  # Parts of a tile of weights that are transposed as one.
  unit = 512 if depth % 512 == 0 else _SIZE
  parts = depth // unit * (width // _LANES)
  heights = blocks.rows // _CHUNK * (width // blocks.code_columns)
  parts_each = pl.cdiv(parts, heights)  # Of a piece of code.

  def transpose_part(i, slot, to_ref):
    i = jnp.minimum(i, parts - 1)  # The last, again, is no harm.
    row = pl.multiple_of(lax.div(i, width // _LANES) * unit, unit)
    column = pl.multiple_of(lax.rem(i, width // _LANES) * _LANES, _LANES)
    here, there = pl.ds(row, unit), pl.ds(column, _LANES)
    to_ref[there, here] = w_buf[slot, here, there].T

  def take_weights(load):
    """Makes the next weights those that are multiplied."""
    slot = lax.rem(load, 2)

    @pl.when(load == 0)
    def _first():
      wait(w_copies(load))
      if not transposed:
        pl.loop(0, parts)(lambda i: transpose_part(i, slot, w_nk_ref))

    if transposed:
      pl.when(load > 0)(lambda: wait(w_copies(load)))
      pl.when(load < num_loads - 1)(lambda: start(w_copies(load + 1)))
      return

    @pl.when(load > 0)
    def _others():
      pl.loop(ready_ref[0], parts)(
        lambda i: transpose_part(i, slot, w_next_ref)
      )
      w_nk_ref[...] = w_next_ref[...]

    ready_ref[0] = 0
    # Both are there: those in use, transposed, and the next, to be so.
    # Of scales there are three, for those of this one are still needed.
    pl.when(load < num_loads - 1)(lambda: wait(w_copies(load + 1)))
    pl.when(load < num_loads - 2)(lambda: start(w_copies(load + 2)))

  def multiply_tile(rows, slot, load):
    w_slot = lax.rem(load, 2)
    w_nk = w_buf.at[w_slot] if transposed else w_nk_ref
    for i in range(width // _LANES):
      scale_ref[i] = (
        x_scale_buf[slot] * w_scale_buf[lax.rem(load, 3), :, i : i + 1]
      )

    def piece(i, chunk, columns):
      """So many columns, the code of which is written out, of some rows."""
      stripes = width // columns
      first = pl.multiple_of(lax.div(i, stripes) * _CHUNK, _CHUNK)
      here = pl.ds(first, chunk)

      def chain(column):
        scales = scale_ref.at[lax.div(column, _LANES)]
        total = tile_lib.total(
          w_nk,
          column,
          lambda part: x_buf[slot, here, part],
          1,
          lambda i, product: product * scales[i : i + 1, here],
          depth // _SIZE,
          blocks.halved,
        )
        o_buf[slot, here, pl.ds(column, _LANES)] = total.T.astype(o_buf.dtype)

      chains = columns // _LANES
      first_column = lax.rem(i, stripes) * columns
      ready = None if transposed else ready_ref[0]
      for j in range(chains):
        chain(pl.multiple_of(first_column + j * _LANES, _LANES))
        if not transposed:
          for part in range(
            parts_each * j // chains, parts_each * (j + 1) // chains
          ):
            transpose_part(ready + part, 1 - w_slot, w_next_ref)
      if not transposed:
        ready_ref[0] = jnp.minimum(ready + parts_each, parts)

    def do_chunks(first, last, chunk, columns):
      stripes = width // columns
      pl.loop(first * stripes, last * stripes)(
        functools.partial(piece, chunk=chunk, columns=columns)
      )

    whole, columns = lax.div(rows, _CHUNK), blocks.code_columns
    do_chunks(0, whole, _CHUNK, columns)
    # Less code for what is done less often.
    some = columns // 2 if columns % (2 * _LANES) == 0 else _LANES
    pl.when(rows > whole * _CHUNK)(
      lambda: do_chunks(whole, whole + 1, _CHUNK // 2, some)
    )

  def do_tile(column, t):
    step = column * num_tiles + t
    slot = lax.rem(step, 2)
    load = column * num_visits + plan['visit_t'][t]
    is_last_tile = t == num_tiles - 1
    is_last_column = column == num_columns - 1

    @pl.when(~(is_last_tile & is_last_column))
    def _fetch_next_rows():
      start(x_copies(jnp.where(is_last_tile, 0, t + 1), 1 - slot))

    pl.when(plan['is_first_t'][t] == 1)(lambda: take_weights(load))
    wait(x_copies(t, slot))
    wait_for_store(slot)
    rows = plan['rows_t'][t]
    multiply_tile(rows, slot, load)
    stored_ref[slot] = rows
    o_copy(column, plan['first_t'][t], rows, slot).start()

  stored_ref[0] = stored_ref[1] = 0

  @pl.when(num_tiles > 0)
  def _multiply():
    start(x_copies(0, 0))
    start(w_copies(0))
    if not transposed:
      ready_ref[0] = 0
      pl.when(num_loads > 1)(lambda: start(w_copies(1)))

    @pl.loop(0, num_columns)
    def _column(column):
      pl.loop(0, num_tiles)(functools.partial(do_tile, column))

  wait_for_store(0)
  wait_for_store(1)

  def fill_rest():
    """Zeros where nobody's rows are, which may hold anything."""
    end = end_ref[0]
    blocks_left = lax.div(o_ref.shape[0] - end, ALIGN)

    @pl.when(blocks_left > 0)
    def _zero():
      o_buf[0, :ALIGN] = jnp.zeros_like(o_buf[0, :ALIGN])

    def copy(i):
      first = end + lax.div(i, num_columns) * ALIGN
      return o_copy(lax.rem(i, num_columns), first, ALIGN, 0)

    pl.loop(0, blocks_left * num_columns)(lambda i: copy(i).start())
    pl.loop(0, blocks_left * num_columns)(lambda i: copy(i).wait())

  if fill:
    fill_rest()


def multiply(
  x_mk: jax.Array,
  x_scale_km: jax.Array,
  w: jax.Array,
  w_scale: jax.Array,
  start_g: jax.Array,
  size_g: jax.Array,
  *,
  blocks: blocks_lib.ProductSizes,
  transposed: bool,
  fill: bool,
  out_dtype: jnp.dtype,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  """Multiplies rows by their group's weights, [m, k] -> [m, n].

  Args:
    x_mk: e4m3 [m, k] rows; m and k multiples of 128.
    x_scale_km: float32 [k/128, m].
    w: e4m3 [g, k, n], or [g, n, k] if transposed.
    w_scale: float32 [g, n/width, k/128, width/128].
    start_g: int32 [g] first row of each group, rising, multiples of 128.
    size_g: int32 [g] its rows.
    blocks: Sizes of the tiles.
    transposed: Multiplies by the transposed weights.
    fill: Writes zeros from where the last group ends, a multiple of 128.
    out_dtype: Of the result.
    interpret: Run on a CPU.
  """
  m, k = x_mk.shape
  n = w.shape[1 if transposed else 2]
  rows, width = blocks.rows, blocks.width
  plan = plan_lib.make_plan(
    start_g, size_g, m, heights=(rows,), align=ALIGN, visit_empty=False
  )
  scalars = [getattr(plan, name) for name in PLAN]
  scalars.append((start_g[-1:] + size_g[-1:]).astype(jnp.int32))
  # VMEM, bytes: 2 · rows · k for rows and k/128 · rows · 8 for their scales,
  # 2 · k · width for weights and as much for them transposed, 3 · k/128
  # · 512 for their scales, 2 · rows · width · itemsize for results and k/128
  # · width/128 · rows · 4 for products of scales.
  scratch = [
    pltpu.VMEM((2, rows, k), x_mk.dtype),
    pltpu.VMEM((2, k // _SIZE, rows), jnp.float32),
    pltpu.VMEM((2, *((width, k) if transposed else (k, width))), w.dtype),
    pltpu.VMEM((3, k // _SIZE, width // _LANES), jnp.float32),
    pltpu.VMEM((2, rows, width), out_dtype),
    pltpu.VMEM((width // _LANES, k // _SIZE, rows), jnp.float32),
  ]
  if not transposed:
    scratch += [pltpu.VMEM((width, k), w.dtype)] * 2
    scratch.append(pltpu.SMEM((1,), jnp.int32))
  scratch += [
    pltpu.SMEM((2,), jnp.int32),
    pltpu.SemaphoreType.DMA((2, 2)),
    pltpu.SemaphoreType.DMA((2, 2)),
    pltpu.SemaphoreType.DMA((2,)),
  ]
  return pl.pallas_call(
    functools.partial(
      _product_kernel, blocks=blocks, transposed=transposed, fill=fill
    ),
    name='grouped_matmul_fp8',
    out_shape=jax.ShapeDtypeStruct((m, n), out_dtype),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(blocks.parts,),
      in_specs=[_HBM] * 4,
      out_specs=_HBM,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=semantics(blocks.parts),
      vmem_limit_bytes=blocks.vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * k * n,
      bytes_accessed=m * k * (n // width)
      + w.size
      + m * n * jnp.dtype(out_dtype).itemsize,
      transcendentals=0,
    ),
    interpret=interpret,
  )(*scalars, x_mk, x_scale_km, w, w_scale)
