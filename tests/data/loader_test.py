"""Batches from rows: every row once an epoch, and exact resume."""

import json

import numpy as np
import pytest

from r1jax import config
from r1jax.data import loader


class _Rows:
  """Row i holds i + 1 everywhere; it has 1 + i % 3 documents of 2 tokens."""

  def __init__(self, num_rows, first=1):
    self._num_rows = num_rows
    self._first = first

  def __len__(self):
    return self._num_rows

  def __getitem__(self, index):
    segment = np.array([1, 1, 2, 2, 3, 3, 0], np.int32)
    segment[segment > 1 + index % 3] = 0
    return {
      'tokens': np.full(7, self._first + index, np.int32),
      'mask': (segment > 0) * np.array([0, 1, 0, 1, 0, 1, 0], np.float32),
      'segment': segment,
      'position': np.array([0, 1, 0, 1, 0, 1, 0], np.int32),
    }


def _source(num_rows=10, batch_size=4, shuffle_seed=5, **options):
  return loader.RowSource(
    _Rows(num_rows),
    batch_size=batch_size,
    shuffle_seed=shuffle_seed,
    **options,
  )


def _draw(source, num_batches):
  return [source.next() for _ in range(num_batches)]


def _ids(batches):
  return np.concatenate([batch.tokens_BT[:, 0] for batch in batches])


def test_every_row_once_an_epoch_in_an_order_of_its_own():
  ids = _ids(_draw(_source(), 5))  # Two epochs of 10 rows.
  np.testing.assert_array_equal(np.sort(ids[:10]), np.arange(1, 11))
  np.testing.assert_array_equal(np.sort(ids[10:]), np.arange(1, 11))
  assert ids[:10].tolist() != ids[10:].tolist()
  assert ids[:10].tolist() != list(range(1, 11))


def test_order_is_a_function_of_the_seed():
  a, b, c = (_ids(_draw(_source(shuffle_seed=s), 5)) for s in (5, 5, 6))
  np.testing.assert_array_equal(a, b)
  assert a.tolist() != c.tolist()


def test_no_seed_keeps_the_order():
  ids = _ids(_draw(_source(shuffle_seed=None), 5))
  np.testing.assert_array_equal(ids, np.tile(np.arange(1, 11), 2))


def test_batch_fields():
  batch = _source(shuffle_seed=None).next(state='not read')
  assert batch.tokens_BT.shape == (4, 7)
  dtypes = [
    x.dtype.name
    for x in (
      batch.tokens_BT,
      batch.mask_BT,
      batch.segment_BT,
      batch.position_BT,
      batch.num_tokens,
      batch.num_sequences,
    )
  ]
  assert dtypes == ['int32', 'float32', 'int32', 'int32', 'float32', 'float32']
  # Rows 0 to 3 hold 1, 2, 3 and 1 documents, each with one predicted token.
  assert batch.num_sequences == 7
  assert batch.num_tokens == 7 == batch.mask_BT.sum()


@pytest.mark.parametrize('consumed', [0, 1, 7])
def test_resume_is_exact(consumed):
  source = _source()
  _draw(source, consumed)
  state = json.loads(json.dumps(source.get_state()))
  expected = _ids(_draw(source, 6))
  fresh = _source()
  _draw(fresh, 2)
  fresh.set_state(state)
  np.testing.assert_array_equal(_ids(_draw(fresh, 6)), expected)
  source.set_state(state)
  np.testing.assert_array_equal(_ids(_draw(source, 6)), expected)


def test_reading_ahead_does_not_move_the_state():
  states = []
  for prefetch in (0, 1, 16):
    source = _source(prefetch_batches=prefetch)
    _draw(source, 3)
    states.append(source.get_state())
  assert states[0] == states[1] == states[2]


def test_resume_over_other_data_is_refused():
  state = _source().get_state()
  for rows in (_Rows(11), _Rows(10, first=2)):
    source = loader.RowSource(rows, batch_size=4, shuffle_seed=5)
    with pytest.raises(config.UserError, match='the data is not what'):
      source.set_state(state)


def test_hosts_share_the_global_batch():
  whole = _draw(_source(), 5)
  totals = [
    np.array([batch.num_tokens, batch.num_sequences]) for batch in whole
  ]
  for host in range(2):
    seen = []

    def reduce(counts, seen=seen):
      seen.append(counts)
      return totals[len(seen) - 1]

    part = _draw(_source(host_index=host, host_count=2, reduce=reduce), 5)
    for mine, batch, counts in zip(part, whole, seen, strict=True):
      np.testing.assert_array_equal(mine.tokens_BT, batch.tokens_BT[host::2])
      assert counts[0] == mine.mask_BT.sum()
      assert counts[1] == mine.segment_BT.max(1).sum()
      assert mine.num_tokens == batch.num_tokens
      assert mine.num_sequences == batch.num_sequences


def test_impossible_sources():
  with pytest.raises(config.UserError, match='no row'):
    _source(num_rows=0)
  with pytest.raises(config.UserError, match='batch_size=3 .* 2 hosts'):
    _source(batch_size=3, host_count=2, reduce=lambda x: x)
  with pytest.raises(config.UserError, match='batch_size=0'):
    _source(batch_size=0)
  with pytest.raises(ValueError, match='host_count=2 needs reduce'):
    _source(host_count=2)


def test_evaluation_batches_cover_the_rows_once():
  batches = loader.evaluation_batches(_Rows(10), 4)
  assert [batch.tokens_BT.shape for batch in batches] == [(4, 7)] * 3
  assert _ids(batches).tolist() == [*range(1, 11), 0, 0]
  last = batches[-1]  # Rows 8 and 9: 3 and 1 documents.
  assert not last.mask_BT[2:].any() and not last.segment_BT[2:].any()
  assert last.num_tokens == 4 and last.num_sequences == 4
