"""The grouped FP8 products as Pallas kernels for TPUs.

As in matmul_fp8 the result is computed transposed, in tiles of 128 columns by
256 rows that are summed over all of k in registers. As in grouped_matmul all
arrays stay in HBM and the kernels copy, each group's rows in as many as there
are and its weights once; which tile is whose is planned outside.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import plan as plan_lib
from pallas_kernels.grouped_matmul_fp8 import blocks as blocks_lib

ALIGN = 128  # Rows that are moved as one: of a tile of scales.
_SIZE = 128  # Of what is summed over, for which a scale holds.
_CHUNK, _LANES = blocks_lib.CHUNK, blocks_lib.LANES
_HBM = pl.BlockSpec(memory_space=pl.ANY)


def _sum(
  b_ref,
  columns,
  a: Callable[[slice], jax.Array],
  axis: int,
  scaled: Callable[[int, jax.Array], jax.Array],
  count: int,
  halved: tuple[int, int],
) -> jax.Array:
  """Σ over 128s of k of scaled(i, b · aᵀ), float32 [128, rows].

  Args:
    b_ref: [n, k].
    columns: Where its 128 rows begin.
    a: Reads a part of k, [rows, 128] or [128, rows].
    axis: Of that, which k is.
    scaled: Multiplies a product by its scales.
    count: Of 128s.
    halved: So many products out of so many are done in halves.
  """
  total = None
  for i in range(count):
    part = slice(i * _SIZE, (i + 1) * _SIZE)
    size = _LANES // 2 if i % halved[1] >= halved[1] - halved[0] else _LANES
    product = jnp.concatenate(
      [
        lax.dot_general(
          b_ref[pl.ds(columns + j, size), part],
          a(part),
          (((1,), (axis,)), ((), ())),
          preferred_element_type=jnp.float32,
        )
        for j in range(0, _LANES, size)
      ]
    )
    product = scaled(i, product)
    total = product if total is None else total + product
  return total


def _transpose(from_ref, to_ref, depth):
  """[depth, n] -> [n, depth], in parts."""
  unit = 512 if depth % 512 == 0 else _SIZE

  @pl.loop(0, depth // unit)
  def _part(i):
    part = pl.ds(pl.multiple_of(i * unit, unit), unit)
    to_ref[:, part] = from_ref[part, :].T


def _semantics(parts):
  return ('parallel',) if parts > 1 else ('arbitrary',)


# Of a plan, what a product needs.
PRODUCT_PLAN = (
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
  count = len(PRODUCT_PLAN)
  plan = dict(zip(PRODUCT_PLAN, refs))
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
        total = _sum(
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
  scalars = [getattr(plan, name) for name in PRODUCT_PLAN]
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
      dimension_semantics=_semantics(blocks.parts),
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


# Of a plan, what sums over rows need.
OUTER_PLAN = (
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
  count = len(OUTER_PLAN)
  plan = dict(zip(OUTER_PLAN, refs))
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
    _transpose(y_buf.at[slot], y_nm_ref, depth)
    for i in range(depth // _SIZE):
      scale_ref[i] = jnp.broadcast_to(
        y_scale_buf[slot, i, 0][:, None], scale_ref.shape[1:]
      )
    pieces = width_k // blocks.code_rows

    def chain(row, column, chunk):
      here, there = pl.ds(row, chunk), pl.ds(column, _LANES)

      def scaled(i, product):
        wide = scale_ref[i, there, :]
        wide = jnp.concatenate([wide] * (chunk // _LANES), axis=1)
        return product * (wide * x_scale_buf[slot, i, :, here])

      total = _sum(
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
    align=ALIGN,
    visit_empty=True,
  )
  scales = depth // _SIZE
  return pl.pallas_call(
    functools.partial(_outer_kernel, blocks=blocks),
    name='grouped_outer_fp8',
    out_shape=jax.ShapeDtypeStruct((g, k, n), jnp.float32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(OUTER_PLAN),
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
      dimension_semantics=_semantics(blocks.parts),
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
    *(getattr(plan, name) for name in OUTER_PLAN),
    x_mk,
    x_scale_mk[:, None],
    y_mn,
    y_scale_mn[:, None],
  )
