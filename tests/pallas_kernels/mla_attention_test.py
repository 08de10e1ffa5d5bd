"""MLA attention: the kernels and their gradients equal the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as ipc
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import reference as flash_reference
from pallas_kernels.mla_attention import blocks as blocks_lib
from pallas_kernels.mla_attention import cases, ops

N, R, U = 16, 8, 12
SCALE = 0.3

# Parts of 2 blocks of queries and of keys, and so 3 of each for 75 slots;
# backward two parts of 3 blocks of queries.
SMALL = blocks_lib.BlockSizes(
  heads=2,
  queries=16,
  keys=16,
  resident_queries=32,
  resident_keys=32,
  grad_heads=2,
  grad_queries=16,
  grad_keys=16,
  grad_resident_queries=48,
)
# Blocks of queries and of keys that differ, all of them resident.
UNEVEN = blocks_lib.BlockSizes(
  heads=1,
  queries=32,
  keys=16,
  resident_queries=128,
  resident_keys=128,
  grad_heads=1,
  grad_queries=16,
  grad_keys=32,
  grad_resident_queries=128,
)

# Lengths of a row's documents by number; 0 is padding.
ONE = (((1, 75),), ((1, 75),))
PACKED = (((1, 20), (2, 36), (3, 10), (0, 9)), ((1, 64), (2, 11)))
# Numbers in no order, and a document of a single token.
SHUFFLED = (((7, 30), (2, 1), (5, 44)), ((0, 40), (9, 35)))

# (rows of documents, first query, number of queries, heads, block sizes)
SHAPES = (
  (ONE, 0, 75, 1, SMALL),
  (PACKED, 0, 75, 2, UNEVEN),
  (PACKED, 37, 20, 2, SMALL),  # A part of the row that no block begins with.
  (SHUFFLED, 0, 75, 3, UNEVEN),
  (PACKED, 74, 1, 1, UNEVEN),  # A single query.
)


def _segments(rows):
  return np.int32([np.concatenate([[d] * n for d, n in row]) for row in rows])


def _inputs(rows, first_query, T, H, dtype=np.float32):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
  segment_BS = _segments(rows)
  B, S = segment_BS.shape
  arrays = (
    draw(B, T, H, N + R),
    draw(B, S, H, N),
    draw(B, S, R),
    draw(B, S, H, U),
  )
  segment_BT = segment_BS[:, first_query : first_query + T]
  return arrays, draw(B, T, H, U), segment_BT, segment_BS


@functools.partial(
  jax.jit, static_argnames=('implementation', 'blocks', 'interpret')
)
def _with_gradients(
  arrays, pull_BTHU, segment_BT, segment_BS, first_query, **options
):
  def run(*arrays):
    return ops.mla_attention(
      *arrays, segment_BT, segment_BS, first_query, scale=SCALE, **options
    )

  out_BTHU, vjp = jax.vjp(run, *arrays)
  return out_BTHU, *vjp(pull_BTHU)


@pytest.mark.parametrize(('rows', 'first_query', 'T', 'H', 'blocks'), SHAPES)
def test_output_and_gradients_are_the_references(
  rows, first_query, T, H, blocks
):
  inputs = *_inputs(rows, first_query, T, H), np.int32(first_query)
  got = _with_gradients(
    *inputs, implementation='pallas', blocks=blocks, interpret=True
  )
  expected = _with_gradients(*inputs, implementation='reference')
  names = 'out', 'grad_q', 'grad_k', 'grad_rope', 'grad_v'
  for name, x, y in zip(names, got, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)


def test_no_race_and_no_read_of_what_nobody_wrote():
  pltpu.reset_tpu_interpret_mode_state()
  inputs = *_inputs(PACKED[:1], 35, 40, 1), np.int32(35)
  # Memory that nobody wrote is NaN here.
  got = _with_gradients(
    *inputs,
    implementation='pallas',
    blocks=SMALL,
    interpret=pltpu.InterpretParams(detect_races=True),
  )
  assert not ipc.races.races_found
  expected = _with_gradients(*inputs, implementation='reference')
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
  inputs = _inputs(PACKED, 0, 75, 1, jnp.bfloat16)
  exact = jax.tree.map(
    lambda x: np.float32(x) if x.dtype == jnp.bfloat16 else x, inputs
  )
  first_query = np.int32(0)
  got = _with_gradients(
    *inputs, first_query, implementation='pallas', blocks=UNEVEN, interpret=True
  )
  expected = _with_gradients(*exact, first_query, implementation='reference')
  for x, y in zip(got, expected, strict=True):
    assert x.dtype == jnp.bfloat16
    # A few roundings of 2⁻⁹ each: of q, the weights, their gradients, x.
    bound = 2**-7 * float(abs(y).max())
    np.testing.assert_allclose(np.float32(x), y, atol=bound)


def test_the_reference_is_that_of_whole_keys():
  arrays, _, segment_BT, segment_BS = _inputs(PACKED, 0, 75, 2)
  q_BTHQ, k_BSHN, rope_BSR, v_BSHU = arrays
  rope_BSHR = np.stack([rope_BSR] * 2, axis=2)
  expected = flash_reference.flash_attention(
    q_BTHQ,
    np.concatenate([k_BSHN, rope_BSHR], axis=-1),
    v_BSHU,
    segment_BT,
    segment_BS,
    0,
    SCALE,
  )
  got = ops.mla_attention(
    *arrays, segment_BT, segment_BS, scale=SCALE, implementation='reference'
  )
  np.testing.assert_array_equal(got, expected)


def test_blocks_of_other_documents_are_not_visited():
  segment_BS = _segments(PACKED)
  cut = blocks_lib.cut(75, 16, 80, 8)
  documents = ops._Documents(segment_BS, segment_BS, cut, cut)
  # Row 0: documents begin at 0, 20, 56, and padding at 66. The last block, of
  # the numbers 3 and 0, may hold any between, so that it meets all.
  assert documents.first_key().tolist() == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 4]]
  assert documents.last_query().tolist() == [[4, 4, 4, 4, 4], [3, 3, 3, 3, 4]]
  plan = documents.plan(jnp.int32(3), documents.first_key())
  assert [len(x) for x in plan] == [1, 10, 10, 10]
  query_id, key_id = (np.reshape(x, (2, 5)) for x in plan[2:])
  is_plain = query_id == key_id
  assert is_plain.tolist() == [
    [True, False, True, False, False],
    [True] * 5,
  ]


@pytest.mark.parametrize(
  ('length', 'block', 'most', 'cut', 'size'),
  [
    (4096, 512, 2048, (512, 4, 2), 4096),
    (4097, 512, 2048, (512, 3, 3), 4608),
    (100, 512, 2048, (128, 1, 1), 128),
    (513, 512, 256, (512, 1, 2), 1024),
  ],
)
def test_lengths_are_cut_into_equal_parts(length, block, most, cut, size):
  got = blocks_lib.cut(length, block, most, 128)
  assert got == blocks_lib.Cut(*cut)
  assert got.size == size


def test_heads_at_a_time_divide_the_heads():
  assert [blocks_lib.group(heads, 4) for heads in (1, 6, 7, 8)] == [1, 3, 1, 4]


def test_cases_are_of_one_shape():
  forward, vjp = cases.cases()
  out = jax.eval_shape(forward.function, *forward.args)
  assert out == vjp.args[-1]
  grads = jax.eval_shape(vjp.function, *vjp.args)[1]
  assert grads == vjp.args[:4]
  # 2 · 320 operations a pair of half the square, and 2 · 832 backward.
  assert forward.flops == 8 * 4096**2 * 320
  assert vjp.flops == 8 * 4096**2 * (320 + 832)


@pytest.mark.parametrize(
  ('changed', 'options', 'message'),
  [
    ({1: (1, 4, 3, N)}, {}, r'k of shape \(1, 4, 3, 16\) does not fit'),
    ({2: (1, 4, R + 1)}, {}, r'rope .* must be \(1, 4, 8\)'),
    ({3: (1, 5, 2, U)}, {}, r'v of shape \(1, 5, 2, 12\)'),
    ({4: (1, 4)}, {}, r'segment_BT .* must be \(1, 3\)'),
    ({5: (1, 3)}, {}, r'segment_BS .* must be \(1, 4\)'),
    ({}, {'implementation': 'mosaic'}, "implementation='mosaic'"),
  ],
)
def test_what_does_not_fit_raises(changed, options, message):
  shapes = dict(
    enumerate(
      [(1, 3, 2, N + R), (1, 4, 2, N), (1, 4, R), (1, 4, 2, U), (1, 3), (1, 4)]
    )
  )
  shapes.update(changed)
  arrays = [np.zeros(shape, np.float32) for shape in shapes.values()]
  with pytest.raises(ValueError, match=message):
    ops.mla_attention(*arrays, scale=SCALE, **options)


def test_dtypes_that_differ_raise():
  arrays, _, segment_BT, segment_BS = _inputs(ONE, 0, 75, 1)
  q_BTHQ, *others = arrays
  with pytest.raises(ValueError, match=r"\['bfloat16', 'float32'\]"):
    ops.mla_attention(
      q_BTHQ.astype(jnp.bfloat16),
      *others,
      segment_BT,
      segment_BS,
      scale=SCALE,
    )


def test_sizes_below_one_raise():
  with pytest.raises(ValueError, match='grad_keys=0'):
    blocks_lib.BlockSizes(grad_keys=0)
