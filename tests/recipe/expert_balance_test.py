"""Replicas of a run's experts follow its own load."""

import dataclasses

import jax
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax import types
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import expert_balance
from tests.model import tiny

_CONFIG = dataclasses.replace(tiny.config(), num_layers=2)


def _mesh():
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, expert=4))


def _batch():
  """Four tokens of eight are real."""
  rng = np.random.default_rng(0)
  segment_BT = np.tile(np.arange(8) < 4, (8, 1)).astype(np.int32)
  zeros_BT = np.zeros((8, 8), np.float32)
  fields = {f.name: zeros_BT for f in dataclasses.fields(types.PolicyBatch)}
  fields |= {
    'tokens_BT': rng.integers(0, tiny.V, (8, 8)).astype(np.int32),
    'segment_BT': segment_BT,
    'position_BT': np.tile(np.arange(8, dtype=np.int32), (8, 1)),
    'num_tokens': np.float32(32),
    'num_sequences': np.float32(8),
  }
  return types.PolicyBatch(**fields)


def _variables():
  """Nearly all tokens choose the first two experts of the first two groups."""
  variables = tiny.variables(_CONFIG)
  bias = np.float32([[9, 9, 9, 9, 0, 0, 0, 0]])
  router = jax.tree.map(lambda _: bias, variables['router'])
  return {**variables, 'router': router}


def test_the_load_is_measured_averaged_and_spread():
  balance = expert_balance.ExpertBalance(
    _CONFIG, _mesh(), redundant=8, decay=0.5
  )
  first = balance.update(_variables(), _batch())
  # Four busy experts on two of four devices.
  assert first['rl/expert_balance_in_order'] >= 2
  assert first['rl/expert_balance_next'] < 1.3
  average_LE = balance.get_state()['average_LE']
  # Two choices of each real token, half of them by the decay.
  assert average_LE.shape == (1, 8) and average_LE.sum() == 32 * 2 / 2
  assert not average_LE[:, 4:].any()
  second = balance.update(_variables(), _batch())
  assert second['rl/expert_balance'] == first['rl/expert_balance_next']
  np.testing.assert_allclose(balance.get_state()['average_LE'].sum(), 48)
  assert balance.placement.expert_LR.shape == (1, 16)
  assert balance.placement.replica_LEX.shape == (1, 8, 9)


@pytest.mark.parametrize(
  ('model', 'redundant', 'message'),
  [
    (_CONFIG, 3, 'redundant_experts=3: .*=11 must be a multiple .*; 12 would'),
    (
      dataclasses.replace(_CONFIG, moe=None, num_dense_layers=2),
      4,
      'redundant_experts=4, but the model has no experts; set it to 0',
    ),
  ],
)
def test_what_cannot_be_is_the_users_error(model, redundant, message):
  with pytest.raises(config_lib.UserError, match=message):
    expert_balance.ExpertBalance(model, _mesh(), redundant=redundant, decay=0.9)
