"""Muon: which parameters it moves, as which matrices, and how far."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.model import tiny
from r1jax import config
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.train import muon, optimizer, state

_STACKS = ('layers', 'experts')  # Logical axes that no matrix has.


def _boxed():
  """The demo's parameters, abstract, with their logical axes."""
  tiny_config = config.from_dict(
    model_config.ModelConfig, tiny.get_config().to_dict()
  )
  return jax.eval_shape(
    lambda: transformer.init(tiny_config, jax.random.key(0))
  )['params']


def _named_leaves(tree):
  is_box = lambda x: hasattr(x, 'names')
  leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
  return [(jax.tree_util.keystr((p[-1],), simple=True), x) for p, x in leaves]


def test_vectors_lookups_and_choices_stay_with_adam():
  labels = dict(_named_leaves(muon.labels(sharding.unbox(_boxed()))))
  adam = {name for name, label in labels.items() if label == 'adam'}
  assert adam == {'embedding', 'head', 'router', 'scale'}
  assert {'q_up', 'out', 'kv_down', 'gate', 'down', 'project'} <= labels.keys()


def test_every_axis_of_the_model_is_an_input_an_output_or_a_stack():
  for name, box in _named_leaves(_boxed()):
    if name in ('embedding', 'head', 'router', 'scale'):
      continue
    inputs, outputs = muon.matrix_axes(name, len(box.names))
    rest = set(range(len(box.names))) - {*inputs, *outputs}
    stacks = {i for i, axis in enumerate(box.names) if axis in _STACKS}
    assert rest == stacks, name
    # `embed` is what all come from or go to.
    embed = [i for i, axis in enumerate(box.names) if axis == 'embed']
    goes_out = name in ('out', 'down', 'project')
    assert set(embed) <= set(outputs if goes_out else inputs), name


def _config(**changes) -> optimizer.OptimConfig:
  values = {
    'peak_lr': 1e-2,
    'warmup_steps': 0,
    'schedule': 'constant',
    'final_lr_ratio': 1.0,
    'weight_decay': 0.0,
    'kind': 'muon',
  }
  return optimizer.OptimConfig(**values | changes)


def _first_update(grads, params=None, **changes):
  """What the first step adds to the parameters."""
  transform = optimizer.make_optimizer(_config(**changes), 10)
  params = params or jax.tree.map(jnp.ones_like, grads)
  updates, _ = transform.update(
    grads, transform.init(params), params, grad_norm=jnp.float32(1.0)
  )
  return updates


@pytest.mark.parametrize(
  ('name', 'shape', 'as_matrix'),
  [
    ('kv_down', (24, 10), (24, 10)),
    ('q_up', (10, 3, 8), (10, 24)),
    ('out', (10, 3, 8), (10, 24)),
  ],
)
def test_a_first_step_goes_as_far_in_every_direction(name, shape, as_matrix):
  rng = np.random.default_rng(0)
  # Singular values from 1 to 50: Adam's or SGD's step would be uneven too.
  left, _, right = np.linalg.svd(
    rng.normal(size=as_matrix), full_matrices=False
  )
  size = min(as_matrix)
  grad = (left * np.geomspace(50, 1, size)) @ right
  grads = {name: jnp.asarray(grad.reshape(shape), jnp.float32)}
  update = np.asarray(_first_update(grads)[name]).reshape(as_matrix)
  got = np.diag(left.T @ -update @ right.T)
  # Newton-Schulz ends between 0.7 and 1.2; 0.2 √max(in, out), times the rate.
  unit = 1e-2 * 0.2 * np.sqrt(max(as_matrix))
  assert (0.6 * unit < got).all() and (got < 1.25 * unit).all()
  off_diagonal = left.T @ update @ right.T + np.diag(got)
  assert np.abs(off_diagonal).max() < 0.01 * unit


def test_stacked_matrices_are_orthogonalised_one_by_one():
  rng = np.random.default_rng(1)
  gate_EDF = rng.normal(size=(2, 3, 6, 4)).astype(np.float32)
  gate_EDF[1, 2] *= 1e3
  together = _first_update({'gate': jnp.asarray(gate_EDF)})['gate']
  for index in np.ndindex(2, 3):
    alone = _first_update({'gate': jnp.asarray(gate_EDF[index])})['gate']
    np.testing.assert_allclose(together[index], alone, atol=1e-6)


def test_what_is_no_matrix_moves_as_by_adamw():
  rng = np.random.default_rng(2)
  grads = {
    'embedding': jnp.asarray(rng.normal(size=(5, 4)), jnp.float32),
    'norm': {'scale': jnp.asarray(rng.normal(size=4), jnp.float32)},
    'up': jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
  }
  params = jax.tree.map(lambda g: g + 1, grads)
  mixed = _first_update(grads, params, weight_decay=0.1)
  adamw = _first_update(grads, params, weight_decay=0.1, kind='adamw')
  for name in ('embedding', 'norm'):
    jax.tree.map(np.testing.assert_array_equal, mixed[name], adamw[name])
  assert np.abs(mixed['up'] - adamw['up']).max() > 1e-3


def test_weight_decay_of_matrices_is_decoupled():
  rng = np.random.default_rng(3)
  grads = {'up': jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)}
  params = {'up': jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)}
  without = _first_update(grads, params)['up']
  decayed = _first_update(grads, params, weight_decay=0.5)['up']
  np.testing.assert_allclose(
    decayed - without, -1e-2 * 0.5 * params['up'], atol=1e-7
  )


def test_momentum_lives_where_its_parameter_lives():
  mesh = jax.make_mesh(
    (2,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  at = lambda *axes: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*axes)
  )
  shardings = {
    'params': {'up': at('fsdp'), 'embedding': at('fsdp')},
    'router': {},
  }
  new = state.init_state(
    lambda: {
      'params': {'up': jnp.ones((4, 6)), 'embedding': jnp.ones((2, 5))},
      'router': {},
    },
    optimizer.make_optimizer(_config(), 10),
    shardings,
  )
  sharded = sorted(
    x.shape
    for x in jax.tree.leaves(new.opt_state)
    if not x.sharding.is_fully_replicated
  )
  # One moment of what Muon moves, two of what Adam does.
  assert sharded == [(2, 5), (2, 5), (4, 6)]


def test_devices_with_the_same_gradients_share_the_work():
  rng = np.random.default_rng(2)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  grads = {'gate': draw(4, 2, 64, 32), 'down': draw(32, 64)}
  params = jax.tree.map(jnp.ones_like, grads)
  transform = optimizer.make_optimizer(_config(), 10)

  def compiled(num_devices):
    sizes = mesh_lib.MeshConfig(data=num_devices)
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[:num_devices])

    def update(grads, params):
      return transform.update(
        grads, transform.init(params), params, grad_norm=jnp.float32(1.0)
      )[0]

    everywhere = sharding.replicated(mesh)
    with jax.set_mesh(mesh):
      program = jax.jit(
        update, in_shardings=everywhere, out_shardings=everywhere
      )
      return program.lower(grads, params).compile()

  alone, shared = compiled(1), compiled(2)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
    alone(grads, params),
    shared(grads, params),
  )
  flops = [program.cost_analysis()['flops'] for program in (alone, shared)]
  assert flops[1] < 0.65 * flops[0]
