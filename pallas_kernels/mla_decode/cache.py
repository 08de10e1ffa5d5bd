"""How the latent cache is stored, so that no lane of it is padding.

Pages of P tokens lie in any order. A token's C = 512 latents are a row of
`latent_NPC`. Its R = 64 rotary channels would fill half of a row of 128 lanes,
so four tokens share a row of `rope_NIL`: I = P / 4 rows of L = 4 · 64 lanes, in
which the token i of a page has the row i mod I, the lanes from 64 · (i div I).
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops

ROPE_TOKENS = 4  # That share a row.
SCALE_CHANNELS = quantize_fp8_ops.SIZE  # That share a scale.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
  """Pages of a layer's latent cache: 1,152 bytes a token, or 656 in FP8.

  Attributes:
    latent_NPC: [N pages, P tokens, C channels] bfloat16 (float32 for tests), or
      e4m3. P must be a multiple of 64, for e4m3 of 128.
    rope_NIL: [N, P / 4, 4 · R] bfloat16, in the layout above.
    scale_NJP: None, or float32 [N, C / 128, P]: a latent is e4m3 · scale.
  """

  latent_NPC: jax.Array
  rope_NIL: jax.Array
  scale_NJP: jax.Array | None = None

  @property
  def page_tokens(self) -> int:
    return self.latent_NPC.shape[1]

  @property
  def rope_dim(self) -> int:
    return self.rope_NIL.shape[-1] // ROPE_TOKENS


def pack(x_NPC: jax.Array, value_dim: int) -> LatentCache:
  """The cache of rows [value_dim latents, rotary channels]."""
  N, P, _ = x_NPC.shape
  rope_NGIR = x_NPC[..., value_dim:].reshape(
    N, ROPE_TOKENS, P // ROPE_TOKENS, -1
  )
  rope_NIL = rope_NGIR.swapaxes(1, 2).reshape(N, P // ROPE_TOKENS, -1)
  return LatentCache(x_NPC[..., :value_dim], rope_NIL)


def quantize(cache: LatentCache) -> LatentCache:
  """The cache in 656 bytes a token: e4m3 with a scale for 128 latents.

  Scales are powers of two, max(amax, 1e-4) / 448 rounded up.

  Source: FlashMLA's FP8 cache.
  """
  latent = quantize_fp8_ops.quantize(
    cache.latent_NPC, quantize_fp8_ops.ROWS, power_of_two=True
  )
  return LatentCache(latent.q, cache.rope_NIL, latent.scale.swapaxes(1, 2))


def unpack(cache: LatentCache) -> jax.Array:
  """Rows [latents, rotary channels] of each token, float32 [N, P, C + R]."""
  N, P, C = cache.latent_NPC.shape
  x_NPC = cache.latent_NPC.astype(jnp.float32)
  if cache.scale_NJP is not None:
    x_NPC *= jnp.repeat(cache.scale_NJP.swapaxes(1, 2), SCALE_CHANNELS, axis=-1)
  rope_NIGR = cache.rope_NIL.reshape(N, P // ROPE_TOKENS, ROPE_TOKENS, -1)
  rope_NPR = rope_NIGR.swapaxes(1, 2).reshape(N, P, -1)
  return jnp.concatenate([x_NPC, rope_NPR.astype(jnp.float32)], axis=-1)
