"""The sampler is the trained model: same numbers, same tokens, any layout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.losses import token
from r1jax.model import router, transformer
from r1jax.parallel import load_balance
from r1jax.parallel import mesh as mesh_lib
from r1jax.sampling import filters, generate
from tests.model import tiny

# Long enough for a second phase, whose waves are smaller than the batch.
_B, _T, _NEW = 64, 8, 40
_STOP, _PAD = (5, 9), 0
_CONFIG = dataclasses.replace(tiny.config(), num_layers=2)
_SAMPLED = filters.SamplingConfig(temperature=0.8)
_GREEDY = filters.SamplingConfig(temperature=0.0)


def _prompts():
  """Ragged prompts, right-padded with ids that must not matter."""
  rng = np.random.default_rng(0)
  length_B = rng.integers(1, _T + 1, _B).astype(np.int32)
  length_B[:2] = 1, _T
  return rng.integers(0, tiny.V, (_B, _T)).astype(np.int32), length_B


def _options(sampling):
  return {
    'max_new_tokens': _NEW,
    'sampling': sampling,
    'stop_ids': _STOP,
    'pad_id': _PAD,
  }


def _generate(sampling, prompts=None):
  """A rollout on one device, on the host."""
  run = functools.partial(generate.generate, _CONFIG, **_options(sampling))
  prompt_BT, length_B = prompts or _prompts()
  row_B = np.arange(len(length_B), dtype=np.int32)
  args = (tiny.variables(_CONFIG), prompt_BT, length_B, row_B)
  return jax.device_get(jax.jit(run)(*args, jax.random.key(1)))


@functools.cache
def _rollout(greedy=False):
  return _generate(_GREEDY if greedy else _SAMPLED)


def _record_experts(monkeypatch):
  """Collects the experts of every router call, in the order they run."""
  calls, route = [], router.route

  def recording(*args, **kwargs):
    expert, weight = route(*args, **kwargs)
    jax.debug.callback(
      lambda x: calls.append(np.sort(x, axis=-1)), expert, ordered=True
    )
    return expert, weight

  monkeypatch.setattr(router, 'route', recording)
  return calls


def _trainer(tokens_BT, length_B, temperature):
  """The trainer's pass over the assembled rollouts: logits and logp."""
  variables = tiny.variables(_CONFIG)

  @jax.jit
  def run(tokens_BT, segment_BT):
    out = transformer.Transformer(_CONFIG).apply(
      variables, tokens_BT, segment_BT=segment_BT
    )
    head = transformer.head(variables['params'], _CONFIG)
    logp_BT, _ = token.next_token_logp(
      out.hidden_BTD, head, tokens_BT, temperature=temperature
    )
    return head.logits(out.hidden_BTD), logp_BT

  width = np.arange(tokens_BT.shape[1])
  return run(tokens_BT, (width < length_B[:, None]).astype(np.int32))


@pytest.mark.parametrize('greedy', [False, True])
def test_rows_hold_prompt_completion_up_to_a_stop_and_padding(greedy):
  prompt_BT, length_B = _prompts()
  r = _rollout(greedy)
  new_B = r.length_B - length_B
  np.testing.assert_array_equal(r.prompt_length_B, length_B)
  for b in range(_B):
    start, end = length_B[b], r.length_B[b]
    new = r.tokens_BT[b, start:end].tolist()
    np.testing.assert_array_equal(r.tokens_BT[b, :start], prompt_BT[b, :start])
    assert 1 <= len(new) <= _NEW
    assert not set(new[:-1]) & set(_STOP)
    assert bool(r.finished_B[b]) == (new[-1] in _STOP)
    assert r.finished_B[b] or len(new) == _NEW
    assert (r.tokens_BT[b, end:] == _PAD).all()
    inside = np.arange(_T + _NEW)
    inside = (inside >= start) & (inside < end)
    np.testing.assert_array_equal(r.mask_BT[b], inside)
    assert not r.logp_BT[b, ~inside].any()
  if not greedy:  # Rows ended in the first phase, in the second, and not.
    assert (new_B < 32).any() and not r.finished_B.all()
    assert ((new_B > 32) & r.finished_B).any()


def test_log_probabilities_and_experts_are_the_trainers(monkeypatch):
  """At every sampled token, over ragged rows: within 1e-5, the same experts.

  One wave, so that the recorded calls are rows in order; the other tests tie
  waves to it.
  """
  waved = _rollout()
  assert len(generate.phases(_NEW, _B)) > 1
  monkeypatch.setattr(generate, 'phases', lambda n, batch: ((n, batch),))
  recorded = _record_experts(monkeypatch)
  r = _generate(_SAMPLED)
  jax.effects_barrier()
  sampler = list(recorded)
  recorded.clear()
  _, logp_BT = jax.device_get(_trainer(r.tokens_BT, r.length_B, 0.8))
  jax.effects_barrier()
  (trainer_BTK,) = recorded
  prefill_BTK, *steps = sampler
  differ = compared = 0
  for b in range(_B):
    n, end = r.prompt_length_B[b], r.length_B[b]
    # The last sampled token is fed to nothing.
    fed = [prefill_BTK[b, :n], *(s[b] for s in steps[: end - n - 1])]
    experts_TK = np.concatenate(fed)
    differ += (experts_TK != trainer_BTK[b, : end - 1]).any(-1).sum()
    compared += end - 1
  assert (differ, compared) == (0, int((r.length_B - 1).sum()))
  gap_BT = np.abs(logp_BT - r.logp_BT) * r.mask_BT
  assert r.mask_BT.sum() > 1000
  assert gap_BT.max() < 1e-5
  assert (r.logp_BT[r.mask_BT > 0] < 0).all()
  # The same rollout as in two phases of waves.
  np.testing.assert_array_equal(r.tokens_BT, waved.tokens_BT)
  np.testing.assert_allclose(r.logp_BT, waved.logp_BT, atol=1e-5)


def test_greedy_is_the_naive_loop_of_full_forwards():
  r = _rollout(greedy=True)
  tokens_BT, length_B = np.copy(r.tokens_BT), r.length_B
  # One full forward tells every next token: each must be what was taken.
  logits_BTV, _ = jax.device_get(_trainer(tokens_BT, length_B, 1.0))
  checked = 0
  for b in range(_B):
    for t in range(r.prompt_length_B[b], length_B[b]):
      assert tokens_BT[b, t] == logits_BTV[b, t - 1].argmax(), (b, t)
      checked += 1
  assert checked == r.mask_BT.sum()
  assert not r.logp_BT.any()


def test_padding_of_prompts_changes_nothing():
  prompt_BT, length_B = _prompts()
  keep_BT = np.arange(_T) < length_B[:, None]
  other_BT = np.where(keep_BT, prompt_BT, (prompt_BT + 13) % tiny.V)
  r = _generate(_SAMPLED, (other_BT.astype(np.int32), length_B))
  np.testing.assert_array_equal(r.tokens_BT, _rollout().tokens_BT)


@pytest.mark.parametrize('devices', [1, 8])
def test_a_prompt_read_once_gives_the_rows_of_its_repeats(devices):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:devices])
  prompt_PT, length_P = (x[:16] for x in _prompts())
  repeated = (np.repeat(x, 4, axis=0) for x in (prompt_PT, length_P))
  make = functools.partial(
    generate.make_generate, _CONFIG, mesh, **_options(_SAMPLED)
  )
  variables, key = tiny.variables(_CONFIG), jax.random.key(1)
  r = make(copies=4)(variables, prompt_PT, length_P, key)
  expected = make()(variables, *repeated, key)
  assert len(np.unique(r.tokens_BT[:4], axis=0)) == 4
  for field in dataclasses.fields(expected):
    np.testing.assert_allclose(
      getattr(r, field.name), getattr(expected, field.name), atol=1e-5
    )


@pytest.mark.parametrize(
  ('num_prompts', 'group_size', 'copies'),
  [(8, 4, 4), (16, 16, 16), (4, 4, 2), (2, 16, 4), (1, 8, 1), (3, 8, 1)],
)
def test_devices_divide_the_prompts_that_are_read(
  num_prompts, group_size, copies
):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=8))
  assert generate.copies_at_once(num_prompts, group_size, mesh) == copies


def _placement(num_devices):
  """Twice as many replicas as experts, some of them with four."""
  load_LE = np.random.default_rng(0).zipf(1.5, (1, 8)).clip(1, 1000)
  sizes = {'num_replicas': 16, 'num_groups': 1, 'num_nodes': 1}
  placement = load_balance.rebalance(
    load_LE, num_devices=num_devices, **sizes
  ).padded(9)
  assert placement.count_LE.min() == 1 and placement.count_LE.max() == 4
  return placement


@pytest.mark.parametrize(
  ('greedy', 'sizes', 'replicas'),
  [
    (False, {'data': 8}, False),
    (True, {'data': 8}, False),
    (False, {'data': 1, 'fsdp': 2, 'expert': 2, 'tensor': 2}, False),
    (False, {'data': 1, 'fsdp': 2, 'expert': 4}, True),
    (True, {'data': 8}, True),
  ],
)
def test_eight_devices_sample_what_one_does(greedy, sizes, replicas):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes))
  options = _options(_GREEDY if greedy else _SAMPLED)
  run = jax.jit(generate.make_generate(_CONFIG, mesh, **options))
  args = (tiny.variables(_CONFIG), *_prompts(), jax.random.key(1))
  if replicas:
    args += (_placement(mesh.shape['expert']),)
  r = jax.device_get(run(*args))
  expected = _rollout(greedy=greedy)
  for field in dataclasses.fields(expected):
    np.testing.assert_allclose(
      getattr(r, field.name), getattr(expected, field.name), atol=1e-5
    )


def test_weights_are_whole_along_fsdp_where_they_sample():
  sizes = mesh_lib.MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
  mesh = mesh_lib.make_mesh(sizes)
  trained = jax.device_put(
    tiny.variables(_CONFIG), transformer.shardings(_CONFIG, mesh)
  )
  moved = generate.make_reshard(_CONFIG, mesh)(trained)
  split = lambda x, axis: axis in str(x.sharding.spec)
  leaves = jax.tree.leaves(moved)
  assert any(split(x, 'fsdp') for x in jax.tree.leaves(trained))
  assert not any(split(x, 'fsdp') for x in leaves)
  assert any(split(x, 'tensor') for x in leaves)
  jax.tree.map(np.testing.assert_array_equal, moved, trained)


def test_weights_are_cast_as_the_model_reads_them_and_sample_the_same():
  config = dataclasses.replace(_CONFIG, dtype='bfloat16')
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  trained = tiny.variables(config)
  moved = generate.make_reshard(config, mesh)(trained)
  params = moved['params']['moe']
  assert params['attention']['k_up'].dtype == params['moe']['gate'].dtype
  assert params['moe']['gate'].dtype == jnp.bfloat16
  assert params['moe']['router'].dtype == jnp.float32
  run = generate.make_generate(config, mesh, **_options(_SAMPLED))
  args = (*_prompts(), jax.random.key(1))
  jax.tree.map(
    np.testing.assert_array_equal, run(moved, *args), run(trained, *args)
  )


def test_weights_of_one_device_stay_where_they_are():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  variables = tiny.variables(_CONFIG)
  assert generate.make_reshard(_CONFIG, mesh)(variables) is variables


@pytest.mark.parametrize('batch', [1, 7, 32, 33, 48, 64, 100, 250, 256, 1000])
@pytest.mark.parametrize('num_new', [1, 2, 31, 32, 33, 64, 65, 500])
def test_phases_end_with_the_last_token_and_waves_divide_the_batch(
  batch, num_new
):
  plan = generate.phases(num_new, batch)
  ends = [end for end, _ in plan]
  assert ends == sorted(set(ends)) and ends[-1] == num_new
  assert all(batch % wave == 0 for _, wave in plan)


def test_draws_have_the_frequencies_of_the_distribution():
  """An even grid of uniforms: each token within one grid step of its share."""
  prob_V = np.float32([0.0, 0.3, 0.0, 0.15, 0.05, 0.5, 0.0])
  num = 4000
  uniform_B = ((np.arange(num) + 0.5) / num).astype(np.float32)
  with np.errstate(divide='ignore'):
    logp_BV = np.broadcast_to(np.log(prob_V), (num, 7))
  token_B = np.asarray(jax.jit(generate._draw)(uniform_B, logp_BV))
  count_V = np.bincount(token_B, minlength=7)
  assert np.abs(count_V - num * prob_V).max() <= 1
  assert not count_V[prob_V == 0].any()
  edge_B = np.float32([0.0, np.nextafter(np.float32(1), np.float32(0))])
  drawn = jax.jit(generate._draw)(edge_B, logp_BV[:2])
  np.testing.assert_array_equal(drawn, [1, 5])
