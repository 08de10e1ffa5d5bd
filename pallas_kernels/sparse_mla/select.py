"""The TPU kernel of selection: a threshold by bisection, then compaction.

A query's k-th largest logit is found bit by bit, by counting those that are not
below: 32 passes over VMEM, whatever k is. What is selected then moves to the
front in steps of 1, 2, 4, … places, so that places never collide.

Source: Warren, Hacker's Delight, §7-4 (compress).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_UNROLL = 8  # Tiles of keys at a time.
_VMEM_LIMIT_BYTES = 48 * 2**20  # Of 64 MiB of v5p and tpu7x.
_LOWEST = -(2**31)  # What stands for -inf.


def top_k(logits_RS: jax.Array, k: int, *, rows: int, interpret) -> jax.Array:
  """Returns int32 [R, K] keys in their order, then -1; K are whole lanes.

  Args:
    logits_RS: float32, whole blocks of queries and whole lanes of keys.
    k: That are selected, at most S.
    rows: Queries at a time.
    interpret: Run on a CPU.
  """
  R, S = logits_RS.shape
  K, n = pl.cdiv(k, _LANES) * _LANES, S // _LANES
  return pl.pallas_call(
    functools.partial(_select_kernel, k=k),
    grid=(R // rows,),
    # VMEM, for 32 queries of 8,192 keys: logits 2 · 1 MiB,
    in_specs=[pl.BlockSpec((rows, S), lambda r: (r, 0))],
    # indices 2 · 256 KiB,
    out_specs=pl.BlockSpec((rows, K), lambda r: (r, 0)),
    scratch_shapes=[
      # ordered numbers and distances 2 · 1 MiB: together 4.5 MiB.
      pltpu.VMEM((n, rows, _LANES), jnp.int32),
      pltpu.VMEM((n, rows, _LANES), jnp.int32),
    ],
    out_shape=jax.ShapeDtypeStruct((R, K), jnp.int32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel',), vmem_limit_bytes=_VMEM_LIMIT_BYTES
    ),
    cost_estimate=pl.CostEstimate(
      flops=R * S * (3 * 32 + 6 * S.bit_length()),
      transcendentals=0,
      bytes_accessed=4 * R * (S + K),
    ),
    interpret=interpret,
    name='sparse_mla_top_k',
  )(logits_RS)


def _select_kernel(
  logits_ref,  # [rows, S]
  out_ref,  # [rows, K]
  number_ref,  # [n, rows, 128] i32
  distance_ref,  # [n, rows, 128] i32
  *,
  k,
):
  """Some queries; a tile is 128 keys of each."""
  n, rows, _ = number_ref.shape
  lane = jax.lax.broadcasted_iota(jnp.int32, (rows, _LANES), 1)

  def lanes_of(i):
    return pl.ds(pl.multiple_of(i * _LANES, _LANES), _LANES)

  def tiles(begin, end, body, carry):
    """A loop over tiles, unrolled where there are many."""
    whole = (end - begin) // _UNROLL

    def some(group, carry):
      for i in range(_UNROLL):
        carry = body(begin + group * _UNROLL + i, carry)
      return carry

    carry = jax.lax.fori_loop(0, whole, some, carry)
    for i in range(begin + whole * _UNROLL, end):
      carry = body(i, carry)
    return carry

  def to_number(i, _):
    """Integers that are ordered as the logits are, with -0 as 0."""
    x = logits_ref[:, lanes_of(i)]
    bits = pltpu.bitcast(jnp.where(x == 0, 0.0, x), jnp.int32)
    number = bits ^ (jax.lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF)
    number_ref[i] = jnp.where(x > -jnp.inf, number, _LOWEST)
    return 0

  def count(is_counted):
    """Keys of each query, float32 [rows, 1]."""

    def add(i, total):
      return total + jnp.where(is_counted(number_ref[i]), 1.0, 0.0)

    total = tiles(0, n, add, jnp.zeros((rows, _LANES)))
    return jnp.sum(total, axis=-1, keepdims=True)

  def bisect(step, least):
    bit = jax.lax.shift_left(jnp.int32(1), 31 - step)
    higher = least + bit  # The first, of 2^31, overflows to 0.
    is_enough = count(lambda number: number >= higher) >= k
    return jnp.where(is_enough, higher, least)

  tiles(0, n, to_number, 0)
  # The k-th largest, or the lowest of all if there are fewer.
  least = jax.lax.fori_loop(
    0, 32, bisect, jnp.full((rows, 1), _LOWEST, jnp.int32)
  )
  num_equal = k - count(lambda number: number > least)
  num_equal = jnp.where(least == _LOWEST, 0.0, num_equal)

  # Keys before one in its tile, and all in it: products with 0 and 1 are exact.
  shape = _LANES, 2 * _LANES
  row, column = (jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1))
  before = (row < column) | (column >= _LANES)
  before = jnp.where(before, 1.0, 0.0).astype(jnp.bfloat16)

  def to_distance(i, carry):
    """How many places each selected key is behind its own; -1 of others."""
    number = number_ref[i]
    masks = number > least, number == least
    sums = jnp.dot(
      jnp.concatenate([jnp.where(x, 1.0, 0.0) for x in masks]).astype(
        jnp.bfloat16
      ),
      before,
      preferred_element_type=jnp.float32,
    )
    larger, equal = (x + y for x, y in zip(carry, _halves(sums[:, :_LANES])))
    # Of equal ones, the first num_equal.
    place = larger + jnp.minimum(equal, num_equal)
    is_selected = masks[0] | (masks[1] & (equal < num_equal))
    distance = i * _LANES + lane - place.astype(jnp.int32)
    distance_ref[i] = jnp.where(is_selected, distance, -1)
    return tuple(x + y for x, y in zip(carry, _halves(sums[:, _LANES:])))

  tiles(0, n, to_distance, (jnp.zeros((rows, _LANES)),) * 2)

  def split(distance, step):
    """Those that move, and those that stay."""
    is_moved = (distance & step != 0) & (distance >= 0)
    return jnp.where(is_moved, distance, -1), jnp.where(is_moved, -1, distance)

  for bit in range((n * _LANES - 1).bit_length()):
    step = 2**bit
    if step < _LANES:

      def rolled(i, step=step):
        moved, stays = split(distance_ref[i], step)
        return pltpu.roll(moved, _LANES - step, 1), stays

      def move(i, this, step=step, rolled=rolled):
        moved, stays = this
        # Into the last lanes come those of the next tile.
        following = rolled(i + 1)
        shifted = jnp.where(lane < _LANES - step, moved, following[0])
        distance_ref[i] = jnp.maximum(stays, shifted)
        return following

      moved, stays = tiles(0, n - 1, move, rolled(0))
      shifted = jnp.where(lane < _LANES - step, moved, -1)
      distance_ref[n - 1] = jnp.maximum(stays, shifted)
    else:
      num = step // _LANES

      def move(i, _, step=step, num=num):
        _, stays = split(distance_ref[i], step)
        moved, _ = split(distance_ref[i + num], step)
        distance_ref[i] = jnp.maximum(stays, moved)
        return 0

      def clear(i, _, step=step):
        distance_ref[i] = split(distance_ref[i], step)[1]
        return 0

      tiles(0, n - num, move, 0)
      tiles(n - num, n, clear, 0)

  def store(i, _):
    distance = distance_ref[i]
    out_ref[:, lanes_of(i)] = jnp.where(
      distance >= 0, i * _LANES + lane + distance, -1
    )
    return 0

  tiles(0, out_ref.shape[1] // _LANES, store, 0)


def _halves(x):
  rows = x.shape[0] // 2
  return x[:rows], x[rows:]
