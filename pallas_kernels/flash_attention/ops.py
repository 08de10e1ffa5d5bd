"""Causal attention within documents, in memory that is linear in length."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import reference, splash, xla

IMPLEMENTATIONS = ('chunked', 'splash', 'reference')


def flash_attention(
  q_BTHQ: jax.Array,
  k_BSGQ: jax.Array,
  v_BSGU: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  first_query: int | jax.Array = 0,
  *,
  scale: float,
  implementation: str,
  block: int = 128,
  interpret: bool = False,
) -> jax.Array:
  """Attention of queries to the keys of their document up to their own slot.

  out[t] = Σ_s softmax_s(scale · q[t] · k[s]) · v[s] over the slots
  s ≤ first_query + t with segment[s] = segment[t]

  Causal by slot is causal by position where each document's tokens stand in
  order. Documents need no ids in order, and padding (0) is one of them.

  Args:
    q_BTHQ: [B, T, H, Q] queries of slots first_query, first_query + 1, ….
    k_BSGQ: [B, S, G, Q] keys of all slots; head h reads head h // (H / G).
    v_BSGU: [B, S, G, U] values.
    segment_BT: int32 [B, T] document of each query, that of its slot.
    segment_BS: int32 [B, S] document of each key.
    first_query: Slot of the first query; for 'splash' a multiple of T.
    scale: Of the scores.
    implementation: 'chunked' (XLA, some keys at a time), 'splash' (JAX's kernel
      for TPUs; widths are padded to whole lanes of 128) or 'reference'.
    block: Keys at a time of 'chunked'; cost only.
    interpret: Run the kernel on a CPU.

  Returns:
    [B, T, H, U] in the dtype of v; softmax and sums in float32.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.
  """
  (T, H), (S, G) = q_BTHQ.shape[1:3], k_BSGQ.shape[1:3]
  if H % G:
    raise ValueError(f'{G} heads of keys do not divide {H} of queries')
  if block < 1:
    raise ValueError(f'block={block} must be at least 1')
  args = q_BTHQ, k_BSGQ, v_BSGU, segment_BT, segment_BS
  match implementation:
    case 'chunked':
      first_query = jnp.asarray(first_query, jnp.int32)
      return xla.flash_attention(*args, first_query, scale, min(block, S))
    case 'splash':
      if T % splash.LANES or S % T:
        raise ValueError(
          f'implementation=splash needs queries in multiples of '
          f'{splash.LANES} that divide the keys: {T} of {S} are not'
        )
      return splash.flash_attention(*args, first_query, scale, interpret)
    case 'reference':
      return reference.flash_attention(*args, first_query, scale)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )
