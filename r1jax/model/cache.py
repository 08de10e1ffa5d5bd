"""Caches of the past behind one interface: append and read.

A cache is an argument and a result, a loop carry that XLA updates in place.
What each layer keeps of the tokens stands in rows that belong to the rows of
the batch. In a `Cache` each call of the model takes the next slots, the same
ones in every row; which of them hold a token, of which document and at which
position, stands beside them, so that rows may be ragged. In `Pages`, which a
kernel reads, each row's tokens follow each other without a gap.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Self

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode import ops as mla_decode_ops

# What a layer keeps of each token, by name.
Entry = dict[str, jax.Array]
PAGE = 128  # Tokens.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedLatents:
  """What `Pages` keep of a layer, as mla_decode wants it.

  Attributes:
    cache: Of all rows.
    table_Bn: int32 pages of each row.
    length_B: int32 tokens of each row before this call of the model.
  """

  cache: mla_decode_ops.LatentCache
  table_Bn: jax.Array
  length_B: jax.Array


@dataclasses.dataclass(frozen=True)
class Base(abc.ABC):
  """What all caches have.

  Attributes:
    layers: For each layer named arrays [B, …], or named arrays [L, B, …] for
      scanned layers.
  """

  layers: tuple[Entry, ...] | Entry

  @abc.abstractmethod
  def advance(self, segment_BT: jax.Array, position_BT: jax.Array) -> Self:
    """Takes room for T tokens; call once per model call, after `append`s."""

  @abc.abstractmethod
  def append(
    self, layer: int | jax.Array, entry: Entry, *, is_first: bool
  ) -> Self:
    """Writes a layer's [B, T, …] where `advance` takes room.

    Args:
      layer: Its number.
      entry: What is kept of this call's tokens.
      is_first: The cache is empty.
    """

  @abc.abstractmethod
  def read(self, layer: int | jax.Array) -> Entry | PagedLatents:
    """All that a layer keeps."""

  @abc.abstractmethod
  def grown(self, num_slots: int) -> Self:
    """With room for at least so many tokens a row."""

  @abc.abstractmethod
  def at_slot(self, slot: jax.Array) -> Self:
    """Goes on at a slot, where rows have no places of their own."""

  def unstacked(self) -> Self:
    """With arrays of each layer's own, as layers that are not scanned have."""
    if isinstance(self.layers, tuple):
      return self
    count = jax.tree.leaves(self.layers)[0].shape[0]
    one = lambda i: jax.tree.map(lambda x: x[i], self.layers)
    return dataclasses.replace(self, layers=tuple(map(one, range(count))))

  def repeated(self, copies: int) -> Self:
    """Each row so many times, one after the other; not of stacked layers."""
    return jax.tree.map(
      lambda x: jnp.repeat(x, copies, axis=0) if x.ndim else x, self
    )

  def _of(self, layer):
    """A layer's arrays."""
    if isinstance(self.layers, tuple):
      return self.layers[layer]
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False),
      self.layers,
    )

  def _changed(self, layer, change):
    """After `change` of a layer's arrays, given where in them it begins."""
    if isinstance(self.layers, tuple):
      new = change(self.layers[layer], ())
      layers = (*self.layers[:layer], new, *self.layers[layer + 1 :])
    else:
      layers = change(self.layers, (layer,))
    return dataclasses.replace(self, layers=layers)

  def _padded(self, behind):
    """Layers with so much more behind their rows' first axis."""
    axis = 1 if isinstance(self.layers, tuple) else 2
    return jax.tree.map(lambda x: _pad(x, axis, behind), self.layers)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache(Base):
  """What attention keeps of the past: 576 numbers per token and layer in V3.

  Attributes:
    layers: Arrays [B, S, …] or [L, B, S, …]. MLA keeps 'latent' (the normed
      latent, then the rotated shared key), its indexer 'index' as well;
      grouped-query attention 'key' and 'value'.
    segment_BS: int32 document of each slot; 0 is an empty slot.
    position_BS: int32 position of each slot inside its document.
    slot: int32 scalar, the next free slot.
  """

  segment_BS: jax.Array
  position_BS: jax.Array
  slot: jax.Array

  def advance(self, segment_BT: jax.Array, position_BT: jax.Array) -> Self:
    at = 0, self.slot
    return dataclasses.replace(
      self,
      segment_BS=_update(self.segment_BS, at, segment_BT),
      position_BS=_update(self.position_BS, at, position_BT),
      slot=self.slot + segment_BT.shape[1],
    )

  def append(
    self, layer: int | jax.Array, entry: Entry, *, is_first: bool
  ) -> Self:
    del is_first  # The slot is known.
    return self._changed(
      layer, lambda old, at: _update(old, (*at, 0, self.slot), entry)
    )

  def read(self, layer: int | jax.Array) -> Entry:
    """All slots of a layer, [B, S, …] each."""
    return self._of(layer)

  def grown(self, num_slots: int) -> Self:
    behind = num_slots - self.segment_BS.shape[1]
    if behind <= 0:
      return self
    return dataclasses.replace(
      self,
      layers=self._padded(behind),
      segment_BS=_pad(self.segment_BS, 1, behind),
      position_BS=_pad(self.position_BS, 1, behind),
    )

  def at_slot(self, slot: jax.Array) -> Self:
    return dataclasses.replace(self, slot=slot)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages(Base):
  """MLA's latents in pages, row after row, for mla_decode.

  A row has one document. Tokens that are none (segment 0) may follow the others
  of a call; the next call's are written over them.

  Attributes:
    layers: 'latent' [B, n, PAGE, C] and 'rope' [B, n, PAGE / 4, 4 · R], see
      mla_decode's `LatentCache`; with L before B for scanned layers.
    length_B: int32 tokens of each row.
  """

  length_B: jax.Array

  def advance(self, segment_BT: jax.Array, position_BT: jax.Array) -> Self:
    del position_BT
    return dataclasses.replace(
      self, length_B=self.length_B + (segment_BT > 0).sum(1)
    )

  def append(
    self, layer: int | jax.Array, entry: Entry, *, is_first: bool
  ) -> Self:
    latent_BTC, rope_BTR = entry['latent'], entry['rope']
    B, T, C = latent_BTC.shape
    if is_first:
      pages = _pages(latent_BTC, rope_BTR)
      return self._changed(layer, lambda old, at: _update(old, (*at, 0), pages))
    token_BT = self.length_B[:, None] + jnp.arange(T)
    row_B1, page_BT, token_BT = (
      jnp.arange(B)[:, None],
      token_BT // PAGE,
      token_BT % PAGE,
    )
    num_rows, R = PAGE // mla_decode_ops.ROPE_TOKENS, rope_BTR.shape[-1]
    lane_BTR = (token_BT // num_rows * R)[..., None] + jnp.arange(R)
    of_rope = (
      row_B1[..., None],
      page_BT[..., None],
      (token_BT % num_rows)[..., None],
    )

    def change(old, at):
      latent, rope = old['latent'], old['rope']
      return {
        'latent': latent.at[*at, row_B1, page_BT, token_BT].set(
          latent_BTC.astype(latent.dtype)
        ),
        'rope': rope.at[*at, *of_rope, lane_BTR].set(
          rope_BTR.astype(rope.dtype)
        ),
      }

    return self._changed(layer, change)

  def read(self, layer: int | jax.Array) -> PagedLatents:
    """All pages of a layer."""
    old = self._of(layer)
    B, n = old['latent'].shape[:2]
    flat = lambda x: x.reshape(B * n, *x.shape[2:])
    return PagedLatents(
      mla_decode_ops.LatentCache(flat(old['latent']), flat(old['rope'])),
      jnp.arange(B * n, dtype=jnp.int32).reshape(B, n),
      self.length_B,
    )

  def grown(self, num_slots: int) -> Self:
    axis = 1 if isinstance(self.layers, tuple) else 2
    behind = -(-num_slots // PAGE) - jax.tree.leaves(self.layers)[0].shape[axis]
    if behind <= 0:
      return self
    return dataclasses.replace(self, layers=self._padded(behind))

  def at_slot(self, slot: jax.Array) -> Self:
    del slot  # Rows have places of their own.
    return self


def _pages(latent_BTC, rope_BTR):
  """Whole pages of tokens from the first."""
  B, T, C = latent_BTC.shape
  both_BTE = jnp.concatenate([latent_BTC, rope_BTR], axis=-1)
  both_BTE = _pad(both_BTE, 1, -T % PAGE)
  packed = mla_decode_ops.pack(
    both_BTE.reshape(-1, PAGE, both_BTE.shape[-1]), C
  )
  split = lambda x: x.reshape(B, -1, *x.shape[1:])
  return {
    'latent': split(packed.latent_NPC),
    'rope': split(packed.rope_NIL),
  }


def _update(old, first, new):
  """Arrays with new ones in them that begin at `first`, 0 on other axes."""

  def one(old, new):
    new = new[(None,) * (old.ndim - new.ndim)].astype(old.dtype)
    at = (*first, *(0,) * (old.ndim - len(first)))
    return jax.lax.dynamic_update_slice(old, new, at)

  return jax.tree.map(one, old, new)


def _pad(x, axis, behind):
  return jnp.pad(x, [(0, behind if i == axis else 0) for i in range(x.ndim)])


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
  return Cache(
    layers=_empty(num_layers, (batch, length), shapes, dtype, stacked),
    segment_BS=jnp.zeros((batch, length), jnp.int32),
    position_BS=jnp.zeros((batch, length), jnp.int32),
    slot=jnp.zeros((), jnp.int32),
  )


def make_pages(
  *,
  num_layers: int,
  batch: int,
  length: int,
  latent_dim: int,
  rope_dim: int,
  dtype: jnp.dtype,
  stacked: bool,
) -> Pages:
  """Empty pages for `length` tokens a row; `stacked` for scanned layers.

  Args:
    num_layers: Layers that keep something.
    batch: Rows.
    length: Tokens.
    latent_dim: C, a multiple of mla_decode's SCALE_CHANNELS.
    rope_dim: R.
    dtype: Of what is kept.
    stacked: One array for all layers.
  """
  together = mla_decode_ops.ROPE_TOKENS
  shapes = {
    'latent': (PAGE, latent_dim),
    'rope': (PAGE // together, together * rope_dim),
  }
  lead = batch, -(-length // PAGE)
  return Pages(
    layers=_empty(num_layers, lead, shapes, dtype, stacked),
    length_B=jnp.zeros((batch,), jnp.int32),
  )


def _empty(num_layers, lead, shapes, dtype, stacked):
  one = lambda *layers: {
    name: jnp.zeros((*layers, *lead, *shape), dtype)
    for name, shape in shapes.items()
  }
  return one(num_layers) if stacked else tuple(one() for _ in range(num_layers))
