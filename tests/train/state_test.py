"""States are born sharded and share no buffers."""

import jax
import numpy as np
import pytest

from r1jax.train import state as state_lib
from tests.train import toy


def _shardings():
  mesh = jax.make_mesh(
    (2,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  at = lambda *axes: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*axes)
  )
  return {
    'params': {'w_D': at('fsdp'), 'scale': at()},
    'router': {'bias_E': at()},
  }


def test_moments_live_where_their_parameter_lives():
  shardings = _shardings()
  state = state_lib.init_state(
    toy.init_variables, toy.make_optimizer(), shardings, with_reference=True
  )
  sharded = [
    x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated
  ]
  # The parameter, its two moments and the reference; nothing else.
  assert [x.shape for x in sharded] == [(toy.NUM_FEATURES,)] * 4
  assert {len(x.sharding.device_set) for x in jax.tree.leaves(state)} == {2}
  jax.tree.map(
    np.testing.assert_array_equal,
    state.variables,
    jax.jit(toy.init_variables)(),
  )


@pytest.mark.parametrize('is_sharded', [False, True])
def test_abstract_state_is_the_state_without_values(is_sharded):
  shardings = _shardings() if is_sharded else None
  args = toy.init_variables, toy.make_optimizer(), shardings
  state = state_lib.init_state(*args, with_reference=True)
  abstract = state_lib.abstract_state(*args, with_reference=True)
  assert jax.tree.structure(state) == jax.tree.structure(abstract)
  for x, a in zip(
    jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True
  ):
    assert (x.shape, x.dtype) == (a.shape, a.dtype)
    assert x.sharding.is_equivalent_to(a.sharding, x.ndim)


def test_a_state_can_be_donated_whole():
  state = toy.make_state(with_reference=True)
  variables = jax.jit(lambda: toy.init_variables(1))()
  state = state_lib.with_variables(state, variables)
  assert state_lib.with_variables(toy.make_state(), variables).reference is None
  for x, y in zip(
    jax.tree.leaves(state.variables),
    jax.tree.leaves(state.reference),
    strict=True,
  ):
    assert x.unsafe_buffer_pointer() != y.unsafe_buffer_pointer()
  expected_D = np.array(variables['params']['w_D'])
  new, _ = toy.make_step(reference_every=2)(state, toy.Source(0).next(None))
  np.testing.assert_array_equal(new.reference['params']['w_D'], expected_D)
