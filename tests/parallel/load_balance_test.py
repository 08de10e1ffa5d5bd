"""Expert placement against known vectors, loops, and what greed guarantees."""

import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.routed_swiglu import ops as routed_swiglu_ops
from r1jax.parallel import load_balance, sharding
from r1jax.parallel import mesh as mesh_lib
from tests import known_answers

_VECTORS = json.loads((known_answers.DATA / 'eplb_vectors.json').read_text())
# The replicas of an expert weigh the same, and torch's sort, which made the
# vectors, keeps the order of equals up to 16 items only: here it swaps some.
_SWAPPED = ('rand32_ep8', 'rand16_global')

_spread = jax.jit(load_balance.spread)
_routed_swiglu = jax.jit(
  routed_swiglu_ops.routed_swiglu, static_argnames=('block', 'implementation')
)


@pytest.mark.parametrize('vector', _VECTORS, ids=lambda v: v['name'])
def test_known_placements(vector):
  placement = load_balance.rebalance(
    vector['weight'],
    num_replicas=vector['num_replicas'],
    num_groups=vector['num_groups'],
    num_nodes=vector['num_nodes'],
    num_devices=vector['num_gpus'],
  )
  np.testing.assert_array_equal(placement.expert_LR, vector['phy2log'])
  replicas = placement.replica_LEX, np.asarray(vector['log2phy'])
  if vector['name'] in _SWAPPED:
    replicas = [np.sort(replica_LEX) for replica_LEX in replicas]
  np.testing.assert_array_equal(*replicas)
  np.testing.assert_array_equal(placement.count_LE, vector['logcnt'])
  # The reference adds in float32.
  args = {'placement': placement, 'num_devices': vector['num_gpus']}
  load_LG = load_balance.device_load(vector['weight'], **args)
  np.testing.assert_allclose(load_LG, vector['gpu_load'], rtol=1e-6)
  balance_L = load_balance.balance(vector['weight'], **args)
  np.testing.assert_allclose(balance_L, vector['max_over_mean'], rtol=1e-6)


def _pack_by_loop(loads, num_packs):
  room = len(loads) // num_packs
  if room == 1:
    return [[i] for i in range(num_packs)]
  packs = [[] for _ in range(num_packs)]
  for item in sorted(range(len(loads)), key=lambda i: -loads[i]):
    free = [p for p in packs if len(p) < room]
    min(free, key=lambda p: sum(loads[i] for i in p)).append(item)
  return packs


def _by_loop(loads, num_replicas, num_groups, num_nodes, num_devices):
  """(expert, which of its replicas) of each slot of one layer."""
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  size, slots = len(loads) // num_groups, []
  groups = [range(j * size, (j + 1) * size) for j in range(num_groups)]
  group_loads = [sum(loads[e] for e in group) for group in groups]
  for node in _pack_by_loop(group_loads, num_nodes):
    experts = [e for j in node for e in groups[j]]
    count = dict.fromkeys(experts, 1)
    replicas = [(e, 0) for e in experts]
    while len(replicas) < num_replicas // num_nodes:
      e = max(experts, key=lambda e: loads[e] / count[e])
      replicas.append((e, count[e]))
      count[e] += 1
    shares = [loads[e] / count[e] for e, _ in replicas]
    for device in _pack_by_loop(shares, num_devices // num_nodes):
      slots += [replicas[i] for i in device]
  return slots


@st.composite
def _problems(draw):
  """Loads [2, E], with ties and zeros, and sizes that divide."""
  N, J, I = draw(st.tuples(*[st.integers(1, 3)] * 3))
  if draw(st.booleans()):
    J *= N  # Always hierarchical.
  E, G = J * I, N * draw(st.integers(1, 3))
  R = -(-E // G) * G + G * draw(st.integers(0, 2))
  load = st.integers(0, 4) | st.integers(0, 1000)
  load_LE = draw(st.lists(load, min_size=2 * E, max_size=2 * E))
  sizes = {
    'num_replicas': R,
    'num_groups': J,
    'num_nodes': N,
    'num_devices': G,
  }
  return np.reshape(load_LE, (2, E)), sizes


@hypothesis.given(_problems())
def test_placement_is_the_loop_and_its_arrays_agree(problem):
  load_LE, sizes = problem
  placement = load_balance.rebalance(load_LE, **sizes)
  L, E, X = placement.replica_LEX.shape
  assert X == placement.count_LE.max()
  for layer in range(L):
    slots = _by_loop(load_LE[layer].tolist(), **sizes)
    assert placement.expert_LR[layer].tolist() == [e for e, _ in slots]
    for e in range(E):
      count = sum(slot[0] == e for slot in slots)
      assert count == placement.count_LE[layer, e] >= 1
      replicas = [slots.index((e, rank)) for rank in range(count)]
      padding = [-1] * (X - count)
      assert placement.replica_LEX[layer, e].tolist() == replicas + padding
  for array in jax.tree.leaves(placement):
    assert array.dtype == np.int32


@hypothesis.given(_problems())
def test_placement_keeps_what_greed_guarantees(problem):
  load_LE, sizes = problem
  R, J, N, G = sizes.values()
  if J % N:
    J = N = 1
  placement = load_balance.rebalance(load_LE, **sizes)
  load_LG = load_balance.device_load(load_LE, placement, num_devices=G)
  L, E = load_LE.shape
  np.testing.assert_allclose(load_LG.sum(1), load_LE.sum(1))
  balance_L = load_balance.balance(load_LE, placement, num_devices=G)
  assert (balance_L > 1 - 1e-9).all() and (balance_L < G + 1e-9).all()
  for layer in range(L):
    load_E, count_E = load_LE[layer], placement.count_LE[layer]
    expert_NR = placement.expert_LR[layer].reshape(N, -1)
    load_NG = load_LG[layer].reshape(N, -1)
    # Each node has J / N whole groups; the nodes share out all J.
    groups = [set((expert_R // (E // J)).tolist()) for expert_R in expert_NR]
    assert [len(g) for g in groups] == [J // N] * N
    assert set.union(*groups) == set(range(J))
    # Packs differ by at most their heaviest item.
    group_J = load_E.reshape(J, -1).sum(1)
    assert np.ptp(load_NG.sum(1)) <= group_J.max() + 1e-9
    for expert_R, load_G in zip(expert_NR, load_NG):
      share_R = load_E[expert_R] / count_E[expert_R]
      assert np.ptp(load_G) <= share_R.max() + 1e-9
      # With every replica lighter than the heaviest one is, the node would
      # need more of them than it has. In integers: share = load / count.
      e = expert_R[share_R.argmax()]
      if load_E[e]:
        experts = np.unique(expert_R)
        needed = load_E[experts] * count_E[e] // load_E[e] + 1
        assert needed.sum() > R // N


@hypothesis.given(
  st.lists(st.integers(0, 100), min_size=7, max_size=7),
  st.integers(0, 7),
  st.integers(0, 1000),
  st.sampled_from([12, 16]),
)
def test_redundancy_does_not_hurt_when_one_expert_is_hot(others, hot, more, R):
  """The hot expert has half the load or more.

  Without redundancy its device has that half, at least. With it, no device
  exceeds the mean by more than the heaviest replica, which carries at most
  total / (R - E): a quarter and a quarter.
  """
  load_LE = np.array([[*others[:hot], sum(others) + more, *others[hot:]]])
  balance = {}
  for num_replicas in (8, R):
    placement = load_balance.rebalance(
      load_LE,
      num_replicas=num_replicas,
      num_groups=1,
      num_nodes=1,
      num_devices=4,
    )
    balance[num_replicas] = load_balance.balance(
      load_LE, placement, num_devices=4
    )[0]
  assert balance[R] <= balance[8] + 1e-9


def _placement(load_LE, num_replicas=12):
  return load_balance.rebalance(
    load_LE, num_replicas=num_replicas, num_groups=4, num_nodes=2, num_devices=4
  )


def _choices(rng, load_E, T=40, K=3):
  """K different experts a token, busy ones more often."""
  noise_TE = rng.gumbel(size=(T, len(load_E)))
  return np.argsort(-np.log(load_E) - noise_TE)[:, :K].astype(np.int32)


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_tokens_take_the_replicas_of_their_experts_in_turn(seed, start):
  rng = np.random.default_rng(seed)
  load_E = rng.zipf(1.5, 8).clip(1, 1000)
  placement = _placement(load_E[None]).padded(5)
  expert_R, count_E = placement.expert_LR[0], placement.count_LE[0]
  expert_TK = _choices(rng, load_E)
  replica_TK = np.asarray(
    _spread(expert_TK, placement.replica_LEX[0], count_E, start=start)
  )
  assert replica_TK.dtype == np.int32
  np.testing.assert_array_equal(expert_R[replica_TK], expert_TK)
  # The replicas of an expert share its tokens: none has one more or less
  # than its part.
  tokens_R = np.bincount(replica_TK.reshape(-1), minlength=12)
  tokens_E = np.bincount(expert_TK.reshape(-1), minlength=8)
  assert (np.abs(tokens_R - (tokens_E / count_E)[expert_R]) < 1).all()
  seen_E = np.full(8, start)
  for t in range(len(expert_TK)):
    for k, e in enumerate(expert_TK[t]):
      turn = seen_E[e] % count_E[e]
      assert replica_TK[t, k] == placement.replica_LEX[0, e, turn]
      seen_E[e] += 1


def test_padded_placements_share_a_program():
  traces = []

  @jax.jit
  def run(expert_TK, placement):
    traces.append(expert_TK.shape)
    return load_balance.spread(
      expert_TK, placement.replica_LEX[0], placement.count_LE[0]
    )

  # A program for each width, if they are not padded.
  expert_TK = np.int32([[0, 1], [0, 7]])
  hot, even = _placement([[99] + [1] * 7]), _placement([[1] * 8])
  assert hot.replica_LEX.shape != even.replica_LEX.shape
  for placement in (hot, even):
    width = 12 - 8 + 1
    padded = placement.padded(width)
    X = placement.replica_LEX.shape[-1]
    np.testing.assert_array_equal(
      padded.replica_LEX[..., :X], placement.replica_LEX
    )
    assert (padded.replica_LEX[..., X:] == -1).all()
    np.testing.assert_array_equal(
      run(expert_TK, padded), _spread(expert_TK, *_layer(placement, 0))
    )
  assert len(traces) == 1


def _layer(placement, layer):
  return placement.replica_LEX[layer], placement.count_LE[layer]


@pytest.mark.parametrize('xp', [np, jnp])
def test_weights_of_experts_stand_at_their_replicas(xp):
  load_LE = np.random.default_rng(0).zipf(1.5, (2, 8)).clip(1, 1000)
  placement = _placement(load_LE)
  weight_LED = xp.arange(2 * 8 * 3).reshape(2, 8, 3)
  physical_LRD = load_balance.physical_weights(weight_LED, placement)
  assert isinstance(physical_LRD, type(weight_LED))
  for layer, expert_R in enumerate(placement.expert_LR):
    for r, e in enumerate(expert_R):
      np.testing.assert_array_equal(
        physical_LRD[layer, r], weight_LED[layer, e]
      )


def test_devices_take_their_replicas_from_each_other():
  load_LE = np.random.default_rng(0).zipf(1.5, (2, 8)).clip(1, 1000)
  placement = _placement(load_LE)
  weight_LED = np.arange(2 * 8 * 3, dtype=np.float32).reshape(2, 8, 3)
  sizes = mesh_lib.MeshConfig(data=2, expert=4)
  mesh = mesh_lib.make_mesh(sizes)
  parts = NamedSharding(mesh, P(None, 'expert'))
  run = sharding.per_device(
    load_balance.physical_weights, mesh, (parts, 'whole'), parts
  )
  np.testing.assert_array_equal(
    jax.jit(run)(weight_LED, placement),
    load_balance.physical_weights(weight_LED, placement),
  )


@pytest.mark.parametrize('seed', range(4))
def test_skewed_traffic_arrives_as_the_placement_promises(seed):
  num_devices, K, rng = 4, 3, np.random.default_rng(seed)
  load_E = rng.zipf(1.3, 32).clip(1, 400).astype(float)
  choices = [_choices(rng, load_E, T=200, K=K) for _ in range(num_devices)]
  count_1E = np.bincount(np.ravel(choices), minlength=32)[None].astype(float)

  def arriving(placement, num_replicas):
    """Max over mean of what the devices are sent, and what was promised."""
    slots = [
      _spread(expert_TK, *_layer(placement, 0), start=device)
      for device, expert_TK in enumerate(choices)
    ]
    per_device = np.bincount(
      np.ravel(slots) // (num_replicas // num_devices), minlength=num_devices
    )
    promised = load_balance.balance(
      count_1E, placement, num_devices=num_devices
    )[0]
    return per_device.max() / per_device.mean(), promised

  before, promised = arriving(load_balance.in_order(1, 32), 32)
  np.testing.assert_allclose(before, promised)
  sizes = {'num_groups': 1, 'num_nodes': 1, 'num_devices': num_devices}
  balanced = load_balance.rebalance(count_1E, num_replicas=64, **sizes)
  after, promised = arriving(balanced, 64)
  # Of each expert every device may send a token more to one replica.
  np.testing.assert_allclose(after, promised, atol=0.05)
  assert after < 1.1 < before


def test_experts_and_their_replicas_compute_the_same():
  L, E, T, D, F = 2, 8, 40, 12, 16
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)
  load_LE = rng.zipf(1.5, (L, E)).clip(1, 1000)
  placement = _placement(load_LE)
  logical = normal(L, E, D, F), normal(L, E, D, F), normal(L, E, F, D)
  copy = jax.jit(load_balance.physical_weights)
  physical = [copy(w, placement) for w in logical]
  x_TD = normal(T, D)
  for layer in range(L):
    expert_TK = _choices(rng, load_LE[layer], T)
    weight_TK = rng.uniform(size=expert_TK.shape).astype(np.float32)
    replica_TK = _spread(expert_TK, *_layer(placement, layer))
    assert len(np.unique(replica_TK)) > E
    outputs = [
      _routed_swiglu(
        x_TD,
        choice_TK,
        weight_TK,
        *(w[layer] for w in weights),
        block=4,
        implementation=implementation,
      )
      for choice_TK, weights, implementation in [
        (replica_TK, physical, 'xla'),
        (expert_TK, logical, 'reference'),
      ]
    ]
    # Outputs are below 1: sums of D, F and K products in float32.
    np.testing.assert_allclose(*outputs, atol=1e-6)


def test_moving_average_weighs_the_past_by_powers_of_decay():
  rng, decay, n = np.random.default_rng(0), 0.75, 6
  counts_NLE = rng.integers(0, 100, (n, 2, 8))
  average_LE = np.zeros((2, 8))
  for counts_LE in counts_NLE:
    average_LE = load_balance.moving_average(average_LE, counts_LE, decay=decay)
  ages = range(n - 1, -1, -1)
  expected_LE = sum(0.25 * decay**a * c for a, c in zip(ages, counts_NLE))
  np.testing.assert_allclose(average_LE, expected_LE)
  # What zeros at the start take away moves no expert.
  mean_LE = average_LE / (1 - decay**n)
  jax.tree.map(
    np.testing.assert_array_equal, _placement(average_LE), _placement(mean_LE)
  )
  last_LE = load_balance.moving_average(average_LE, counts_NLE[0], decay=0.0)
  np.testing.assert_array_equal(last_LE, counts_NLE[0])


def test_no_load_is_in_balance():
  load_LE = np.zeros((1, 8))
  placement = _placement(load_LE)
  assert load_balance.balance(load_LE, placement, num_devices=4) == [1.0]


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'load_LE': np.ones(8)}, r'load_LE.shape=\(8,\) must be \[layers'),
    ({'load_LE': np.ones((0, 8))}, r'load_LE.shape=\(0, 8\) .* none of them 0'),
    ({'load_LE': [[1.0] * 7 + [-2.0]]}, r'load_LE has -2.0; .* >= 0'),
    ({'load_LE': [[1.0] * 7 + [np.nan]]}, 'load_LE has nan; .* finite'),
    ({'load_LE': [[1.0] * 7 + [np.inf]]}, 'load_LE has inf; .* finite'),
    ({'num_nodes': 0}, 'num_nodes=0 must be at least 1'),
    ({'num_devices': -4}, 'num_devices=-4 must be at least 1'),
    ({'num_replicas': 10}, 'num_replicas=10 .* num_devices=4 .* 12 would do'),
    ({'num_replicas': 4}, 'num_replicas=4 .* the 8 experts; 8 would do'),
    (
      {'num_nodes': 4, 'num_devices': 6},
      'num_nodes=4 must divide num_devices=6; 2 would do',
    ),
    ({'num_groups': 6}, 'num_groups=6 must divide the 8 experts; 2 would do'),
  ],
)
def test_errors_name_the_values_and_what_would_do(changes, message):
  args = {
    'load_LE': np.ones((1, 8)),
    'num_replicas': 12,
    'num_groups': 4,
    'num_nodes': 2,
    'num_devices': 4,
  } | changes
  load_LE = args.pop('load_LE')
  with pytest.raises(ValueError, match=message):
    load_balance.rebalance(load_LE, **args)


def test_errors_of_the_other_functions():
  load_LE = np.ones((1, 8))
  placement = _placement(load_LE)
  with pytest.raises(ValueError, match='=8 must divide .*=12; 4 would do'):
    load_balance.device_load(load_LE, placement, num_devices=8)
  with pytest.raises(ValueError, match='=0 must divide num_replicas=12'):
    load_balance.balance(load_LE, placement, num_devices=0)
  with pytest.raises(ValueError, match=r'\(1, 9, 3\); .* for \[1, 8, ...\]'):
    load_balance.physical_weights(np.ones((1, 9, 3)), placement)
  for decay in (-0.1, 1.0):
    with pytest.raises(ValueError, match=f'decay={decay} must be in'):
      load_balance.moving_average(load_LE, load_LE, decay=decay)
  X = placement.replica_LEX.shape[-1]
  with pytest.raises(ValueError, match=f'width=1: .*; width={X} would do'):
    placement.padded(1)
