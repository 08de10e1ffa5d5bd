"""One transformer block: attention, then a dense or an expert feed-forward."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from r1jax.model import cache as cache_lib
from r1jax.model import config as model_config
from r1jax.model import layers, mla, moe
from r1jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every block of a call shares.

  Attributes:
    cos_sin: Rotation of the query positions, [B, T, R / 2] each.
    mask_BTS: Which keys each query may see.
    keep_BT: True on real tokens.
  """

  cos_sin: tuple[jax.Array, jax.Array]
  mask_BTS: jax.Array
  keep_BT: jax.Array


class Block(nn.Module):
  """x += attention(norm(x)); x += ffn(norm(x))."""

  config: model_config.ModelConfig
  is_moe: bool
  decode: bool = False

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    context: Context,
    cache: cache_lib.LatentCache | None,
    layer: int | jax.Array,
  ) -> tuple[jax.Array, cache_lib.LatentCache | None, moe.MoeMetrics | None]:
    c = self.config
    dtype = jnp.dtype(c.dtype)
    norm = lambda name: layers.RmsNorm(c.norm_eps, dtype, name=name)
    with jax.named_scope('attention'):
      attention = mla.Mla(
        c.attention, c.norm_eps, c.init_std, dtype, name='attention'
      )
      out_BTD, cache = attention(
        norm('attention_norm')(x_BTD),
        context.cos_sin,
        context.mask_BTS,
        cache,
        layer,
        self.decode,
      )
      x_BTD += out_BTD
    with jax.named_scope('ffn'):
      h_BTD, metrics = norm('ffn_norm')(x_BTD), None
      if self.is_moe:
        ffn = moe.Moe(c.moe, c.init_std, dtype, name='moe')
        out_BTD, metrics = ffn(h_BTD, context.keep_BT)
      else:
        ffn = layers.SwiGlu(c.dense_dim, c.init_std, dtype, name='ffn')
        out_BTD = ffn(h_BTD)
      x_BTD += out_BTD
    x_BTD = sharding.constrain(x_BTD, ('batch', 'length', 'act_embed'))
    return x_BTD, cache, metrics
