"""MLA decode: all forms equal the reference, whatever unused pages hold."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as ipc
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode import blocks as blocks_lib
from pallas_kernels.mla_decode import cases, ops, schedule

_KNOWN = json.loads(
  (pathlib.Path(__file__).parents[1] / 'data/known_answers.json').read_text()
)
_C, _R, _P = 128, 64, 256
_BLOCKS = blocks_lib.BlockSizes(num_pages=2, num_slots=6)

# (heads, query tokens, lengths, workers, splits): chunks have 512 tokens.
SHAPES = (
  # Whole chunks, none, one token, a token in a page, three chunks.
  (16, 1, (512, 0, 1, 257, 1100, 1024), 2, 1),
  # The first query sees nothing, or all but a chunk's only token.
  (3, 2, (1, 513, 0, 20), 2, 1),
  (1, 2, (1100, 2, 513), 1, 2),  # A split of the second has no tokens.
  (128, 2, (140,), 1, 2),
)


def _inputs(heads, num_queries, lengths, dtype=jnp.float32, is_fp8=False):
  """Queries, a cache whose unused rows are nan, its table and lengths."""
  rng = np.random.default_rng(0)
  B, pages = len(lengths), -(-max(lengths) // _P)
  N = B * pages + 1
  x_NPC = jnp.asarray(rng.normal(size=(N, _P, _C + _R)), dtype)
  table_Bn = rng.permutation(N)[: B * pages].reshape(B, pages).astype(np.int32)
  is_used_NP = np.zeros((N, _P), bool)
  token_n1 = _P * np.arange(pages)[:, None] + np.arange(_P)
  for b, length in enumerate(lengths):
    is_used_NP[table_Bn[b]] = token_n1 < length
  cache = ops.pack(jnp.where(is_used_NP[..., None], x_NPC, jnp.nan), _C)
  if is_fp8:
    cache = ops.quantize(cache)
    unused_NPC = jnp.where(is_used_NP, 0, jnp.nan)[..., None]
    cache = ops.LatentCache(
      (cache.latent_NPC.astype(jnp.float32) + unused_NPC).astype(
        cache.latent_NPC.dtype
      ),
      cache.rope_NIL,
      jnp.where(is_used_NP[:, None], cache.scale_NJP, jnp.nan),
    )
  q_BTHC = rng.normal(size=(B, num_queries, heads, _C + _R))
  return jnp.asarray(q_BTHC, dtype), cache, table_Bn, np.int32(lengths)


@functools.partial(
  jax.jit, static_argnames=('implementation', 'blocks', 'interpret')
)
def _run(inputs, **options):
  return ops.mla_decode(*inputs, value_dim=_C, scale=_C**-0.5, **options)


def _assert_close(got, wanted, atol, rtol):
  """FlashMLA's: of the sum of squares too, and of the logarithms."""
  (out, lse), (expected, expected_lse) = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (got, wanted)
  )
  np.testing.assert_allclose(out, expected, atol=atol, rtol=rtol)
  both, squares = (out * expected).sum(), (out**2 + expected**2).sum()
  assert 1 - 2 * both / squares < 1e-5
  np.testing.assert_allclose(lse, expected_lse, atol=1e-5, rtol=8.01 / 65536)


@pytest.mark.parametrize(('heads', 'T', 'lengths', 'workers', 'splits'), SHAPES)
def test_all_forms_are_the_references(heads, T, lengths, workers, splits):
  inputs = _inputs(heads, T, lengths)
  expected = _run(inputs, implementation='reference')
  blocks = blocks_lib.BlockSizes(2, 6, workers, splits)
  got = _run(inputs, implementation='pallas', blocks=blocks, interpret=True)
  _assert_close(got, expected, 1e-5, 1e-5)
  got = _run(inputs, implementation='xla')
  _assert_close(got, expected, 1e-5, 1e-5)
  out_BTHU, lse_BTH = expected
  for b, length in enumerate(lengths):
    for t in range(T):
      is_empty = length - T + t < 0
      assert np.isinf(lse_BTH[b, t]).all() == is_empty
      assert (out_BTHU[b, t] == 0).all() == is_empty


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_each_row_is_the_papers_sum(implementation):
  lengths = (1, 260, 0)
  inputs = q_BTHC, cache, table_Bn, _ = _inputs(3, 2, lengths)
  out_BTHU, lse_BTH = _run(inputs, implementation=implementation)
  x_NPC = np.asarray(ops.unpack(cache))
  for b, length in enumerate(lengths):
    x_SC = np.concatenate(x_NPC[table_Bn[b]])[:length].astype(np.float64)
    for t in range(2):
      seen_SC = x_SC[: max(length - 1 + t, 0)]
      for h in range(3):
        weight_S = np.exp(seen_SC @ np.float64(q_BTHC[b, t, h]) * _C**-0.5)
        total = weight_S.sum()
        expected = np.log(total) if total else np.inf
        np.testing.assert_allclose(lse_BTH[b, t, h], expected, atol=1e-5)
        if total:
          out_U = weight_S @ seen_SC[:, :_C] / total
          np.testing.assert_allclose(out_BTHU[b, t, h], out_U, atol=1e-5)


@pytest.mark.parametrize('is_fp8', [False, True])
def test_bfloat16_and_fp8_are_as_near_as_flashmlas(is_fp8):
  inputs = _inputs(16, 1, (600, 37), jnp.bfloat16, is_fp8)
  expected = _run(inputs, implementation='reference')
  options = {'blocks': _BLOCKS, 'interpret': True}
  got = _run(inputs, implementation='pallas', **options)
  assert got[0].dtype == jnp.bfloat16
  # A weight is rounded to bfloat16, in FP8 once more with its scale.
  _assert_close(got, expected, atol=4e-3 if is_fp8 else 8e-4, rtol=2.01 / 128)
  got = _run(inputs, implementation='xla')
  _assert_close(got, expected, atol=4e-3, rtol=2.01 / 128)


def test_the_kernel_has_no_races_and_reads_only_what_has_come():
  # Six chunks a worker, so that each of five slots is used again.
  inputs = _inputs(16, 1, (600, 1030, 5, 2100))
  blocks = blocks_lib.BlockSizes(2, 5, num_workers=2)
  mode = pltpu.InterpretParams(detect_races=True)
  got = _run(inputs, implementation='pallas', blocks=blocks, interpret=mode)
  jax.block_until_ready(got)
  assert ipc.races.races_found is False
  expected = _run(inputs, implementation='reference')
  _assert_close(got, expected, 1e-5, 1e-5)


def test_packed_rows_have_their_lanes_and_unpack():
  x_NPC = np.arange(2 * 64 * (_C + _R), dtype=np.float32)
  x_NPC = x_NPC.reshape(2, 64, _C + _R)
  cache = ops.pack(jnp.asarray(x_NPC), _C)
  # Token 35 of 64 is the second of a row's four, in the row 35 - 16 · 2.
  lanes = slice(2 * _R, 3 * _R)
  np.testing.assert_array_equal(cache.rope_NIL[1, 3, lanes], x_NPC[1, 35, _C:])
  np.testing.assert_array_equal(ops.unpack(cache), x_NPC)


def test_quantized_caches_have_scales_that_are_powers_of_two():
  rng = np.random.default_rng(0)
  x_NPC = rng.normal(size=(2, 64, 2 * _C + _R)).astype(np.float32)
  x_NPC[0, 0, :_C] = 0
  x_NPC[0, 1, :_C] = 448
  cache = ops.quantize(ops.pack(jnp.asarray(x_NPC), 2 * _C))
  amax_NPJ = np.abs(x_NPC[..., : 2 * _C]).reshape(2, 64, 2, _C).max(-1)
  expected = 2 ** np.ceil(np.log2(np.maximum(amax_NPJ, 1e-4) / 448))
  np.testing.assert_array_equal(cache.scale_NJP, expected.swapaxes(1, 2))
  got_NPC = ops.unpack(cache)
  # Half a unit of three bits, or of the smallest number.
  steps = np.maximum(
    np.abs(x_NPC) / 16,
    2.0**-10
    * np.repeat(np.pad(expected, ((0, 0), (0, 0), (0, 1))), _C, axis=-1)[
      ..., : 2 * _C + _R
    ],
  )
  assert (np.abs(got_NPC - x_NPC) <= steps).all()


def test_combine_is_flashmlas():
  known = _KNOWN['lse_combine']
  out_ZU, lse_Z = np.float32(known['o']), np.float32(known['lse'])
  out_U, lse = ops.combine(out_ZU, lse_Z)
  np.testing.assert_allclose(out_U, known['o_out'], rtol=1e-6)
  np.testing.assert_allclose(lse, known['lse_out'], rtol=1e-6)
  for none in (np.inf, -np.inf):
    # A part without keys changes nothing, and nothing of nothing is nothing.
    out_U, lse = ops.combine(
      np.append(out_ZU, [[0, 0]], axis=0), np.append(lse_Z, np.float32(none))
    )
    np.testing.assert_allclose(out_U, known['o_out'], rtol=1e-6)
    out_U, lse = ops.combine(np.zeros((2, 3)), np.full(2, np.float32(none)))
    assert (out_U == 0).all()
    assert lse == np.inf


@pytest.mark.parametrize('known', _KNOWN['flashmla_sched'])
def test_the_split_plan_is_flashmlas(known):
  parts, first_splits = schedule.split_plan(
    known['seqlens'],
    known['num_sm_parts'],
    block_tokens=known['block_n'],
    overhead_blocks=known['overhead'],
  )
  rows = known['rows_begin_idx_begin_tok_end_idx_end_tok_begin_split']
  assert parts == [schedule.Part(*row) for row in rows]
  assert first_splits == known['num_splits_cum']


def test_a_split_plan_reads_each_token_once():
  rng = np.random.default_rng(0)
  for num_parts in (1, 7, 132):
    lengths = rng.integers(0, 5000, 20).tolist()
    parts, first_splits = schedule.split_plan(lengths, num_parts)
    reads = [np.zeros(length, int) for length in lengths]
    splits = np.zeros(len(lengths), int)
    for part in parts:
      for request in range(part.begin_request, part.end_request + 1):
        is_first = request == part.begin_request
        is_last = request == part.end_request
        begin = part.begin_token if is_first else 0
        end = part.end_token if is_last else lengths[request]
        reads[request][begin:end] += 1
        splits[request] += 1
    assert all((read == 1).all() for read in reads)
    np.testing.assert_array_equal(np.diff(first_splits), splits)


def test_split_plans_need_parts_and_lengths():
  with pytest.raises(ValueError, match='num_parts=0'):
    schedule.split_plan([1], 0)
  with pytest.raises(ValueError, match='must not be negative'):
    schedule.split_plan([1, -1], 1)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'value_dim': 64}, 'value_dim=64 must be that of the cache, 128'),
    ({'q': (2, 1, 4, 160)}, '160 channels of queries are fewer than 128'),
    ({'rope': (3, 32, 256)}, r'rotary channels \(3, 32, 256\) are not those'),
    ({'scale_NJP': (3, 2, 256)}, r'scales \(3, 2, 256\) are not \(3, 1, 256\)'),
    ({'length': (3,)}, '2 sequences of queries have a block table'),
    ({'blocks': blocks_lib.BlockSizes(3)}, 'num_pages=3 of 256 tokens'),
    (
      {'blocks': blocks_lib.BlockSizes(2, num_workers=3)},
      'num_workers=3 do not divide 2',
    ),
    ({'page': 32}, 'pages of 32 tokens are no multiple of 64'),
    ({'implementation': 'cuda'}, "implementation='cuda', it must be one of"),
  ],
)
def test_what_does_not_fit_raises(changes, message):
  page = changes.get('page', _P)
  scale_shape = changes.get('scale_NJP')
  cache = ops.LatentCache(
    np.zeros((3, page, _C)),
    np.zeros(changes.get('rope', (3, page // 4, 4 * _R))),
    None if scale_shape is None else np.zeros(scale_shape),
  )
  with pytest.raises(ValueError, match=message):
    ops.mla_decode(
      np.zeros(changes.get('q', (2, 1, 4, _C + _R))),
      cache,
      np.zeros((2, 1), np.int32),
      np.zeros(changes.get('length', (2,)), np.int32),
      value_dim=changes.get('value_dim', _C),
      scale=1.0,
      implementation=changes.get('implementation', 'pallas'),
      blocks=changes.get('blocks'),
    )


def test_blocks_have_room_and_fit_the_batch():
  with pytest.raises(ValueError, match='num_slots=4 must be at least 5'):
    blocks_lib.BlockSizes(4, num_slots=4)
  even, odd, one, long = (
    blocks_lib.default(256, shape)
    for shape in ((128, 16), (3, 16), (1, 16), (8, 64))
  )
  assert (even.num_pages, even.num_workers, even.num_splits) == (4, 2, 1)
  assert (odd.num_workers, odd.num_splits) == (1, 1)
  assert (one.num_workers, one.num_splits) == (1, 2)
  assert long.num_pages == 8


@pytest.mark.parametrize('case', cases.cases(), ids=lambda case: case.name)
def test_cases_have_deepseeks_shapes(case):
  q = case.args[0]
  out, lse = jax.eval_shape(case.function, *case.args)
  assert out.shape == (*q.shape[:3], 512)
  assert lse.shape == q.shape[:3]
  # What the cases' kernel reads of its scalars: all pages of all sequences.
  lengths, table = (case.scalars['mla_decode'][i] for i in range(2))
  assert lengths.sum() == 256 * len(table) == 128 * 4096
