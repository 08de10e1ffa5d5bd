"""Logical axes: every mistake raises; eight devices compute what one does."""

import collections
import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from tests.model import tiny
from tests.parallel import model_gradient


def _mesh(data, fsdp):
  devices = jax.devices()[: data * fsdp]
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(data, fsdp), devices)


def _boxed(config):
  return jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))


def test_axes_map_to_mesh_axes():
  assert sharding.to_spec(('embed', None)) == P(
    ('fsdp', 'expert', 'pipe'), None
  )
  assert sharding.to_spec((None, 'head_vocab')) == P(
    None, ('fsdp', 'tensor', 'pipe')
  )


def test_two_axes_on_one_mesh_axis_raise():
  message = "'heads' and 'mlp' of .* both map to mesh axis 'tensor'"
  with pytest.raises(ValueError, match=message):
    sharding.to_spec(('heads', 'mlp'))
  # Inside a tuple of mesh axes as well.
  with pytest.raises(ValueError, match="both map to mesh axis 'fsdp'"):
    sharding.to_spec(('head_vocab', 'embed'))


def test_unknown_axis_raises():
  with pytest.raises(ValueError, match="unknown logical axis 'embd'"):
    sharding.to_spec(('embd',))


def test_parameters_are_sharded_over_fsdp_and_stacked_layers_are_not():
  shardings = sharding.tree_shardings(
    _mesh(2, 4), _boxed(model_gradient.CONFIG)
  )
  params = shardings['params']
  assert params['embedding'].spec == P('tensor', ('fsdp', 'expert', 'pipe'))
  assert params['moe']['moe']['gate'].spec == P(
    None, 'expert', ('fsdp', 'pipe'), 'tensor'
  )
  assert shardings['router']['moe']['moe']['bias'].spec == P()


def test_local_rows_of_the_only_process_are_the_whole_batch():
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=4, fsdp=2))
  batch = {'rows_BT': np.arange(16.0).reshape(8, 2), 'count': np.float32(3)}
  whole, local = (
    put(mesh, batch) for put in (sharding.put_batch, sharding.put_local_batch)
  )
  for name, x in batch.items():
    np.testing.assert_array_equal(local[name], x)
    assert local[name].sharding == whole[name].sharding
  counts = np.array([5.0, 2.0])
  np.testing.assert_array_equal(sharding.sum_over_processes(counts), counts)


@pytest.mark.parametrize(
  'axes',
  [
    ('layers', 'embed'),
    ('layers', 'mlp', 'expert_embed'),
    ('layers', 'expert_mlp', None),
    ('layers', 'head_vocab'),
    ('layers', None),
  ],
)
def test_stages_of_a_pipeline_get_the_same_numbers_and_give_them_back(axes):
  sizes = {'data': 1, 'pipe': 2, 'fsdp': 2, 'tensor': 2}
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes))
  rest = (8, 16)[3 - len(axes) :]
  x = np.arange(4 * 5 * math.prod(rest), dtype=np.float32).reshape(4, 5, *rest)
  shared = NamedSharding(mesh, P(None, *sharding.to_spec(axes)))
  stack = NamedSharding(mesh, sharding.to_spec(axes))
  staged = sharding.of_stages(stack)
  assert staged.spec[0] == 'pipe' and 'pipe' not in str(staged.spec[1:])
  joined = sharding.without(shared, ('pipe',))
  for there, back, target, moved in (
    (sharding.spread_stages, sharding.collect_stages, stack, staged),
    (sharding.join_pipe, sharding.share_pipe, shared, joined),
  ):
    run = lambda function, source, goal, of=target: jax.jit(
      sharding.per_device(lambda x: function(x, of), mesh, (source,), goal)
    )
    in_place = run(there, shared, moved)(jax.device_put(x, shared))
    np.testing.assert_array_equal(in_place, x)
    np.testing.assert_array_equal(run(back, moved, shared)(in_place), x)


def test_indivisible_parameter_is_named():
  odd = dataclasses.replace(model_gradient.CONFIG, vocab_size=66)
  boxed = _boxed(odd)['params']
  message = (
    r"'head'\] \(32, 66\): mesh axis fsdp=4 x tensor=1 x pipe=1 does not "
    'divide 66'
  )
  with pytest.raises(ValueError, match=message):
    sharding.tree_shardings(_mesh(2, 4), {'head': boxed['head']})


def test_a_program_for_one_device_sees_its_own_rows():
  mesh = _mesh(8, 1)
  assert sharding.num_batch_shards(mesh) == 8

  def first(x_BT, w):
    return x_BT * 0 + x_BT[0, 0] + w, sharding.sum_rows(x_BT.sum())

  run = jax.jit(
    sharding.per_device(first, mesh, ('rows', 'whole'), ('rows', 'whole'))
  )
  x_BT = np.arange(16.0, dtype=np.float32)[:, None]
  rows_BT, total = run(x_BT, np.float32(100))
  np.testing.assert_array_equal(rows_BT, np.repeat(x_BT[::2], 2, axis=0) + 100)
  assert total == x_BT.sum()


_FAST = (
  ('one_layer', {'fsdp': 2, 'expert': 2, 'tensor': 2}),
  ('gqa', {'data': 2, 'tensor': 2, 'context': 2}),
)
_SLOW = (
  ('mla', {'data': 8}),
  ('mla', {'fsdp': 2, 'expert': 2, 'tensor': 2}),
  ('mla', {'data': 2, 'fsdp': 4}),
  ('mla', {'pipe': 2, 'fsdp': 2, 'tensor': 2}),
  ('mla', {'data': 2, 'expert': 4}),
  ('mla', {'fsdp': 2, 'expert': 2, 'context': 2}),
  ('mla', {'expert': 2, 'tensor': 2, 'context': 2}),
  ('mla', {'data': 2, 'fsdp': 2, 'num_microbatches': 2}),
  ('gqa', {'fsdp': 2, 'expert': 2, 'tensor': 2}),
  ('sparse', {'fsdp': 2, 'tensor': 2, 'context': 2}),
  ('chunked', {'expert': 2, 'tensor': 2, 'context': 2}),
)


@pytest.fixture(scope='module')
def one_device():
  """What the fast tests compare with, compiled once."""
  for name in ('one_layer', 'gqa'):
    model_gradient.loss_and_gradients(name)


@pytest.mark.parametrize(
  ('name', 'mesh'),
  [*_FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in _SLOW)],
)
def test_any_mesh_gives_the_loss_and_gradients_of_one_device(
  name, mesh, one_device
):
  del one_device
  (loss, metrics), grads = model_gradient.loss_and_gradients(name, **mesh)
  (one_loss, one_metrics), one_grads = model_gradient.loss_and_gradients(name)
  np.testing.assert_allclose(loss, one_loss, rtol=1e-6)
  if 'moe/counts' in one_metrics:
    np.testing.assert_array_equal(
      metrics['moe/counts'], one_metrics['moe/counts']
    )
  metrics.pop('moe/overflow_tokens', None)
  tiny.assert_trees_close(metrics, one_metrics, atol=2e-6)
  tiny.assert_trees_close(grads, one_grads, atol=2e-5)
  assert all(np.any(g) for g in jax.tree.leaves(grads))


def test_logits_are_those_of_one_device_however_the_head_is_shared():
  program = transformer.Transformer(model_gradient.CONFIGS['one_layer'])
  logits = lambda variables, tokens: program.apply(
    variables, tokens, method='logits'
  )
  variables = tiny.variables(program.config)
  tokens_BT = model_gradient.batch().tokens_BT
  sizes = {'data': 1, 'pipe': 2, 'fsdp': 2, 'tensor': 2}
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**sizes))
  shardings = transformer.shardings(program.config, mesh)
  run = sharding.per_device(logits, mesh, (shardings, 'rows'), 'rows')
  found_BTV = jax.jit(run)(
    jax.device_put(variables, shardings), sharding.put_batch(mesh, tokens_BT)
  )
  expected_BTV = jax.jit(logits)(variables, tokens_BT)
  np.testing.assert_allclose(found_BTV, expected_BTV, atol=2e-5)


def _collectives(name, **mesh):
  """How often each kind of exchange stands in the compiled program."""
  program, *args = model_gradient.program(name, **mesh)
  text = program.lower(*args).compile().as_text()
  kinds = r' (all-\w+(?:-\w+)*|collective-\w+|reduce-scatter)(?:-start)?\('
  return collections.Counter(re.findall(kinds, text))


def test_data_parallel_devices_exchange_gradients_once_and_nothing_else():
  found = _collectives('mla', data=2)
  # Loss and metrics, and one for all gradients.
  assert set(found) == {'all-reduce'} and found['all-reduce'] <= 4
