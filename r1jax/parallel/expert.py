"""Expert parallelism: tokens travel to the devices that hold their experts.

Each device of the mesh axis `expert` holds E / R experts. A token is sent
once to each device that holds some of its experts, whatever their number;
there the experts' outputs are weighed and added up, and one sum comes back.
What is sent stands in order of destination and token, and arrives in order of
source and token, whichever way it is exchanged.

Source: DeepEP (https://github.com/deepseek-ai/DeepEP); DeepSeek-V3,
arXiv:2412.19437, §3.2.2.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.expert_all_to_all import ops as expert_all_to_all_ops
from pallas_kernels.routed_swiglu import layout
from r1jax import fp8

AXIS = 'expert'


@dataclasses.dataclass(frozen=True)
class Limits:
  """Sizes of an exchange, known when it is traced.

  Attributes:
    num_ranks: R, devices along the axis.
    num_tokens: T of one device.
    most_ranks: Destinations that a token may have.
    rows: Rows that a device may receive.
    choices: Pairs of token and expert that a device may receive.
    multiple: Of the rows for each device, where they start, and of all rows.
  """

  num_ranks: int
  num_tokens: int
  most_ranks: int
  rows: int
  choices: int
  multiple: int = 1

  def rounded(self, rows):
    """Up to whole multiples."""
    return -(-rows // self.multiple) * self.multiple

  @property
  def sent(self) -> int:
    """Rows that a device may send, what fills up the multiples included."""
    fill = self.num_ranks * (self.multiple - 1)
    return self.rounded(self.num_tokens * self.most_ranks + fill)


def limits(
  num_tokens: int,
  *,
  num_ranks: int,
  num_experts: int,
  top_k: int,
  num_groups: int = 1,
  top_groups: int = 1,
  receive_factor: float | Literal['worst'],
  multiple: int = 1,
) -> Limits:
  """What a device may send and receive.

  Args:
    num_tokens: T of one device.
    num_ranks: R.
    num_experts: E.
    top_k: K.
    num_groups: Groups of experts.
    top_groups: Groups that a token may reach.
    receive_factor: 'worst' has room at any skew; a number for so many times
      what arrives when all devices get the same, if each token has as many
      destinations as it may.
    multiple: What the rows for each device are filled up to; 8 for 'dma', see
      `dispatch`.

  Raises:
    ValueError: R does not divide E.
  """
  if num_experts % num_ranks:
    raise ValueError(
      f'mesh axis {AXIS}={num_ranks} does not divide {num_experts} experts'
    )
  local = num_experts // num_ranks
  # A group lies on one device, or over several.
  per_group = max(num_ranks // num_groups, 1)
  most = min(top_k, num_ranks, top_groups * per_group)
  rows = num_ranks * num_tokens
  choices = rows * min(top_k, local)
  if receive_factor != 'worst':
    share = lambda mean: math.ceil(receive_factor * mean)
    rows = min(rows, share(num_tokens * most))
    choices = min(choices, share(num_tokens * top_k))
  fill = num_ranks * (multiple - 1)
  rows = -(-(rows + fill) // multiple) * multiple
  return Limits(num_ranks, num_tokens, most, rows, choices, multiple)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
  """Which token goes where.

  Attributes:
    token_s: int32 token of each row that is sent; T for what fills up.
    slot_TK: int32 row sent for choice k of token t, for the first of its
      choices on that device; the number of rows for the others.
    send_R: int32 first row for each destination.
    count_R: int32 rows sent to each destination, those that fit.
    place_R: int32 where they go in the destination's rows.
    receive_R: int32 first row of each source among those received.
    received_R: int32 rows received of each source.
    tokens_R: int32 tokens among them, the first ones.
    home_R: int32 where the rows of each source start among its own.
    dropped: int32 rows of this device that did not fit.
  """

  token_s: jax.Array
  slot_TK: jax.Array
  send_R: jax.Array
  count_R: jax.Array
  place_R: jax.Array
  receive_R: jax.Array
  received_R: jax.Array
  tokens_R: jax.Array
  home_R: jax.Array
  dropped: jax.Array


def plan(expert_TK: jax.Array, num_local: int, limits: Limits) -> Plan:
  """Plans an exchange; the devices tell each other how much they send.

  Args:
    expert_TK: int32 expert of each choice.
    num_local: Experts of one device.
    limits: Sizes.
  """
  T, R = limits.num_tokens, limits.num_ranks
  rank_TK = expert_TK // num_local
  goes_TR = (rank_TK[:, :, None] == jnp.arange(R)).any(1)
  # Rows in order of destination, then of token.
  rank_TR = jnp.cumsum(goes_TR.astype(jnp.int32), axis=0) - 1
  want_R = goes_TR.sum(0, dtype=jnp.int32)

  # What all want to send to all, [source, destination].
  want_RR = jax.lax.all_gather(want_R, AXIS)
  room_RR = limits.rounded(want_RR)
  place_RR = jnp.cumsum(room_RR, axis=0) - room_RR
  count_RR = jnp.clip(limits.rows - place_RR, 0, room_RR)
  place_RR = jnp.minimum(place_RR, limits.rows)
  send_RR = jnp.cumsum(room_RR, axis=1) - room_RR
  tokens_RR = jnp.minimum(want_RR, count_RR)
  me = jax.lax.axis_index(AXIS)
  send_R = send_RR[me]

  slot_TR = jnp.where(
    goes_TR & (rank_TR < tokens_RR[me]), send_R + rank_TR, limits.sent
  )
  slot_TK = jnp.take_along_axis(slot_TR, rank_TK, axis=1)
  same_TKK = rank_TK[:, :, None] == rank_TK[:, None, :]
  is_first_TK = ~jnp.tril(same_TKK, -1).any(-1)
  num_rows = limits.sent
  token_s = jnp.full((num_rows,), T, jnp.int32)
  token_s = token_s.at[jnp.where(is_first_TK, slot_TK, num_rows)].set(
    jnp.arange(T, dtype=jnp.int32)[:, None], mode='drop'
  )
  return Plan(
    token_s=token_s,
    slot_TK=jnp.where(is_first_TK, slot_TK, num_rows),
    send_R=send_R,
    count_R=count_RR[me],
    place_R=place_RR[me],
    receive_R=place_RR[:, me],
    received_R=count_RR[:, me],
    tokens_R=tokens_RR[:, me],
    home_R=send_RR[:, me],
    dropped=(want_R - tokens_RR[me]).sum(),
  )


def send(
  x_TD: jax.Array,
  expert_TK: jax.Array,
  weight_TK: jax.Array,
  plan: Plan,
  limits: Limits,
  num_local: int,
  implementation: str,
  *,
  in_fp8: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Sends tokens, and with them which experts they go to with which weights.

  Args:
    x_TD: Tokens of this device.
    expert_TK: int32 experts, numbered over all devices.
    weight_TK: float32.
    plan: Of `plan`.
    limits: Sizes.
    num_local: Experts of one device.
    implementation: See `dispatch`.
    in_fp8: Tokens travel as `fp8.quantize_tiles`, scales powers of two; their
      gradient does not.

  Returns:
    Rows [N, D], the choices [N, K] numbered over this device's experts, with
    num_local for those of other devices, and the weights [N, K].
  """
  exchange = lambda rows: dispatch(rows, plan, limits, implementation)
  # Numbers of experts are exact in float32: one exchange for both.
  choice_N2K = exchange(
    jnp.concatenate(
      [expert_TK.astype(jnp.float32), weight_TK.astype(jnp.float32)], axis=-1
    )
  )
  expert_NK, weight_NK = jnp.split(choice_N2K, 2, axis=-1)
  expert_NK = jax.lax.stop_gradient(expert_NK).astype(jnp.int32)
  expert_NK -= jax.lax.axis_index(AXIS) * num_local
  is_here_NK = (expert_NK >= 0) & (expert_NK < num_local)
  row_N1 = jnp.arange(limits.rows)[:, None]
  is_token_NR = row_N1 >= plan.receive_R
  is_token_NR &= row_N1 < plan.receive_R + plan.tokens_R
  is_here_NK &= is_token_NR.any(1, keepdims=True)
  send_rows = _dispatch_fp8 if in_fp8 else dispatch
  return (
    send_rows(x_TD, plan, limits, implementation),
    jnp.where(is_here_NK, expert_NK, num_local),
    jnp.where(is_here_NK, weight_NK, 0.0),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dispatch(
  x_TD: jax.Array, plan: Plan, limits: Limits, implementation: str
) -> jax.Array:
  """Sends tokens to their destinations: [T, D] -> [N, D].

  Rows that are no token's hold anything finite.

  Args:
    x_TD: Tokens of this device.
    plan: Where they go.
    limits: Sizes; N = limits.rows.
    implementation: 'ragged' (`jax.lax.ragged_all_to_all`, not on a CPU), 'dma'
      (a kernel for TPUs, which wants `limits.multiple` of 8: it moves tiles,
      and single rows have to be copied before and after) or 'padded'
      (`jax.lax.all_to_all` of T rows for each pair of devices).

  Raises:
    ValueError: An unknown implementation.
  """
  return _dispatch((x_TD,), plan, limits, implementation)[0]


def _dispatch(arrays, plan, limits, implementation):
  """Of several arrays, which travel together."""
  p = plan
  spans = p.send_R, p.count_R, p.place_R, p.receive_R, p.received_R
  exchange = _exchange(implementation)
  return exchange(arrays, p.token_s, spans, limits, limits.rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def combine(
  y_ND: jax.Array, plan: Plan, limits: Limits, implementation: str
) -> jax.Array:
  """Sends rows back and adds up those of each token: [N, D] -> [T, D].

  What `dispatch` pulls back, and pulled back by it.
  """
  p = plan
  spans = p.receive_R, p.received_R, p.home_R, p.send_R, p.count_R
  exchange = _exchange(implementation)
  [row_sD] = exchange((y_ND,), None, spans, limits, len(p.token_s))
  is_sent_TK = p.slot_TK < len(p.token_s)
  return layout.weighted_sum(row_sD, p.slot_TK, is_sent_TK)


dispatch.defvjp(
  lambda x, plan, *static: (dispatch(x, plan, *static), plan),
  lambda *args: (combine(args[-1], args[-2], *args[:-2]), None),
)
combine.defvjp(
  lambda y, plan, *static: (combine(y, plan, *static), plan),
  lambda *args: (dispatch(args[-1], args[-2], *args[:-2]), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _dispatch_fp8(x_TD, plan, limits, implementation):
  q_TD, scale_Tt = fp8.quantize_tiles(x_TD, power_of_two=True)
  q_ND, scale_Nt = _dispatch((q_TD, scale_Tt), plan, limits, implementation)
  return fp8.dequantize_tiles(q_ND, scale_Nt, x_TD.dtype)


_dispatch_fp8.defvjp(
  lambda x, plan, *static: (_dispatch_fp8(x, plan, *static), plan),
  lambda *args: (combine(args[-1], args[-2], *args[:-2]), None),
)


def _exchange(implementation: str):
  match implementation:
    case 'padded':
      return _padded
    case 'ragged':
      return _ragged
    case 'dma':
      return _dma
  raise ValueError(
    f'implementation={implementation!r}, it must be padded, ragged or dma'
  )


def _ragged(arrays, number_s, spans, limits, num_out):
  """Sends spans of rows as they are; see `_padded`."""
  del limits
  first_R, count_R, place_R, _, received_R = spans
  results = []
  for rows in arrays:
    rows = _take(rows, number_s)
    out = jnp.zeros((num_out, *rows.shape[1:]), rows.dtype)
    results.append(
      jax.lax.ragged_all_to_all(
        rows, out, first_R, count_R, place_R, received_R, axis_name=AXIS
      )
    )
  return results


def _dma(arrays, number_s, spans, limits, num_out):
  """Sends spans of rows in one kernel; see `_padded`."""
  return expert_all_to_all_ops.ragged_exchange(
    [_take(rows, number_s) for rows in arrays],
    num_out,
    *spans,
    axis_name=AXIS,
    implementation='pallas',
    multiple=limits.multiple,
  )


def _padded(arrays, number_s, spans, limits, num_out):
  """Sends as many rows to each device, most of them perhaps for nothing.

  Args:
    arrays: Rows, which travel together.
    number_s: Which of them to send; None for all as they stand.
    spans: For each device: the first row and the number of rows to send, where
      they go there, where its rows go here and how many they are.
    limits: Sizes.
    num_out: Rows of the results.
  """
  first_R, _, _, receive_R, received_R = spans
  most = limits.rounded(limits.num_tokens)
  num_rows = len(arrays[0]) if number_s is None else len(number_s)
  column_C = jnp.arange(most, dtype=jnp.int32)
  sent_RC = jnp.minimum(first_R[:, None] + column_C, num_rows - 1)
  if number_s is not None:
    sent_RC = number_s[sent_RC]
  row_n = jnp.arange(num_out, dtype=jnp.int32)
  end_R = receive_R + received_R
  source_n = (row_n[:, None] >= end_R[:-1]).sum(1)
  column_n = jnp.clip(row_n - receive_R[source_n], 0, most - 1)
  results = []
  for rows in arrays:
    got_RCD = jax.lax.all_to_all(_take(rows, sent_RC), AXIS, 0, 0)
    results.append(got_RCD[source_n, column_n])
  return results


def _take(rows: jax.Array, number: jax.Array | None) -> jax.Array:
  """Rows by number, one past the last is the last; all if None."""
  if number is None:
    return rows
  return jnp.take(rows, number, axis=0, mode='clip')
