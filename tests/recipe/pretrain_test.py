"""The pretraining loss and evaluation against loops, and whole micro runs."""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from r1jax import config as config_lib
from r1jax import types
from r1jax.model import config as model_config
from r1jax.model import router, transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import origin, pretrain
from r1jax.recipe import stage as stage_lib
from r1jax.train import interrupt, metrics, optimizer
from r1jax.train import state as state_lib
from r1jax.train import step as step_lib
from tests.recipe import micro

_MTP_COEF, _BALANCE_COEF = 0.3, 0.05


@functools.cache
def _batch() -> types.Batch:
  """4 rows of packed documents, each row different, the last half empty."""
  rng = np.random.default_rng(1)
  lengths = ([5, 7, 4], [16], [9, 2, 3], [8])
  shape = (4, 16)
  segment_BT, position_BT, mask_BT = (np.zeros(shape, int) for _ in range(3))
  for b, row in enumerate(lengths):
    ends = np.cumsum(row)
    for s, (start, end) in enumerate(zip(ends - row, ends), start=1):
      segment_BT[b, start:end] = s
      position_BT[b, start:end] = np.arange(end - start)
      mask_BT[b, start + 1 : end] = 1
  return types.Batch(
    tokens_BT=jnp.asarray(
      rng.integers(micro.model().vocab_size, size=shape), jnp.int32
    ),
    mask_BT=jnp.asarray(mask_BT, jnp.float32),
    segment_BT=jnp.asarray(segment_BT, jnp.int32),
    position_BT=jnp.asarray(position_BT, jnp.int32),
    num_tokens=jnp.float32(mask_BT.sum()),
    num_sequences=jnp.float32(8),
  )


@functools.cache
def _output() -> tuple[transformer.Output, np.ndarray, np.ndarray]:
  """The model's output, log-probs of its next token and of its drafts."""
  config, batch = micro.model(), _batch()
  variables = micro.variables(config)
  out = jax.jit(
    functools.partial(transformer.Transformer(config).apply, mtp=True)
  )(
    variables,
    batch.tokens_BT,
    segment_BT=batch.segment_BT,
    position_BT=batch.position_BT,
  )
  head_DV = np.asarray(variables['params']['head'], np.float64)

  def logp(hidden_BTD):
    logits_BTV = np.asarray(hidden_BTD, np.float64) @ head_DV
    return logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))

  return out, logp(out.hidden_BTD), logp(out.mtp_hidden[0])


def _ahead(depth: int):
  """Yields (b, t, target) of every token that depth-1 more tokens precede."""
  batch = jax.tree.map(np.asarray, _batch())
  B, T = batch.tokens_BT.shape
  for b, t in itertools.product(range(B), range(T - depth)):
    segment = batch.segment_BT[b, t]
    if segment and segment == batch.segment_BT[b, t + depth]:
      yield b, t, batch.tokens_BT[b, t + depth]


def _nats(logp_BTV: np.ndarray, depth: int) -> float:
  return -sum(logp_BTV[b, t, token] for b, t, token in _ahead(depth))


@functools.cache
def _gradient(num_microbatches: int = 1):
  loss_fn = pretrain.make_loss(
    micro.model(), mtp_coef=_MTP_COEF, balance_coef=_BALANCE_COEF
  )
  gradient = step_lib.make_gradient(loss_fn, num_microbatches=num_microbatches)
  return jax.jit(gradient)(micro.variables(micro.model()), _batch())


@pytest.mark.slow
def test_loss_is_next_token_plus_mtp_plus_balance():
  out, logp_BTV, draft_logp_BTV = _output()
  num_tokens = float(_batch().num_tokens)
  next_loss = _nats(logp_BTV, 1) / num_tokens
  mtp_loss = _nats(draft_logp_BTV, 2) / num_tokens
  weight_B = np.asarray(_batch().mask_BT).sum(1) / num_tokens
  balance = sum(float(b @ weight_B) for b in np.asarray(out.moe.balance_B))

  (loss, got), _ = _gradient()
  close = functools.partial(pytest.approx, rel=1e-5)
  assert float(got['train/next_token_loss']) == close(next_loss)
  assert float(got['mtp/loss']) == close(mtp_loss)
  assert float(got['moe/balance_loss']) == close(balance / 2)  # 2 MoE layers.
  assert float(loss) == close(
    next_loss + _MTP_COEF * mtp_loss + _BALANCE_COEF * balance
  )


@pytest.mark.parametrize('dense', [True, False])
def test_indexers_learn_alone_in_their_warm_up_then_beside_the_model(dense):
  indexer = model_config.IndexerConfig(4, 8, top_k=8, dense=dense)
  attention = dataclasses.replace(
    micro.model().attention, q_lora_rank=8, indexer=indexer
  )
  config = micro.model(attention=attention, mtp_depth=0)
  loss_fn = pretrain.make_loss(config, mtp_coef=0.0, balance_coef=0.0)
  loss, got = jax.jit(loss_fn)(micro.variables(config), _batch())
  learned = 2 * float(got['indexer/divergence'])  # 2 layers.
  assert learned > 1e-3
  model = 0.0 if dense else float(got['train/next_token_loss'])
  assert float(loss) == pytest.approx(model + learned, rel=1e-5)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'optim__trainable': 'indexers'},
      "optim.trainable='indexers' is in the path of no parameter",
    ),
    (
      {'model__moe__has_bias': False, 'train__bias_update_speed': 1e-3},
      'train.bias_update_speed=0.001 needs model.moe.has_bias',
    ),
    (
      {
        'model__attention__q_lora_rank': 8,
        'model__attention__indexer': {
          **{'num_heads': 2, 'head_dim': 8, 'top_k': 4},
          'dense': True,
        },
      },
      "optim.trainable='' with a dense indexer, it must be 'indexer'",
    ),
  ],
)
def test_what_cannot_be_trained_is_said(changes, message, tmp_path):
  with micro.on(micro.one_device()):
    with pytest.raises(config_lib.UserError, match=message):
      config = config_lib.from_dict(
        pretrain.PretrainConfig, micro.pretrain_dict(**changes)
      )
      pretrain.run(config, str(tmp_path / 'none'))
  assert not (tmp_path / 'none').exists()


def test_counts_are_the_choices_of_real_tokens():
  _, got = _gradient()[0]
  real_tokens = float((np.asarray(_batch().segment_BT) > 0).sum())
  top_k = micro.model().moe.top_k
  counts_LE = np.asarray(got['moe/counts'])
  assert counts_LE.shape == (2, micro.model().moe.num_experts)
  np.testing.assert_array_equal(counts_LE.sum(1), real_tokens * top_k)


def test_four_microbatches_give_the_gradient_of_the_whole_batch():
  (loss, whole), grads = _gradient()
  (part_loss, parts), part_grads = _gradient(4)
  # The same float32 sums in another order.
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
  close(part_loss, loss)
  assert parts.keys() == whole.keys() >= {'moe/counts', 'mtp/loss'}
  jax.tree.map(close, parts, whole)
  jax.tree.map(close, part_grads, grads)


def test_evaluation_sums_equal_loops_over_the_tokens():
  out, logp_BTV, draft_logp_BTV = _output()
  accepted = [
    draft_logp_BTV[b, t].argmax() == logp_BTV[b, t + 1].argmax()
    for b, t, _ in _ahead(2)
  ]
  evaluate = jax.jit(pretrain.make_evaluate(micro.model()))
  sums = evaluate(micro.variables(micro.model()), _batch())
  assert float(sums['nats']) == pytest.approx(_nats(logp_BTV, 1), rel=1e-5)
  assert float(sums['tokens']) == len(list(_ahead(1)))
  assert float(sums['mtp_nats']) == pytest.approx(
    _nats(draft_logp_BTV, 2), rel=1e-5
  )
  assert float(sums['mtp_tokens']) == len(accepted)
  assert float(sums['mtp_accepted']) == sum(accepted)

  result = pretrain.summarise(jax.device_get(sums))
  assert result['eval/loss'] == pytest.approx(
    float(sums['nats']) / float(sums['tokens'])
  )
  assert result['mtp/accept'] == pytest.approx(np.mean(accepted))
  counts_LE = np.asarray(out.moe.counts_E)
  worst = max(row.max() / row.mean() - 1 for row in counts_LE)
  assert result['eval/max_vio'] == pytest.approx(worst)


def test_drafts_that_the_main_model_makes_too_are_accepted():
  # MTP module and main model always answer token 7: every draft is accepted.
  config = micro.model()
  variables = jax.tree.map(jnp.zeros_like, micro.variables(config))
  head_DV = variables['params']['head']
  variables['params']['head'] = head_DV.at[:, 7].set(1.0)
  for place in (variables['params'], variables['params']['mtp_1']):
    norm = place.get('norm', place.get('final_norm'))
    norm['scale'] = jnp.ones_like(norm['scale'])
  variables['params']['embedding'] += 1.0
  project_ED = variables['params']['mtp_1']['project']
  variables['params']['mtp_1']['project'] = project_ED + 1.0
  for name in ('embed_norm', 'hidden_norm'):
    scale = variables['params']['mtp_1'][name]
    scale['scale'] = jnp.ones_like(scale['scale'])
  sums = jax.jit(pretrain.make_evaluate(config))(variables, _batch())
  assert float(sums['mtp_accepted']) == float(sums['mtp_tokens']) > 0


def test_load_metrics_are_max_vio_of_each_layer():
  counts_LE = np.array([[4.0, 4.0, 4.0, 4.0], [8.0, 4.0, 0.0, 4.0]])
  got = stage_lib.load_metrics(counts_LE)
  assert got == {
    'moe/max_vio': 1.0,
    'moe/max_vio/0': 0.0,
    'moe/max_vio/1': 1.0,
  }
  np.testing.assert_allclose(
    router.max_violation(jnp.asarray(counts_LE)), [0.0, 1.0], rtol=1e-6
  )


def _losses(workdir) -> list[float]:
  rows = metrics.read(workdir)
  return [r['train/loss'] for r in rows if 'train/loss' in r]


def _run(workdir, mesh, **changes):
  config = config_lib.from_dict(
    pretrain.PretrainConfig, micro.pretrain_dict(**changes)
  )
  with micro.on(mesh):
    return pretrain.run(config, str(workdir))


@pytest.fixture(scope='module')
def one_device_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('one')
  state = _run(workdir, micro.one_device())
  return workdir, jax.device_get(state)


@pytest.fixture(scope='module')
def eight_device_run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('eight')
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=4, fsdp=2))
  state = _run(workdir, mesh)
  return workdir, jax.device_get(state)


@pytest.mark.slow
def test_one_and_eight_devices_give_the_same_losses(
  one_device_run, eight_device_run
):
  one, eight = _losses(one_device_run[0]), _losses(eight_device_run[0])
  assert len(one) == 3
  np.testing.assert_allclose(eight, one, rtol=2e-6)
  bias_of = lambda state: state.variables['router']['moe']['moe']['bias']
  np.testing.assert_array_equal(
    bias_of(eight_device_run[1]), bias_of(one_device_run[1])
  )
  assert np.abs(bias_of(one_device_run[1])).max() > 0


def test_a_run_keeps_its_config_figures_and_checkpoint(one_device_run):
  workdir, state = one_device_run
  assert int(state.step) == 3
  kept = json.loads((workdir / 'config.json').read_text())
  assert kept['model']['moe']['num_experts'] == 4
  assert json.loads((workdir / 'summary.json').read_text())['num_steps'] == 3
  last = [r for r in metrics.read(workdir) if 'eval/loss' in r][-1]
  assert last['step'] == 3
  assert 'mtp/accept' in last and 'eval/max_vio' in last
  said = []
  variables, step = origin.load_variables(
    str(workdir), micro.model(), micro.one_device(), say=said.append
  )
  assert step == 3
  jax.tree.map(np.testing.assert_array_equal, variables, state.variables)


def test_a_run_killed_before_its_summary_still_gets_one(
  one_device_run, tmp_path
):
  shutil.copytree(one_device_run[0], tmp_path / 'run')
  (tmp_path / 'run' / 'summary.json').unlink()
  _run(tmp_path / 'run', micro.one_device())
  kept = json.loads((tmp_path / 'run' / 'summary.json').read_text())
  assert kept['num_steps'] == 3


@pytest.mark.slow
def test_an_evaluation_that_a_sigterm_left_out_is_made_up_for(
  one_device_run, tmp_path, monkeypatch
):
  workdir, state = tmp_path / 'run', one_device_run[1]
  write = metrics.MetricWriter.write

  def write_and_terminate(self, step, values):
    write(self, step, values)
    if step == 1:  # Step 2, with its evaluation, runs already.
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricWriter, 'write', write_and_terminate)
    with pytest.raises(interrupt.Preempted, match='after step 2'):
      _run(workdir, micro.one_device(), train__eval_every=2)
  evaluated = lambda: [
    r['step'] for r in metrics.read(workdir) if 'eval/loss' in r
  ]
  assert evaluated() == []
  last = _run(workdir, micro.one_device(), train__eval_every=2)
  assert evaluated() == [2, 3]
  jax.tree.map(np.testing.assert_array_equal, last.variables, state.variables)
  _run(workdir, micro.one_device(), train__eval_every=1)  # Nothing is left.
  assert evaluated() == [2, 3]


@pytest.mark.parametrize(
  ('start', 'last', 'num_steps', 'traced'),
  [
    (0, 100, 5, (10, 15)),
    (40, 100, 5, (50, 55)),
    (0, 8, 5, (3, 8)),
    (0, 6, 5, (1, 6)),
  ],
)
def test_a_trace_fits_the_run(start, last, num_steps, traced):
  first, end = stage_lib.profile_hooks(epath.Path('x'), start, last, num_steps)
  assert (first.step, end.step) == traced


def test_a_trace_longer_than_the_run_is_the_users_error():
  with pytest.raises(config_lib.UserError, match='only 4 steps'):
    stage_lib.profile_hooks(epath.Path('x'), 0, 5, 5)


@pytest.fixture(scope='module')
def second_stage(one_device_run, tmp_path_factory):
  """What a stage that starts from another run says, and its state."""
  stage = stage_lib.Stage(
    workdir=tmp_path_factory.mktemp('second'),
    model=micro.model(),
    train=stage_lib.TrainConfig(**micro.pretrain_dict()['train']),
    optim=optimizer.OptimConfig(**micro.pretrain_dict()['optim']),
    mesh=micro.one_device(),
    seed=5,
    title='test',
    with_reference=True,
    init_from=str(one_device_run[0]),
  )
  said = []
  return said, stage.new_state(said.append)


def test_init_from_starts_at_the_other_runs_variables(
  one_device_run, second_stage
):
  workdir, state = one_device_run
  said, new = second_stage
  assert said[-1] == f'starting from step 3 of {workdir}'
  assert int(new.step) == 0
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, new.variables, state.variables)
  jax.tree.map(equal, new.reference, state.variables)


def test_dry_run_returns_sizes_and_leaves_no_workdir(tmp_path):
  config = config_lib.from_dict(pretrain.PretrainConfig, micro.pretrain_dict())
  with micro.on(micro.one_device()):
    sizes = pretrain.run(config, str(tmp_path / 'none'), dry_run=True)
  assert not (tmp_path / 'none').exists()
  assert sizes['parameters'] == sum(
    x.size for x in jax.tree.leaves(micro.variables(micro.model()))
  )
  assert sizes['devices'] == 1
  assert sizes['rows x tokens'] == '8x64'
  # Parameters and two moments, 4 bytes each, and some.
  assert sizes['state and batch MiB'] >= sizes['parameters'] * 12 / 2**20
  assert sizes['temporaries MiB'] > 0


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'row_length': 65}, 'row_length=65 exceeds model.max_length=64'),
    ({'model__moe__top_k': 5}, 'top_k=5 of num_experts=4'),
    ({'train__num_steps': 0}, 'num_steps=0'),
    ({'train__max_to_keep': 0}, 'train: max_to_keep=0 must be at least 1'),
    ({'model__moe__num_groups': 0}, 'num_groups=0 must divide'),
    ({'row_length': 1}, 'row_length=1 must be at least 2'),
    ({'eval_rows': 0}, 'eval_rows=0 must be at least 1'),
    ({'optim__schedule': 'linear'}, "optim.schedule='linear'"),
    ({'data__arithmetic__maximum': 5}, 'maximum=5'),
    ({'trian': {}}, "'trian' (did you mean 'train'?)"),
  ],
)
def test_what_cannot_be_is_the_users_error(changes, message):
  with pytest.raises(config_lib.UserError) as error:
    config_lib.from_dict(
      pretrain.PretrainConfig, micro.pretrain_dict(**changes)
    )
  assert message in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'model__vocab_size': 300}, 'model.vocab_size=300 is smaller than'),
    ({'init_from': 'nowhere'}, 'nowhere'),
    ({'tokenizer': 'none.model'}, "cannot read tokenizer 'none.model'"),
    ({'train__num_microbatches': 3}, 'batch_size=8 must be a multiple of'),
  ],
)
def test_a_run_that_cannot_start_is_the_users_error(changes, message, tmp_path):
  with pytest.raises(config_lib.UserError) as error:
    _run(tmp_path / 'run', micro.one_device(), **changes)
  assert message in str(error.value)
  # The same command, corrected, may use the workdir.
  assert not (tmp_path / 'run' / 'config.json').exists()


def _gsm8k_head(shared_data, folder, num_lines: int) -> str:
  with open(shared_data / 'gsm8k' / 'train.jsonl', encoding='utf-8') as f:
    text = ''.join(itertools.islice(f, num_lines))
  path = folder / 'head.jsonl'
  path.write_text(text, encoding='utf-8')
  return str(path)


@pytest.fixture(scope='module')
def real_text_run(shared_data, tmp_path_factory):
  folder = tmp_path_factory.mktemp('text')
  data = {
    'paths': (_gsm8k_head(shared_data, folder, 60),),
    'format': 'jsonl',
    'template': '{question}\n{answer}',
    'split_blank_lines': False,
    'held_out_fraction': 0.1,
  }
  _run(
    folder / 'run',
    micro.one_device(),
    data=data,
    optim__peak_lr=1e-2,
    train__num_steps=16,
    train__eval_every=4,
  )
  return folder / 'run'


def test_bits_per_byte_of_real_text_fall(real_text_run):
  bits = [
    r['eval/bits_per_byte']
    for r in metrics.read(real_text_run)
    if 'eval/bits_per_byte' in r
  ]
  assert len(bits) == 4
  # A guess costs log2 of the vocabulary, 8.6 bits.
  assert 8.6 > bits[0] > bits[-1]
  assert bits[-1] < 6.5


@functools.cache
def _step_of_an_uneven_router():
  """A train step without MTP, and a state whose tokens prefer expert 0."""
  config = micro.model(mtp_depth=0)
  variables = jax.tree.map(jnp.array, micro.variables(config))
  router_DE = variables['params']['moe']['moe']['router']
  variables['params']['embedding'] += 0.3
  variables['params']['moe']['moe']['router'] = router_DE.at[..., 0].add(0.1)
  adam = optimizer.make_optimizer(
    optimizer.OptimConfig(**micro.pretrain_dict()['optim']), 30
  )
  loss_fn = pretrain.make_loss(config, mtp_coef=0.0, balance_coef=0.0)
  gradient = step_lib.make_gradient(loss_fn)
  step = jax.jit(step_lib.make_train_step(gradient, adam))
  return step, state_lib.init_state(lambda: variables, adam)


def _max_vio(num_steps: int, *, speed: float) -> np.ndarray:
  """MaxVio of the MoE layer over a short run on one batch, [steps]."""
  step, state = _step_of_an_uneven_router()
  max_vio = []
  for _ in range(num_steps):
    state, got = step(state, _batch())
    new = transformer.update_router(
      state.variables['router'], got['moe/counts'], speed=speed
    )
    state = dataclasses.replace(
      state, variables=state.variables | {'router': new}
    )
    max_vio.append(float(router.max_violation(got['moe/counts'])[0]))
  return np.array(max_vio)


def test_the_bias_evens_out_the_load():
  with_bias = _max_vio(30, speed=0.02)
  without = _max_vio(30, speed=0.0)
  assert with_bias[0] == without[0] > 0.5
  assert with_bias[-5:].mean() < 0.35
  assert without[-5:].mean() > 0.5
