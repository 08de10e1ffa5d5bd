"""Packing completions: each once, whole, with its own numbers."""

import hypothesis
import numpy as np
from hypothesis import strategies as st

from r1jax import types
from r1jax.rl import packing

_ROW = 20
_lengths = st.lists(st.integers(1, _ROW), min_size=1, max_size=30)


@hypothesis.given(_lengths)
def test_best_fit_packs_each_item_once_and_no_row_overflows(lengths):
  rows = packing.best_fit(np.array(lengths), _ROW)
  assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
  used = [sum(lengths[i] for i in row) for row in rows]
  assert max(used) <= _ROW
  # Best fit is any-fit: no two rows could have been one, so more than half
  # of the room is used.
  assert len(rows) == 1 or sum(used) > (len(rows) / 2) * _ROW


def test_best_fit_takes_the_tightest_room():
  # 12 leaves 8 and 11 leaves 9: 8 fits both.
  assert packing.best_fit(np.array([11, 12, 8]), _ROW) == [[1, 2], [0]]


def test_parts_have_equal_counts_and_about_equal_totals():
  rng = np.random.default_rng(0)
  sizes = rng.exponential(size=32)
  parts = packing.even_parts(sizes, 4)
  assert parts.shape == (4, 8)
  assert sorted(parts.ravel()) == list(range(32))
  totals = sizes[parts].sum(1)
  assert totals.max() < 1.1 * totals.mean()
  drawn = sizes.reshape(4, 8).sum(1)  # As they came.
  assert drawn.max() > 1.2 * drawn.mean()


def _rollout(lengths, rng):
  B = len(lengths)
  rollout = types.Rollout(
    tokens_BT=rng.integers(1, 99, (B, _ROW)).astype(np.int32),
    mask_BT=np.zeros((B, _ROW), np.float32),
    logp_BT=rng.normal(size=(B, _ROW)).astype(np.float32),
    prompt_length_B=np.array([rng.integers(0, n) for n in lengths]),
    length_B=np.array(lengths),
    finished_B=np.ones(B, bool),
  )
  for i, n in enumerate(lengths):
    rollout.mask_BT[i, rollout.prompt_length_B[i] : n] = 1
  return rollout


@hypothesis.given(_lengths, st.integers(1, 4), st.randoms())
def test_pack_puts_every_chosen_completion_at_one_place(
  lengths, multiple, random
):
  rng = np.random.default_rng(random.randrange(1000))
  rollout = _rollout(lengths, rng)
  adv_B = rng.permutation(len(lengths)).astype(np.float32) + 1
  chosen = rng.permutation(len(lengths))[: rng.integers(1, len(lengths) + 1)]
  batch = packing.pack(
    rollout, adv_B, chosen, row_length=_ROW, rows_multiple=multiple
  )
  assert len(batch.tokens_BT) % multiple == 0
  found = []
  for b, segment_T in enumerate(batch.segment_BT):
    for segment in range(1, segment_T.max() + 1):
      (at,) = np.nonzero(segment_T == segment)
      n = len(at)
      assert (np.diff(at) == 1).all()
      i = int(np.flatnonzero(adv_B == batch.adv_BT[b, at[0]])[0])
      found.append(i)
      assert n == lengths[i]
      for name, value_T in (
        ('tokens_BT', rollout.tokens_BT[i, :n]),
        ('mask_BT', rollout.mask_BT[i, :n]),
        ('old_logp_BT', rollout.logp_BT[i, :n]),
        ('adv_BT', np.full(n, adv_B[i])),
        ('position_BT', np.arange(n)),
        ('length_BT', np.full(n, lengths[i] - rollout.prompt_length_B[i])),
      ):
        np.testing.assert_array_equal(getattr(batch, name)[b, at], value_T)
  assert sorted(found) == sorted(chosen.tolist())
  padding = batch.segment_BT == 0
  assert not batch.mask_BT[padding].any() and not batch.adv_BT[padding].any()
  assert batch.num_tokens == rollout.mask_BT[chosen].sum()
  assert batch.num_sequences == len(chosen)
