"""Expert parallelism: what the layer computes on one device, at any skew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from r1jax import fp8
from r1jax.model import config as model_config
from r1jax.model import moe
from r1jax.parallel import expert, sharding
from r1jax.parallel import mesh as mesh_lib

_R, _T, _D, _E, _F, _K = 4, 12, 6, 8, 5, 3  # T tokens a device.
_CONFIG = model_config.MoeConfig(
  num_experts=_E, top_k=_K, expert_dim=_F, num_shared=0, block=4
)


def _with_exchange(**changes):
  return dataclasses.replace(
    _CONFIG, exchange=model_config.ExchangeConfig(**changes)
  )


def _mesh():
  config = mesh_lib.MeshConfig(data=1, expert=_R)
  return mesh_lib.make_mesh(config, jax.devices()[:_R])


def _inputs(skew):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  favour_E = {
    'even': np.zeros(_E),
    'skewed': 3 * rng.normal(size=_E),
    'one device': 99.0 * (np.arange(_E) // 2 == 2),  # And one expert more.
    'one expert': 99.0 * (np.arange(_E) == 5),
  }[skew]
  chance = favour_E + rng.gumbel(size=(_R * _T, _E))
  expert_TK = np.argsort(-chance, axis=1)[:, :_K].astype(np.int32)
  weights = draw(_E, _D, _F), draw(_E, _D, _F), draw(_E, _F, _D)
  tokens = draw(_R * _T, _D), expert_TK, draw(_R * _T, _K)
  return (*tokens, weights), draw(_R * _T, _D)


def _layer(config, x_TD, expert_TK, weight_TK, weights, pull_TD):
  """Output, overflow and gradients of what a device has."""

  def run(x_TD, weight_TK, weights):
    return moe._run_experts(x_TD, expert_TK, weight_TK, weights, config)

  out_TD, vjp, overflow = jax.vjp(run, x_TD, weight_TK, weights, has_aux=True)
  return out_TD, overflow[None], vjp(pull_TD)


@functools.cache
def _programs(config):
  """The layer on one device, and on four."""
  over_experts = jax.sharding.NamedSharding(
    _mesh(), jax.sharding.PartitionSpec('expert')
  )
  run = functools.partial(_layer, config)
  shared = sharding.per_device(
    run,
    _mesh(),
    ('rows', 'rows', 'rows', over_experts, 'rows'),
    ('rows', 'rows', ('rows', 'rows', over_experts)),
  )
  return jax.jit(run), jax.jit(shared)


@pytest.mark.parametrize('skew', ['even', 'skewed', 'one device', 'one expert'])
def test_four_devices_compute_what_one_does_at_any_skew(skew):
  args, pull_TD = _inputs(skew)
  one, four = _programs(_CONFIG)
  out_TD, _, grads = one(*args, pull_TD)
  shared_TD, overflow_R, shared_grads = four(*args, pull_TD)
  np.testing.assert_allclose(shared_TD, out_TD, atol=2e-5)
  assert not np.any(overflow_R)
  for a, b in zip(
    jax.tree.leaves(shared_grads), jax.tree.leaves(grads), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=5e-5)
    assert np.abs(b).max() > 0.1


def _assert_close(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 1.0))


def test_three_parts_of_the_tokens_give_what_all_of_them_give():
  args, pull_TD = _inputs('skewed')
  whole = _programs(_CONFIG)[1](*args, pull_TD)
  parts = _programs(_with_exchange(tokens_at_once=5))[1]
  _assert_close(parts(*args, pull_TD), whole)


def test_each_part_has_its_own_receive_factor_and_overflows_add_up():
  (*tokens, weights), pull_TD = _inputs('skewed')
  tight = {'receive_factor': 0.5}
  together = _programs(_with_exchange(**tight, tokens_at_once=5))[1]
  _, overflow_R, _ = together(*tokens, weights, pull_TD)
  alone = _programs(_with_exchange(**tight))[1]
  total_R = 0
  split = lambda a: a.reshape(_R, 3, _T // 3, -1).swapaxes(0, 1)
  for part in zip(*map(split, (*tokens, pull_TD)), strict=True):
    *part, pull_PD = (a.reshape(-1, a.shape[-1]) for a in part)
    total_R += alone(*part, weights, pull_PD)[1]
  np.testing.assert_array_equal(overflow_R, total_R)
  assert total_R.sum() > 0


def test_many_parts_hold_fewer_rows_and_give_the_same():
  (*tokens, weights), pull_TD = _inputs('even')
  *tokens, pull_TD = (np.tile(a, (64, 1)) for a in (*tokens, pull_TD))
  held, out = {}, {}
  for tokens_at_once in (0, 2 * _T):  # All, and 1 / 32.
    program = _programs(_with_exchange(tokens_at_once=tokens_at_once))[1]
    compiled = program.lower(*tokens, weights, pull_TD).compile()
    held[tokens_at_once] = compiled.memory_analysis().temp_size_in_bytes
    out[tokens_at_once] = program(*tokens, weights, pull_TD)
  _assert_close(out[2 * _T], out[0])
  assert held[2 * _T] < 0.4 * held[0]


def _emulated(
  operand, output, in_offset, send, out_offset, received, *, axis_name
):
  """`jax.lax.ragged_all_to_all` of what everyone has, by its documentation."""
  me = jax.lax.axis_index(axis_name)
  everyone = functools.partial(jax.lax.all_gather, axis_name=axis_name)
  rows_RN, in_RR, send_RR, out_RR = map(
    everyone, (operand, in_offset, send, out_offset)
  )
  place_N = jnp.arange(len(output))
  for source in range(_R):
    k = place_N - out_RR[source, me]
    is_sent = (k >= 0) & (k < send_RR[source, me])
    row_N = jnp.clip(in_RR[source, me] + k, 0, len(operand) - 1)
    shape = (-1, *(1,) * (operand.ndim - 1))
    output = jnp.where(is_sent.reshape(shape), rows_RN[source, row_N], output)
  # What it demands: both sides agree, and rows stay inside the result.
  agrees = jnp.all(received == send_RR[:, me])
  fits = jnp.all(out_RR[:, me] + send_RR[:, me] <= len(output))
  poison = jnp.where(agrees & fits, 0, jnp.nan)
  if jnp.issubdtype(output.dtype, jnp.floating):
    output += poison.astype(output.dtype)
  return output


@pytest.mark.parametrize('receive_factor', ['worst', 1.0])
@pytest.mark.parametrize('skew', ['even', 'one device'])
def test_ragged_exchange_is_the_padded_one(skew, receive_factor, monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', _emulated)
  args, pull_TD = _inputs(skew)
  padded, ragged = (
    _programs(_with_exchange(kind=kind, receive_factor=receive_factor))[1]
    for kind in ('padded', 'ragged')
  )
  for a, b in zip(
    jax.tree.leaves(ragged(*args, pull_TD)),
    jax.tree.leaves(padded(*args, pull_TD)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('kind', ['padded', 'ragged'])
@pytest.mark.parametrize('skew', ['even', 'one device'])
def test_spans_filled_up_to_tiles_change_nothing(skew, kind, monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', _emulated)
  args, pull_TD = _inputs(skew)
  expected = _programs(_CONFIG)[1](*args, pull_TD)
  monkeypatch.setattr(
    expert, 'limits', functools.partial(expert.limits, multiple=8)
  )
  program = _programs.__wrapped__(_with_exchange(kind=kind))[1]
  _assert_close(program(*args, pull_TD), expected)


def _there_and_back(kind, multiple, receive_factor, in_fp8, tokens, weight_RN):
  """Tokens that come back weighted, and what that pulls back."""
  limits = expert.limits(
    _T,
    num_ranks=_R,
    num_experts=_E,
    top_k=_K,
    receive_factor=receive_factor,
    multiple=multiple,
  )
  dispatch = expert._dispatch_fp8 if in_fp8 else expert.dispatch

  def on_device(x_TD, expert_TK, pull_TD):
    plan = expert.plan(expert_TK, _E // _R, limits)
    weight_N1 = weight_RN[jax.lax.axis_index('expert'), : limits.rows, None]

    def run(x_TD):
      y_ND = weight_N1 * dispatch(x_TD, plan, limits, kind)
      return expert.combine(y_ND, plan, limits, kind)

    out_TD, vjp = jax.vjp(run, x_TD)
    for numbers in (plan.send_R, plan.count_R, plan.place_R, limits.rows):
      out_TD += jnp.where(jnp.any(numbers % multiple != 0), jnp.nan, 0)
    return out_TD, vjp(pull_TD)[0], plan.dropped[None]

  run = sharding.per_device(on_device, _mesh(), ('rows',) * 3, 'rows')
  return jax.jit(run)(*tokens)


@pytest.mark.parametrize(
  ('skew', 'multiple', 'receive_factor', 'in_fp8'),
  [
    ('skewed', 1, 'worst', False),
    ('one device', 8, 0.5, False),
    ('even', 8, 2.0, True),
  ],
)
def test_dma_is_the_padded_exchange(
  skew, multiple, receive_factor, in_fp8, monkeypatch
):
  exchange = functools.partial(
    expert.expert_all_to_all_ops.ragged_exchange,
    interpret=pltpu.InterpretParams(),
  )
  monkeypatch.setattr(expert.expert_all_to_all_ops, 'ragged_exchange', exchange)
  (x_TD, expert_TK, *_), pull_TD = _inputs(skew)
  weight_RN = jnp.float32(np.random.default_rng(1).normal(size=(_R, 100)))
  padded, dma = (
    _there_and_back(
      kind,
      multiple,
      receive_factor,
      in_fp8,
      (x_TD, expert_TK, pull_TD),
      weight_RN,
    )
    for kind in ('padded', 'dma')
  )
  for a, b in zip(dma, padded, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  assert np.abs(padded[0]).max() > 1 and np.abs(padded[1]).max() > 1
  assert padded[2].any() == (skew == 'one device')


def test_overflow_is_counted_and_spares_the_others():
  args, pull_TD = _inputs('one device')
  config = _with_exchange(receive_factor=0.5)
  out_TD = _programs(_CONFIG)[0](*args, pull_TD)[0]
  shared_TD, overflow_R, _ = _programs(config)[1](*args, pull_TD)
  limits = expert.limits(
    _T, num_ranks=_R, num_experts=_E, top_k=_K, receive_factor=0.5
  )
  # Device 2 is sent all 48 tokens.
  assert limits.rows == 18 and limits.choices == 18
  assert overflow_R.sum() >= _R * _T - limits.rows
  differs_T = np.abs(np.asarray(shared_TD) - out_TD).max(1) > 1e-4
  assert not differs_T[:9].any() and differs_T[limits.rows :].all()
  assert np.isfinite(shared_TD).all()


def test_enough_room_is_as_good_as_the_worst_case():
  args, pull_TD = _inputs('even')
  worst, roomy = (
    _programs(_with_exchange(receive_factor=factor))[1](*args, pull_TD)
    for factor in ('worst', 1.3)
  )
  assert not roomy[1].any()
  np.testing.assert_allclose(roomy[0], worst[0], atol=1e-6)


@functools.partial(jax.jit, static_argnames=('limits', 'num_local'))
def _plans(expert_TK, limits, num_local):
  plan = lambda e: jax.tree.map(
    lambda x: x[None], expert.plan(e, num_local, limits)
  )
  return sharding.per_device(plan, _mesh(), ('rows',), 'rows')(expert_TK)


@pytest.mark.parametrize('skew', ['even', 'skewed', 'one device'])
def test_a_token_is_sent_once_to_each_device_that_it_needs(skew):
  (_, expert_TK, *_), _ = _inputs(skew)
  limits = expert.limits(
    _T, num_ranks=_R, num_experts=_E, top_k=_K, receive_factor='worst'
  )
  plans = _plans(expert_TK, limits, _E // _R)
  rank_RTK = (expert_TK // (_E // _R)).reshape(_R, _T, _K)
  for r in range(_R):
    sent = [set(rank_RTK[r, t]) for t in range(_T)]
    count_R = [sum(to in s for s in sent) for to in range(_R)]
    np.testing.assert_array_equal(plans.count_R[r], count_R)
    expected = [t for to in range(_R) for t in range(_T) if to in sent[t]]
    np.testing.assert_array_equal(plans.token_s[r][: len(expected)], expected)
    assert (plans.token_s[r][len(expected) :] == _T).all()


@pytest.mark.parametrize(
  ('num_ranks', 'groups', 'most'),
  [(8, (8, 4), 4), (16, (8, 4), 8), (4, (8, 4), 4), (8, (1, 1), 8)],
)
def test_group_limited_routing_bounds_the_destinations(num_ranks, groups, most):
  limits = expert.limits(
    100,
    num_ranks=num_ranks,
    num_experts=256,
    top_k=8,
    num_groups=groups[0],
    top_groups=groups[1],
    receive_factor=2.0,
  )
  assert limits.most_ranks == most
  assert limits.rows == min(200 * most, 100 * num_ranks)
  assert limits.choices == 1600


def test_devices_that_do_not_divide_the_experts_are_refused():
  with pytest.raises(ValueError, match='expert=3 does not divide 8 experts'):
    expert.limits(4, num_ranks=3, num_experts=8, top_k=2, receive_factor=2.0)


@pytest.mark.parametrize('kind', ['padded', 'ragged'])
def test_fp8_rows_are_rounded_once_and_their_gradient_is_not(kind, monkeypatch):
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', _emulated)
  (x_TD, *rest), pull_TD = _inputs('skewed')
  rounded_TD = fp8.dequantize_tiles(
    *fp8.quantize_tiles(x_TD, power_of_two=True), jnp.float32
  )
  assert 1e-3 < np.abs(rounded_TD - x_TD).max() < 0.2
  program = _programs(_with_exchange(kind=kind, fp8=True))[1]
  out_TD, _, grads = program(x_TD, *rest, pull_TD)
  expected_TD, _, expected = _programs(_CONFIG)[0](rounded_TD, *rest, pull_TD)
  np.testing.assert_allclose(out_TD, expected_TD, atol=2e-5)
  for a, b in zip(
    jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=5e-5)
