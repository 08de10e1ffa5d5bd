"""How the caches are stored: each token's row can be copied by itself.

On a TPU a bfloat16 array holds two rows in each 32-bit word, so that no copy
can take one of them. Here a word holds two channels of one token instead.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

_LANES = 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowCache:
  """Pages of rows of latent cache: 1,536 bytes a token for 512 + 64 channels.

  A token with C latents and R rotary channels has C / 2 + 128 words. Word l has
  latent l in its low half and latent l + C / 2 in its high one, the word
  C / 2 + i has rotary channel i in the low half, and all else is 0. The words
  are C / 256 + 1 rows of 128 lanes, one after the other in memory.

  Attributes:
    word_NIL: uint32 [N pages, P tokens · (C / 256 + 1), 128].
    value_dim: C, a multiple of 256.
    rope_dim: R, at most 128.
  """

  word_NIL: jax.Array
  value_dim: int = dataclasses.field(metadata={'static': True})
  rope_dim: int = dataclasses.field(metadata={'static': True})

  @property
  def num_tiles(self) -> int:
    """Rows of 128 words of a token."""
    return self.value_dim // (2 * _LANES) + 1

  @property
  def page_tokens(self) -> int:
    return self.word_NIL.shape[1] // self.num_tiles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class IndexCache:
  """Pages of a layer's index keys: 132 bytes a token in FP8.

  Attributes:
    key_NPI: [N pages, P tokens, I] e4m3, bfloat16 or float32.
    scale_N1P: float32 [N, 1, P], positive: a key is its e4m3 times this; None
      if keys are not scaled.
  """

  key_NPI: jax.Array
  scale_N1P: jax.Array | None = None

  @property
  def page_tokens(self) -> int:
    return self.key_NPI.shape[1]


def pack(x_NPC: jax.Array, value_dim: int) -> RowCache:
  """The cache of rows [latents, rotary channels], as bfloat16.

  Raises:
    ValueError: The latents are no multiple of 256, or too many are rotary.
  """
  half, rope_dim = value_dim // 2, x_NPC.shape[-1] - value_dim
  if value_dim % (2 * _LANES) or not 0 <= rope_dim <= _LANES:
    raise ValueError(
      f'value_dim={value_dim} of {x_NPC.shape[-1]} channels must be a multiple '
      f'of {2 * _LANES} and leave at most {_LANES}'
    )
  bits_NPC = jax.lax.bitcast_convert_type(
    x_NPC.astype(jnp.bfloat16), jnp.uint16
  ).astype(jnp.uint32)
  latent_NPL = bits_NPC[..., :half] | bits_NPC[..., half:value_dim] << 16
  rope_NPL = jnp.pad(
    bits_NPC[..., value_dim:], ((0, 0), (0, 0), (0, _LANES - rope_dim))
  )
  word_NPL = jnp.concatenate([latent_NPL, rope_NPL], axis=-1)
  word_NIL = word_NPL.reshape(len(word_NPL), -1, _LANES)
  return RowCache(word_NIL, value_dim, rope_dim)


def unpack(word_ZL: jax.Array) -> jax.Array:
  """bfloat16 [..., C + 128] of words: latents, rotary channels, zeros."""
  half = word_ZL.shape[-1] - _LANES
  low_ZL, high_ZL = (
    jax.lax.bitcast_convert_type(x.astype(jnp.uint16), jnp.bfloat16)
    for x in (word_ZL & 0xFFFF, word_ZL >> 16)
  )
  return jnp.concatenate(
    [low_ZL[..., :half], high_ZL[..., :half], low_ZL[..., half:]], axis=-1
  )


def quantize_keys(x_ZI: jax.Array) -> tuple[jax.Array, jax.Array]:
  """e4m3 [..., I] and float32 scales [...], powers of two, x ≈ e4m3 · scale.

  A scale is max(amax, 1e-4) / 448 rounded up. The queries' are multiplied into
  the weights of the heads.

  Source: DeepSeek-V3.2-Exp, the indexer of its inference code.
  """
  keys = quantize_fp8_ops.quantize(x_ZI, (1, 0), power_of_two=True)
  return keys.q, keys.scale[..., 0]
