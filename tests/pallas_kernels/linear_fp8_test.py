"""FP8 linears and SwiGLUs: the recipe written out, product by product."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear_fp8 import ops
from pallas_kernels.quantize_fp8 import ops as quantize_ops

_M, _K, _N = 256, 192, 160


def _draw(*shapes):
  """Activations around 1, and products of them with weights around 1, too."""
  rng = np.random.default_rng(0)
  size = lambda s: 1 if s[-2] == _M else _K**-0.5
  return [(size(s) * rng.normal(size=s)).astype(np.float32) for s in shapes]


def _rounding(scaling):
  """(rows, columns, blocks): float32 -> FP8 -> float32."""

  def make(tile):
    def rounded(x, power_of_two=False):
      used = tile if scaling == 'block' else quantize_ops.TENSOR
      out = quantize_ops.quantize(
        jnp.asarray(x), used, power_of_two=power_of_two
      )
      return np.asarray(out.dequantized())

    return rounded

  tiles = quantize_ops.ROWS, quantize_ops.COLUMNS, quantize_ops.BLOCKS
  return tuple(make(t) for t in tiles)


def _close(got, wanted):
  """Within 1e-3: where float32 sums differ, a few values round elsewhere.

  A product of something else is off by 3%, what FP8 leaves of it.
  """
  got, wanted = np.asarray(got), np.asarray(wanted)
  assert np.linalg.norm(got - wanted) <= 1e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('scaling', ops.SCALINGS)
def test_a_linear_and_its_gradients_are_the_three_products(
  scaling, power_of_two
):
  x, w, pull = _draw((_M, _K), (_K, _N), (_M, _N))
  rows, columns, blocks = _rounding(scaling)
  run = functools.partial(
    ops.linear, recipe=ops.Recipe(scaling), power_of_two=power_of_two
  )
  y, vjp = jax.vjp(run, x, w)
  grad_x, grad_w = vjp(pull)
  kept = rows(x, power_of_two)
  _close(y, kept @ blocks(w))
  _close(grad_x, rows(pull) @ blocks(w).T)
  _close(grad_w, columns(kept).T @ columns(pull))
  assert not np.allclose(y, x @ w, atol=1e-3)


@pytest.mark.parametrize('scaling', ops.SCALINGS)
def test_a_swiglu_keeps_fp8_and_computes_its_activation_again(scaling):
  x, gate, up, down, pull = _draw(
    (_M, _K), (_K, _N), (_K, _N), (_N, _K), (_M, _K)
  )
  rows, columns, blocks = _rounding(scaling)
  run = functools.partial(
    ops.swiglu, recipe=ops.Recipe(scaling), power_of_two=True
  )
  y, vjp = jax.vjp(run, x, gate, up, down)
  got = vjp(pull)
  act = lambda g, u: jax.nn.silu(g) * u
  kept = rows(x, True)
  g, u = kept @ blocks(gate), kept @ blocks(up)
  _close(y, rows(act(g, u)) @ blocks(down))
  g, u = rows(g), rows(u)
  h, activation = jax.vjp(act, g, u)
  grad_g, grad_u = activation(rows(pull, True) @ blocks(down).T)
  _close(got[0], rows(grad_g) @ blocks(gate).T + rows(grad_u) @ blocks(up).T)
  _close(got[1], columns(kept).T @ columns(grad_g))
  _close(got[2], columns(kept).T @ columns(grad_u))
  _close(got[3], columns(h).T @ columns(pull))


def test_what_is_kept_of_activations_is_fp8():
  x, gate, up, down = _draw((_M, _K), (_K, _N), (_K, _N), (_N, _K))
  _, vjp = jax.vjp(
    lambda x: ops.swiglu(x, gate, up, down, recipe=ops.Recipe()), x
  )
  kept = [a for a in jax.tree.leaves(vjp) if hasattr(a, 'dtype')]
  assert sum(a.dtype == jnp.float8_e4m3fn for a in kept) == 3
  wide = [a.shape for a in kept if a.dtype != jnp.float8_e4m3fn]
  assert (_M, _K) not in wide and (_M, _N) not in wide


@functools.partial(jax.jit, static_argnames=('function', 'recipe'))
def _with_gradients(args, pull, groups, function, recipe):
  """Arrays are arguments: XLA folds products of constant FP8 wrongly."""
  run = lambda *args: function(*args, groups, recipe=recipe, power_of_two=True)
  y, vjp = jax.vjp(run, *args)
  return y, *vjp(pull)


def _assert_kernels_do_the_same(*args):
  kernels = ops.Recipe(implementation='pallas', interpret=True)
  got = _with_gradients(*args, kernels)
  for one, wanted in zip(
    got, _with_gradients(*args, ops.Recipe()), strict=True
  ):
    _close(one, wanted)


def test_kernels_are_their_emulation_in_a_linear():
  *args, pull = _draw((_M, _K), (_K, _N), (_M, _N))
  _assert_kernels_do_the_same(args, pull, None, ops.linear)


@pytest.mark.slow
def test_kernels_are_their_emulation_in_groups():
  widths = (2, _K, _N), (2, _K, _N), (2, _N, _K)
  *args, pull = _draw((_M, _K), *widths, (_M, _K))
  groups = ops.Groups(jnp.int32([128, 128]), 128)
  _assert_kernels_do_the_same(args, pull, groups, ops.swiglu)


@pytest.mark.parametrize('scaling', ops.SCALINGS)
def test_groups_of_rows_have_linears_of_their_own(scaling):
  sizes = (128, 0, 256)  # An empty group in between; whole tiles.
  x, gate, up, down, pull = _draw(
    (384, _K), (3, _K, _N), (3, _K, _N), (3, _N, _K), (384, _K)
  )
  groups = ops.Groups(np.int32(sizes), 128)
  run = lambda *args: ops.swiglu(*args, groups, recipe=ops.Recipe(scaling))
  y, vjp = jax.vjp(run, x, gate, up, down)
  grads = vjp(pull)
  start = 0
  for i, size in enumerate(sizes):
    part = slice(start, start + size)
    start += size
    if not size:
      assert not any(np.asarray(g[i]).any() for g in grads[1:])
      continue
    # One scale for all groups' rows, where a tensor has one.
    if scaling == 'tensor':
      continue
    y_i, vjp_i = jax.vjp(
      functools.partial(ops.swiglu, recipe=ops.Recipe(scaling)),
      x[part],
      gate[i],
      up[i],
      down[i],
    )
    expected = vjp_i(pull[part])
    _close(y[part], y_i)
    _close(grads[0][part], expected[0])
    for got, wanted in zip(grads[1:], expected[1:]):
      _close(got[i], wanted)


def test_gradients_of_weights_are_float32_of_bfloat16_activations():
  x, w, pull = _draw((_M, _K), (_K, _N), (_M, _N))
  x, pull = jnp.asarray(x, jnp.bfloat16), jnp.asarray(pull, jnp.bfloat16)
  y, vjp = jax.vjp(functools.partial(ops.linear, recipe=ops.Recipe()), x, w)
  grad_x, grad_w = vjp(pull)
  assert (y.dtype, grad_x.dtype) == (jnp.bfloat16, jnp.bfloat16)
  assert grad_w.dtype == jnp.float32
  # No rounding to bfloat16 on the way.
  assert (np.asarray(grad_w) != grad_w.astype(jnp.bfloat16)).mean() > 0.9


def test_an_unknown_scaling_is_named():
  with pytest.raises(ValueError, match="scaling='channel'.*block, tensor"):
    ops.Recipe('channel')
