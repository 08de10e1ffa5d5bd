"""Flash attention: all forms and their gradients equal the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.flash_attention import ops

# (queries, keys, first query, heads, heads of keys, width, width of values)
SHAPES = (
  (12, 12, 0, 2, 2, 6, 4),
  (12, 12, 0, 4, 2, 5, 5),
  (4, 12, 4, 4, 1, 6, 4),  # The middle third of a row.
  (1, 1, 0, 1, 1, 2, 2),
)
SPLASH_SHAPES = (
  (256, 256, 0, 2, 2, 192, 128),  # MLA's widths.
  (128, 384, 256, 4, 2, 8, 8),
)


def _inputs(T, S, first, H, G, Q, U):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  # Two documents and padding; one document, begun twice as far.
  cuts_B = np.array([[S // 3, S - S // 6], [S // 2, S]])
  slot_S = np.arange(S)
  segment_BS = np.int32(1) + (slot_S >= cuts_B[:, :1])
  segment_BS = np.where(slot_S < cuts_B[:, 1:], segment_BS, 0).astype(np.int32)
  args = draw(2, T, H, Q), draw(2, S, G, Q), draw(2, S, G, U)
  segments = segment_BS[:, first : first + T], segment_BS
  return args, (*segments, np.int32(first)), draw(2, T, H, U)


@functools.partial(
  jax.jit, static_argnames=('scale', 'implementation', 'block', 'interpret')
)
def _with_gradients(args, where, pull_BTHU, **options):
  def run(q, k, v):
    return ops.flash_attention(q, k, v, *where, **options)

  out_BTHU, vjp = jax.vjp(run, *args)
  return out_BTHU, *vjp(pull_BTHU)


_CASES = [
  *(('chunked', block, shape) for shape in SHAPES for block in (1, 5, 128)),
  *(('splash', 128, shape) for shape in SPLASH_SHAPES),
]


@pytest.mark.parametrize(('implementation', 'block', 'shape'), _CASES)
def test_all_forms_and_their_vjps_are_the_references(
  implementation, block, shape
):
  inputs = _inputs(*shape)
  run = functools.partial(_with_gradients, *inputs, scale=0.7)
  actual = run(implementation=implementation, block=block, interpret=True)
  expected = run(implementation='reference')
  for got, wanted in zip(actual, expected, strict=True):
    size = np.abs(wanted).max()
    np.testing.assert_allclose(got / size, wanted / size, atol=1e-5)


def test_reference_is_a_loop_by_hand():
  (q, k, v), where, _ = _inputs(4, 12, 4, 4, 1, 6, 4)
  out = ops.flash_attention(
    q, k, v, *where, scale=0.7, implementation='reference'
  )
  segment_BT, segment_BS, first = where
  for b, t, h in ((0, 0, 0), (0, 3, 2), (1, 2, 3)):
    keys = [s for s in range(12) if s <= first + t]
    keys = [s for s in keys if segment_BS[b, s] == segment_BT[b, t]]
    weight = np.exp([0.7 * q[b, t, h] @ k[b, s, 0] for s in keys])
    by_hand_U = weight / weight.sum() @ v[b, keys, 0]
    np.testing.assert_allclose(out[b, t, h], by_hand_U, atol=1e-5)


def test_bfloat16_stays_near_float32():
  args, where, pull = _inputs(*SHAPES[1])
  half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (args, pull))
  actual = _with_gradients(
    half[0], where, half[1], scale=0.7, implementation='chunked', block=5
  )
  expected = _with_gradients(
    args, where, pull, scale=0.7, implementation='reference'
  )
  for got, wanted in zip(actual, expected, strict=True):
    assert got.dtype == jnp.bfloat16
    error = np.linalg.norm(np.float32(got) - wanted) / np.linalg.norm(wanted)
    assert error < 0.02


def test_memory_grows_with_the_block_not_with_the_keys():
  def temporaries(S, implementation):
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    segment_BS = jax.ShapeDtypeStruct((1, S), jnp.int32)
    args = (struct(1, S, 4, 8),) * 3
    lowered = _with_gradients.lower(
      args,
      (segment_BS, segment_BS, 0),
      struct(1, S, 4, 8),
      scale=1.0,
      implementation=implementation,
      block=16,
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes

  scores = 4 * 1024 * 1024 * 4
  assert temporaries(1024, 'chunked') < scores / 8
  assert temporaries(1024, 'reference') > scores


@pytest.mark.parametrize(
  ('shape', 'options', 'message'),
  [
    ((4, 4, 0, 3, 2, 2, 2), {'implementation': 'chunked'}, '2 heads of keys'),
    ((4, 4, 0, 1, 1, 2, 2), {'implementation': 'splash'}, '4 of 4 are not'),
    ((4, 4, 0, 1, 1, 2, 2), {'implementation': 'mosaic'}, "'mosaic'"),
    (
      (4, 4, 0, 1, 1, 2, 2),
      {'implementation': 'chunked', 'block': 0},
      'block=0 must be',
    ),
  ],
)
def test_what_does_not_fit_raises(shape, options, message):
  args, where, _ = _inputs(*shape)
  with pytest.raises(ValueError, match=message):
    ops.flash_attention(*args, *where, scale=1.0, **options)
