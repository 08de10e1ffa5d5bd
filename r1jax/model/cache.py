"""Latent key-value caches behind one interface: append and read.

A cache is an argument and a result, a loop carry that XLA updates in place.
Each call of the model takes the next slots for its tokens, the same slots in
every row; which of them hold a token, of which document and at which
position, stands beside the latents, so that rows may be ragged.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCache:
  """What MLA keeps of the past: 576 numbers per token and layer in V3.

  Attributes:
    layers: One array per layer [B, S, C + R] (the normed latent, then the
      rotated shared key), or one array [L, B, S, C + R] for scanned layers.
    segment_BS: int32 document of each slot; 0 is an empty slot.
    position_BS: int32 position of each slot inside its document.
    slot: int32 scalar, the next free slot.
  """

  layers: tuple[jax.Array, ...] | jax.Array
  segment_BS: jax.Array
  position_BS: jax.Array
  slot: jax.Array

  def advance(
    self, segment_BT: jax.Array, position_BT: jax.Array
  ) -> 'LatentCache':
    """Takes the next T slots; call once per model call, after `append`s."""
    place = lambda old, new: jax.lax.dynamic_update_slice(
      old, new.astype(old.dtype), (0, self.slot)
    )
    return dataclasses.replace(
      self,
      segment_BS=place(self.segment_BS, segment_BT),
      position_BS=place(self.position_BS, position_BT),
      slot=self.slot + segment_BT.shape[1],
    )

  def append(
    self, layer: int | jax.Array, latent_BTC: jax.Array
  ) -> 'LatentCache':
    """Writes a layer's latents into the slots that `advance` takes."""
    if isinstance(self.layers, tuple):
      old = self.layers[layer]
      new = jax.lax.dynamic_update_slice(
        old, latent_BTC.astype(old.dtype), (0, self.slot, 0)
      )
      layers = (*self.layers[:layer], new, *self.layers[layer + 1 :])
    else:
      layers = jax.lax.dynamic_update_slice(
        self.layers,
        latent_BTC[None].astype(self.layers.dtype),
        (layer, 0, self.slot, 0),
      )
    return dataclasses.replace(self, layers=layers)

  def grown(self, num_slots: int) -> 'LatentCache':
    """With more empty slots at the end."""
    if not num_slots:
      return self
    axis = 1 if isinstance(self.layers, tuple) else 2
    grow = lambda x, axis: jnp.pad(
      x, [(0, num_slots if i == axis else 0) for i in range(x.ndim)]
    )
    return dataclasses.replace(
      self,
      layers=jax.tree.map(lambda x: grow(x, axis), self.layers),
      segment_BS=grow(self.segment_BS, 1),
      position_BS=grow(self.position_BS, 1),
    )

  def read(self, layer: int | jax.Array) -> jax.Array:
    """All slots of a layer, [B, S, C + R]."""
    if isinstance(self.layers, tuple):
      return self.layers[layer]
    return jax.lax.dynamic_index_in_dim(self.layers, layer, keepdims=False)


def make_latent_cache(
  *,
  num_layers: int,
  batch: int,
  length: int,
  width: int,
  dtype: jnp.dtype,
  stacked: bool,
) -> LatentCache:
  """An empty cache of `length` slots; `stacked` for scanned layers."""
  shape = (batch, length, width)
  if stacked:
    layers = jnp.zeros((num_layers, *shape), dtype)
  else:
    layers = tuple(jnp.zeros(shape, dtype) for _ in range(num_layers))
  return LatentCache(
    layers=layers,
    segment_BS=jnp.zeros((batch, length), jnp.int32),
    position_BS=jnp.zeros((batch, length), jnp.int32),
    slot=jnp.zeros((), jnp.int32),
  )
