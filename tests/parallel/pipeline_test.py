"""A pipelined gradient is the plain one, whatever the schedule.

Run as a program, this file compares gradients on simulated devices: a
misplaced collective hangs, so the tests start it with a limit on their time.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.parallel import executor, pipeline, sharding, table
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import schedule as schedule_lib
from tests import quick
from tests.parallel import model_gradient

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_D, _F, _E, _V, _T = 6, 5, 4, 7, 3
_SCHEDULES = {
  'gpipe': schedule_lib.gpipe,
  '1f1b': schedule_lib.one_f_one_b,
  'zb1p': schedule_lib.zb1p,
  'dualpipe': schedule_lib.dualpipe,
  'dualpipe_v': schedule_lib.dualpipe_v,
}


# A small model: a causal mean and a feed-forward, dense or of experts.


def _mix(params, frozen, x_BTD, context):
  """Adds a projected mean over earlier tokens of the same segment."""
  h_BTD = x_BTD * lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + 1e-3)
  h_BTD = h_BTD * params['norm'] + frozen['shift']
  mean_BTD = jnp.einsum('BTS,BSD->BTD', context['weight_BTS'], h_BTD)
  return x_BTD + jnp.einsum('BTD,DE->BTE', mean_BTD, params['mix']['project'])


def _dense(params, frozen, x_BTD, context):
  x_BTD = _mix(params, frozen, x_BTD, context)
  h_BTF = jnp.tanh(jnp.einsum('BTD,DF->BTF', x_BTD, params['up']))
  y_BTD = x_BTD + jnp.einsum('BTF,FD->BTD', h_BTF, params['down'])
  return y_BTD, jnp.zeros(()), {'size': jnp.square(y_BTD).sum()}


def _to_experts(x_END, axis):
  """[E, N, D] of this device's tokens -> [E / X, X N, D] of its experts."""
  if axis is None:
    return x_END
  return lax.all_to_all(x_END, axis, 0, 1, tiled=True)


def _from_experts(x_END, axis):
  if axis is None:
    return x_END
  return lax.all_to_all(x_END, axis, 1, 0, tiled=True)


def _make_moe(axis, num_rows):
  """Top-1 experts; `num_rows` of the whole batch normalise the balance loss."""

  def moe(params, frozen, x_BTD, context):
    x_BTD = _mix(params, frozen, x_BTD, context)
    logits_BTE = jnp.einsum('BTD,DE->BTE', x_BTD, params['router'])
    score_BTE = jax.nn.softmax(logits_BTE)
    choice_BT = jnp.argmax(score_BTE + frozen['bias'], axis=-1)
    chosen_BTE = jax.nn.one_hot(choice_BT, _E)
    balance_B = (chosen_BTE.mean(1) * score_BTE.mean(1)).sum(-1)
    x_ND = x_BTD.reshape(-1, _D)
    x_END = chosen_BTE.reshape(-1, _E).T[..., None] * x_ND
    up_EDF, down_EFD = params['expert']['up'], params['expert']['down']
    h_ENF = jnp.einsum('END,EDF->ENF', _to_experts(x_END, axis), up_EDF)
    h_ENF = jnp.tanh(h_ENF) * h_ENF
    y_END = jnp.einsum('ENF,EFD->END', h_ENF, down_EFD)
    y_BTD = _from_experts(y_END, axis).sum(0).reshape(x_BTD.shape)
    gate_BT1 = (chosen_BTE * score_BTE).sum(-1, keepdims=True)
    counts_E = chosen_BTE.sum((0, 1))
    loss = 0.1 * balance_B.sum() / num_rows
    return x_BTD + gate_BT1 * y_BTD, loss, {'counts_E': counts_E}

  return moe


def _embed(ends, batch):
  return jnp.take(ends['embedding'], batch['tokens_BT'], axis=0)


def _head(ends, x_BTD, batch):
  """Next-token loss through the tied embedding and a matrix."""
  h_BTD = jnp.tanh(x_BTD @ ends['final'])
  logp_BTV = jax.nn.log_softmax(
    jnp.einsum('BTD,VD->BTV', h_BTD, ends['embedding'])
  )
  target_BT = jnp.roll(batch['tokens_BT'], -1, axis=1)
  logp_BT = jnp.take_along_axis(logp_BTV, target_BT[..., None], -1)[..., 0]
  loss = -(logp_BT * batch['mask_BT']).sum() / batch['num_tokens']
  hits = (logp_BTV.argmax(-1) == target_BT).sum()
  return loss, {'hits': hits, 'logp': logp_BT.sum()}


def _context(batch):
  keep_BTS = jnp.tril(jnp.ones((_T, _T))) * batch['mask_BT'][:, None, :]
  return {'weight_BTS': keep_BTS / (keep_BTS.sum(-1, keepdims=True) + 1e-3)}


def _functions(num_layers, axis, num_rows):
  layers = {
    'dense': _dense,
    'wide': _dense,
    'moe': _make_moe(axis, num_rows),
  }
  return executor.Functions(
    embed=_embed,
    stacks={n: executor.Stack(layers[n], num_layers[n]) for n in num_layers},
    head=_head,
    context=_context,
  )


def _num_layers(num_stages, wide=False):
  """Dense first; the stages of one rank differ in number."""
  rest = num_stages - 1
  dense = {'dense': (1, *[0] * rest)}
  moe = {'moe': (1, 2, *[1] * (rest - 1))}
  return dense | ({'wide': (1,) * num_stages} if wide else {}) | moe


def _parameters(num_stages, names=('dense', 'moe')):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape) * 0.5
  layers = lambda n, *shape: draw(num_stages, n, *shape)
  mix = lambda n: {
    'mix': {'project': layers(n, _D, _D)},
    'norm': 1 + layers(n, _D),
  }
  dense = lambda F: {**mix(1), 'up': layers(1, _D, F), 'down': layers(1, F, _D)}
  stacks = {
    'dense': dense(_F),
    'wide': dense(2 * _F),
    'moe': {
      **mix(2),
      'router': layers(2, _D, _E),
      'expert': {'up': layers(2, _E, _D, _F), 'down': layers(2, _E, _F, _D)},
    },
  }
  frozen = {
    'dense': {'shift': layers(1, _D)},
    'wide': {'shift': layers(1, _D)},
    'moe': {'shift': layers(2, _D), 'bias': layers(2, _E)},
  }
  params = {
    'ends': {'embedding': draw(_V, _D), 'final': draw(_D, _D)},
    'stacks': {n: stacks[n] for n in names},
  }
  return params, {n: frozen[n] for n in names}


def _shardings(mesh, params):
  """The experts on the devices of `expert`."""

  def one(path, _):
    names = [k.key for k in path]
    lead = ('pipe', None) if names[0] == 'stacks' else ()
    spec = P(*lead, 'expert') if 'expert' in names else P(*lead)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, params)


def _batch(num_rows):
  rng = np.random.default_rng(1)
  mask_BT = (rng.random((num_rows, _T)) < 0.8).astype(float)
  return {
    'tokens_BT': rng.integers(0, _V, (num_rows, _T)).astype(np.int32),
    'mask_BT': mask_BT,
    'num_tokens': mask_BT.sum(),
  }


def _plain_gradient(functions, num_layers):
  """Loops over stages and layers, on one device, of the whole batch."""

  def loss_of(params, frozen, batch):
    context = functions.context(batch)
    x_BTD, total = functions.embed(params['ends'], batch), 0.0
    metrics = {name: {} for name in functions.stacks}
    for stage in range(len(num_layers['moe'])):
      for name, stack in functions.stacks.items():
        for n in range(num_layers[name][stage]):
          p, constants = jax.tree.map(
            lambda x, at=(stage, n): x[at],
            (params['stacks'][name], frozen[name]),
          )
          x_BTD, loss, m = stack.layer(p, constants, x_BTD, context)
          total += loss
          metrics[name][stage, n] = m
    loss, head_metrics = functions.head(params['ends'], x_BTD, batch)
    return loss + total, {'head': head_metrics, 'stacks': metrics}

  return jax.value_and_grad(loss_of, has_aux=True)


def _error(found, expected):
  """Largest difference over the leaf's largest entry."""
  size = np.abs(expected).max()
  return float(np.abs(found - expected).max() / (size if size else 1))


def _setting(case):
  """(functions, table, mesh, options, rows) of a case."""
  schedule = _SCHEDULES[case['schedule']](case['ranks'], case['microbatches'])
  options = executor.Options(
    case.get('keep', 'input'),
    case.get('fused', False),
    case.get('masked', False),
  )
  made = table.make_table(
    schedule,
    unit=case.get('unit', False),
    latency=case.get('latency', 1),
    recompute=options.keep == 'input',
    split=options.masked,
  )
  sizes = {a: case.get(a, 1) for a in mesh_lib.AXES} | {'pipe': case['ranks']}
  devices = np.array(jax.devices()[: math.prod(sizes.values())])
  mesh = jax.sharding.Mesh(devices.reshape(*sizes.values()), mesh_lib.AXES)
  shards = math.prod(sizes[a] for a in sharding.ROW_AXES)
  num_rows = 2 * schedule.num_microbatches * shards
  num_layers = _num_layers(schedule.num_stages, case.get('wide', False))
  functions = _functions(num_layers, 'expert', num_rows)
  return functions, made, mesh, options, num_rows


def _in_order(schedule, params):
  """From the order of the stages to that of the ranks."""
  order = np.array(schedule.stage_order)
  return jax.tree.map(lambda x: x[order], params)


def _pipelined(case):
  """A gradient, its arguments and what they have been made from."""
  functions, made, mesh, options, num_rows = _setting(case)
  schedule = made.schedule
  params, frozen = _parameters(schedule.num_stages, functions.stacks)
  batch = _batch(num_rows)
  gradient = pipeline.make_gradient(
    functions,
    made,
    mesh,
    options,
    batch_axes=sharding.ROW_AXES,
    shardings=_shardings(mesh, params),
  )
  placed = params | {'stacks': _in_order(schedule, params['stacks'])}
  args = placed, _in_order(schedule, frozen), batch
  return gradient, args, (params, frozen, batch)


def _compare(case):
  """Errors of loss, gradients and metrics of a case."""
  functions, made, _, _, num_rows = _setting(case)
  schedule = made.schedule
  gradient, args, plain_args = _pipelined(case)
  (loss, metrics), grads = jax.device_get(jax.jit(gradient)(*args))
  num_layers = {n: s.num_layers for n, s in functions.stacks.items()}
  plain = _plain_gradient(_functions(num_layers, None, num_rows), num_layers)
  (plain_loss, plain_metrics), plain_grads = jax.device_get(
    jax.jit(plain)(*plain_args)
  )
  expected = plain_grads | {
    'stacks': _in_order(schedule, plain_grads['stacks'])
  }
  metric_errors = jax.tree.leaves(
    jax.tree.map(_error, metrics['head'], plain_metrics['head'])
  )
  order = schedule.stage_order
  for name, of_layers in metrics['stacks'].items():
    for leaf, found in of_layers.items():
      expected_metric = np.zeros_like(found)
      for (stage, n), m in plain_metrics['stacks'][name].items():
        expected_metric[order.index(stage), n] = m[leaf]
      metric_errors.append(_error(found, expected_metric))
  return {
    'loss': _error(loss, plain_loss),
    'grads': max(jax.tree.leaves(jax.tree.map(_error, grads, expected))),
    'smallest': min(np.abs(g).max() for g in jax.tree.leaves(grads)),
    'metrics': max(metric_errors),
    'num_ticks': made.num_ticks,
  }


def _start(cases, num_devices):
  """Compares gradients in a process that a hanging collective ends."""
  flags = (
    quick.XLA_FLAGS,
    f'--xla_force_host_platform_device_count={num_devices}',
    '--xla_cpu_collective_call_warn_stuck_timeout_seconds=10',
    '--xla_cpu_collective_call_terminate_timeout_seconds=40',
  )
  done = subprocess.run(
    [sys.executable, __file__, *map(json.dumps, cases)],
    env=os.environ | {'XLA_FLAGS': ' '.join(flags), 'PYTHONPATH': str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  results = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(results) == len(cases)
  return results


def _run(cases, num_devices):
  for case, result in zip(cases, _start(cases, num_devices), strict=True):
    # float64: what is left is rounding, larger where 8 stages amplify it.
    for what in ('loss', 'grads', 'metrics'):
      assert result[what] < 1e-10, (case, result)
    assert result['smallest'] > 0, (case, result)


def _case(schedule, ranks, microbatches, **more):
  return {
    'schedule': schedule,
    'ranks': ranks,
    'microbatches': microbatches,
    **more,
  }


def _name(case):
  return '-'.join(str(v) if v is not True else k for k, v in case.items())


_FOUR_DEVICES = [
  _case('gpipe', 2, 3, expert=2, keep='layers'),
  _case('1f1b', 2, 4, expert=2, keep='all', latency=2),
  _case('zb1p', 2, 4, expert=2, unit=True, keep='all'),
  _case('dualpipe', 2, 4, expert=2, masked=True),
  _case('dualpipe_v', 2, 4, expert=2, keep='layers'),
]
_FOUR_DEVICES_MORE = [
  _case('gpipe', 4, 4, unit=True),
  _case('1f1b', 4, 6),
  _case('zb1p', 4, 6),
  _case('zb1p', 2, 3, data=2, masked=True, keep='all', fused=True),
  _case('dualpipe', 4, 8),
  _case('dualpipe', 2, 4, expert=2, keep='layers', fused=True),
  _case('dualpipe_v', 2, 4, expert=2, latency=2),
  _case('dualpipe_v', 4, 8, keep='all', fused=True),
]


@pytest.mark.parametrize('case', _FOUR_DEVICES, ids=_name)
def test_gradients_are_the_plain_ones(case):
  _run([case], 4)


@pytest.mark.slow
def test_gradients_are_the_plain_ones_with_other_options():
  _run(_FOUR_DEVICES_MORE, 4)


_EIGHT_DEVICES = [
  _case(schedule, 4, 8, expert=2, **more)
  for schedule in _SCHEDULES
  for more in (
    {},
    {'unit': True, 'keep': 'all'},
    {'latency': 2, 'keep': 'layers', 'fused': True},
    {'masked': True},
    {'masked': True, 'latency': 2, 'keep': 'layers', 'fused': True},
  )
] + [
  _case('1f1b', 8, 20),
  _case('zb1p', 8, 20, unit=True),
  _case('dualpipe', 8, 20, keep='all', fused=True, wide=True),
  _case('dualpipe', 2, 4, expert=2, data=2),
  _case('dualpipe_v', 1, 2, expert=2, data=2, fsdp=2),
]


@pytest.mark.slow
@pytest.mark.parametrize('first', range(0, len(_EIGHT_DEVICES), 5))
def test_gradients_on_eight_devices(first):
  _run(_EIGHT_DEVICES[first : first + 5], 8)


# The model itself, as a stage trains it.


def _compare_model(case):
  """Errors against the loss, metrics and gradients of one device."""
  case = dict(case)
  name, options = case.pop('model'), case.pop('options')
  schedule = pipeline.PipelineConfig(**options)
  (loss, metrics), grads = model_gradient.loss_and_gradients(
    name, schedule=schedule, **case
  )
  (one_loss, one_metrics), one_grads = model_gradient.loss_and_gradients(name)
  assert metrics.pop('moe/overflow_tokens', 0) == 0
  assert metrics.keys() == one_metrics.keys()
  worst = lambda *trees: max(jax.tree.leaves(jax.tree.map(_error, *trees)))
  counts = 'moe/counts'
  return {
    'loss': _error(loss, one_loss),
    'grads': worst(grads, one_grads),
    'smallest': min(float(np.abs(g).max()) for g in jax.tree.leaves(grads)),
    'metrics': worst(metrics, one_metrics),
    'counts': _error(metrics.get(counts, 0), one_metrics.get(counts, 0)),
  }


def _model(model, num_microbatches, options, **mesh):
  return {
    'model': model,
    'num_microbatches': num_microbatches,
    'options': options,
    **mesh,
  }


_MODELS = [
  _model('mla', 4, {'schedule': '1f1b'}, pipe=2, expert=2),
  _model(
    'mla',
    4,
    {'schedule': 'dualpipe', 'keep': 'layers', 'fused': True},
    pipe=2,
    expert=2,
  ),
  _model(
    'mla', 2, {'schedule': 'zb1p', 'keep': 'all'}, pipe=2, fsdp=2, tensor=2
  ),
  _model('mla', 2, {'schedule': 'gpipe'}, pipe=2, fsdp=2, context=2),
  _model(
    'deep',
    8,
    {'schedule': 'dualpipe_v', 'keep': 'layers', 'latency': 2},
    pipe=2,
  ),
  _model(
    'gqa', 2, {'schedule': '1f1b', 'masked': True}, pipe=2, fsdp=2, expert=2
  ),
  _model('sparse', 2, {'schedule': '1f1b'}, pipe=2, data=2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
  'case', _MODELS, ids=lambda c: f'{c["model"]}-{c["options"]["schedule"]}'
)
def test_the_model_is_trained_as_without_a_pipeline(case):
  (result,) = _start([case], 8)
  # float32, over some hundred terms; the plain gradient is off as much.
  assert result['loss'] < 1e-6 and result['metrics'] < 2e-6, result
  assert result['grads'] < 2e-5 and result['smallest'] > 0, result
  assert result['counts'] == 0


# What a loop that not every rank enters must not hold.
_RANK_WIDE = ('psum', 'ppermute', 'all_gather', 'all_to_all', 'reduce_scatter')


def _equations(jaxpr, inside=False):
  """All equations, however deep; `inside` one that may run or not."""
  for eqn in jaxpr.eqns:
    yield eqn, inside
    deeper = inside or eqn.primitive.name in ('cond', 'while')
    is_jaxpr = lambda x: hasattr(x, 'eqns')
    for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
      inner = getattr(inner, 'jaxpr', inner)
      if is_jaxpr(inner):
        yield from _equations(inner, deeper)


def _misplaced(jaxpr):
  """Collectives over `pipe`, and any ppermute, under a cond or a while."""
  found = []
  for eqn, inside in _equations(jaxpr):
    name = eqn.primitive.name
    axes = str(eqn.params.get('axes', eqn.params.get('axis_name', '')))
    is_collective = any(name.startswith(c) for c in _RANK_WIDE)
    if inside and is_collective and ('pipe' in axes or name == 'ppermute'):
      found.append(f'{name} over {axes}')
  return found


def _primitives(jaxpr):
  return {eqn.primitive.name for eqn, _ in _equations(jaxpr)}


@pytest.mark.parametrize(
  'case',
  [c for c in _FOUR_DEVICES + _FOUR_DEVICES_MORE if not c.get('masked')],
  ids=_name,
)
def test_nothing_over_pipe_stands_where_ranks_part(case):
  gradient, args, _ = _pipelined(case)
  jaxpr = jax.make_jaxpr(gradient)(*args).jaxpr
  assert _misplaced(jaxpr) == []
  assert {'while', 'ppermute', 'all_to_all'} <= _primitives(jaxpr)


def test_masked_ranks_never_part():
  case = _case('dualpipe', 2, 4, expert=2, masked=True, keep='all')
  gradient, args, _ = _pipelined(case)
  primitives = _primitives(jax.make_jaxpr(gradient)(*args).jaxpr)
  assert not primitives & {'while', 'cond'}
  assert {'ppermute', 'all_to_all'} <= primitives


def test_the_guard_finds_what_it_guards_against():
  mesh = jax.make_mesh((2, 2), ('pipe', 'expert'), devices=jax.devices()[:4])

  def run(collective):
    body = lambda x: lax.fori_loop(0, lax.axis_index('pipe'),
                                   lambda _, x: collective(x), x)  # fmt: skip
    return jax.make_jaxpr(
      jax.shard_map(
        body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False
      )
    )(jnp.ones(4)).jaxpr

  edges = [(0, 1), (1, 0)]
  assert _misplaced(run(lambda x: lax.psum(x, 'pipe')))
  assert _misplaced(run(lambda x: lax.ppermute(x, 'pipe', edges)))
  assert _misplaced(run(lambda x: lax.ppermute(x, 'expert', edges)))
  assert not _misplaced(run(lambda x: lax.psum(x, 'expert')))


def test_no_weight_is_kept_from_forward_to_backward():
  case = _case('1f1b', 2, 4, keep='all')
  functions, made, mesh, options, num_rows = _setting(case)

  def layer(params, frozen, x_BTD, context):
    w_DD = params['square'].astype(jnp.bfloat16)
    h_BTD = jnp.einsum('BTD,DE->BTE', x_BTD.astype(jnp.bfloat16), w_DD)
    h_BTD = jnp.tanh(h_BTD)
    return x_BTD + h_BTD.astype(x_BTD.dtype), jnp.zeros(()), {}

  functions = dataclasses.replace(
    functions, stacks={'only': executor.Stack(layer, (3, 3))}
  )
  params = {
    'ends': _parameters(2)[0]['ends'],
    'stacks': {'only': {'square': np.zeros((2, 3, _D, _D), np.float32)}},
  }
  gradient = pipeline.make_gradient(functions, made, mesh, options)
  jaxpr = jax.make_jaxpr(gradient)(params, {}, _batch(num_rows)).jaxpr
  scans = [e for e, _ in _equations(jaxpr) if e.primitive.name == 'scan']
  ticks = max(scans, key=lambda e: e.params['num_carry'])
  carried = ticks.outvars[: ticks.params['num_carry']]
  of_weights = [v.aval for v in carried if v.aval.shape[1:] == (_D, _D)]
  # The gradient; and kept activations, so that the test could have failed.
  assert [str(a.dtype) for a in of_weights] == ['float32']
  kept = [v.aval for v in carried if v.aval.shape[1:] == (2, _T, _D)]
  assert any(a.dtype == jnp.bfloat16 for a in kept)


def _make(case=None, layer=_dense, num_layers=(1, 1), **changes):
  """A gradient of one stack, with something changed."""
  case = _case('gpipe', 2, 2) if case is None else case
  functions, made, mesh, options, _ = _setting(case)
  stacks = {'dense': executor.Stack(layer, num_layers)}
  functions = dataclasses.replace(functions, stacks=stacks)
  keywords = {'table': made, 'mesh': mesh, 'options': options} | changes
  return pipeline.make_gradient(functions, **keywords)


def _call(gradient, num_rows=4):
  params, frozen = _parameters(2)
  params['stacks'].pop('moe')
  frozen.pop('moe')
  return jax.eval_shape(gradient, params, frozen, _batch(num_rows))


def test_layers_go_to_stages_and_back():
  # Layers 0 | 1 2 | - | 3, on two ranks of a V: stages 0 3, then 1 2.
  num_layers, order = (1, 2, 0, 1), (0, 3, 1, 2)
  x_LD = np.arange(1.0, 9).reshape(4, 2)
  none = [0, 0]
  stages = pipeline.to_stages({'x': x_LD}, num_layers, order)
  expected = [[[1, 2], none], [[7, 8], none], [[3, 4], [5, 6]], [none, none]]
  np.testing.assert_array_equal(stages['x'], expected)
  back = pipeline.from_stages(stages, num_layers, order)
  np.testing.assert_array_equal(back['x'], x_LD)


def test_what_does_not_fit_is_named():
  fails = lambda message: pytest.raises(ValueError, match=message)
  with fails("keep='none': one of input, layers, all"):
    executor.Options(keep='none')
  with fails("fused=True needs keep='layers' or keep='all'"):
    executor.Options(fused=True)
  with fails("keep='all' needs a table with recompute=False"):
    _make(options=executor.Options(keep='all'))
  with fails('masked=True needs a table with split=True'):
    _make(options=executor.Options(masked=True))
  with fails('the table has 2 ranks, mesh axis pipe has 4'):
    _make(mesh=_setting(_case('gpipe', 4, 2))[2])
  with fails("'dense' has num_layers of 3 stages, the table has 2"):
    _make(num_layers=(1, 1, 1))
  with fails("'dense': num_layers=2, the parameters have 1"):
    _call(_make(num_layers=(1, 2)))
  with fails('num_microbatches=2 must divide the 5 rows of a device'):
    _call(_make(), num_rows=5)
  _call(_make())


def test_a_layer_that_changes_shapes_is_named():
  def layer(params, frozen, x_BTD, context):
    return x_BTD[..., :3], jnp.zeros(()), {}

  message = r'a layer turns .*\(2, 3, 6\).* into .*\(2, 3, 3\)'
  with pytest.raises(ValueError, match=message):
    _call(_make(layer=layer))


if __name__ == '__main__':
  for text in sys.argv[1:]:
    arguments = json.loads(text)
    is_model = 'model' in arguments
    jax.config.update('jax_enable_x64', not is_model)
    compare = _compare_model if is_model else _compare
    print(json.dumps(compare(arguments)), flush=True)
