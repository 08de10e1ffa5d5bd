"""What the FP8 kernels do with a tile: sum it over k, and transpose it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

SIZE = 128  # Of k, for which a scale holds.
LANES = 128


def total(
  b_ref,
  start: jax.Array,
  a: Callable[[slice], jax.Array],
  axis: int,
  scaled: Callable[[int, jax.Array], jax.Array],
  count: int,
  halved: tuple[int, int],
  first: int = 0,
) -> jax.Array:
  """Σ over 128s of k of scaled(i, b · aᵀ), float32 [128, rows].

  Args:
    b_ref: [n, k].
    start: Where its 128 rows begin.
    a: Reads a part of k, [rows, 128] or [128, rows].
    axis: Of that, which k is.
    scaled: Multiplies the product i by its scales.
    count: Of 128s.
    halved: So many products out of so many are done in halves, see
      blocks.BlockSizes.
    first: Products before these in a piece of straight-line code.
  """
  out = None
  for i in range(count):
    part = slice(i * SIZE, (i + 1) * SIZE)
    is_halved = (first + i) % halved[1] >= halved[1] - halved[0]
    size = LANES // 2 if is_halved else LANES
    a_part = a(part)
    product = jnp.concatenate(
      [
        lax.dot_general(
          b_ref[pl.ds(start + j, size), part],
          a_part,
          (((1,), (axis,)), ((), ())),
          preferred_element_type=jnp.float32,
        )
        for j in range(0, LANES, size)
      ]
    )
    product = scaled(i, product)
    out = product if out is None else out + product
  return out


def in_lanes(column: jax.Array, rows: int) -> jax.Array:
  """[n, 128], the same in each lane, of so many rows: [n, rows]."""
  return jnp.concatenate([column] * (rows // LANES), axis=1)


def transpose(from_ref, to_ref, depth: int) -> None:
  """[depth, n] -> [n, depth], in parts."""
  unit = 512 if depth % 512 == 0 else SIZE

  @pl.loop(0, depth // unit)
  def _part(i):
    part = pl.ds(pl.multiple_of(i * unit, unit), unit)
    to_ref[:, part] = from_ref[part, :].T
