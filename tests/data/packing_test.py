"""Packed rows lose no token, mix no documents and are the same again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1jax.data import packing


class _Tokenizer:
  """One id per character."""

  pad_id, eos_id, bos_id = 0, 1, 2

  def encode_batch(self, texts):
    return [[ord(c) + 3 for c in text] for text in texts]


def _rows(documents, row_length, seed=None):
  rows = packing.pack_documents(
    documents, _Tokenizer(), row_length=row_length, seed=seed
  )
  return rows, [rows[i] for i in range(len(rows))]


def _read_back(rows):
  """Joins the pieces of every document again, by the definition of a row."""
  pieces = []
  for row in rows:
    for segment in range(1, row['segment'].max() + 1):
      here = row['segment'] == segment
      assert (np.diff(np.flatnonzero(here)) == 1).all()
      np.testing.assert_array_equal(
        row['position'][here], np.arange(here.sum())
      )
      np.testing.assert_array_equal(
        row['mask'][here], [0] + [1] * (here.sum() - 1)
      )
      pieces.append(row['tokens'][here].tolist())
  whole = [p for p in pieces if p[0] == 2 and p[-1] == 1]
  heads = [p for p in pieces if p[0] == 2 and p[-1] != 1]
  tails = [p for p in pieces if p[0] != 2]
  return whole, heads, tails


@given(
  st.lists(st.text(alphabet='abc', max_size=30), min_size=1, max_size=60),
  st.integers(2, 24),
  st.one_of(st.none(), st.integers(0, 9)),
)
def test_every_token_once(documents, row_length, seed):
  rows, packed = _rows(documents, row_length, seed)
  expected = sum(len(d) + 1 for d in documents)  # <bos> is not predicted.
  assert sum(row['mask'].sum() for row in packed) == expected
  targets = np.concatenate([r['tokens'][r['mask'] > 0] for r in packed])
  characters = ''.join(documents)
  np.testing.assert_array_equal(
    np.sort(targets),
    np.sort([ord(c) + 3 for c in characters] + [1] * len(documents)),
  )
  whole, heads, tails = _read_back(packed)
  short = [d for d in documents if len(d) + 2 <= row_length]
  assert sorted(whole) == sorted(
    [2, *(ord(c) + 3 for c in d), 1] for d in short
  )
  assert len(heads) == len(documents) - len(short)
  assert all(len(piece) == row_length for piece in heads)
  assert all(len(piece) >= 2 for piece in tails)
  for row in packed:
    padding = row['segment'] == 0
    assert not row['mask'][padding].any() and not row['tokens'][padding].any()
  assert rows.num_documents == len(documents)


def test_long_document_continues_from_its_last_token():
  _, packed = _rows(['abcdefg'], 4)
  # <bos> a b c | c d e f | f g <eos>
  tokens = [row['tokens'].tolist() for row in packed]
  a = ord('a') + 3
  assert tokens == [
    [2, a, a + 1, a + 2],
    [a + 2, a + 3, a + 4, a + 5],
    [a + 5, a + 6, 1, 0],
  ]
  assert packed[1]['mask'].tolist() == [0, 1, 1, 1]
  assert packed[2]['segment'].tolist() == [1, 1, 1, 0]


def test_first_fit_by_hand():
  rows = packing.first_fit(np.array([5, 6, 4, 5, 3, 10]), 10)
  assert rows == [[0, 2], [1, 4], [3], [5]]


def test_a_bounded_number_of_rows_is_open():
  # 40 rows of 6 open in turn; a 4 must not go back to one that closed.
  rows = packing.first_fit(np.array([6] * 40 + [4] * 40), 10)
  assert rows[:8] == [[i] for i in range(8)]
  assert rows[8:40] == [[8 + i, 40 + i] for i in range(32)]
  assert sum(len(row) for row in rows) == 80


def test_bytes_are_those_of_the_text():
  rows, _ = _rows(['é等', 'a\n'], 8)
  assert rows.num_bytes == 2 + 3 + 2


def test_seed_alone_decides():
  documents = [chr(97 + i % 26) * (1 + i % 7) for i in range(50)]

  def tokens(seed):
    return np.stack([row['tokens'] for row in _rows(documents, 16, seed)[1]])

  np.testing.assert_array_equal(tokens(3), tokens(3))
  assert tokens(3).tobytes() != tokens(4).tobytes()
  assert tokens(None)[0, 1] == ord('a') + 3


def test_fills_rows():
  rng = np.random.default_rng(0)
  lengths = rng.integers(5, 60, 400)
  rows = packing.first_fit(lengths, 128)
  assert lengths.sum() / (128 * len(rows)) > 0.95


def test_row_length_must_hold_two_tokens():
  with pytest.raises(ValueError, match='row_length=1 '):
    _rows(['a'], 1)
