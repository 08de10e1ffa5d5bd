"""Grouped matmul: xla equals the reference."""

import functools

import jax
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import ops
from tests import quick

# (k, n, groups, rows a block, group of each block)
SHAPES = (
  (4, 6, 3, 2, (0, 0, 1, 2)),
  (4, 6, 3, 2, (0, 2, 2, 2)),  # Group 1 is empty.
  (5, 3, 2, 1, (1,)),  # A single row.
  (3, 3, 1, 4, (0, 0)),
)


@functools.partial(quick.jit, static_argnames='implementation')
def _with_gradients(x_mk, w_gkn, group_of_block, pull_mn, *, implementation):
  def run(x_mk, w_gkn):
    return ops.grouped_matmul(
      x_mk, w_gkn, group_of_block, implementation=implementation
    )

  out_mn, vjp = jax.vjp(run, x_mk, w_gkn)
  return out_mn, vjp(pull_mn)


@pytest.mark.parametrize(('k', 'n', 'g', 'block', 'groups'), SHAPES)
def test_xla_and_its_vjp_are_the_references(k, n, g, block, groups):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  m = block * len(groups)
  args = (draw(m, k), draw(g, k, n), np.int32(groups), draw(m, n))
  out_mn, grads = _with_gradients(*args, implementation='xla')
  expected_mn, expected = _with_gradients(*args, implementation='reference')
  np.testing.assert_allclose(out_mn, expected_mn, atol=1e-5)
  for grad, other in zip(grads, expected, strict=True):
    np.testing.assert_allclose(grad, other, atol=1e-5)
  for i in range(m):
    by_hand_n = args[0][i] @ args[1][groups[i // block]]
    np.testing.assert_allclose(out_mn[i], by_hand_n, atol=1e-5)


@pytest.mark.parametrize(
  ('x_shape', 'w_shape', 'num_blocks', 'implementation', 'message'),
  [
    ((5, 4), (3, 4, 6), 2, 'xla', '5 rows are no whole number'),
    ((4, 5), (3, 4, 6), 2, 'xla', 'k=5 of the rows is not k=4'),
    ((4, 4), (3, 4, 6), 2, 'mosaic', "implementation='mosaic'"),
  ],
)
def test_what_does_not_fit_raises(
  x_shape, w_shape, num_blocks, implementation, message
):
  with pytest.raises(ValueError, match=message):
    ops.grouped_matmul(
      np.zeros(x_shape),
      np.zeros(w_shape),
      np.zeros(num_blocks, np.int32),
      implementation=implementation,
    )
