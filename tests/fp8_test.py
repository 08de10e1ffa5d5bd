"""FP8 tiles against the known answers and by hand."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import fp8

_KNOWN = json.loads(
  (pathlib.Path(__file__).parent / 'data' / 'known_answers.json').read_text()
)


@pytest.mark.parametrize('kind', ['fp32', 'ue8m0'])
def test_tile_of_the_known_answer(kind):
  known = _KNOWN['fp8_tile']
  x = np.zeros((1, fp8.TILE), np.float32)
  x[0, :8] = known['x_first8']
  q, scale = fp8.quantize_tiles(x, power_of_two=kind == 'ue8m0')
  np.testing.assert_allclose(scale, [[known[kind]['scale']]], rtol=1e-7)
  np.testing.assert_array_equal(
    np.asarray(q, np.float32)[0, :8], known[kind]['q']
  )
  np.testing.assert_allclose(
    fp8.dequantize_tiles(q, scale, jnp.float32)[0, :8],
    known[kind]['dq'],
    rtol=1e-6,
  )


def test_a_tile_of_zeros_has_the_least_scale():
  q, scale = fp8.quantize_tiles(jnp.zeros((2, fp8.TILE)))
  np.testing.assert_allclose(scale, _KNOWN['fp8_zero_tile']['scale'], rtol=1e-6)
  assert not np.asarray(q, np.float32).any()


def test_casts_of_the_known_answer():
  known = _KNOWN['e4m3_cast']
  cast = jnp.float32(known['inp']).astype(fp8.E4M3)
  np.testing.assert_array_equal(np.asarray(cast, np.float32), known['out'])


def test_each_tile_has_its_own_scale_the_narrow_last_one_too():
  rng = np.random.default_rng(0)
  size = np.repeat([1e-3, 1.0, 1e3], [128, 128, 44])
  x = (rng.normal(size=(5, 300)) * size).astype(np.float32)
  for power_of_two in (False, True):
    q, scale = fp8.quantize_tiles(x, power_of_two=power_of_two)
    assert q.shape == x.shape and scale.shape == (5, 3)
    back = fp8.dequantize_tiles(q, scale, jnp.float32)
    for tile in np.split(np.arange(300), [128, 256]):
      largest = np.abs(x[:, tile]).max(1, keepdims=True)
      # Half of the distance of e4m3 numbers next to its largest.
      limit = largest / 448 * 16 * (2 if power_of_two else 1)
      assert (np.abs(back[:, tile] - x[:, tile]) <= limit).all()
    if power_of_two:
      mantissa, _ = np.frexp(np.asarray(scale))
      assert (mantissa == 0.5).all()
      # The least that holds: a half of it would not.
      amax = np.stack([np.abs(t).max(1) for t in np.split(x, [128, 256], 1)], 1)
      assert (amax <= 448 * np.asarray(scale)).all()
      assert (amax > 224 * np.asarray(scale)).all()
