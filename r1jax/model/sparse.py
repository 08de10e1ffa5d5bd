"""DeepSeek sparse attention: the lightning indexer picks each query's keys.

  I[t, s] = Σ_j w[t, j] · ReLU(q[t, j] · k[s]),  w scaled by (J · I)^-½

The indexer sees no gradient but that of its own loss, and nothing but its own
weights learns from it: its inputs and its target are constants. In exact
arithmetic the Hadamard rotation of the released code changes nothing, so it
is left out, as is its FP8.

Source: DeepSeek-V3.2-Exp report, §2.1.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from r1jax.model import config as model_config
from r1jax.model import layers, rope
from r1jax.parallel import sharding

_KEY_NORM_EPS = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
  """What the indexer makes of tokens.

  Attributes:
    q_BTJI: Queries of its heads.
    k_BSI: Keys, one for all heads.
    weight_BTJ: float32 weights of the heads, scaled.
  """

  q_BTJI: jax.Array
  k_BSI: jax.Array
  weight_BTJ: jax.Array

  def scores(self) -> jax.Array:
    """Index scores of each query with each key, float32 [B, T, S]."""
    score_BTJS = jnp.einsum(
      'BTJI,BSI->BTJS',
      self.q_BTJI,
      self.k_BSI,
      preferred_element_type=jnp.float32,
    )
    return sharding.fan_in(
      jnp.einsum('BTJS,BTJ->BTS', jax.nn.relu(score_BTJS), self.weight_BTJ)
    )


class Indexer(nn.Module):
  """Projections of the lightning indexer; its input is a constant to it."""

  config: model_config.IndexerConfig
  init_std: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    latent_BTA: jax.Array,
    cos_sin: tuple[jax.Array, jax.Array],
  ) -> Index:
    """Indexes the tokens of x, whose normed query latent is given."""
    c, (cos_BTR, sin_BTR) = self.config, cos_sin
    J, dim = c.num_heads, c.head_dim
    x_BTD, latent_BTA = jax.lax.stop_gradient((x_BTD, latent_BTA))
    D, A = x_BTD.shape[-1], latent_BTA.shape[-1]
    param = functools.partial(sharding.param, self, std=self.init_std)
    q_up_AJI = param(
      'q_up', (A, J, dim), ('latent', 'heads', None), dtype=self.dtype
    )
    key_DI = param('key', (D, dim), ('embed', None), dtype=self.dtype)
    weight_DJ = param('weight', (D, J), ('embed', 'heads'))

    q_BTJI = jnp.einsum('BTA,AJI->BTJI', latent_BTA, q_up_AJI)
    k_BTI = layers.LayerNorm(_KEY_NORM_EPS, self.dtype, name='key_norm')(
      jnp.einsum('BTD,DI->BTI', x_BTD, key_DI)
    )
    weight_BTJ = jnp.einsum(
      'BTD,DJ->BTJ',
      x_BTD.astype(jnp.float32),
      weight_DJ,
      precision=jax.lax.Precision.HIGHEST,
    )
    return Index(
      q_BTJI=_rotate_first(q_BTJI, cos_BTR[:, :, None], sin_BTR[:, :, None]),
      k_BSI=sharding.fan_out(_rotate_first(k_BTI, cos_BTR, sin_BTR)),
      weight_BTJ=weight_BTJ * (J * dim) ** -0.5,
    )


def _rotate_first(x, cos, sin):
  """Rotates the first dims, in halves, unlike MLA's last, in pairs."""
  rotated, rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
  rotated = rope.rotate(rotated, cos, sin, interleaved=False)
  return jnp.concatenate([rotated, rest], axis=-1)


def selected(
  index_BTS: jax.Array, mask_BTS: jax.Array, top_k: int
) -> jax.Array:
  """True at the top_k best keys of those that each query may see."""
  if top_k >= mask_BTS.shape[-1]:
    return mask_BTS
  best_BTK = _best(index_BTS, mask_BTS, top_k)
  chosen_BTS = jnp.put_along_axis(
    jnp.zeros_like(mask_BTS), best_BTK, True, axis=-1, inplace=False
  )
  return chosen_BTS & mask_BTS


def over_selected(
  attend: Callable[..., jax.Array], index_BTS: jax.Array, top_k: int
) -> Callable[..., jax.Array]:
  """`attend`(q, cache, mask) over the selected slots of the cache only."""

  def run(q_BTHC, cache_BSC, mask_BTS):
    if top_k >= mask_BTS.shape[-1]:
      return attend(q_BTHC, cache_BSC, mask_BTS)
    best_BTK = _best(index_BTS, mask_BTS, top_k)
    # Each query has keys of its own, so each is a row of its own.
    B, T = best_BTK.shape[:2]
    row_BT11 = jnp.arange(B)[:, None, None]
    cache_RKC = cache_BSC[row_BT11, best_BTK].reshape(B * T, top_k, -1)
    mask_BTK = jnp.take_along_axis(mask_BTS, best_BTK, axis=-1)
    out_R1HC = attend(
      q_BTHC.reshape(B * T, 1, *q_BTHC.shape[2:]),
      cache_RKC,
      mask_BTK.reshape(B * T, 1, top_k),
    )
    return out_R1HC.reshape(B, T, *out_R1HC.shape[2:])

  return run


def _best(index_BTS, mask_BTS, top_k):
  index_BTS = jax.lax.stop_gradient(index_BTS)
  return jax.lax.top_k(jnp.where(mask_BTS, index_BTS, -jnp.inf), top_k)[1]


def divergence(
  probability_BTS: jax.Array, index_BTS: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
  """KL(p ‖ softmax I) of each query over the keys of the mask, [B, T].

  Args:
    probability_BTS: p, attention summed over the heads, of sum 1.
    index_BTS: I.
    mask_BTS: Keys that attention saw: all of them in the dense warm-up, the
      selected ones after it. Queries without any get 0.
  """
  logq_BTS = jax.nn.log_softmax(jnp.where(mask_BTS, index_BTS, -1e30), axis=-1)
  is_used_BTS = mask_BTS & (probability_BTS > 0)
  logp_BTS = jnp.log(jnp.where(is_used_BTS, probability_BTS, 1.0))
  term_BTS = probability_BTS * (logp_BTS - logq_BTS)
  return jnp.sum(jnp.where(is_used_BTS, term_BTS, 0.0), axis=-1)
