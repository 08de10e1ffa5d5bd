"""The FP8 product as a Pallas kernel for TPUs.

It computes the transposed product, 128 columns of b by 256 rows of a: there the
scales of a are a row of lanes, and one multiplied row of scales serves all the
128 columns of a block of b. Each such tile is summed over k in registers, and
where the result is not wanted transposed it is transposed when it is whole.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.matmul_fp8 import blocks as blocks_lib
from pallas_kernels.matmul_fp8 import tile as tile_lib

_CHUNK, _LANES, _SIZE = blocks_lib.CHUNK, blocks_lib.LANES, tile_lib.SIZE


def _matmul_kernel(
  *refs,
  blocks: blocks_lib.BlockSizes,
  contract: tuple[int, int],
  by_column: bool,
  n: int,
  steps_k: int,
  has_addend: bool,
  is_transposed: bool,
):
  """One tile of the result; k is the innermost grid axis, rows are the next.

  a_ref [bm, bk] or [bk, bm], scale_a_ref [bk/128, bm], b_ref [bn, bk] or
  [bk, bn], scale_b_ref [1, 1, bk/128, bn/128] or by column [bk/128, bn] and
  perhaps add_ref [bm, bn] -> o_ref [bm, bn], these and total_ref [bn, bm] if
  transposed. In VMEM scale_ref, the products of both scales [bn/128, bk/128,
  bm], or by column those of b in all lanes [bk/128, bn, 128]; b_nk_ref [bn,
  bk], if b is [bk, bn]; total_ref [bm, bn] f32, if k has several steps.
  """
  refs = list(refs)
  a_ref, scale_a_ref, b_ref, scale_b_ref = refs[:4]
  del refs[:4]
  add_ref = refs.pop(0) if has_addend else None
  o_ref, scale_ref = refs.pop(0), refs.pop(0)
  b_nk_ref = refs.pop(0) if contract[1] == 0 else b_ref
  total_ref = refs.pop(0) if steps_k > 1 else None
  column, row, step = (pl.program_id(i) for i in range(3))
  depth = blocks.depth
  # A tile of b stays while rows pass, unless those of k pass, too.
  is_new = (row == 0) | (steps_k > 1)

  def load_columns():
    """Puts a new tile of b as it is used."""
    if b_nk_ref is not b_ref:
      tile_lib.transpose(b_ref, b_nk_ref, depth)
    if by_column:
      scale_ref[...] = jnp.broadcast_to(
        scale_b_ref[...][:, :, None], scale_ref.shape
      )

  pl.when(is_new)(load_columns)

  if not by_column:
    for i in range(blocks.columns // _LANES):
      scale_ref[i] = scale_a_ref[...] * scale_b_ref[0, 0, :, i : i + 1]

  def tile(rows, columns, stripe, number):
    """A sum over this step's k, [128, 256]; the number of it in the code."""

    def scaled(i, product):
      if not by_column:
        return product * scale_ref[stripe, i : i + 1, rows]
      wide = tile_lib.in_lanes(scale_ref[i, columns, :], _CHUNK)
      return product * (wide * scale_a_ref[i : i + 1, rows])

    return tile_lib.total(
      b_nk_ref,
      columns.start,
      lambda part: a_ref[rows, part] if contract[0] == 1 else a_ref[part, rows],
      contract[0],
      scaled,
      depth // _SIZE,
      blocks.halved,
      number * (depth // _SIZE),
    )

  def store(at, total):
    if steps_k > 1:
      total_ref[at] = total + jnp.where(step == 0, 0.0, total_ref[at])
      total = total_ref[at]

    def leave():
      out = total if add_ref is None else total + add_ref[at]
      o_ref[at] = out.astype(o_ref.dtype)

    if steps_k == 1:
      leave()
    else:
      pl.when(step == steps_k - 1)(leave)

  pieces = blocks.rows // blocks.code_rows
  stripes = blocks.columns // blocks.code_columns
  if n % blocks.columns:
    # Columns past the last are not computed.
    last = pl.cdiv(n % blocks.columns, blocks.code_columns)
    stripes = jnp.where(column == n // blocks.columns, last, stripes)

  @pl.loop(0, stripes * pieces)
  def _piece(piece):
    first_column = lax.div(piece, pieces) * blocks.code_columns
    first_row = lax.rem(piece, pieces) * blocks.code_rows
    for j in range(0, blocks.code_columns, _LANES):
      for i in range(0, blocks.code_rows, _CHUNK):
        start = pl.multiple_of(first_column + j, _LANES)
        rows = pl.ds(pl.multiple_of(first_row + i, _CHUNK), _CHUNK)
        columns = pl.ds(start, _LANES)
        number = (j * blocks.code_rows + i * _LANES) // (_CHUNK * _LANES)
        total = tile(rows, columns, lax.div(start, _LANES), number)
        if is_transposed:
          store((columns, rows), total)
        else:
          store((rows, columns), total.T)


def multiply(
  a: jax.Array,
  scale_a_im: jax.Array,
  b: jax.Array,
  scale_b: jax.Array,
  addend: jax.Array | None,
  *,
  blocks: blocks_lib.BlockSizes,
  contract: tuple[int, int],
  is_transposed: bool,
  out_dtype: jnp.dtype,
  interpret: bool | pltpu.InterpretParams,
) -> jax.Array:
  """Multiplies, [m, k] · [k, n] -> [m, n], or [n, m] if transposed.

  Args:
    a: e4m3 [m, k], or [k, m]; k a multiple of the depth of a block.
    scale_a_im: float32 [k/128, m].
    b: e4m3 [k, n], or [n, k].
    scale_b: float32 [k/128, n], or of blocks [k/depth, ⌈n/columns⌉, depth/128,
      columns/128].
    addend: float32 of the result's shape, to which it is added, in place.
    blocks: Sizes of the tiles.
    contract: Axes of a and b that are k.
    is_transposed: The result is stored [n, m].
    out_dtype: Of the result.
    interpret: Run on a CPU.
  """
  k, m = a.shape[contract[0]], a.shape[1 - contract[0]]
  n = b.shape[1 - contract[1]]
  bm, bn, bk = blocks.rows, blocks.columns, blocks.depth
  by_column = scale_b.ndim == 2
  grid = pl.cdiv(n, bn), pl.cdiv(m, bm), k // bk
  if contract[0] == 1:
    tile_a = pl.BlockSpec((bm, bk), lambda j, i, l: (i, l))
  else:
    tile_a = pl.BlockSpec((bk, bm), lambda j, i, l: (l, i))
  if contract[1] == 1:
    tile_b = pl.BlockSpec((bn, bk), lambda j, i, l: (j, l))
  else:
    tile_b = pl.BlockSpec((bk, bn), lambda j, i, l: (l, j))
  if is_transposed:
    tile_o, shape = pl.BlockSpec((bn, bm), lambda j, i, l: (j, i)), (n, m)
  else:
    tile_o, shape = pl.BlockSpec((bm, bn), lambda j, i, l: (i, j)), (m, n)
  scales_a = pl.BlockSpec((bk // _SIZE, bm), lambda j, i, l: (l, i))
  if by_column:
    scales_b = pl.BlockSpec((bk // _SIZE, bn), lambda j, i, l: (l, j))
    scales = bk // _SIZE, bn, _LANES
  else:
    scales_b = pl.BlockSpec(
      (1, 1, bk // _SIZE, bn // _LANES), lambda j, i, l: (l, j, 0, 0)
    )
    scales = bn // _LANES, bk // _SIZE, bm
  has_addend = addend is not None
  # VMEM, bytes: 2 · bk · (bm + bn) for a and b and bk · bn for b transposed,
  # 2 · bm · bn · itemsize for the result and as much for what it is added to,
  # bm · bn · 4 for the sum, bk/128 · bm · bn/128 · 4 for products of scales or
  # bk/128 · bn · 512 for b's in all lanes.
  scratch = [pltpu.VMEM(scales, jnp.float32)]
  if contract[1] == 0:
    scratch.append(pltpu.VMEM((bn, bk), b.dtype))
  if grid[2] > 1:
    scratch.append(pltpu.VMEM(tile_o.block_shape, jnp.float32))
  return pl.pallas_call(
    functools.partial(
      _matmul_kernel,
      blocks=blocks,
      contract=contract,
      by_column=by_column,
      n=n,
      steps_k=grid[2],
      has_addend=has_addend,
      is_transposed=is_transposed,
    ),
    name='matmul_fp8',
    grid=grid,
    in_specs=[
      *(tile_a, scales_a, tile_b, scales_b),
      *([tile_o] if has_addend else []),
    ],
    out_specs=tile_o,
    out_shape=jax.ShapeDtypeStruct(shape, out_dtype),
    scratch_shapes=scratch,
    input_output_aliases={4: 0} if has_addend else {},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=blocks.vmem_limit_bytes,
    ),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * k * n,
      bytes_accessed=m * k * grid[0]
      + k * n * (1 if grid[2] == 1 else grid[1])
      + m * n * jnp.dtype(out_dtype).itemsize * (2 if has_addend else 1),
      transcendentals=0,
    ),
    interpret=interpret,
  )(a, scale_a_im, b, scale_b, *([addend] if has_addend else []))
