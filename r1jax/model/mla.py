"""Multi-head latent attention, expanded and absorbed.

Expanded (training, prefill): keys and values of every head are computed from
the latent. Absorbed (decode): the key up-projection moves to the query and
the value up-projection behind the sum, so that attention runs over the latent
cache itself, as multi-query attention of width C + R. Tested equal.

Source: DeepSeek-V2, arXiv:2405.04434, §2.1; DeepSeek-V3, arXiv:2412.19437,
§2.1.1.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.mla_attention import ops as mla_attention_ops
from pallas_kernels.mla_decode import ops as mla_decode_ops
from r1jax import fp8
from r1jax.model import attention, layers, rope, sparse
from r1jax.model import cache as cache_lib
from r1jax.model import config as model_config
from r1jax.parallel import sharding

_LANES = 128  # Of a TPU's registers.


class Mla(nn.Module):
  """Multi-head latent attention; see the top of this file."""

  config: model_config.MlaConfig
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
  ) -> tuple[jax.Array, cache_lib.Base | None, jax.Array | None]:
    """Attends to x itself, or when decoding to everything in the cache.

    Args:
      x_BTD: Normed input.
      context: Rotations, and which keys each token may see: the tokens of x,
        or when decoding the slots of the cache, those of x included.
      cache: Receives the latents of x if given.
      layer: Index of this layer in the cache.
      mode: Absorbed form over the cache, or expanded over x.

    Returns:
      The output, the cache, and if asked for what the indexer has to learn:
      its divergence from attention, [B, T].
    """
    c = self.config
    D, H, C, N = x_BTD.shape[-1], c.num_heads, c.kv_lora_rank, c.nope_head_dim
    param = functools.partial(
      sharding.param,
      self,
      std=self.init_std,
      dtype=fp8.weight_dtype(self.dtype, self.recipe),
    )
    linear = functools.partial(fp8.einsum, recipe=self.recipe)
    norm = functools.partial(layers.RmsNorm, c.norm_eps, self.dtype)
    rotate = functools.partial(rope.rotate, interleaved=c.rope.interleaved)
    cos_BTR, sin_BTR = context.cos_sin

    q_BTA, q_in = x_BTD, 'embed'
    if c.q_lora_rank is not None:
      q_down_DA = param('q_down', (D, c.q_lora_rank), ('embed', 'latent'))
      q_BTA = norm(name='q_norm')(linear('BTD,DA->BTA', x_BTD, q_down_DA))
      q_in = 'rank'
    q_up_AHQ = param(
      'q_up',
      (q_BTA.shape[-1], H, N + c.rope_head_dim),
      (q_in, 'heads', None),
    )
    q_BTHQ = linear('BTA,AHQ->BTHQ', sharding.fan_out(q_BTA), q_up_AHQ)
    q_nope_BTHN, q_rope_BTHR = jnp.split(q_BTHQ, [N], axis=-1)
    q_rope_BTHR = rotate(q_rope_BTHR, cos_BTR[:, :, None], sin_BTR[:, :, None])

    kv_down_DC = param('kv_down', (D, C + c.rope_head_dim), ('embed', 'latent'))
    latent_BTC, k_rope_BTR = jnp.split(
      linear('BTD,DC->BTC', x_BTD, kv_down_DC), [C], axis=-1
    )
    latent_BTC = norm(name='kv_norm')(latent_BTC)
    k_rope_BTR = rotate(k_rope_BTR, cos_BTR, sin_BTR)
    k_up_CHN = param('k_up', (C, H, N), ('rank', 'heads', None))
    v_up_CHU = param('v_up', (C, H, c.v_head_dim), ('rank', 'heads', None))
    out_DHU = param('out', (D, H, c.v_head_dim), ('embed', 'heads', None))

    latent_BTC, k_rope_BTR = sharding.fan_out((latent_BTC, k_rope_BTR))
    if isinstance(cache, cache_lib.Pages):
      entry = {'latent': latent_BTC, 'rope': k_rope_BTR}
    else:
      entry = {'latent': jnp.concatenate([latent_BTC, k_rope_BTR], axis=-1)}
    index = None
    if c.indexer is not None:
      indexer = sparse.Indexer(
        c.indexer, self.init_std, self.dtype, name='indexer'
      )
      index = indexer(x_BTD, q_BTA, context.cos_sin)
      entry['index'] = index.k_BSI
    if cache is not None:
      cache = cache.append(layer, entry, is_first=not mode.decode)

    learned_BT = None
    if mode.decode:
      past = cache.read(layer)
      # Weights as training multiplies them; here activations are not rounded.
      as_trained = functools.partial(
        fp8.rounded, dtype=self.dtype, recipe=self.recipe
      )
      k_up_CHN = as_trained('BSC,CHN->BSHN', k_up_CHN)
      v_up_CHU = as_trained('BSC,CHU->BSHU', v_up_CHU)
      q_BTHC = jnp.einsum('BTHN,CHN->BTHC', q_nope_BTHN, k_up_CHN)
      if mode.implementation == 'pallas':
        o_BTHC = paged(q_BTHC, q_rope_BTHR, past, scale=c.softmax_scale)
      else:
        q_BTHC = jnp.concatenate([q_BTHC, q_rope_BTHR], axis=-1)
        attend = functools.partial(absorbed, scale=c.softmax_scale)
        if index is not None and not c.indexer.dense:
          attend = sparse.over_selected(
            attend,
            dataclasses.replace(index, k_BSI=past['index']).scores(),
            c.indexer.top_k,
          )
        o_BTHC = attend(q_BTHC, past['latent'], context.mask_BTS)
      o_BTHU = jnp.einsum('BTHC,CHU->BTHU', o_BTHC[..., :C], v_up_CHU)
    else:
      # The latents travel, not the keys and values of all heads.
      latent_BSC = mode.all_keys(latent_BTC)
      k_rope_BSR = mode.all_keys(k_rope_BTR)
      k_BSHN = linear('BSC,CHN->BSHN', latent_BSC, k_up_CHN)
      v_BSHU = linear('BSC,CHU->BSHU', latent_BSC, v_up_CHU)
      q_BTHQ = jnp.concatenate([q_nope_BTHN, q_rope_BTHR], axis=-1)
      if mode.implementation == 'pallas':
        o_BTHU = mla_attention_ops.mla_attention(
          q_BTHQ,
          k_BSHN,
          k_rope_BSR,
          v_BSHU,
          context.segment_BT,
          context.segment_BS,
          mode.first_query(x_BTD.shape[1]),
          scale=c.softmax_scale,
          implementation='pallas',
        )
      else:
        k_BSHR = jnp.broadcast_to(
          k_rope_BSR[:, :, None], (*k_BSHN.shape[:3], c.rope_head_dim)
        )
        k_BSHQ = jnp.concatenate([k_BSHN, k_BSHR], axis=-1)
        if index is not None:
          index = dataclasses.replace(index, k_BSI=mode.all_keys(index.k_BSI))
        if mode.needs_mask:
          o_BTHU, learned_BT = self._attend(
            q_BTHQ, k_BSHQ, v_BSHU, context.mask_BTS, index, mode
          )
        else:
          o_BTHU = attention.flash(
            q_BTHQ, k_BSHQ, v_BSHU, context, mode, scale=c.softmax_scale
          )
    out_BTD = linear('BTHU,DHU->BTD', o_BTHU, out_DHU, power_of_two=True)
    return sharding.fan_in(out_BTD), cache, learned_BT

  def _attend(self, q_BTHQ, k_BSHQ, v_BSHU, mask_BTS, index, mode):
    """Attention with all scores at once, and what the indexer has to learn."""
    c, learned_BT = self.config, None
    score_BHTS = scores(q_BTHQ, k_BSHQ, scale=c.softmax_scale)
    if index is not None:
      index_BTS = index.scores()
      if not c.indexer.dense:
        mask_BTS = sparse.selected(index_BTS, mask_BTS, c.indexer.top_k)
      if mode.indexer_loss:
        learned_BT = sparse.divergence(
          sharding.mean_tensor(
            attention.mean_probability(score_BHTS, mask_BTS)
          ),
          index_BTS,
          mask_BTS,
        )
    o_BTHU = attention.attend(score_BHTS, mask_BTS, v_BSHU, 'BHTS,BSHU->BTHU')
    return o_BTHU, learned_BT


def scores(q_BTHQ: jax.Array, k_BSHQ: jax.Array, *, scale: float) -> jax.Array:
  """Scaled scores of multi-head attention, float32 [B, H, T, S]."""
  return jnp.einsum(
    'BTHQ,BSHQ->BHTS',
    q_BTHQ * scale,
    k_BSHQ,
    preferred_element_type=jnp.float32,
  )


def paged(
  q_BTHC: jax.Array,
  q_rope_BTHR: jax.Array,
  past: cache_lib.PagedLatents,
  *,
  scale: float,
) -> jax.Array:
  """`absorbed`, by a kernel that reads pages: [B, T, H, C]."""
  (T, C), R = q_BTHC.shape[1::2], q_rope_BTHR.shape[-1]
  # As wide as whole lanes: the kernel would pad a narrower one by a copy.
  filler = jnp.zeros((*q_BTHC.shape[:3], -(C + R) % _LANES), q_BTHC.dtype)
  o_BTHC, _ = mla_decode_ops.mla_decode(
    jnp.concatenate([q_BTHC, q_rope_BTHR, filler], axis=-1),
    past.cache,
    past.table_Bn,
    past.length_B + T,
    value_dim=C,
    scale=scale,
    implementation='pallas',
  )
  return o_BTHC


def absorbed(
  q_BTHC: jax.Array,
  cache_BSC: jax.Array,
  mask_BTS: jax.Array,
  *,
  scale: float,
) -> jax.Array:
  """Multi-query attention whose keys are also its values, [B, T, H, C].

  Only the first kv_lora_rank of the result mean anything: the rest, sums of
  rotated keys, cost less than a copy of the cache without them.
  """
  score_BTHS = jnp.einsum(
    'BTHC,BSC->BTHS',
    q_BTHC * scale,
    cache_BSC,
    preferred_element_type=jnp.float32,
  )
  score_BTHS = jnp.where(mask_BTS[:, :, None], score_BTHS, -1e30)
  weight_BTHS = jnp.exp(score_BTHS - score_BTHS.max(-1, keepdims=True))
  o_BTHC = jnp.einsum(
    'BTHS,BSC->BTHC',
    weight_BTHS.astype(cache_BSC.dtype),
    cache_BSC,
    preferred_element_type=jnp.float32,
  )
  return (o_BTHC / weight_BTHS.sum(-1)[..., None]).astype(cache_BSC.dtype)
