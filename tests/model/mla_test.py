"""Attention by numpy loops: the mask, the expanded and the absorbed core."""

import jax
import numpy as np

from r1jax.model import attention, mla


def _softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def test_mask_is_same_document_and_not_later():
  segment_BT = np.array([[1, 1, 2, 2, 0]])
  position_BT = np.array([[0, 1, 0, 1, 0]])
  mask_BTS = attention.attention_mask(
    segment_BT, position_BT, segment_BT, position_BT
  )
  expected = [
    [1, 0, 0, 0, 0],
    [1, 1, 0, 0, 0],
    [0, 0, 1, 0, 0],
    [0, 0, 1, 1, 0],
    [0, 0, 0, 0, 0],
  ]
  np.testing.assert_array_equal(mask_BTS[0], np.array(expected, bool))


def test_expanded_and_absorbed_cores_are_the_loop():
  """Query 3 sees nothing: finite, and otherwise unspecified."""
  rng = np.random.default_rng(0)
  B, T, S, H, N, U, C, R = 1, 4, 5, 2, 3, 4, 6, 2
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q_nope, q_rope = draw(B, T, H, N), draw(B, T, H, R)
  latent, k_rope = draw(B, S, C), draw(B, S, R)
  k_up, v_up = draw(C, H, N), draw(C, H, U)
  mask_BTS = rng.random((B, T, S)) < 0.6
  mask_BTS[0, :, 0], mask_BTS[0, 3] = True, False
  scale = 0.3
  k_BSHQ = np.concatenate(
    [
      np.einsum('BSC,CHN->BSHN', latent, k_up),
      np.broadcast_to(k_rope[:, :, None], (B, S, H, R)),
    ],
    axis=-1,
  )
  v_BSHU = np.einsum('BSC,CHU->BSHU', latent, v_up)
  q_BTHQ = np.concatenate([q_nope, q_rope], axis=-1)
  expanded = jax.jit(
    lambda q, k, v, mask: attention.attend(
      mla.scores(q, k, scale=scale), mask, v, 'BHTS,BSHU->BTHU'
    )
  )(q_BTHQ, k_BSHQ, v_BSHU, mask_BTS)
  q_BTHC = np.concatenate(
    [np.einsum('BTHN,CHN->BTHC', q_nope, k_up), q_rope], axis=-1
  )
  cache_BSC = np.concatenate([latent, k_rope], axis=-1)
  o_BTHC = jax.jit(lambda *xs: mla.absorbed(*xs, scale=scale))(
    q_BTHC, cache_BSC, mask_BTS
  )
  absorbed = np.einsum('BTHC,CHU->BTHU', o_BTHC[..., :C], v_up)
  for t in range(3):
    keys = np.flatnonzero(mask_BTS[0, t])
    for h in range(H):
      weight = _softmax(k_BSHQ[0, keys, h] @ q_BTHQ[0, t, h] * scale)
      expected = weight @ v_BSHU[0, keys, h]
      np.testing.assert_allclose(expanded[0, t, h], expected, atol=1e-5)
      np.testing.assert_allclose(absorbed[0, t, h], expected, atol=1e-5)
  assert np.isfinite(expanded).all() and np.isfinite(absorbed).all()
