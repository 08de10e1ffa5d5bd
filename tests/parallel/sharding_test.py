"""Logical axes: every mistake raises; eight devices compute what one does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from r1jax import types
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.recipe import pretrain
from tests import quick
from tests.model import tiny

_B, _T = 8, 8
_CONFIG = dataclasses.replace(tiny.config(), num_layers=2, mtp_depth=1)


def _mesh(data, fsdp):
  devices = jax.devices()[: data * fsdp]
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(data, fsdp), devices)


def _boxed(config):
  return jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))


def test_axes_map_to_mesh_axes():
  assert sharding.to_spec(('embed', None)) == P('fsdp', None)
  assert sharding.to_spec(('batch', 'length', 'act_embed')) == P(
    sharding.BATCH_AXES, 'context', None
  )


def test_two_axes_on_one_mesh_axis_raise():
  message = "'heads' and 'mlp' of .* both map to mesh axis 'tensor'"
  with pytest.raises(ValueError, match=message):
    sharding.to_spec(('heads', 'mlp'))
  # Inside a tuple of mesh axes as well.
  with pytest.raises(ValueError, match="both map to mesh axis 'fsdp'"):
    sharding.to_spec(('batch', 'embed'))


def test_unknown_axis_raises():
  with pytest.raises(ValueError, match="unknown logical axis 'embd'"):
    sharding.to_spec(('embd',))


def test_parameters_are_sharded_over_fsdp_and_stacked_layers_are_not():
  shardings = sharding.tree_shardings(_mesh(2, 4), _boxed(_CONFIG))
  params = shardings['params']
  assert params['embedding'].spec == P('tensor', 'fsdp')
  assert params['moe']['moe']['gate'].spec == P(
    None, 'expert', 'fsdp', 'tensor'
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


def test_indivisible_parameter_is_named():
  odd = dataclasses.replace(_CONFIG, embed_dim=34)
  boxed = _boxed(odd)['params']
  message = r"'head'\] \(34, 64\): mesh axis fsdp=4 does not divide 34"
  with pytest.raises(ValueError, match=message):
    sharding.tree_shardings(_mesh(2, 4), {'head': boxed['head']})


def test_per_shard_sees_its_own_rows():
  mesh = _mesh(8, 1)
  assert sharding.num_batch_shards(mesh) == 8
  first = lambda x_BT, w: x_BT * 0 + x_BT[0, 0] + w
  run = quick.jit(sharding.per_shard(first, mesh, (True, False)))
  x_BT = np.arange(16.0, dtype=np.float32)[:, None]
  expected_BT = np.repeat(x_BT[::2], 2, axis=0) + 100
  np.testing.assert_array_equal(run(x_BT, np.float32(100)), expected_BT)


def _look_up(rows_BD, choice_B, weights):
  """Rows times one of their matrices; what was chosen comes out as well."""
  table_EDF, scale = weights
  product_BF = jnp.einsum('BD,BDF->BF', rows_BD, table_EDF[choice_B])
  return {'out': jnp.tanh(product_BF) * scale, 'choice': choice_B}


def test_gradients_per_shard_are_those_of_the_whole():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  choice_B = rng.integers(0, 3, 16).astype(np.int32)
  args = draw(16, 4), choice_B, (draw(3, 4, 5), np.float32(1.5))
  pull_BF = draw(16, 5)
  shards = sharding.per_shard(_look_up, _mesh(8, 1), (True, True, False))

  def gradients(function):
    @quick.jit
    def run(rows_BD, choice_B, weights):
      objective = lambda rows_BD, weights: jnp.sum(
        function(rows_BD, choice_B, weights)['out'] * pull_BF
      )
      return jax.grad(objective, argnums=(0, 1))(rows_BD, weights)

    return run(*args)

  tiny.assert_trees_close(gradients(shards), gradients(_look_up), atol=1e-5)


def _batch():
  """Rows of two packed documents and padding, other lengths in each row."""
  rng = np.random.default_rng(0)
  segment_BT, position_BT = np.zeros((2, _B, _T), np.int32)
  for b in range(_B):
    first, end = b % 3 + 2, _T - b % 2
    segment_BT[b, :end] = [1] * first + [2] * (end - first)
    position_BT[b, :end] = [*range(first), *range(end - first)]
  mask_BT = ((position_BT > 0) & (segment_BT > 0)).astype(np.float32)
  return types.Batch(
    tokens_BT=rng.integers(0, tiny.V, (_B, _T)).astype(np.int32),
    mask_BT=mask_BT,
    segment_BT=segment_BT,
    position_BT=position_BT,
    num_tokens=mask_BT.sum(),
    num_sequences=np.float32(2 * _B),
  )


def _loss_and_gradients(data, fsdp):
  """Loss with MTP and balance terms, its gradients and metrics."""
  mesh = _mesh(data, fsdp)
  loss_fn = pretrain.make_loss(_CONFIG, mtp_coef=0.3, balance_coef=0.1)
  shardings = sharding.tree_shardings(mesh, _boxed(_CONFIG))
  variables = jax.device_put(tiny.variables(_CONFIG), shardings)
  step = jax.value_and_grad(loss_fn, has_aux=True)
  with jax.set_mesh(mesh):
    out = quick.jit(step)(variables, sharding.put_batch(mesh, _batch()))
    return jax.device_get(out)


@pytest.fixture(scope='module')
def one_device():
  return _loss_and_gradients(1, 1)


@pytest.mark.parametrize(('data', 'fsdp'), [(8, 1), (2, 4)])
def test_eight_devices_give_the_loss_and_gradients_of_one(
  data, fsdp, one_device
):
  (loss, metrics), grads = _loss_and_gradients(data, fsdp)
  (one_loss, one_metrics), one_grads = one_device
  np.testing.assert_allclose(loss, one_loss, rtol=1e-5)
  np.testing.assert_array_equal(
    metrics['moe/counts'], one_metrics['moe/counts']
  )
  tiny.assert_trees_close(metrics, one_metrics, atol=1e-5)
  tiny.assert_trees_close(grads, one_grads, atol=2e-5)
  assert all(np.any(g) for g in jax.tree.leaves(grads['params']))
