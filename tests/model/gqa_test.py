"""Grouped-query attention by numpy loops."""

import jax
import numpy as np

from r1jax.model import gqa


def test_each_group_of_heads_has_its_own_keys_and_values():
  rng = np.random.default_rng(0)
  T, S, H, G, Q, scale = 3, 4, 6, 2, 5, 0.3
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q_BTHQ, k_BSGQ, v_BSGQ = draw(1, T, H, Q), draw(1, S, G, Q), draw(1, S, G, Q)
  mask_BTS = rng.random((1, T, S)) < 0.6
  mask_BTS[..., 0] = True
  out_BTHQ = jax.jit(lambda *xs: gqa.grouped(*xs, scale=scale))(
    q_BTHQ, k_BSGQ, v_BSGQ, mask_BTS
  )
  for t in range(T):
    keys = np.flatnonzero(mask_BTS[0, t])
    for h in range(H):
      g = h // (H // G)
      score = np.exp(k_BSGQ[0, keys, g] @ q_BTHQ[0, t, h] * scale)
      expected = score / score.sum() @ v_BSGQ[0, keys, g]
      np.testing.assert_allclose(out_BTHQ[0, t, h], expected, atol=1e-5)
