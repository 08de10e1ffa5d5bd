"""Which rows a kernel does when: groups cut into tiles of a few heights.

A group's tiles begin at its own first row, so that no tile has two groups and
none is done twice. The rows around a group that share a whole tile of memory
with it, `align` of them at most, are moved along.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Tiles of rows, in order, and the groups that have any.

  Attributes:
    num_tiles: int32 [1].
    num_visits: int32 [1] groups that have tiles.
    group_v: int32 [g] which these are.
    visit_t: int32 [t] number of each tile's group among them.
    kind_t: int32 [t] height of each tile, as its place among the heights; one
      past them for the tile of an empty group.
    first_t: int32 [t] first row, a multiple of `align`.
    rows_t: int32 [t] rows there are, a multiple of `align`.
    begin_t: int32 [t] of these, those that belong to groups before.
    end_t: int32 [t] where those begin that belong to groups behind.
    is_first_t: int32 [t] 1 for the first tile of a group.
    is_last_t: int32 [t] 1 for the last tile of a group.
  """

  num_tiles: jax.Array
  num_visits: jax.Array
  group_v: jax.Array
  visit_t: jax.Array
  kind_t: jax.Array
  first_t: jax.Array
  rows_t: jax.Array
  begin_t: jax.Array
  end_t: jax.Array
  is_first_t: jax.Array
  is_last_t: jax.Array


def make_plan(
  start_g: jax.Array,
  size_g: jax.Array,
  max_rows: int,
  *,
  heights: tuple[int, ...],
  align: int,
  visit_empty: bool,
) -> Plan:
  """Cuts the groups into tiles.

  Args:
    start_g: int32 [g] first row of each group.
    size_g: int32 [g] its rows.
    max_rows: Most rows of all groups together.
    heights: Of tiles, the largest first, multiples of `align`.
    align: Rows that are moved as one.
    visit_empty: An empty group has a tile, of no rows.
  """
  start_g, size_g = jnp.asarray(start_g), jnp.asarray(size_g)
  pieces_rp, length_r = map(jnp.asarray, _pieces(heights))
  unit, highest, count = math.gcd(*heights), heights[0], len(heights)
  num_groups, max_pieces = len(size_g), pieces_rp.shape[1]
  # Each group's rows are rounded up: to rows moved as one, twice, and to units.
  max_span = max_rows + num_groups * (2 * align + unit)
  max_tiles = max_span // highest + num_groups * max_pieces

  low_g = start_g // align * align
  span_g = jnp.where(
    size_g > 0, -(-(start_g + size_g) // align) * align - low_g, 0
  )
  units_g = -(-span_g // unit)
  # Two of the highest tiles are not always the best start, one is left over.
  whole_g = jnp.maximum(units_g // (highest // unit) - 1, 0)
  rest_g = units_g - whole_g * (highest // unit)
  tiles_g = whole_g + length_r[rest_g]
  if visit_empty:
    tiles_g = jnp.maximum(tiles_g, 1)
  last_g = jnp.cumsum(tiles_g)

  tile_t = jnp.arange(max_tiles)
  group_t = jnp.sum(tile_t[:, None] >= last_g[:-1], axis=1, dtype=jnp.int32)
  place_t = tile_t - (last_g - tiles_g)[group_t]
  piece_t = jnp.clip(place_t - whole_g[group_t], 0, max_pieces - 1)
  kind_t = jnp.where(
    place_t < whole_g[group_t], 0, pieces_rp[rest_g[group_t], piece_t]
  )
  height_p = jnp.asarray((*heights, 0))
  before_rp = jnp.cumsum(height_p[pieces_rp], axis=1) - height_p[pieces_rp]
  skip_t = highest * jnp.minimum(place_t, whole_g[group_t])
  skip_t += before_rp[rest_g[group_t], piece_t]
  first_t = low_g[group_t] + skip_t
  rows_t = jnp.clip(span_g[group_t] - skip_t, 0, height_p[kind_t])
  start_t, size_t = start_g[group_t], size_g[group_t]
  is_visited_g = tiles_g > 0
  return jax.tree.map(
    lambda x: x.astype(jnp.int32),
    Plan(
      num_tiles=last_g[-1:],
      num_visits=is_visited_g.sum(keepdims=True),
      group_v=jnp.nonzero(is_visited_g, size=num_groups, fill_value=0)[0],
      visit_t=(jnp.cumsum(is_visited_g) - 1)[group_t],
      kind_t=jnp.where(size_t > 0, kind_t, count),
      first_t=first_t,
      rows_t=rows_t,
      begin_t=jnp.clip(start_t - first_t, 0, rows_t),
      end_t=jnp.clip(start_t + size_t - first_t, 0, rows_t),
      is_first_t=place_t == 0,
      is_last_t=place_t == tiles_g[group_t] - 1,
    ),
  )


# Rows that a tile more costs, of tiles of 512 x 7,168 (a product's 270 cycles
# in which the matrix unit idles, of 14 cycles a row, and what a tile adds).
_ROWS_OF_A_TILE = 24


@functools.cache
def _pieces(heights: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """How what a group has beyond whole highest tiles is cut, at the least cost.

  Returns:
    Kinds of tiles [units, pieces], len(heights) where there is none, and how
    many there are [units], for each number of units below two highest tiles. A
    unit is the greatest common divisor of the heights.
  """
  unit = math.gcd(*heights)
  cost = lambda cut: sum(heights[kind] + _ROWS_OF_A_TILE for kind in cut)
  cuts = [()]
  for wanted in range(1, 2 * heights[0] // unit):
    options = (
      (*cuts[max(0, wanted - height // unit)], kind)
      for kind, height in enumerate(heights)
    )
    cuts.append(min(options, key=cost))
  # The highest first, as the rows of the last may be fewer.
  cuts = [sorted(cut) for cut in cuts]
  most = max(map(len, cuts))
  table = [cut + [len(heights)] * (most - len(cut)) for cut in cuts]
  return np.int32(table), np.int32([len(cut) for cut in cuts])
