"""What all kinds of attention share: context, masks, softmax over keys."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import ops as flash_attention_ops
from r1jax.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every block of a call shares.

  Attributes:
    cos_sin: Rotation of the query positions, [B, T, R / 2] each.
    segment_BT: int32 document of each query, 0 is padding.
    segment_BS: int32 document of each key.
    mask_BTS: Which keys each query may see; None where attention holds only
      some scores at a time, and no mask.
  """

  cos_sin: tuple[jax.Array, jax.Array]
  segment_BT: jax.Array
  segment_BS: jax.Array
  mask_BTS: jax.Array | None

  @property
  def keep_BT(self) -> jax.Array:
    """True on real tokens."""
    return self.segment_BT > 0


@dataclasses.dataclass(frozen=True)
class Mode:
  """How every block of a call runs; decided when it is traced.

  Attributes:
    decode: Attend to everything in the cache, else to this call's tokens.
    indexer_loss: Return what sparse attention's indexers have to learn.
    split_length: Each device of `context` has a part of every row.
    implementation: Of attention, to this call's tokens or to the cache, as the
      model's config has it.
  """

  decode: bool = False
  indexer_loss: bool = False
  split_length: bool = False
  implementation: str = 'naive'

  @property
  def needs_mask(self) -> bool:
    """Whether attention holds all scores."""
    return self.implementation in ('naive', 'xla')

  def first_query(self, num_queries: int) -> int | jax.Array:
    """The slot of this device's first of so many queries."""
    return sharding.first_of_length(num_queries) if self.split_length else 0

  def all_keys(self, x_BT: jax.Array) -> jax.Array:
    """What queries attend to, [B, S, …], of this device's tokens."""
    return sharding.gather_length(x_BT) if self.split_length else x_BT


def attention_mask(
  segment_BT: jax.Array,
  position_BT: jax.Array,
  segment_BS: jax.Array,
  position_BS: jax.Array,
) -> jax.Array:
  """True where a query may see a key: same document, not later. [B, T, S]."""
  same_BTS = segment_BT[:, :, None] == segment_BS[:, None, :]
  same_BTS &= segment_BS[:, None, :] > 0
  return same_BTS & (position_BS[:, None, :] <= position_BT[:, :, None])


def flash(
  q_BTHQ: jax.Array,
  k_BSGQ: jax.Array,
  v_BSGU: jax.Array,
  context: Context,
  mode: Mode,
  *,
  scale: float,
) -> jax.Array:
  """Attention that holds only some scores at a time, [B, T, H, U].

  It is causal by slot: each row's documents stand in one piece and in order.
  """
  return flash_attention_ops.flash_attention(
    q_BTHQ,
    k_BSGQ,
    v_BSGU,
    context.segment_BT,
    context.segment_BS,
    mode.first_query(q_BTHQ.shape[1]),
    scale=scale,
    implementation=mode.implementation,
  )


def attend(
  score_BHTS: jax.Array, mask_BTS: jax.Array, value: jax.Array, einsum: str
) -> jax.Array:
  """Softmax over the allowed keys in float32, then the weighted sum of values.

  Divides after the sum, where there is less to divide. A query without any
  allowed key (padding) gets the mean of the values: finite, and used nowhere.

  Args:
    score_BHTS: Scaled scores.
    mask_BTS: True where a query may see a key.
    value: Values, heads or no heads.
    einsum: How 'BHTS' meets them; the result begins with B, T, H.
  """
  score_BHTS = jnp.where(mask_BTS[:, None], score_BHTS, -1e30)
  top_BHT1 = jax.lax.stop_gradient(score_BHTS.max(-1, keepdims=True))
  weight_BHTS = jnp.exp(score_BHTS - top_BHT1)
  total_BTH = weight_BHTS.sum(-1).swapaxes(1, 2)
  out = jnp.einsum(
    einsum,
    weight_BHTS.astype(value.dtype),
    value,
    preferred_element_type=jnp.float32,
  )
  return (out / total_BTH[..., None]).astype(value.dtype)


def mean_probability(score_BHTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """Mean of the heads' attention, a constant, [B, T, S]."""
  score_BHTS = jnp.where(mask_BTS[:, None], score_BHTS, -1e30)
  return jax.lax.stop_gradient(jax.nn.softmax(score_BHTS, axis=-1)).mean(1)
