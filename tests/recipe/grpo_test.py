"""What GRPO trains on: rollouts, rewards, groups, minibatches; whole runs."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import r1_zero
from r1jax import config as config_lib
from r1jax import types
from r1jax.data import tokenizer
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import grpo, origin, rollouts, samples, tasks
from r1jax.rl.reward import strings
from r1jax.train import checkpoint, metrics, source_state, workdir
from r1jax.train import state as state_lib
from tests.recipe import micro


@functools.cache
def _programs() -> dict[str, Callable]:
  """The compiled programs of a source: all sources here have the same."""
  source = _Recorded(own_programs=True).source
  names = ('_generate', '_score', '_logp', '_advantage')
  return {name: vars(source)[name] for name in names}


def _mesh() -> jax.sharding.Mesh:
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])


@functools.cache
def _logp() -> Callable:
  return jax.jit(rollouts.make_logp(micro.model(), _mesh(), temperature=1.0))


class _Recorded:
  """A source with all that it reports, and the rollouts it was made of."""

  def __init__(
    self, *, seed: int = 0, loss=None, own_programs: bool = False, **changes
  ):
    self.config = micro.rollout(**changes)
    loss = loss or micro.policy_loss(kl_coef=0.0)
    self.metrics, self.samples, self.rollouts = [], [], []
    self.source = rollouts.GrpoSource(
      self.config,
      micro.model(),
      micro.one_device(),
      tokenizer.default(),
      micro.questions,
      advantage=grpo.ADVANTAGES[loss.advantage],
      use_reference=loss.kl_coef > 0,
      seed=seed,
      write=lambda step, row: self.metrics.append((step, row)),
      write_samples=lambda step, rows: self.samples.append((step, rows)),
    )
    if not own_programs:
      vars(self.source).update(_programs())
    inner = self.source._rollout

    def rollout(*args):
      self.rollouts.append(inner(*args))
      return self.rollouts[-1]

    self.source._rollout = rollout

  def take(self, count: int, state) -> list[types.PolicyBatch]:
    return [jax.device_get(self.source.next(state)) for _ in range(count)]


def _state(variables, reference=None, step: int = 0) -> state_lib.State:
  return state_lib.State(jnp.int32(step), variables, None, reference)


def _random() -> state_lib.State:
  return _state(micro.variables(micro.model()))


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _assert_same_samples(a, b):
  """Equal but for the log-probabilities' rounding, if rows stand elsewhere."""

  def check(x, y):
    rtol = 1e-6 if np.issubdtype(x.dtype, np.floating) else 0
    np.testing.assert_allclose(x, y, rtol=rtol)

  jax.tree.map(check, a, b)


def _sequences(batch: types.PolicyBatch):
  """Yields (tokens, advantage, sampled tokens) of every packed completion."""
  for b in range(batch.tokens_BT.shape[0]):
    for s in range(1, batch.segment_BT[b].max() + 1):
      at_T = batch.segment_BT[b] == s
      adv_T, mask_T = batch.adv_BT[b, at_T], batch.mask_BT[b, at_T]
      assert len(set(adv_T)) == 1
      yield tuple(batch.tokens_BT[b, at_T]), float(adv_T[0]), mask_T.sum()


@pytest.fixture(scope='module', autouse=True)
def compiled():
  """The programs of `_programs` run once, so that no test waits for them."""
  _Recorded().take(1, _random())


def test_the_same_seed_gives_the_same_batches():
  first = _Recorded(seed=3).take(3, _random())
  _assert_equal(_Recorded(seed=3).take(3, _random()), first)
  other = _Recorded(seed=4).take(1, _random())[0]
  assert not np.array_equal(other.tokens_BT, first[0].tokens_BT)


def test_resumes_bit_for_bit_between_two_minibatches():
  whole = _Recorded().take(5, _random())
  before = _Recorded()
  before.take(3, _random())  # The second of two minibatches is waiting.
  packed = source_state.pack(before.source.get_state())
  after = _Recorded()
  after.source.set_state(source_state.unpack(packed))
  _assert_equal(after.take(1, _random()), whole[3:4])
  assert not after.rollouts  # It came from the state: nothing was sampled.
  _assert_equal(after.take(1, _random()), whole[4:])


def test_every_choice_about_rollouts_is_a_flag():
  # Those that a config file leaves out cannot be set on a command line.
  fields = {f.name for f in dataclasses.fields(rollouts.RolloutConfig)}
  assert fields - set(r1_zero.get_config().rollout) == {'rule'}


def test_replicas_of_experts_sample_the_same_and_are_resumed():
  whole = _Recorded().take(4, _random())
  replicated = _Recorded(redundant_experts=4, load_decay=0.5)
  _assert_same_samples(replicated.take(3, _random()), whole[:3])
  figures = replicated.metrics[-1][1]
  assert figures['perf/reshard_seconds'] >= 0
  # All on one device: in balance, whatever the load.
  assert (
    figures['rl/expert_balance'] == figures['rl/expert_balance_in_order'] == 1
  )
  packed = source_state.pack(replicated.source.get_state())
  after = _Recorded(redundant_experts=4, load_decay=0.5)
  after.source.set_state(source_state.unpack(packed))
  _assert_same_samples(after.take(1, _random()), whole[3:])
  placements = [r.source._experts.placement for r in (replicated, after)]
  _assert_equal(*placements)
  assert (
    placements[0].count_LE.sum(1).min() == micro.model().moe.num_experts + 4
  )


def test_old_logp_is_the_trainers_on_ragged_rows():
  recorded = _Recorded()
  batch = recorded.take(1, _random())[0]
  logp_BT = np.asarray(_logp()(_random().variables, batch))
  sampled_BT = batch.mask_BT > 0
  assert sampled_BT.sum() > 100
  gap = np.abs(logp_BT - batch.old_logp_BT)[sampled_BT]
  assert gap.max() < 1e-5
  _, row = recorded.metrics[0]
  # Two programs of the trainer's, each off by its own rounding.
  np.testing.assert_allclose(row['rl/gap_max'], gap.max(), atol=2e-6)
  np.testing.assert_allclose(row['rl/gap_mean'], gap.mean(), atol=2e-7)
  assert row['rl/gap_outside'] == 0


def test_gap_is_measured_each_so_many_rollouts():
  recorded = _Recorded(gap_every=2)
  recorded.take(6, _random())
  has_gap = ['rl/gap_max' in row for _, row in recorded.metrics]
  assert has_gap == [True, False, True]


def test_a_stale_policy_shows_in_the_gap():
  recorded = _Recorded()
  batch = recorded.take(1, _random())[0]
  other = micro.variables(micro.model(), seed=1)
  row = recorded.source._gap(other, batch)
  assert row['rl/gap_max'] > 0.1 and row['rl/gap_outside'] > 0.1
  logp_BT = np.asarray(_logp()(other, batch))
  gap = np.abs(logp_BT - batch.old_logp_BT)[batch.mask_BT > 0]
  np.testing.assert_allclose(row['rl/gap_max'], gap.max(), rtol=1e-4)
  np.testing.assert_allclose(row['rl/gap_mean'], gap.mean(), rtol=1e-4)


@functools.cache
def _rewarded() -> tuple[_Recorded, list[types.PolicyBatch]]:
  """Rollouts of the policy by hand: some right, some without format."""
  recorded = _Recorded(samples_every=2)
  return recorded, recorded.take(4, _state(micro.policy()))


def test_device_rewards_equal_the_string_twin():
  recorded, _ = _rewarded()
  c, t = recorded.config, tokenizer.default()
  seen = Counter()
  for index, (rollout, score) in enumerate(recorded.rollouts):
    for i in range(c.num_prompts * c.group_size):
      p, g = divmod(i, c.group_size)
      answer = micro.questions(index * c.num_prompts + p).answer
      start, end = rollout.prompt_length_B[i], rollout.length_B[i]
      completion = rollout.tokens_BT[i, start:end]
      accuracy = strings.accuracy_reward(completion, answer, t)
      well_formed = strings.format_reward(completion, t)
      assert score['accuracy'][p, g] == accuracy
      assert score['format'][p, g] == well_formed
      assert score['reward'][p, g] == accuracy + 0.5 * well_formed
      seen[accuracy, well_formed] += 1
  assert seen.keys() == {(0, 0), (0, 1), (1, 1)}


def test_the_logged_reward_is_the_trained_one():
  recorded, _ = _rewarded()
  for (_, score), (_, row) in zip(recorded.rollouts, recorded.metrics):
    for name in ('reward', 'accuracy', 'format'):
      assert row[f'rl/{name}'] == pytest.approx(score[name].mean())
    spread_P = np.ptp(score['reward'], axis=1)
    assert row['rl/zero_variance_groups'] == np.mean(spread_P == 0)


def test_each_completion_is_packed_once_with_its_advantage():
  recorded, batches = _rewarded()
  rollout, score = recorded.rollouts[0]
  expected = Counter()
  for p, reward_G in enumerate(np.asarray(score['reward'], np.float64)):
    adv_G = reward_G - reward_G.mean()
    adv_G /= reward_G.std() or 1.0
    for g, adv in enumerate(adv_G):
      i = p * recorded.config.group_size + g
      tokens = tuple(rollout.tokens_BT[i, : rollout.length_B[i]])
      sampled = rollout.length_B[i] - rollout.prompt_length_B[i]
      expected[tokens, round(adv, 4), sampled] += 1
  got = Counter()
  for batch in batches[:2]:
    packed = list(_sequences(batch))
    assert batch.num_sequences == len(packed) == 16
    assert batch.num_tokens == sum(sampled for *_, sampled in packed)
    got.update((t, round(adv, 4), s) for t, adv, s in packed)
  assert got == expected


def test_samples_are_written_each_so_many_rollouts():
  recorded, _ = _rewarded()
  assert len(recorded.rollouts) == 2
  ((step, rows),) = recorded.samples
  assert step == 1
  question = micro.questions(0)
  assert rows[0]['prompt'] == question.prompt
  assert rows[0]['gold'] == question.answer
  assert rows[0]['completion'].startswith('<think>')
  _, score = recorded.rollouts[0]
  assert rows[0]['reward'] == score['reward'][0, 0]
  assert rows[0]['correct'] == score['accuracy'][0, 0]


def test_groups_that_teach_something_come_first():
  # Always well formed: a group differs only if one of 8 guesses is right.
  recorded = _Recorded(max_rollouts=4)
  batches = recorded.take(2, _state(micro.policy(1.0)))
  informative = [
    np.ptp(score['reward'], axis=1) > 0 for _, score in recorded.rollouts
  ]
  so_far = np.cumsum([each.sum() for each in informative])
  assert 1 < len(so_far) <= 4
  assert (so_far[:-1] < 4).all() and (so_far[-1] >= 4 or len(so_far) == 4)
  advantages = [adv for batch in batches for _, adv, _ in _sequences(batch)]
  assert len(advantages) == 32
  assert np.count_nonzero(advantages) == min(so_far[-1], 4) * 8
  _, row = recorded.metrics[0]
  assert row['rl/zero_variance_groups'] == np.mean(~np.concatenate(informative))
  assert row['rl/rollouts'] == len(so_far)


def test_the_reference_is_read_only_with_a_kl_penalty():
  reference = micro.variables(micro.model(), seed=1)
  state = _state(micro.variables(micro.model()), reference)
  without = _Recorded(gap_every=0)
  without.source._logp = None  # Must not be called.
  (batch,) = without.take(1, state)
  assert not batch.ref_logp_BT.any()

  with_kl = _Recorded(gap_every=0, loss=micro.policy_loss(kl_coef=0.01))
  (batch,) = with_kl.take(1, state)
  np.testing.assert_allclose(
    batch.ref_logp_BT, _logp()(reference, batch), atol=1e-5
  )
  assert np.abs(batch.ref_logp_BT - batch.old_logp_BT).max() > 0.1


@jax.jit
def _balance(variables, batch: types.PolicyBatch) -> jax.Array:
  out = transformer.Transformer(micro.model()).apply(
    variables,
    batch.tokens_BT,
    segment_BT=batch.segment_BT,
    position_BT=batch.position_BT,
  )
  return out.moe.balance_B


@pytest.mark.parametrize('reduction', ['sequence_mean', 'token_mean'])
def test_loss_is_gain_plus_penalty_plus_balance(reduction):
  recorded, (batch, *_) = _rewarded()
  rng = np.random.default_rng(0)
  noise = lambda: rng.normal(scale=0.3, size=batch.mask_BT.shape)
  batch = dataclasses.replace(
    batch,
    old_logp_BT=(batch.old_logp_BT + noise()).astype(np.float32),
    ref_logp_BT=(batch.old_logp_BT + noise()).astype(np.float32),
  )
  config, variables = micro.model(), micro.policy()
  loss_config = micro.policy_loss(kl_coef=0.5, reduction=reduction)
  loss_fn = grpo.make_loss(
    config, loss_config, temperature=1.3, balance_coef=0.1
  )
  loss, got = jax.jit(loss_fn)(variables, batch)

  logp = jax.jit(rollouts.make_logp(config, _mesh(), temperature=1.3))
  logp_BT = np.asarray(logp(variables, batch))
  balance_LB = _balance(variables, batch)
  weight_B = batch.mask_BT.sum(1) / batch.num_tokens
  expected = 0.1 * float((balance_LB @ weight_B).sum())
  kl = clipped = 0.0
  for b, t in zip(*np.nonzero(batch.mask_BT)):
    ratio = np.exp(logp_BT[b, t] - batch.old_logp_BT[b, t])
    adv = batch.adv_BT[b, t]
    gain = min(ratio * adv, np.clip(ratio, 0.8, 1.28) * adv)
    r = batch.ref_logp_BT[b, t] - logp_BT[b, t]
    weight = (
      1 / batch.length_BT[b, t] / batch.num_sequences
      if reduction == 'sequence_mean'
      else 1 / batch.num_tokens
    )
    expected += weight * (0.5 * (np.exp(r) - r - 1) - gain)
    kl += (np.exp(r) - r - 1) / batch.num_tokens
    clipped += (gain < ratio * adv) / batch.num_tokens
  assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)
  assert float(got['rl/kl']) == pytest.approx(kl, rel=1e-4)
  assert float(got['rl/clip_fraction']) == pytest.approx(clipped, abs=1e-6)


@pytest.fixture(scope='module')
def base(tmp_path_factory) -> str:
  """A workdir whose model is the policy by hand."""
  folder = tmp_path_factory.mktemp('base')
  workdir.prepare(folder, {'model': dataclasses.asdict(micro.model())})
  state = _state(micro.policy(0.6), step=7)
  with checkpoint.Checkpoints(folder / 'checkpoints', max_to_keep=1) as c:
    c.save(7, state, {})
  return str(folder)


def _config(base: str, **changes) -> grpo.GrpoConfig:
  changes = {'optim__peak_lr': 3e-3} | changes
  return config_lib.from_dict(grpo.GrpoConfig, micro.grpo_dict(base, **changes))


def _run(base: str, folder, **changes) -> state_lib.State:
  with micro.on(micro.one_device()):
    return jax.device_get(grpo.run(_config(base, **changes), str(folder)))


_RUN = {'train__num_steps': 12, 'train__reference_every': 4}


@pytest.fixture(scope='module')
def finished(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp('finished')
  return folder, _run(base, folder, **_RUN)


def test_a_run_learns_to_keep_the_format(finished):
  folder, state = finished
  assert int(state.step) == 12
  rows = [r for r in metrics.read(folder) if 'rl/format' in r]
  assert [r['step'] for r in rows] == [1, 3, 5, 7, 9, 11]
  kept = [r['rl/format'] for r in rows]
  assert np.mean(kept[:2]) < 0.9 < np.mean(kept[-2:])


def test_the_first_update_of_a_rollout_sees_its_own_policy(finished):
  rows = {
    r['step']: r for r in metrics.read(finished[0]) if 'rl/ratio_max' in r
  }
  for step in (1, 5, 9):
    assert rows[step]['rl/ratio_max'] == pytest.approx(1, abs=1e-4)
    assert rows[step]['rl/clip_fraction'] == 0
  assert rows[1]['rl/kl'] == pytest.approx(0, abs=1e-6)
  assert rows[2]['rl/ratio_max'] > 1.01


def test_the_reference_is_replaced(finished):
  state = finished[1]
  _assert_equal(state.reference, state.variables)  # 12 is a multiple of 4.


def test_the_samples_of_a_run_are_kept(finished):
  lines = (finished[0] / 'samples.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [r['step'] for r in rows] == sorted(r['step'] for r in rows)
  assert {r['step'] for r in rows} == {1, 3, 5, 7, 9, 11}
  assert rows[0].keys() >= {'prompt', 'completion', 'gold', 'reward'}


@pytest.fixture(scope='module')
def cut_and_resumed(base, tmp_path_factory):
  folder = tmp_path_factory.mktemp('cut')
  cut = _run(base, folder, **_RUN | {'train__num_steps': 7})
  return folder, cut, _run(base, folder, **_RUN)


def test_a_run_cut_inside_a_rollout_goes_on_bit_for_bit(
  finished, cut_and_resumed
):
  folder, cut, resumed = cut_and_resumed
  assert int(cut.step) == 7
  differ = jax.tree.map(
    lambda a, b: bool(np.any(a != b)), cut.reference, cut.variables
  )
  assert differ['params']['head']  # Replaced at step 4, not since.
  whole_folder, whole = finished
  _assert_equal(resumed, whole)
  assert _figures(folder) == _figures(whole_folder)
  read = lambda folder: (folder / 'samples.jsonl').read_text()
  assert read(folder) == read(whole_folder)


def _figures(folder) -> list[dict[str, float]]:
  """The lines of metrics.jsonl without what a clock says."""
  return [
    {k: v for k, v in row.items() if not k.startswith('perf/')}
    for row in metrics.read(folder)
  ]


def test_dry_run_returns_sizes_and_leaves_no_workdir(base, tmp_path):
  with micro.on(micro.one_device()):
    # The program of `finished`, so that it is compiled once.
    config = _config(base, **_RUN)
    sizes = grpo.run(config, str(tmp_path / 'none'), dry_run=True)
  assert not (tmp_path / 'none').exists()
  assert sizes['rows x tokens'] == '8x32'
  assert sizes['sampler: rows x new tokens'] == '32x12'
  assert sizes['sampler: temporaries MiB'] > 0
  assert sizes['parameters'] == sum(
    x.size for x in jax.tree.leaves(micro.policy())
  )


def test_without_a_penalty_there_is_no_reference_to_replace(base, tmp_path):
  with micro.on(micro.one_device()):
    config = _config(base, loss__kl_coef=0.0, train__reference_every=4)
    sizes = grpo.run(config, str(tmp_path / 'none'), dry_run=True)
  # Parameters and two moments, 4 bytes each; a reference would be as many.
  whole = sizes['parameters'] * 16 / 2**20
  assert whole * 0.75 < sizes['state and batch MiB'] < whole


def test_loss_without_a_penalty_is_finite_where_a_reference_would_not_be():
  _, (batch, *_) = _rewarded()
  loss_fn = grpo.make_loss(
    micro.model(),
    micro.policy_loss(kl_coef=0.0),
    temperature=1.0,
    balance_coef=0.0,
  )
  batch = dataclasses.replace(
    batch,
    old_logp_BT=np.zeros_like(batch.old_logp_BT),
    # A reference that was left out is 0: k3 would be e^200.
    ref_logp_BT=np.full_like(batch.ref_logp_BT, 200.0),
  )
  loss, got = jax.jit(loss_fn)(micro.policy(), batch)
  assert np.isfinite(loss) and 'rl/kl' not in got


def test_samples_past_the_restored_step_are_dropped(tmp_path):
  first = samples.SampleWriter(tmp_path)
  for step in (1, 3, 5):
    first.write(step, [{'completion': f'第{step}步'}])
  samples.SampleWriter(tmp_path).write(3, [{'completion': 'again'}])
  text = (tmp_path / 'samples.jsonl').read_text(encoding='utf-8')
  rows = [json.loads(line) for line in text.splitlines()]
  assert rows == [
    {'step': 1, 'completion': '第1步'},
    {'step': 3, 'completion': 'again'},
  ]


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'init_from': ''}, "init_from='' must name"),
    ({'rollout__group_size': 1}, 'rollout: group_size=1 must be at least 2'),
    ({'rollout__num_minibatches': 3}, 'num_minibatches=3 must divide'),
    ({'rollout__row_length': 23}, 'row_length=23 must hold'),
    ({'rollout__max_rollouts': 0}, 'max_rollouts=0 must be at least 1'),
    ({'rollout__sampling': {'temperature': 0.0}}, 'sampling.temperature=0'),
    ({'rollout__sampling': {'top_p': 0.9}}, 'top_p=0.9'),
    ({'rollout__sampling': {'top_k': 5}}, 'sampling.top_k=5'),
    ({'loss__reduction': 'mean'}, "loss: reduction='mean'"),
    ({'loss__advantage': 'gae'}, "advantage='gae'"),
    ({'loss__clip_low': 0.0}, 'clip_low=0.0'),
    ({'rollout__rows_multiple': 0}, 'rows_multiple=0 must be at least 1'),
    ({'eval_problems': -8}, 'eval_problems=-8'),
    ({'rollout__grup_size': 8}, "did you mean 'group_size'"),
  ],
)
def test_what_cannot_be_is_the_users_error(changes, message):
  with pytest.raises(config_lib.UserError) as error:
    _config('base', **changes)
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_rows_must_fit_the_bases_context(base, tmp_path):
  with pytest.raises(config_lib.UserError) as error:
    _run(base, tmp_path / 'run', rollout__row_length=65)
  assert 'row_length = 65 tokens exceeds' in str(error.value)


def test_a_prompt_too_long_is_the_users_error():
  t, question = tokenizer.default(), micro.questions(0)
  ids = [t.bos_id, *t.encode(question.prompt)]
  tokens_PT, length_P = rollouts.encode_prompts([question], t, len(ids) + 1)
  assert tokens_PT.tolist() == [[*ids, t.pad_id]]
  assert length_P.tolist() == [len(ids)]
  with pytest.raises(config_lib.UserError) as error:
    rollouts.encode_prompts([question], t, len(ids) - 1)
  assert f'max_prompt_tokens is {len(ids) - 1}' in str(error.value)


def test_rows_must_divide_over_the_devices(base, tmp_path):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=8, fsdp=1))
  config = _config(base, rollout__rows_multiple=12)
  with micro.on(mesh), pytest.raises(config_lib.UserError) as error:
    grpo.run(config, str(tmp_path / 'run'))
  assert 'rollout.rows_multiple=12 does not divide over 8' in str(error.value)


@pytest.mark.parametrize('content', [None, '{"mo', '{}'])
def test_a_base_that_is_none_is_the_users_error(content, tmp_path):
  if content is not None:
    (tmp_path / 'config.json').write_text(content)
  with pytest.raises(config_lib.UserError) as error:
    origin.load_model_config(str(tmp_path))
  assert str(tmp_path) in str(error.value)


def test_what_the_loss_does_not_see_is_what_does_not_decay():
  indexer = model_config.IndexerConfig(num_heads=2, head_dim=16, top_k=4)
  attention = dataclasses.replace(
    micro.model().attention, q_lora_rank=16, indexer=indexer
  )
  model = micro.model(attention=attention)
  loss_fn = grpo.make_loss(
    model, micro.policy_loss(), temperature=1.0, balance_coef=0.01
  )
  rng, (B, T) = np.random.default_rng(0), (4, 32)
  noise = lambda: rng.normal(size=(B, T)).astype(np.float32)
  batch = types.PolicyBatch(
    tokens_BT=rng.integers(0, model.vocab_size, (B, T)).astype(np.int32),
    mask_BT=np.ones((B, T), np.float32),
    segment_BT=np.ones((B, T), np.int32),
    position_BT=np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    num_tokens=np.float32(B * T),
    num_sequences=np.float32(B),
    old_logp_BT=noise() - 5,
    ref_logp_BT=noise() - 5,
    adv_BT=noise(),
    length_BT=np.full((B, T), T, np.float32),
  )
  grad = jax.jit(jax.grad(lambda v: loss_fn(v, batch)[0], allow_int=True))
  grads = grad(micro.variables(model))['params']
  leaves, _ = jax.tree_util.tree_flatten_with_path(grads)
  names = {jax.tree_util.keystr(path): np.any(x) for path, x in leaves}
  unseen = {name for name, has_any in names.items() if not has_any}
  is_left_out = lambda name: any(part in name for part in grpo.UNTRAINED)
  assert unseen == set(filter(is_left_out, names)) and unseen < names.keys()


def test_held_out_questions_need_not_divide_over_the_devices(monkeypatch):
  """Rows that fill up do not count; row i has length i and score i here."""

  def sample(variables, prompt_BT, length_B, key):
    rows_B = np.arange(len(prompt_BT))
    return types.Rollout(
      **dict.fromkeys(f.name for f in dataclasses.fields(types.Rollout))
      | {'mask_BT': (np.arange(12) < rows_B[:, None]).astype(np.float32)}
    )

  def score(rollout, questions):
    rows_P1 = np.arange(len(questions), dtype=np.float32)[:, None]
    return {'accuracy': rows_P1, 'format': 2 * rows_P1}

  make_sampler = lambda *args, **options: sample
  monkeypatch.setattr(grpo.rollouts, 'make_sampler', make_sampler)
  monkeypatch.setattr(grpo.scoring, 'make_score', lambda *args: score)
  values = micro.grpo_dict('x', eval_problems=5)
  config = config_lib.from_dict(grpo.GrpoConfig, values)
  ours = tokenizer.default()
  task = tasks.make_task(
    config.task,
    seed=0,
    render=str,
    limit=tasks.PromptLimit(ours, 12),
    say=print,
  )
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(-1, 1))
  evaluate = grpo._make_held_out(config, task, micro.model(), mesh, ours)
  expected = {'eval/greedy': 2.0, 'eval/format': 4.0, 'eval/length': 2.0}
  assert evaluate(None) == expected  # Of 0 to 4, though there are 8 devices.
