"""Caches of the past behind one interface: append and read.

A cache is an argument and a result, a loop carry that XLA updates in place.
Each call of the model takes the next slots for its tokens, the same slots in
every row; which of them hold a token, of which document and at which
position, stands beside what is kept of it, so that rows may be ragged.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

# What a layer keeps of each token, by name.
Entry = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What attention keeps of the past: 576 numbers per token and layer in V3.

  Attributes:
    layers: For each layer named arrays [B, S, …], or named arrays
      [L, B, S, …] for scanned layers. MLA keeps 'latent' (the normed latent,
      then the rotated shared key), its indexer 'index' as well; grouped-query
      attention 'key' and 'value'.
    segment_BS: int32 document of each slot; 0 is an empty slot.
    position_BS: int32 position of each slot inside its document.
    slot: int32 scalar, the next free slot.
  """

  layers: tuple[Entry, ...] | Entry
  segment_BS: jax.Array
  position_BS: jax.Array
  slot: jax.Array

  def advance(self, segment_BT: jax.Array, position_BT: jax.Array) -> 'Cache':
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

  def append(self, layer: int | jax.Array, entry: Entry) -> 'Cache':
    """Writes a layer's [B, T, …] into the slots that `advance` takes."""
    if isinstance(self.layers, tuple):

      def place(old, new):
        at = (0, self.slot, *(0,) * (old.ndim - 2))
        return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at)

      new = jax.tree.map(place, self.layers[layer], entry)
      layers = (*self.layers[:layer], new, *self.layers[layer + 1 :])
    else:

      def place(old, new):
        at = (layer, 0, self.slot, *(0,) * (old.ndim - 3))
        return jax.lax.dynamic_update_slice(
          old, new[None].astype(old.dtype), at
        )

      layers = jax.tree.map(place, self.layers, entry)
    return dataclasses.replace(self, layers=layers)

  def grown(self, num_slots: int) -> 'Cache':
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

  def unstacked(self) -> 'Cache':
    """With arrays of each layer's own, as layers that are not scanned have."""
    if isinstance(self.layers, tuple):
      return self
    count = jax.tree.leaves(self.layers)[0].shape[0]
    one = lambda i: jax.tree.map(lambda x: x[i], self.layers)
    return dataclasses.replace(self, layers=tuple(map(one, range(count))))

  def repeated(self, copies: int) -> 'Cache':
    """Each row so many times, one after the other; not of stacked layers."""
    return jax.tree.map(
      lambda x: jnp.repeat(x, copies, axis=0) if x.ndim else x, self
    )

  def read(self, layer: int | jax.Array) -> Entry:
    """All slots of a layer, [B, S, …] each."""
    if isinstance(self.layers, tuple):
      return self.layers[layer]
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False),
      self.layers,
    )


def make_cache(
  *,
  num_layers: int,
  batch: int,
  length: int,
  shapes: Mapping[str, tuple[int, ...]],
  dtype: jnp.dtype,
  stacked: bool,
) -> Cache:
  """An empty cache of `length` slots; `stacked` for scanned layers.

  Args:
    num_layers: Layers that keep something.
    batch: Rows.
    length: Slots.
    shapes: By name, the shape of what is kept of one token.
    dtype: Of what is kept.
    stacked: One array for all layers.
  """
  empty = lambda *lead: {
    name: jnp.zeros((*lead, batch, length, *shape), dtype)
    for name, shape in shapes.items()
  }
  return Cache(
    layers=(
      empty(num_layers)
      if stacked
      else tuple(empty() for _ in range(num_layers))
    ),
    segment_BS=jnp.zeros((batch, length), jnp.int32),
    position_BS=jnp.zeros((batch, length), jnp.int32),
    slot=jnp.zeros((), jnp.int32),
  )
