"""The loss of a training stage, whole or in the parts of a pipeline."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from r1jax.losses import token
from r1jax.model import block, transformer
from r1jax.model import config as model_config
from r1jax.parallel import sharding
from r1jax.train import step as step_lib

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Objective:
  """loss(variables, batch): what the stage asks of tokens, and of layers.

  Losses and metrics are divided by the global batch's normalisers, so that
  microbatches add up.

  Attributes:
    model: Shape of the model.
    of_hidden: (head, hidden_BTD, mtp_hidden, batch) -> (loss, metrics), the
      stage's own part.
    mtp: Run the MTP modules.
    balance_coef: α of the sequence-wise balance loss, summed over layers. Rows
      are weighted by their tokens.
    indexer: Of sparse attention, if it learns: its divergence is added, which
      no other parameter sees; in its dense warm-up it is the whole loss.
  """

  model: model_config.ModelConfig
  of_hidden: Callable[
    [token.Head, jax.Array, tuple[jax.Array, ...], Any],
    tuple[jax.Array, Metrics],
  ]
  mtp: bool
  balance_coef: float
  indexer: model_config.IndexerConfig | None = None

  @property
  def is_warm_up(self) -> bool:
    return self.indexer is not None and self.indexer.dense

  def __call__(self, variables: Any, batch: Any) -> tuple[jax.Array, Metrics]:
    out = transformer.Transformer(self.model).apply(
      variables,
      batch.tokens_BT,
      segment_BT=batch.segment_BT,
      position_BT=batch.position_BT,
      mtp=self.mtp,
      indexer_loss=self.indexer is not None,
    )
    head = transformer.head(variables['params'], self.model)
    loss, metrics = self.of_hidden(head, out.hidden_BTD, out.mtp_hidden, batch)
    layers = block.BlockMetrics(out.moe, out.indexer_LBT)
    sums = self.layer_sums(layers, batch)
    of_layers = self.of_layers(sums)
    loss = of_layers if self.is_warm_up else loss + of_layers
    return loss, metrics | self.layer_metrics(sums)

  def layer_sums(self, layers: block.BlockMetrics, batch: Any) -> Metrics:
    """What layers report, summed over rows: [L, …], or of one layer.

    Of the experts 'counts' [E], 'balance', with several devices 'overflow';
    'divergence' of the indexer.
    """
    sums = {}
    if layers.moe is not None:
      weight_B = batch.mask_BT.sum(1) / batch.num_tokens
      sums['counts'] = layers.moe.counts_E
      sums['balance'] = jnp.einsum(
        '...B,B->...', layers.moe.balance_B, weight_B
      )
      if sharding.axis_size('expert') > 1:
        sums['overflow'] = layers.moe.overflow
    if self.indexer is not None:
      # Σ_t KL; queries of padding have none.
      divergence = layers.indexer_BT.sum((-2, -1))
      sums['divergence'] = divergence / batch.num_tokens
    return sums

  def of_layers(self, sums: Metrics) -> jax.Array:
    """The part of the loss that layers add."""
    loss = jnp.zeros(())
    if 'balance' in sums and not self.is_warm_up:
      loss += self.balance_coef * sums['balance'].sum()
    if 'divergence' in sums:
      loss += sums['divergence'].sum()
    return loss

  def layer_metrics(self, sums: Metrics) -> Metrics:
    """What is shown of all layers, [L, …]."""
    metrics = {}
    if 'counts' in sums:
      metrics['moe/counts'] = sums['counts']
      metrics['moe/balance_loss'] = sums['balance'].mean()
    if 'overflow' in sums:
      metrics[step_lib.OVERFLOW] = sums['overflow'].sum()
    if 'divergence' in sums:
      metrics['indexer/divergence'] = sums['divergence'].mean()
    return metrics


def concatenate(stacks: Sequence[Metrics]) -> Metrics:
  """Joins the `layer_sums` [L, …] of stacks, which may lack some."""
  names = dict.fromkeys(name for sums in stacks for name in sums)
  return {
    name: jnp.concatenate([sums[name] for sums in stacks if name in sums])
    for name in names
  }
