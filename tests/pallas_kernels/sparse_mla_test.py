"""DSA: all forms equal the reference, whatever unused pages and rows hold."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as ipc
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_decode import ops as mla_decode_ops
from pallas_kernels.sparse_mla import blocks as blocks_lib
from pallas_kernels.sparse_mla import cases, ops

_KNOWN = json.loads(
  (pathlib.Path(__file__).parents[1] / 'data/known_answers.json').read_text()
)
_I, _P = 128, 128
_C, _R = 256, 64
_FP8 = jnp.float8_e4m3fn
_LOGITS_BLOCKS = blocks_lib.LogitsBlocks(64, 128)
# Little code, as interpreting takes longer with more of it.
_COPIED = blocks_lib.AttendBlocks(tokens=128, workers=2, is_unrolled=False)
_RESIDENT = blocks_lib.AttendBlocks(128, 1, is_resident=True, is_unrolled=False)

# (queries, heads, keys) of indexing; blocks have 64 queries and 128 keys.
SHAPES = (
  (130, 3, 300),  # No whole blocks; one has no key that any query sees.
  (64, 4, 128),  # A block.
  (1, 1, 5),
)


def _random(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def _index_inputs(T, J, S, dtype, B=2):
  """Queries, keys, weights and scales of keys."""
  q_BTJI, k_BSI = _random(B, T, J, _I), _random(B, S, _I, seed=1)
  weight_BTJ, scale_BS = _random(B, T, J, seed=2), None
  if dtype == _FP8:
    q_BTJI, scale_BTJ = ops.quantize_keys(q_BTJI)
    k_BSI, scale_BS = ops.quantize_keys(k_BSI)
    weight_BTJ *= scale_BTJ
  return q_BTJI.astype(dtype), k_BSI.astype(dtype), weight_BTJ, scale_BS


def _ranges(T, S, B=2):
  """Any, empty ones and such that end past the last key too."""
  rng = np.random.default_rng(0)
  start_BT = rng.integers(0, S, (B, T)).astype(np.int32)
  end_BT = start_BT + rng.integers(-1, S, (B, T)).astype(np.int32)
  # The first block of queries sees none of the first block of keys.
  start_BT[0, :64] = np.maximum(start_BT[0, :64], min(S - 1, 128))
  end_BT[-1, :64] = 0
  return start_BT, end_BT


@functools.partial(
  jax.jit, static_argnames=('implementation', 'blocks', 'interpret')
)
def _logits(q, k, weight, scale, start, end, **options):
  return ops.index_logits(
    q, k, weight, scale_BS=scale, start_BT=start, end_BT=end, **options
  )


@functools.partial(
  jax.jit, static_argnames=('implementation', 'blocks', 'interpret')
)
def _paged(*inputs, **options):
  return ops.index_logits_paged(*inputs, **options)


@functools.partial(
  jax.jit, static_argnames=('implementation', 'blocks', 'interpret')
)
def _attend(q, cache, index, table=None, **options):
  return ops.sparse_mla(
    q, cache, index, table, value_dim=_C, scale=_C**-0.5, **options
  )


def _oracle(q_BTJI, k_BSI, weight_BTJ, scale_BS):
  """The report's sum, in float64, of all pairs."""
  q_BTJI, k_BSI, weight_BTJ = (
    np.asarray(x, np.float64) for x in (q_BTJI, k_BSI, weight_BTJ)
  )
  if scale_BS is not None:
    k_BSI *= np.asarray(scale_BS)[..., None]
  logits_BTS = np.zeros((*q_BTJI.shape[:2], k_BSI.shape[1]))
  for j in range(q_BTJI.shape[2]):
    score_BTS = q_BTJI[:, :, j] @ k_BSI.swapaxes(1, 2)
    logits_BTS += weight_BTJ[:, :, j, None] * np.maximum(score_BTS, 0)
  return logits_BTS


def _assert_logits(got, expected):
  """DeepGEMM's measure, and element by element the rounding of sums."""
  got = np.asarray(got, np.float64)
  np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
  assert not np.isnan(got).any()
  is_in = np.isfinite(expected)
  np.testing.assert_allclose(got[is_in], expected[is_in], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, _FP8])
@pytest.mark.parametrize(('T', 'J', 'S'), SHAPES)
def test_index_logits_are_the_reports(T, J, S, dtype):
  inputs = _index_inputs(T, J, S, dtype)
  start_BT, end_BT = _ranges(T, S)
  key_S = np.arange(S)
  is_in = (key_S >= start_BT[..., None]) & (key_S < end_BT[..., None])
  expected = np.where(is_in, _oracle(*inputs), -np.inf)
  for options in (
    {'implementation': 'reference'},
    {'implementation': 'xla'},
    {'blocks': _LOGITS_BLOCKS, 'interpret': True},
  ):
    _assert_logits(_logits(*inputs, start_BT, end_BT, **options), expected)


def test_index_logits_of_all_keys_are_the_known_ones():
  known = _KNOWN['dsa_index']
  pad = lambda x: np.pad(np.float32(x), ((0, 0), (0, 0), (0, _I - 2)))
  for implementation in ops.IMPLEMENTATIONS:
    logits_BTS = ops.index_logits(
      jnp.asarray(pad(known['q']))[None],
      jnp.asarray(pad([known['k']])),
      jnp.asarray([known['w']], jnp.float32),
      implementation=implementation,
      interpret=True,
    )
    np.testing.assert_array_equal(logits_BTS[0], known['I'])


def _paged_inputs(T, lengths, dtype):
  """As `_index_inputs`, with pages in any order and nan in what is unused."""
  B, J = len(lengths), 3
  n = -(-max(lengths) // _P) + 1
  q, k_BSI, weight, scale_BS = _index_inputs(T, J, n * _P, dtype, B)
  N = B * n + 1
  table_Bn = np.random.default_rng(3).permutation(N)[: B * n].reshape(B, n)
  is_used_BS = np.arange(n * _P) < np.array(lengths)[:, None]
  key_NPI = np.full((N, _P, _I), np.nan, np.float32)
  key_NPI[table_Bn] = np.where(
    is_used_BS[..., None], np.float32(k_BSI), np.nan
  ).reshape(B, n, _P, _I)
  scale_N1P = None
  if scale_BS is not None:
    scale_N1P = np.full((N, 1, _P), np.nan, np.float32)
    scale_N1P[table_Bn] = np.where(is_used_BS, scale_BS, np.nan).reshape(
      B, n, 1, _P
    )
  cache = ops.IndexCache(jnp.asarray(key_NPI, dtype), scale_N1P)
  length_B = np.array(lengths, np.int32)
  last_BT1 = (length_B[:, None] - T + np.arange(T))[..., None]
  expected = np.where(
    np.arange(n * _P) <= last_BT1, _oracle(q, k_BSI, weight, scale_BS), -np.inf
  )
  return (q, cache, weight, table_Bn.astype(np.int32), length_B), expected


@pytest.mark.parametrize(
  ('T', 'lengths', 'dtype', 'workers'),
  [
    # Chunks have 256 tokens: none, one, in a page, whole ones, several.
    (1, (0, 1, 130, 256, 700, 512), _FP8, 2),
    (2, (513, 1, 20), jnp.float32, 1),
  ],
)
def test_paged_logits_are_those_of_the_sequences(T, lengths, dtype, workers):
  inputs, expected = _paged_inputs(T, lengths, dtype)
  blocks = blocks_lib.PagedBlocks(pages=2, slots=2, workers=workers)
  for options in (
    {'implementation': 'reference'},
    {'implementation': 'xla'},
    {'blocks': blocks, 'interpret': True},
  ):
    _assert_logits(_paged(*inputs, **options), expected)


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_top_k_takes_the_lower_of_equals_and_none_that_may_not_be(
  implementation,
):
  none = -np.inf
  logits_BTS = jnp.asarray(
    [[[1, 3, -0.0, 3, 0], [none, 0, none, 0, none], [none] * 5]], jnp.float32
  )
  top_k = functools.partial(
    ops.top_k, logits_BTS, implementation=implementation
  )
  expected = [[[1, 3, 0, 2], [1, 3, -1, -1], [-1] * 4]]
  np.testing.assert_array_equal(top_k(4), expected)
  # More than there are keys.
  expected = [[[1, 3, 0, 2, 4, -1], [1, 3] + [-1] * 4, [-1] * 6]]
  np.testing.assert_array_equal(top_k(6), expected)
  assert top_k(6).dtype == jnp.int32


@pytest.mark.parametrize(('S', 'k'), [(1100, 200), (300, 300), (100, 130)])
def test_selection_is_that_of_a_stable_sort_in_order_of_the_keys(S, k):
  rng = np.random.default_rng(0)
  logits_TS = rng.normal(size=(7, S)).astype(np.float32)
  logits_TS[1] = np.round(logits_TS[1])  # Many that are equal,
  logits_TS[2] = np.where(rng.random(S) < 0.9, 0, logits_TS[2])
  logits_TS[2, ::3] *= -1  # also zeros of both signs.
  logits_TS[3], logits_TS[4] = -np.inf, -np.inf
  logits_TS[4, S // 2] = 1
  logits_TS[5, : S - 50] = -np.inf
  logits_1TS = jnp.asarray(logits_TS)[None]
  expected = np.asarray(ops.top_k(logits_1TS, k, implementation='reference'))
  got = np.asarray(ops.top_k(logits_1TS, k, rows=8, interpret=True))
  # -1 last, as those of the kernel.
  in_order = np.sort(np.where(expected < 0, 2**30, expected), axis=-1)
  in_order = np.where(in_order == 2**30, -1, in_order)
  np.testing.assert_array_equal(got, in_order)


def _attend_inputs(T, H, S, K, B=2):
  """Queries, rows and indices; what is in no index is nan."""
  rng = np.random.default_rng(0)
  q_BTHC = _random(B, T, H, _C + _R, dtype=jnp.bfloat16)
  index_BTK = np.stack(
    [[rng.permutation(S - 1)[:K] for _ in range(T)] for _ in range(B)]
  ).astype(np.int32)
  index_BTK += 1  # The row that would stand for none is not used.
  index_BTK[0, -1] = -1  # A query without keys,
  index_BTK[-1, -1, 2::3] = -1  # one with gaps,
  index_BTK[-1, 0, 1:] = -2  # and one with a single key.
  x_BSC = _random(B, S, _C + _R, seed=1)
  is_used_BS1 = np.zeros((B, S, 1), bool)
  for b in range(B):
    is_used_BS1[b, index_BTK[b][index_BTK[b] >= 0]] = True
  x_BSC = jnp.where(is_used_BS1, x_BSC, jnp.nan).astype(jnp.bfloat16)
  return q_BTHC, x_BSC, jnp.asarray(index_BTK)


def _attend_oracle(q_BTHC, x_BSC, index_BTK):
  q_BTHC, x_BSC = (np.asarray(x, np.float64) for x in (q_BTHC, x_BSC))
  B, T, H, _ = q_BTHC.shape
  out_BTHU, lse_BTH = np.zeros((B, T, H, _C)), np.full((B, T, H), np.inf)
  for b, t in np.ndindex(B, T):
    keys = np.asarray(index_BTK[b, t])
    x_SC = x_BSC[b, keys[keys >= 0]]
    if len(x_SC):
      weight_HS = np.exp(q_BTHC[b, t] @ x_SC.T * _C**-0.5)
      total_H = weight_HS.sum(-1)
      lse_BTH[b, t] = np.log(total_H)
      out_BTHU[b, t] = weight_HS @ x_SC[:, :_C] / total_H[:, None]
  return out_BTHU, lse_BTH


def _assert_attention(got, expected, atol=8e-3):
  """Weights and results are rounded to bfloat16."""
  (out, lse), (out_expected, lse_expected) = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (got, expected)
  )
  np.testing.assert_allclose(out, out_expected, atol=atol, rtol=2**-6)
  both, squares = (out * out_expected).sum(), (out**2 + out_expected**2).sum()
  assert 1 - 2 * both / squares < 1e-5
  np.testing.assert_allclose(lse, lse_expected, atol=1e-4)
  is_empty = np.isinf(lse_expected)
  assert is_empty.any()
  assert (out[is_empty] == 0).all()


def test_attention_to_selected_rows_is_the_sum_over_them():
  inputs = _attend_inputs(T=2, H=3, S=300, K=200)
  expected = _attend_oracle(*inputs)
  for options in (
    {'implementation': 'reference'},
    {'implementation': 'xla'},
    {'blocks': _COPIED, 'interpret': True},
    {'blocks': _RESIDENT, 'interpret': True},
  ):
    _assert_attention(_attend(*inputs, **options), expected)


def test_fewer_keys_than_a_block_and_many_queries_are_split():
  # Of an odd number of blocks, of which two in turn are resident.
  inputs = _attend_inputs(T=6, H=17, S=40, K=30)
  expected = _attend_oracle(*inputs)
  resident = blocks_lib.AttendBlocks(
    128, 2, is_resident=True, is_unrolled=False
  )
  for blocks in (_COPIED, resident):
    got = _attend(*inputs, blocks=blocks, interpret=True)
    _assert_attention(got, expected)


def _pages(x_BSC):
  """The rows of sequences in pages of 64 tokens, in any order."""
  B, S, C = x_BSC.shape
  n = S // 64
  table_Bn = np.random.default_rng(4).permutation(B * n + 1)[: B * n]
  table_Bn = table_Bn.reshape(B, n).astype(np.int32)
  x_NPC = jnp.full((B * n + 1, 64, C), jnp.nan, x_BSC.dtype)
  return x_NPC.at[table_Bn].set(x_BSC.reshape(B, n, 64, C)), table_Bn


def test_paged_caches_of_both_layouts_have_the_same_rows():
  q_BTHC, x_BSC, index_BTK = _attend_inputs(T=2, H=4, S=256, K=100)
  expected = _attend_oracle(q_BTHC, x_BSC, index_BTK)
  x_NPC, table_Bn = _pages(x_BSC)
  cache = ops.pack(x_NPC, _C)
  # Channels past the rotary ones do not matter.
  q_BTHC = jnp.pad(q_BTHC, [(0, 0)] * 3 + [(0, 64)], constant_values=3)
  for options in (
    {'implementation': 'reference'},
    {'implementation': 'xla'},
    {'blocks': _COPIED, 'interpret': True},
  ):
    got = _attend(q_BTHC, cache, index_BTK, table_Bn, **options)
    _assert_attention(got, expected)
    if options.get('implementation'):
      latent = mla_decode_ops.pack(x_NPC, _C)
      got = _attend(q_BTHC, latent, index_BTK, table_Bn, **options)
      _assert_attention(got, expected)
  # As FlashMLA's, indices are places in the cache where there is no table.
  page_BTK = np.take_along_axis(table_Bn[:, None], index_BTK // 64, axis=2)
  place_BTK = np.where(index_BTK >= 0, page_BTK * 64 + index_BTK % 64, -1)
  got = _attend(q_BTHC, cache, place_BTK, implementation='xla')
  _assert_attention(got, expected)


def test_packed_rows_hold_two_channels_in_a_word_and_unpack():
  x_NPC = _random(3, 16, 2 * _C + _R, dtype=jnp.bfloat16)
  cache = ops.pack(x_NPC, 2 * _C)
  assert (cache.num_tiles, cache.page_tokens, cache.rope_dim) == (3, 16, _R)
  bits = lambda x: int(np.asarray(x).view(np.uint16))
  # Token 5: latents 130 and 130 + 256, in its second row of 128 words.
  word = int(cache.word_NIL[1, 5 * 3 + 1, 2])
  assert word == bits(x_NPC[1, 5, 130]) | bits(x_NPC[1, 5, 386]) << 16
  got_NPC = ops.unpack(cache.word_NIL.reshape(3, 16, -1))
  np.testing.assert_array_equal(got_NPC[..., : 2 * _C + _R], x_NPC)
  assert (got_NPC[..., 2 * _C + _R :] == 0).all()
  latent = mla_decode_ops.pack(x_NPC.repeat(4, axis=1), 2 * _C)
  np.testing.assert_array_equal(
    ops.pack_latent(latent).word_NIL,
    ops.pack(x_NPC.repeat(4, 1), 2 * _C).word_NIL,
  )


def test_keys_are_quantized_with_powers_of_two():
  x_SI = np.asarray(_random(5, _I)).copy()
  x_SI[0], x_SI[1, 0] = 0, 448
  key_SI, scale_S = ops.quantize_keys(jnp.asarray(x_SI))
  amax_S = np.maximum(np.abs(x_SI).max(-1), 1e-4)
  np.testing.assert_array_equal(scale_S, 2 ** np.ceil(np.log2(amax_S / 448)))
  got_SI = np.float32(key_SI) * np.asarray(scale_S)[:, None]
  # Half a unit of three bits, or of the smallest number.
  step_SI = np.maximum(
    np.abs(x_SI) / 16, 2.0**-10 * np.asarray(scale_S)[:, None]
  )
  assert (np.abs(got_SI - x_SI) <= step_SI).all()


def _assert_no_races(run):
  jax.block_until_ready(run(pltpu.InterpretParams(detect_races=True)))
  assert ipc.races.races_found is False


def test_index_kernels_have_no_races_and_read_only_what_has_come():
  inputs = _index_inputs(130, 2, 200, jnp.float32)
  start_BT, end_BT = _ranges(130, 200)
  _assert_no_races(
    lambda mode: _logits(
      *inputs, start_BT, end_BT, blocks=_LOGITS_BLOCKS, interpret=mode
    )
  )
  _assert_no_races(
    lambda mode: ops.top_k(_random(1, 9, 200), 130, rows=8, interpret=mode)
  )
  # Each of the slots is used again.
  inputs, expected = _paged_inputs(1, (600, 0, 300), _FP8)
  blocks = blocks_lib.PagedBlocks(pages=2, slots=2)
  got = []
  _assert_no_races(
    lambda mode: got.append(_paged(*inputs, blocks=blocks, interpret=mode))
  )
  _assert_logits(got[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize('is_resident', [False, True])
def test_attention_has_no_races_and_reads_only_what_has_come(is_resident):
  # More blocks than slots.
  inputs = _attend_inputs(T=3, H=2, S=300, K=200, B=1)
  blocks = blocks_lib.AttendBlocks(128, 1, is_resident, is_unrolled=False)
  got = []
  _assert_no_races(
    lambda mode: got.append(_attend(*inputs, blocks=blocks, interpret=mode))
  )
  np.testing.assert_allclose(
    np.float32(got[0][0]), _attend_oracle(*inputs)[0], atol=8e-3, rtol=2**-6
  )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'k': ((2, 9, 64), np.float32)}, '128 channels do not fit keys float32'),
    ({'k': ((2, 9, _I), np.int8)}, 'do not fit keys int8'),
    ({'k': ((3, 9, _I), np.float32)}, r'k of shape \(3, 9, 128\) must be'),
    ({'weight': (2, 5, 4)}, r'weights \(2, 5, 4\) are not \(2, 5, 3\)'),
    ({'scale': (2, 8)}, r'scale_BS of shape \(2, 8\) must be \(2, 9\)'),
    ({'end': (2, 4)}, r'end_BT of shape \(2, 4\) must be \(2, 5\)'),
    ({'implementation': 'cuda'}, "implementation='cuda', it must be one of"),
  ],
)
def test_what_does_not_fit_an_index_raises(changes, message):
  shape, dtype = changes.get('k', ((2, 9, _I), np.float32))
  with pytest.raises(ValueError, match=message):
    ops.index_logits(
      np.zeros((2, 5, 3, _I), np.float32),
      np.zeros(shape, dtype),
      np.zeros(changes.get('weight', (2, 5, 3))),
      scale_BS=np.zeros(changes.get('scale', (2, 9))),
      end_BT=np.zeros(changes.get('end', (2, 5)), np.int32),
      implementation=changes.get('implementation', 'pallas'),
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'scale': (3, _P)}, r'scales \(3, 128\) are not \(3, 1, 128\)'),
    ({'length': (3,)}, '2 sequences of queries have a block table'),
    ({'page': 64}, 'pages of 64 tokens of 128 channels are no multiples'),
    ({'workers': 3}, 'workers=3 do not divide 2'),
    ({'implementation': 'cuda'}, "implementation='cuda', it must be one of"),
  ],
)
def test_what_does_not_fit_paged_keys_raises(changes, message):
  page = changes.get('page', _P)
  cache = ops.IndexCache(
    np.zeros((3, page, _I), np.float32),
    np.zeros(changes.get('scale', (3, 1, page))),
  )
  with pytest.raises(ValueError, match=message):
    ops.index_logits_paged(
      np.zeros((2, 1, 3, _I), np.float32),
      cache,
      np.zeros((2, 1, 3)),
      np.zeros((2, 1), np.int32),
      np.zeros(changes.get('length', (2,)), np.int32),
      implementation=changes.get('implementation', 'pallas'),
      blocks=blocks_lib.PagedBlocks(1, workers=changes.get('workers', 1)),
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'value_dim': 128}, 'value_dim=128 must be a multiple of 256'),
    ({'value_dim': 512}, 'value_dim=512 and 320 channels of queries'),
    ({'q': (2, 3, 4, 300)}, 'value_dim=256 and 300 channels of queries'),
    ({'cache': (3, 9, _C + _R)}, r'a cache \(3, 9, 320\) of rows must be of 2'),
    ({'index': (2, 4, 5)}, r'indices \(2, 4, 5\) are not of 2 x 3 queries'),
    ({'paged': True, 'table': (3, 1)}, 'is not of 2 sequences'),
    ({'table': (2, 1)}, 'without a block table'),
    ({'paged': True, 'blocks': _RESIDENT}, 'is_resident needs a cache'),
    (
      {'blocks': blocks_lib.AttendBlocks(128, 4)},
      'workers=4 do not divide 6 queries',
    ),
    ({'implementation': 'cuda'}, "implementation='cuda', it must be one of"),
  ],
)
def test_what_does_not_fit_attention_raises(changes, message):
  cache = jnp.zeros(changes.get('cache', (2, 9, _C + _R)), jnp.bfloat16)
  if changes.get('paged'):
    cache = ops.pack(cache, _C)
  table = changes.get('table')
  with pytest.raises(ValueError, match=message):
    ops.sparse_mla(
      jnp.zeros(changes.get('q', (2, 3, 4, _C + _R))),
      cache,
      jnp.zeros(changes.get('index', (2, 3, 5)), jnp.int32),
      None if table is None else np.zeros(table, np.int32),
      value_dim=changes.get('value_dim', _C),
      scale=1.0,
      blocks=changes.get('blocks'),
      implementation=changes.get('implementation', 'pallas'),
    )


def test_what_does_not_fit_the_rest_raises():
  with pytest.raises(ValueError, match='k=0 must be at least 1'):
    ops.top_k(np.zeros((1, 1, 3)), 0)
  with pytest.raises(ValueError, match="implementation='cuda', it must be one"):
    ops.top_k(np.zeros((1, 1, 3)), 1, implementation='cuda')
  for value_dim, width in ((128, 192), (256, 400), (256, 255)):
    with pytest.raises(ValueError, match=f'value_dim={value_dim} of {width}'):
      ops.pack(np.zeros((1, 8, width)), value_dim)


def test_blocks_are_for_the_cache_and_the_batch():
  decode = blocks_lib.attend(128, 1, 2048, None)
  assert (decode.tokens, decode.workers, decode.is_resident) == (512, 2, False)
  prefill = blocks_lib.attend(1, 1024, 2048, 2**20)
  assert (prefill.tokens, prefill.workers) == (1024, 2)
  assert prefill.is_resident
  # A sequence too long for VMEM, and too few queries to read all of it.
  assert not blocks_lib.attend(1, 1024, 2048, 2**26).is_resident
  assert not blocks_lib.attend(1, 1, 2048, 2**20).is_resident
  # Two blocks in turn.
  assert blocks_lib.attend(1, 9, 100, 0).tokens == 128
  assert blocks_lib.paged(256, (128, 16)).pages == 16
  assert blocks_lib.paged(256, (3, 4)).workers == 1
  assert blocks_lib.selected_rows(128, 4096) == 64
  assert blocks_lib.selected_rows(9, 4096) == 16
  assert blocks_lib.selected_rows(128, 2**17) == 8


@pytest.mark.parametrize(
  'case', cases.cases(), ids=lambda case: f'{case.name}_{case.implementation}'
)
def test_cases_have_deepseeks_shapes(case):
  results = jax.eval_shape(case.function, *case.args)
  if case.name.startswith('top_k'):
    assert results.shape == (*case.args[0].shape[:2], 2048)
  elif case.name.startswith('index'):
    assert results.shape[-1] == 4096
  else:
    out, lse = results
    assert out.shape == (*case.args[0].shape[:3], 512)
    assert lse.shape == out.shape[:3]
