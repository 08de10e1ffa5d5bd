"""One transformer block: attention, then a dense or an expert feed-forward."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from r1jax.model import attention, gqa, layers, mla, moe
from r1jax.model import cache as cache_lib
from r1jax.model import config as model_config


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMetrics:
  """What a block reports.

  Attributes:
    moe: Of its routing; None without experts.
    indexer_BT: What its indexer has to learn; None unless asked for.
  """

  moe: moe.MoeMetrics | None
  indexer_BT: jax.Array | None


class Block(nn.Module):
  """x += attention(norm(x)); x += ffn(norm(x))."""

  config: model_config.ModelConfig
  is_moe: bool
  mode: attention.Mode = attention.Mode()

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    context: attention.Context,
    cache: cache_lib.Base | None,
    layer: int | jax.Array,
  ) -> tuple[jax.Array, cache_lib.Base | None, BlockMetrics]:
    c = self.config
    dtype = jnp.dtype(c.dtype)
    norm = lambda name: layers.RmsNorm(c.norm_eps, dtype, name=name)
    with jax.named_scope('attention'):
      out_BTD, cache, indexer_BT = self._attention()(
        norm('attention_norm')(x_BTD), context, cache, layer, self.mode
      )
      x_BTD += out_BTD
    with jax.named_scope('ffn'):
      h_BTD, metrics = norm('ffn_norm')(x_BTD), None
      if self.is_moe:
        ffn = moe.Moe(c.moe, c.init_std, dtype, c.recipe, name='moe')
        out_BTD, metrics = ffn(h_BTD, context.keep_BT)
      else:
        ffn = layers.SwiGlu(
          c.dense_dim, c.init_std, dtype, c.recipe, name='ffn'
        )
        out_BTD = ffn(h_BTD)
      x_BTD += out_BTD
    return x_BTD, cache, BlockMetrics(metrics, indexer_BT)

  def _attention(self) -> nn.Module:
    c = self.config
    how = c.init_std, jnp.dtype(c.dtype), c.recipe
    match c.attention:
      case model_config.MlaConfig():
        return mla.Mla(c.attention, *how, name='attention')
      case model_config.GqaConfig():
        return gqa.Gqa(c.attention, c.norm_eps, *how, name='attention')
