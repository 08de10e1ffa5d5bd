"""Replicas of busy experts for a run's sampler, placed by its own load."""

from typing import Any

import jax
import numpy as np

from r1jax import config as config_lib
from r1jax import types
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import load_balance, sharding


class ExpertBalance:
  """Measures the load of experts, averages it, and places their replicas.

  Attributes:
    placement: What to sample with; replicas of the first experts until some
      load was measured. Its shapes never change.
  """

  def __init__(
    self,
    model: model_config.ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    redundant: int,
    decay: float,
  ):
    """Places experts as if all had the same load.

    Args:
      model: The policy's shape.
      mesh: Its devices of `expert` hold the replicas.
      redundant: Replicas beyond one of each expert.
      decay: Of the moving average of the load.

    Raises:
      UserError: There are no experts, or the devices do not divide replicas.
    """
    if model.moe is None:
      raise config_lib.UserError(
        f'rollout.redundant_experts={redundant}, but the model has no experts; '
        'set it to 0'
      )
    self._mesh, self._decay = mesh, decay
    self._num_devices = mesh.shape['expert']
    self._num_replicas = model.moe.num_experts + redundant
    self._measure = _make_measure(model, mesh)
    num_layers = model.num_layers - model.num_dense_layers
    self._average_LE = np.zeros((num_layers, model.moe.num_experts))
    try:
      self._place()
    except ValueError as e:
      raise config_lib.UserError(
        f'rollout.redundant_experts={redundant}: {e}'
      ) from e

  def update(
    self, variables: Any, batch: types.PolicyBatch
  ) -> dict[str, float]:
    """Measures the load of a batch, and places replicas for what comes next.

    Returns:
      Max over mean of the devices' loads, in the worst layer: without replicas,
      with the placement so far, and with the new one.
    """
    load_LE = np.asarray(
      self._measure(variables, sharding.put_batch(self._mesh, batch)),
      np.float64,
    )
    in_order = load_balance.in_order(*load_LE.shape)
    metrics = {
      'rl/expert_balance_in_order': self._balance(load_LE, in_order),
      'rl/expert_balance': self._balance(load_LE, self.placement),
    }
    self._average_LE = load_balance.moving_average(
      self._average_LE, load_LE, decay=self._decay
    )
    self._place()
    metrics['rl/expert_balance_next'] = self._balance(load_LE, self.placement)
    return metrics

  def get_state(self) -> dict[str, Any]:
    return {'average_LE': self._average_LE}

  def set_state(self, state: dict[str, Any]) -> None:
    self._average_LE = np.asarray(state['average_LE'], np.float64)
    self._place()

  def _place(self):
    load_LE = self._average_LE
    if not load_LE.any():  # Nothing was measured: all alike.
      load_LE = np.ones_like(load_LE)
    placement = load_balance.rebalance(
      load_LE,
      num_replicas=self._num_replicas,
      num_groups=1,  # Global: the sampler has room for any destination.
      num_nodes=1,
      num_devices=self._num_devices,
    )
    most = self._num_replicas - load_LE.shape[1] + 1
    self.placement = placement.padded(most)

  def _balance(self, load_LE, placement):
    return float(
      load_balance.balance(
        load_LE, placement, num_devices=self._num_devices
      ).max()
    )


def _make_measure(model, mesh):
  """A jitted (variables, batch) -> choices of each expert, [L, E]."""

  def measure(variables, batch):
    out = transformer.Transformer(model).apply(
      variables,
      batch.tokens_BT,
      segment_BT=batch.segment_BT,
      position_BT=batch.position_BT,
    )
    return sharding.sum_rows(out.moe.counts_E)

  layout = transformer.shardings(model, mesh)
  return jax.jit(sharding.per_device(measure, mesh, (layout, 'rows'), 'whole'))
