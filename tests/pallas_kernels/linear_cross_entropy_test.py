"""Cross entropy of a linear head: the kernel is the reference, in parts too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_cross_entropy import blocks, ops

_BLOCKS = blocks.BlockSizes(tokens=8, columns=128)

# (tokens, D, V): whole tiles, two parts of the width, edges, one of each.
SHAPES = ((16, 32, 256), (8, 2048, 128), (19, 24, 300), (1, 8, 1), (9, 16, 129))


def _inputs(m, D, V, size=1.0):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  target = rng.integers(0, V, m).astype(np.int32)
  target[-1] = V - 1  # In the last tile.
  return size * draw(m, D), draw(D, V), target, draw(m)


@functools.partial(
  jax.jit, static_argnames=('implementation', 'temperature', 'interpret')
)
def _run(x_mD, w_DV, target_m, pull_m, **options):
  run = lambda x, w: ops.linear_cross_entropy(
    x, w, target_m, blocks=_BLOCKS, **options
  )
  (logp_m, entropy_m), vjp = jax.vjp(run, x_mD, w_DV)
  return logp_m, entropy_m, *vjp((pull_m, jnp.ones_like(entropy_m)))


@pytest.mark.parametrize('temperature', [1.0, 0.7])
@pytest.mark.parametrize('shape', SHAPES)
def test_values_and_gradients_are_the_references(shape, temperature):
  args = _inputs(*shape)
  run = functools.partial(_run, *args, temperature=temperature)
  out = run(implementation='pallas', interpret=True)
  expected = run(implementation='reference')
  for got, wanted in zip(out, expected, strict=True):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_large_scores_overflow_nothing():
  args = _inputs(16, 32, 256, size=300.0)
  out = _run(*args, temperature=1.0, implementation='pallas', interpret=True)
  expected = _run(*args, temperature=1.0, implementation='reference')
  for got, wanted in zip(out, expected, strict=True):
    assert np.isfinite(got).all()
    scale = np.abs(np.asarray(wanted)).max() + 1e-3
    np.testing.assert_allclose(got / scale, wanted / scale, atol=1e-5)


def test_columns_on_two_devices_are_one_head():
  """Exchanges as they are on a mesh, over an axis of two halves."""
  x, w, target, pull = _inputs(16, 32, 256)

  def half(w_DV, first, pull_m):
    psum = functools.partial(jax.lax.psum, axis_name='i')
    run = lambda x, w: ops.linear_cross_entropy(
      x,
      w,
      jnp.asarray(target),
      first=first,
      total=psum,
      largest=functools.partial(jax.lax.pmax, axis_name='i'),
      implementation='pallas',
      blocks=_BLOCKS,
      interpret=True,
    )
    (logp, entropy), vjp = jax.vjp(run, jnp.asarray(x), w_DV)
    grad_x, grad_w = vjp((pull_m, jnp.zeros_like(entropy)))
    return logp, entropy, psum(grad_x), grad_w

  halves = jnp.stack([w[:, :100], w[:, 100:200]])
  target[:] = target % 200
  out = jax.vmap(half, (0, 0, None), axis_name='i')(
    halves, jnp.int32([0, 100]), pull
  )
  expected = _run(
    x, w[:, :200], target, pull, temperature=1.0, implementation='reference'
  )
  for got, wanted in zip(out[:3], expected[:3]):
    for device in got:
      np.testing.assert_allclose(device, wanted, rtol=2e-5, atol=2e-5)
  np.testing.assert_allclose(
    np.concatenate(out[3], axis=1), expected[3], rtol=2e-5, atol=2e-5
  )


def test_no_two_steps_race():
  args = _inputs(16, 8, 256)
  params = pltpu.InterpretParams(detect_races=True)
  run = functools.partial(
    ops.linear_cross_entropy,
    implementation='pallas',
    blocks=_BLOCKS,
    interpret=params,
  )
  (logp, _), vjp = jax.vjp(lambda x, w: run(x, w, args[2]), *args[:2])
  assert interpret_pallas_call.races.races_found is False
  grads = vjp((args[3], np.zeros_like(args[3])))
  assert interpret_pallas_call.races.races_found is False
  expected = _run(*args, temperature=1.0, implementation='reference')
  np.testing.assert_allclose(logp, expected[0], rtol=2e-5, atol=2e-5)
  for got, wanted in zip(grads, expected[2:]):
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


def test_what_does_not_fit_is_named():
  x, w, target, _ = _inputs(8, 8, 16)
  with pytest.raises(ValueError, match='D=8 of the hidden .* is not D=7 of'):
    ops.linear_cross_entropy(x, w[:7], target, implementation='pallas')
  with pytest.raises(ValueError, match="implementation='xla'"):
    ops.linear_cross_entropy(x, w, target, implementation='xla')
  with pytest.raises(ValueError, match='columns=100 must be a multiple of 128'):
    blocks.BlockSizes(8, 100)
  with pytest.raises(ValueError, match='tokens=4 must be a multiple of 8'):
    blocks.BlockSizes(4, 128)
