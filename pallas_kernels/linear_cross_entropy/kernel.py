"""Scores of a tile of tokens and columns live in VMEM, and nowhere else.

Forward, one pass over the columns keeps of each token the largest score so
far, and relative to it the sum of exponentials and of exponentials times
scores. Backward computes the scores again, once for each of the two gradients:
they sum over different axes of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_cross_entropy import blocks as blocks_lib

_NONE = -1e30  # A score of no column.
_PART = 1024
_ONE = pl.Buffered(1)
_VMEM_BYTES = 62 * 2**20  # What every generation since v5e has.


def _scores(x_ref, w_ref, scale, first_column, num_columns):
  """Scores [tokens, columns] in float32, and the numbers of the columns."""
  z_bc = scale * jnp.dot(
    x_ref[...], w_ref[...], preferred_element_type=jnp.float32
  )
  column_bc = first_column + jax.lax.broadcasted_iota(jnp.int32, z_bc.shape, 1)
  return jnp.where(column_bc < num_columns, z_bc, _NONE), column_bc


def _forward_kernel(
  x_ref,
  w_ref,
  target_ref,
  top_ref,
  sum_ref,
  weighted_ref,
  hit_ref,
  *,
  scale,
  columns,
  num_columns,
):
  """One tile of columns of a tile of tokens; columns are innermost.

  x_ref [b, D], w_ref [D, c], target_ref [b, 1] -> four sums [b, 1].
  """
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _start():
    top_ref[...] = jnp.full_like(top_ref, _NONE)
    for ref in (sum_ref, weighted_ref, hit_ref):
      ref[...] = jnp.zeros_like(ref)

  z_bc, column_bc = _scores(x_ref, w_ref, scale, step * columns, num_columns)
  old_b1 = top_ref[...]
  top_b1 = jnp.maximum(old_b1, z_bc.max(axis=1, keepdims=True))
  shifted_bc = z_bc - top_b1
  exp_bc = jnp.exp(shifted_bc)
  # What was summed relative to the old top; of nothing the sums are 0.
  moved_b1 = jnp.maximum(old_b1 - top_b1, _NONE / 2)
  shrink_b1 = jnp.exp(moved_b1)
  total = lambda x: x.sum(axis=1, keepdims=True)
  weighted_ref[...] = shrink_b1 * (
    weighted_ref[...] + jnp.where(sum_ref[...] > 0, moved_b1, 0) * sum_ref[...]
  ) + total(exp_bc * jnp.maximum(shifted_bc, _NONE / 2))
  sum_ref[...] = shrink_b1 * sum_ref[...] + total(exp_bc)
  hit_ref[...] += total(jnp.where(column_bc == target_ref[...], z_bc, 0.0))
  top_ref[...] = top_b1


def _gradient_kernel(
  x_ref,
  w_ref,
  target_ref,
  lse_ref,
  grad_ref,
  out_ref,
  acc_ref,
  *,
  of_head,
  scale,
  columns,
  num_columns,
):
  """The gradient of a tile of tokens, or of one of the head's columns.

  The other tiles are innermost. out_ref and acc_ref, which is float32, are
  [b, D] or [D, c].
  """
  step = pl.program_id(1)

  @pl.when(step == 0)
  def _zero():
    acc_ref[...] = jnp.zeros_like(acc_ref)

  z_bc, column_bc = _scores(
    x_ref,
    w_ref,
    scale,
    (pl.program_id(0) if of_head else step) * columns,
    num_columns,
  )
  # g · (1[v = y] - p_v), scaled as the scores are.
  hit_bc = (column_bc == target_ref[...]).astype(jnp.float32)
  pull_bc = (scale * grad_ref[...]) * (hit_bc - jnp.exp(z_bc - lse_ref[...]))
  pull_bc = pull_bc.astype(x_ref.dtype)

  def add(part):
    if of_head:
      at, operands, axes = (
        (part, slice(None)),
        (x_ref[:, part], pull_bc),
        (0, 0),
      )
    else:
      at, operands, axes = (
        (slice(None), part),
        (pull_bc, w_ref[part, :]),
        (1, 1),
      )
    acc_ref[at] += jax.lax.dot_general(
      *operands,
      (((axes[0],), (axes[1],)), ((), ())),
      preferred_element_type=jnp.float32,
    )

  # Part by part of the width: a seventh of the code.
  width = w_ref.shape[0]
  size = _PART if width % _PART == 0 else width

  @pl.loop(0, width // size)
  def _(i):
    add(pl.ds(pl.multiple_of(i * size, size), size))

  @pl.when(step == pl.num_programs(1) - 1)
  def _store():
    out_ref[...] = acc_ref[...].astype(out_ref.dtype)


def forward(
  x_mD: jax.Array,
  w_DV: jax.Array,
  target_m1: jax.Array,
  *,
  temperature: float,
  num_columns: int,
  blocks: blocks_lib.BlockSizes,
  interpret: bool,
) -> tuple[jax.Array, ...]:
  """(top, Σ exp, Σ exp · (z - top), target's score), float32 [m, 1] each."""
  (m, D), V = x_mD.shape, w_DV.shape[1]
  b, c = blocks.tokens, blocks.columns
  rows = pl.BlockSpec((b, 1), lambda i, j: (i, 0))
  return pl.pallas_call(
    functools.partial(
      _forward_kernel,
      scale=1 / temperature,
      columns=c,
      num_columns=num_columns,
    ),
    grid=(m // b, V // c),
    in_specs=[
      pl.BlockSpec((b, D), lambda i, j: (i, 0), pipeline_mode=_ONE),
      pl.BlockSpec((D, c), lambda i, j: (0, j)),
      rows,
    ],
    out_specs=[rows] * 4,
    out_shape=[jax.ShapeDtypeStruct((m, 1), jnp.float32)] * 4,
    compiler_params=_params(),
    cost_estimate=pl.CostEstimate(
      flops=2 * m * D * V,
      bytes_accessed=x_mD.nbytes + m // b * w_DV.nbytes,
      transcendentals=m * V,
    ),
    name='linear_cross_entropy',
    interpret=interpret,
  )(x_mD, w_DV, target_m1)


def backward(
  x_mD: jax.Array,
  w_DV: jax.Array,
  target_m1: jax.Array,
  lse_m1: jax.Array,
  grad_m1: jax.Array,
  *,
  temperature: float,
  num_columns: int,
  blocks: blocks_lib.BlockSizes,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """Gradients of x and w, in their dtypes."""
  (m, D), V = x_mD.shape, w_DV.shape[1]
  b, c = blocks.tokens, blocks.columns

  def gradient(of_head):
    if of_head:
      out, acc, grid = w_DV, (D, c), (V // c, m // b)
      row, column = (lambda i, j: j), (lambda i, j: i)
      passing, passes = x_mD, V // c
    else:
      out, acc, grid = x_mD, (b, D), (m // b, V // c)
      row, column = (lambda i, j: i), (lambda i, j: j)
      passing, passes = w_DV, m // b
    # What stays while the other tiles pass needs no second buffer.
    mode_x, mode_w = (None, _ONE) if of_head else (_ONE, None)
    rows = pl.BlockSpec((b, 1), lambda i, j: (row(i, j), 0))
    tile_x = pl.BlockSpec(
      (b, D), lambda i, j: (row(i, j), 0), pipeline_mode=mode_x
    )
    tile_w = pl.BlockSpec(
      (D, c), lambda i, j: (0, column(i, j)), pipeline_mode=mode_w
    )
    return pl.pallas_call(
      functools.partial(
        _gradient_kernel,
        of_head=of_head,
        scale=1 / temperature,
        columns=c,
        num_columns=num_columns,
      ),
      grid=grid,
      in_specs=[tile_x, tile_w, rows, rows, rows],
      out_specs=tile_w if of_head else tile_x,
      out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
      scratch_shapes=[pltpu.VMEM(acc, jnp.float32)],
      compiler_params=_params(),
      cost_estimate=pl.CostEstimate(
        flops=4 * m * D * V,
        bytes_accessed=2 * out.nbytes + passes * passing.nbytes,
        transcendentals=m * V,
      ),
      name=f'linear_cross_entropy_{"head" if of_head else "hidden"}',
      interpret=interpret,
    )(x_mD, w_DV, target_m1, lse_m1, grad_m1)

  return gradient(of_head=False), gradient(of_head=True)


def _params():
  return pltpu.CompilerParams(
    dimension_semantics=('parallel', 'arbitrary'),
    vmem_limit_bytes=_VMEM_BYTES,
  )
