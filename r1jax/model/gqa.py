"""Grouped-query attention, as Qwen and Llama have it.

Source: Ainslie et al., arXiv:2305.13245; Qwen3, arXiv:2505.09388, §2.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from r1jax import fp8
from r1jax.model import attention, layers, rope
from r1jax.model import cache as cache_lib
from r1jax.model import config as model_config
from r1jax.parallel import sharding


class Gqa(nn.Module):
  """Each key-value head serves H / G query heads."""

  config: model_config.GqaConfig
  norm_eps: float
  init_std: float
  dtype: jnp.dtype
  recipe: fp8.Recipe | None = None

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    context: attention.Context,
    cache: cache_lib.Base | None,
    layer: int | jax.Array,
    mode: attention.Mode,
  ) -> tuple[jax.Array, cache_lib.Base | None, None]:
    """Attends to x itself, or when decoding to everything in the cache.

    Args:
      x_BTD: Normed input.
      context: Rotations, and which keys each token may see.
      cache: Receives the keys and values of x if given.
      layer: Index of this layer in the cache.
      mode: Whether to decode.
    """
    c = self.config
    D, H, G, Q = x_BTD.shape[-1], c.num_heads, c.num_kv_heads, c.head_dim
    x_BTD = sharding.fan_out(x_BTD)
    q_BTHQ = self._project(x_BTD, 'q', H, 'heads')
    k_BTGQ = self._project(x_BTD, 'k', G, 'kv_heads')
    v_BTGQ = self._project(x_BTD, 'v', G, 'kv_heads')
    if c.qk_norm:
      norm = functools.partial(
        layers.RmsNorm, self.norm_eps, self.dtype, fanned_out=True
      )
      q_BTHQ, k_BTGQ = norm(name='q_norm')(q_BTHQ), norm(name='k_norm')(k_BTGQ)
    cos, sin = (x[:, :, None] for x in context.cos_sin)
    rotate = functools.partial(rope.rotate, interleaved=c.rope.interleaved)
    q_BTHQ, k_BTGQ = rotate(q_BTHQ, cos, sin), rotate(k_BTGQ, cos, sin)

    if cache is not None:
      entry = {'key': k_BTGQ, 'value': v_BTGQ}
      cache = cache.append(layer, entry, is_first=not mode.decode)
    if mode.decode:
      past = cache.read(layer)
      k_BSGQ, v_BSGQ = past['key'], past['value']
    else:
      k_BSGQ, v_BSGQ = mode.all_keys(k_BTGQ), mode.all_keys(v_BTGQ)
    if mode.needs_mask:
      o_BTHQ = grouped(
        q_BTHQ, k_BSGQ, v_BSGQ, context.mask_BTS, scale=c.softmax_scale
      )
    else:
      o_BTHQ = attention.flash(
        q_BTHQ, k_BSGQ, v_BSGQ, context, mode, scale=c.softmax_scale
      )
    out_DHQ = sharding.param(
      self,
      'out',
      (D, H, Q),
      ('embed', 'heads', None),
      std=self.init_std,
      dtype=fp8.weight_dtype(self.dtype, self.recipe),
    )
    out_BTD = fp8.einsum(
      'BTHQ,DHQ->BTD',
      o_BTHQ,
      out_DHQ,
      recipe=self.recipe,
      power_of_two=True,
    )
    return sharding.fan_in(out_BTD), cache, None

  def _project(self, x_BTD, name, num_heads, axis):
    """x times the matrix of so many heads, and the bias if there are any."""
    c = self.config
    param = functools.partial(sharding.param, self)
    w_DHQ = param(
      f'{name}_proj',
      (x_BTD.shape[-1], num_heads, c.head_dim),
      ('embed', axis, None),
      std=self.init_std,
      dtype=fp8.weight_dtype(self.dtype, self.recipe),
    )
    out_BTHQ = fp8.einsum('BTD,DHQ->BTHQ', x_BTD, w_DHQ, recipe=self.recipe)
    if c.qkv_bias:
      shape = (num_heads, c.head_dim)
      bias_HQ = param(
        f'{name}_bias', shape, (axis, None), std=0.0, dtype=self.dtype
      )
      out_BTHQ += bias_HQ
    return out_BTHQ


def grouped(
  q_BTHQ: jax.Array,
  k_BSGQ: jax.Array,
  v_BSGQ: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Attention of H heads over G key-value heads, [B, T, H, Q]."""
  B, T, H, Q = q_BTHQ.shape
  G = k_BSGQ.shape[2]
  # Head h reads key-value head h // (H / G).
  q_BTGHQ = (q_BTHQ * scale).reshape(B, T, G, H // G, Q)
  score_BGHTS = jnp.einsum(
    'BTGHQ,BSGQ->BGHTS', q_BTGHQ, k_BSGQ, preferred_element_type=jnp.float32
  )
  score_BHTS = score_BGHTS.reshape(B, H, T, -1)
  v_BSHQ = jnp.repeat(v_BSGQ, H // G, axis=2)
  return attention.attend(score_BHTS, mask_BTS, v_BSHQ, 'BHTS,BSHQ->BTHQ')
