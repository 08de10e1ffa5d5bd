"""DeepSeekMoE: routed experts, dropless and exact, beside shared ones."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.routed_swiglu import ops as routed_swiglu_ops
from r1jax.model import config as model_config
from r1jax.model import layers, router
from r1jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeMetrics:
  """What a layer reports of its routing.

  Attributes:
    counts_BE: float32 choices per expert over the real tokens of each row.
    balance_B: float32 sequence-wise balance loss of each row, before α.
  """

  counts_BE: jax.Array
  balance_B: jax.Array

  @property
  def counts_E(self) -> jax.Array:
    """Over the whole batch; summed after all layers, not in each."""
    return self.counts_BE.sum(-2)


class Moe(nn.Module):
  """out = Σ_k w_k FFN_k(x) + FFN_shared(x).

  Source: DeepSeek-V3, arXiv:2412.19437, eq. 12-16.
  """

  config: model_config.MoeConfig
  init_std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, keep_BT: jax.Array
  ) -> tuple[jax.Array, MoeMetrics]:
    """Runs each token's experts; tokens with keep 0 are not counted."""
    c = self.config
    D, E, F = x_BTD.shape[-1], c.num_experts, c.expert_dim
    param = functools.partial(sharding.param, self, std=self.init_std)
    router_DE = param('router', (D, E), ('embed', None))
    gate_EDF = param('gate', (E, D, F), ('experts', 'embed', 'mlp'))
    up_EDF = param('up', (E, D, F), ('experts', 'embed', 'mlp'))
    down_EFD = param('down', (E, F, D), ('experts', 'mlp', 'embed'))
    bias_E = jnp.zeros((E,), jnp.float32)
    if c.has_bias:
      bias_E = self.variable(
        'router', 'bias', jnp.zeros, (E,), jnp.float32
      ).value

    with jax.named_scope('router'):
      logits_BTE = jnp.einsum(
        'BTD,DE->BTE',
        x_BTD.astype(jnp.float32),
        router_DE,
        precision=jax.lax.Precision.HIGHEST,
      )
      # By hand: XLA gathers all tokens on every device to sort them.
      expert_BTK, weight_BTK, metrics = sharding.per_shard_here(
        functools.partial(_route, config=c), (True, True, False)
      )(logits_BTE, keep_BT, bias_E)
    with jax.named_scope('experts'):
      weights = (gate_EDF, up_EDF, down_EFD)
      out_BTD = sharding.per_shard_here(
        functools.partial(
          _run_experts, block=c.block, implementation=c.implementation
        ),
        (True, True, True, False),
      )(
        x_BTD,
        expert_BTK,
        weight_BTK.astype(self.dtype),
        tuple(w.astype(self.dtype) for w in weights),
      )
    if c.num_shared:
      shared = layers.SwiGlu(
        c.num_shared * F, self.init_std, self.dtype, name='shared'
      )
      out_BTD = out_BTD + shared(x_BTD)
    return out_BTD, metrics


def _route(logits_BTE, keep_BT, bias_E, *, config):
  """Experts, their weights and the metrics of the rows of one device."""
  score_BTE = router.scores(logits_BTE, config.score)
  expert_BTK, weight_BTK = router.route(score_BTE, bias_E, config=config)
  metrics = MoeMetrics(
    counts_BE=router.counts(expert_BTK, keep_BT, config.num_experts),
    balance_B=router.sequence_balance(score_BTE, keep_BT, top_k=config.top_k),
  )
  return expert_BTK, weight_BTK, metrics


def _run_experts(x_BTD, expert_BTK, weight_BTK, weights, **options):
  """The routed part on the tokens of one device."""
  flat = lambda a: a.reshape(-1, a.shape[-1])
  out_TD = routed_swiglu_ops.routed_swiglu(
    flat(x_BTD), flat(expert_BTK), flat(weight_BTK), *weights, **options
  )
  return out_TD.reshape(x_BTD.shape)
