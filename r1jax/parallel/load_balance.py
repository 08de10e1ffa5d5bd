"""Which device holds which experts, and how often (EPLB).

Busy experts get several replicas, and replicas are packed onto devices so that
devices have about the same load. Placement is computed on the host; tokens are
sent to replicas on the device.

Dimensions of this file: R replicas (physical experts), X replicas of one
expert, J groups of I experts, G devices. In `rebalance` a row Q is one node of
one layer, with e experts and r replicas.

Source: DeepSeek-V3, arXiv:2412.19437, §3.4; deepseek-ai/EPLB.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
  """Logical experts and their replicas.

  Slots follow node, device, place on the device: of G devices, device g holds
  the replicas from g · R/G on.

  Attributes:
    expert_LR: int32 logical expert of each replica.
    replica_LEX: int32 replicas of each expert in the order they were made, all
      alike; -1 from its count on.
    count_LE: int32 replicas of each expert, at least 1.
  """

  expert_LR: np.ndarray
  replica_LEX: np.ndarray
  count_LE: np.ndarray

  def padded(self, width: int) -> 'Placement':
    """Widens replica_LEX to X = width with -1, on the host.

    R - E + 1 is enough for any load: programs that take the placement as an
    argument then never compile again.

    Raises:
      ValueError: The width is less than X.
    """
    X = self.replica_LEX.shape[-1]
    if width < X:
      raise ValueError(
        f'width={width}: an expert has {X} replicas; width={X} would do'
      )
    replica_LEX = np.pad(
      self.replica_LEX, ((0, 0), (0, 0), (0, width - X)), constant_values=-1
    )
    return dataclasses.replace(self, replica_LEX=replica_LEX)


def in_order(num_layers: int, num_experts: int) -> Placement:
  """One replica of each expert, where it lies without a placement."""
  expert_LE = np.tile(np.arange(num_experts, dtype=np.int32), (num_layers, 1))
  return Placement(expert_LE, expert_LE[..., None], np.ones_like(expert_LE))


def rebalance(
  load_LE: np.ndarray,
  *,
  num_replicas: int,
  num_groups: int,
  num_nodes: int,
  num_devices: int,
) -> Placement:
  """Places replicas of experts so that devices have about the same load.

  Hierarchical, if num_nodes divides num_groups: whole groups go to nodes, so
  that a token limited to few groups visits few nodes; replicas are made and
  packed onto devices inside each node. Otherwise global: as if there were one
  group and one node.

  Args:
    load_LE: [L, E] load of each expert, say its tokens; only proportions
      matter.
    num_replicas: R, slots of all devices together.
    num_groups: J, equal groups of neighbouring experts, the router's.
    num_nodes: Nodes with equally many devices.
    num_devices: G.

  Raises:
    ValueError: Loads that are negative or not finite, or sizes that do not
      divide each other.

  Source: DeepSeek-V3, arXiv:2412.19437, §3.4; deepseek-ai/EPLB.
  """
  load_LE = np.asarray(load_LE, np.float64)
  _check(load_LE, num_replicas, num_groups, num_nodes, num_devices)
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  L, E = load_LE.shape
  R, J, I = num_replicas, num_groups, E // num_groups

  group_load_LJ = load_LE.reshape(L, J, I).sum(-1)
  group_LJ = _inverse(_pack(group_load_LJ, num_nodes))
  order_LE = (group_LJ[..., None] * I + np.arange(I)).reshape(L, E)

  load_Qe = _take(load_LE, order_LE).reshape(L * num_nodes, -1)
  expert_Qr, rank_Qr, count_Qe = _replicate(load_Qe, R // num_nodes)

  replica_load_Qr = _take(load_Qe / count_Qe, expert_Qr)
  slot_Qr = _inverse(_pack(replica_load_Qr, num_devices // num_nodes))
  # From numbers inside the node to places in order_LE.
  first_Q1 = np.arange(L * num_nodes)[:, None] % num_nodes * (E // num_nodes)
  place_LR = (_take(expert_Qr, slot_Qr) + first_Q1).reshape(L, R)
  rank_LR = _take(rank_Qr, slot_Qr).reshape(L, R)

  expert_LR = _take(order_LE, place_LR)
  count_LE = _take(count_Qe.reshape(L, E), _inverse(order_LE))
  replica_LEX = np.full((L, E, count_LE.max()), -1, np.int32)
  layer_L1 = np.arange(L)[:, None]
  replica_LEX[layer_L1, expert_LR, rank_LR] = np.arange(R)
  return Placement(
    expert_LR.astype(np.int32), replica_LEX, count_LE.astype(np.int32)
  )


def device_load(
  load_LE: np.ndarray, placement: Placement, *, num_devices: int
) -> np.ndarray:
  """Load of each device, [L, G]: a replica carries load / count.

  Raises:
    ValueError: The devices do not divide the replicas.
  """
  L, R = placement.expert_LR.shape
  if num_devices < 1 or R % num_devices:
    raise ValueError(
      f'num_devices={num_devices} must divide num_replicas={R}; '
      f'{math.gcd(R, num_devices)} would do'
    )
  share_LE = np.asarray(load_LE, np.float64) / placement.count_LE
  share_LR = _take(share_LE, placement.expert_LR)
  return share_LR.reshape(L, num_devices, -1).sum(-1)


def balance(
  load_LE: np.ndarray, placement: Placement, *, num_devices: int
) -> np.ndarray:
  """Max over mean of the devices' loads, [L], in [1, G]; 1 with no load.

  Raises:
    ValueError: The devices do not divide the replicas.
  """
  load_LG = device_load(load_LE, placement, num_devices=num_devices)
  mean_L = load_LG.mean(-1)
  idle_L = mean_L == 0
  return np.where(idle_L, 1.0, load_LG.max(-1) / np.where(idle_L, 1.0, mean_L))


def moving_average(
  average_LE: jax.Array, counts_LE: jax.Array, *, decay: float
) -> jax.Array:
  """a ← decay · a + (1 - decay) · counts, the load to rebalance for.

  Averages that start from zeros are too small by 1 - decayⁿ after n updates,
  all by the same factor, which moves no expert.

  Args:
    average_LE: [L, E], of numpy or jax; zeros to begin with.
    counts_LE: [L, E] tokens of each expert since the last update.
    decay: In [0, 1).

  Raises:
    ValueError: decay is out of range.
  """
  if not 0 <= decay < 1:
    raise ValueError(f'decay={decay} must be in [0, 1); 0.9 would do')
  return decay * average_LE + (1 - decay) * counts_LE


def physical_weights(weight: jax.Array, placement: Placement) -> jax.Array:
  """Copies the weights of experts to their replicas.

  Inside `per_device` from this device's experts to its replicas: the experts
  of a layer go round all devices of `expert`, and each takes what it needs, so
  that there are never more than two devices' experts of a layer beside both.

  Args:
    weight: [L, E, ...], of numpy or jax; inside `per_device` this device's
      part along E.
    placement: Of the same L and E.

  Returns:
    [L, R, ...], of numpy or jax as the weights are; this device's part along R.

  Raises:
    ValueError: The weights have other layers or experts.
  """
  L, E = placement.count_LE.shape
  num_devices = sharding.axis_size('expert')
  if weight.shape[:2] != (L, E // num_devices):
    raise ValueError(
      f'weight.shape={tuple(weight.shape)}; the placement is for '
      f'[{L}, {E // num_devices}, ...]'
    )
  if num_devices == 1:
    return weight[np.arange(L)[:, None], placement.expert_LR]
  return jax.lax.map(
    lambda layer: _pick_on_the_way(*layer, num_devices),
    (weight, jnp.asarray(placement.expert_LR)),
  )


def _pick_on_the_way(
  own: jax.Array, expert_R: jax.Array, num_devices: int
) -> jax.Array:
  """This device's replicas of one layer; `own` are its experts."""
  me = jax.lax.axis_index('expert')
  e, r = len(own), len(expert_R) // num_devices
  expert_r = jax.lax.dynamic_slice_in_dim(expert_R, me * r, r)
  ring = [(i, (i + 1) % num_devices) for i in range(num_devices)]

  def turn(i, carry):
    passing, out = carry
    owner = (me - i) % num_devices
    place_r = jnp.clip(expert_r - owner * e, 0, e - 1)
    is_here_r = expert_r // e == owner
    is_here = is_here_r.reshape(-1, *[1] * (own.ndim - 1))
    out = jnp.where(is_here, passing[place_r], out)
    return jax.lax.ppermute(passing, 'expert', ring), out

  nothing = jnp.zeros((r, *own.shape[1:]), own.dtype)
  return jax.lax.fori_loop(0, num_devices, turn, (own, nothing))[1]


def spread(
  expert_TK: jax.Array,
  replica_EX: jax.Array,
  count_E: jax.Array,
  *,
  start: jax.Array | int = 0,
) -> jax.Array:
  """Sends the n-th token of each expert to its replica (start + n) mod count.

  Replicas of an expert get equally many of these tokens, up to one.

  Args:
    expert_TK: int32 logical experts, K different ones a token.
    replica_EX: int32, of one layer.
    count_E: int32, of one layer.
    start: Scalar int32 >= 0. Devices that spread their tokens each on its own
      had better differ in it, or the odd tokens all meet at replica 0.

  Returns:
    int32 [T, K], values in [0, R), K different ones a token.
  """
  chosen_TE = jax.nn.one_hot(expert_TK, len(count_E), dtype=jnp.int32).sum(1)
  before_TE = jnp.cumsum(chosen_TE, axis=0) - chosen_TE
  nth_TK = start + jnp.take_along_axis(before_TE, expert_TK, axis=1)
  return replica_EX[expert_TK, nth_TK % count_E[expert_TK]]


def _check(
  load_LE: np.ndarray,
  num_replicas: int,
  num_groups: int,
  num_nodes: int,
  num_devices: int,
) -> None:
  if load_LE.ndim != 2 or not load_LE.size:
    raise ValueError(
      f'load_LE.shape={load_LE.shape} must be [layers, experts], none of them 0'
    )
  bad = load_LE[~(np.isfinite(load_LE) & (load_LE >= 0))]
  if bad.size:
    raise ValueError(f'load_LE has {bad[0]}; loads are finite and >= 0')
  sizes = {
    'num_replicas': num_replicas,
    'num_groups': num_groups,
    'num_nodes': num_nodes,
    'num_devices': num_devices,
  }
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f'{name}={size} must be at least 1')
  E = load_LE.shape[1]
  if num_replicas < E or num_replicas % num_devices:
    enough = -(-max(num_replicas, E) // num_devices) * num_devices
    raise ValueError(
      f'num_replicas={num_replicas} must be a multiple of '
      f'num_devices={num_devices} and at least the {E} experts; '
      f'{enough} would do'
    )
  if num_groups % num_nodes:
    return  # Global: groups and nodes do not matter.
  if num_devices % num_nodes:
    raise ValueError(
      f'num_nodes={num_nodes} must divide num_devices={num_devices}; '
      f'{math.gcd(num_nodes, num_devices)} would do'
    )
  if E % num_groups:
    raise ValueError(
      f'num_groups={num_groups} must divide the {E} experts; '
      f'{math.gcd(num_groups, E)} would do'
    )


def _pack(load_Qn: np.ndarray, num_packs: int) -> np.ndarray:
  """Packs n items, equally many a pack, in each row.

  The heaviest first, each into the lightest pack that has room.

  Returns:
    [Q, n], where each item goes: pack · (n / num_packs) + place in the pack.
  """
  Q, n = load_Qn.shape
  room = n // num_packs
  if room == 1:
    return np.tile(np.arange(n), (Q, 1))
  row_Q = np.arange(Q)
  total_Qm = np.zeros((Q, num_packs))
  used_Qm = np.zeros((Q, num_packs), np.int64)
  place_Qn = np.empty((Q, n), np.int64)
  for item_Q in np.argsort(-load_Qn, axis=1, kind='stable').T:
    pack_Q = np.where(used_Qm < room, total_Qm, np.inf).argmin(1)
    place_Qn[row_Q, item_Q] = pack_Q * room + used_Qm[row_Q, pack_Q]
    total_Qm[row_Q, pack_Q] += load_Qn[row_Q, item_Q]
    used_Qm[row_Q, pack_Q] += 1
  return place_Qn


def _replicate(
  load_Qe: np.ndarray, num_replicas: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """One replica of each expert, then one more where a replica carries most.

  No other counts give the busiest replica less load.

  Returns:
    [Q, r] the expert of each replica, [Q, r] its number among that expert's,
    and [Q, e] replicas of each expert.
  """
  Q, e = load_Qe.shape
  row_Q = np.arange(Q)
  expert_Qr = np.tile(np.arange(num_replicas), (Q, 1))
  rank_Qr = np.zeros((Q, num_replicas), np.int64)
  count_Qe = np.ones((Q, e), np.int64)
  for replica in range(e, num_replicas):
    expert_Q = (load_Qe / count_Qe).argmax(1)
    expert_Qr[:, replica] = expert_Q
    rank_Qr[:, replica] = count_Qe[row_Q, expert_Q]
    count_Qe[row_Q, expert_Q] += 1
  return expert_Qr, rank_Qr, count_Qe


def _take(x: np.ndarray, index: np.ndarray) -> np.ndarray:
  return np.take_along_axis(x, index, axis=1)


def _inverse(place_Qn: np.ndarray) -> np.ndarray:
  """The item at each place of each row."""
  return np.argsort(place_Qn, axis=1)
