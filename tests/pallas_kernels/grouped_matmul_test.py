"""Grouped matmul: all forms and their gradients equal the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import megablox, ops

# (k, n, rows, rows a block, blocks of each group)
SHAPES = (
  (4, 6, 8, 2, (2, 1, 1)),
  (4, 6, 8, 2, (1, 0, 3)),  # Group 1 is empty.
  (4, 6, 12, 2, (1, 0, 3)),  # Two blocks hold padding only.
  (5, 3, 1, 1, (0, 1)),  # A single row.
  (3, 3, 8, 4, (2,)),
  (3, 3, 8, 4, (0, 0)),  # Nothing but padding.
)


@functools.partial(
  jax.jit, static_argnames=('block', 'implementation', 'interpret')
)
def _with_gradients(x_mk, w_gkn, size_g, pull_mn, **options):
  def run(x_mk, w_gkn):
    return ops.grouped_matmul(x_mk, w_gkn, size_g, **options)

  out_mn, vjp = jax.vjp(run, x_mk, w_gkn)
  return out_mn, vjp(pull_mn)


def _inputs(m, k, n, g):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(m, k), draw(g, k, n), draw(m, n)


@pytest.mark.parametrize('implementation', ['xla', 'megablox'])
@pytest.mark.parametrize(('k', 'n', 'm', 'block', 'blocks'), SHAPES)
def test_all_forms_and_their_vjps_are_the_references(
  k, n, m, block, blocks, implementation
):
  x_mk, w_gkn, pull_mn = _inputs(m, k, n, len(blocks))
  size_g = block * np.int32(blocks)
  rows = size_g.sum()
  # What comes after the last group is never read: combine pulls back zeros.
  pull_mn[rows:] = 0
  run = functools.partial(
    _with_gradients, x_mk, w_gkn, size_g, pull_mn, block=block, interpret=True
  )
  out_mn, (grad_mk, grad_gkn) = run(implementation=implementation)
  expected_mn, (expected_mk, expected_gkn) = run(implementation='reference')
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(out_mn[:rows], expected_mn[:rows])
  close(grad_mk[:rows], expected_mk[:rows])
  close(grad_gkn, expected_gkn)
  assert np.isfinite(out_mn[-1]).all()
  assert np.isfinite(grad_mk[-1]).all()
  group_m = np.repeat(np.arange(len(blocks)), size_g)
  for i, group in enumerate(group_m):
    close(out_mn[i], x_mk[i] @ w_gkn[group])


def test_megablox_tiles_widths_that_are_no_whole_tiles():
  k, n = 1280, 1408  # Two tiles of 640, of 768 and 640; three of 512 each.
  x_mk, w_gkn, pull_mn = _inputs(4, k, n, 2)
  run = functools.partial(
    _with_gradients, x_mk, w_gkn, np.int32([0, 4]), pull_mn, block=4
  )
  out = run(implementation='megablox', interpret=True)
  expected = run(implementation='reference')
  for got, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
    np.testing.assert_allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize(
  ('size', 'most', 'tile'),
  [(7168, 1024, 1024), (2048, 1024, 1024), (1408, 1024, 768), (40, 1024, 40)],
)
def test_tiles_are_equal_and_whole_lanes(size, most, tile):
  assert megablox._tile(size, most) == tile


def test_megablox_accumulates_bfloat16_in_float32():
  x_mk, w_gkn, pull_mn = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), _inputs(8, 256, 4, 2)
  )
  size_g = np.int32([4, 4])
  out = _with_gradients(
    x_mk,
    w_gkn,
    size_g,
    pull_mn,
    block=4,
    implementation='megablox',
    interpret=True,
  )
  expected = _with_gradients(
    *(jnp.float32(x) for x in (x_mk, w_gkn)),
    size_g,
    jnp.float32(pull_mn),
    block=4,
    implementation='reference',
  )
  for got, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), wanted, rtol=2**-7, atol=0.01)


@pytest.mark.parametrize(
  ('x_shape', 'w_shape', 'implementation', 'message'),
  [
    ((5, 4), (3, 4, 6), 'xla', '5 rows are no whole number of blocks of 2'),
    ((4, 5), (3, 4, 6), 'xla', 'k=5 of the rows is not k=4'),
    ((4, 4), (3, 4, 6), 'mosaic', "implementation='mosaic'"),
  ],
)
def test_what_does_not_fit_raises(x_shape, w_shape, implementation, message):
  with pytest.raises(ValueError, match=message):
    ops.grouped_matmul(
      np.zeros(x_shape),
      np.zeros(w_shape),
      np.zeros(3, np.int32),
      block=2,
      implementation=implementation,
    )
