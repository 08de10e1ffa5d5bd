"""Simulated times equal the published formulas; broken lists are refused."""

import dataclasses
import json
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from r1jax.parallel import schedule as schedule_lib
from r1jax.parallel import simulator, table

_VECTORS = json.loads(
  (
    pathlib.Path(__file__).parents[1] / 'data' / 'dualpipe_vectors.json'
  ).read_text()
)
_CASES = [k for k in _VECTORS if not k.startswith('ops_')]
_ALL = (
  schedule_lib.gpipe,
  schedule_lib.one_f_one_b,
  schedule_lib.zb1p,
  schedule_lib.dualpipe,
  schedule_lib.dualpipe_v,
)
_UNIT = simulator.Durations(forward=1, backward=2, weight=1, pair=3)
_HIDDEN = simulator.Durations(forward=1, backward=2, weight=1, pair=2)


@pytest.mark.parametrize('name', _CASES)
def test_dualpipe_takes_the_known_time(name):
  known = _VECTORS[name]
  method, P, M, _ = name.split('_')
  make = {
    'DualPipe': schedule_lib.dualpipe,
    'DualPipeV': schedule_lib.dualpipe_v,
  }[method]
  schedule = make(int(P[1:]), int(M[1:]))
  durations = simulator.Durations(
    known['F'], known['B'], known['W'], known['FB']
  )
  timing = simulator.simulate(schedule, durations)
  assert timing.makespan == known['makespan']
  assert list(timing.busy) == known['busy']
  assert list(timing.idle) == known['idle']
  assert max(timing.idle) == known['formula_bubble']
  assert list(simulator.peak_live(schedule)) == known['peak_live']


# The bubbles of arXiv:2412.19437, table 2, with F = 1, B = 2, W = 1, F&B = 3,
# and what is kept, in microbatches; P stages.
@pytest.mark.parametrize('P', [4, 8, 16])
@pytest.mark.parametrize(
  ('make', 'bubble', 'peak'),
  [
    (schedule_lib.gpipe, lambda P: (P - 1) * (1 + 2), lambda P, M: M),
    (schedule_lib.one_f_one_b, lambda P: (P - 1) * (1 + 2), lambda P, M: P),
    (schedule_lib.zb1p, lambda P: (P - 1) * (1 + 2 - 2), lambda P, M: P),
    (
      schedule_lib.dualpipe,
      lambda P: (P // 2 - 1) * (3 + 2 - 3),
      lambda P, M: P + 1,
    ),
  ],
)
def test_bubbles_are_those_of_the_table(P, make, bubble, peak):
  for M in (2 * P, 2 * P + 4, 5 * P):
    schedule = make(P, M)
    simulator.check(schedule)
    timing = simulator.simulate(schedule, _UNIT)
    assert timing.makespan == 3 * M + bubble(P)
    assert set(timing.idle) == {bubble(P)}
    assert timing.idle_share[0] == bubble(P) / timing.makespan
    assert max(simulator.peak_live(schedule)) == peak(P, M)


def test_what_each_rank_holds():
  one_f_one_b = simulator.peak_live(schedule_lib.one_f_one_b(4, 8))
  assert one_f_one_b == (4, 3, 2, 1)
  assert simulator.peak_live(schedule_lib.zb1p(4, 8)) == (4, 4, 4, 4)


@pytest.mark.parametrize('P', [4, 8, 16])
def test_the_v_idles_as_the_whole_does_on_half_the_ranks(P):
  timing = simulator.simulate(schedule_lib.dualpipe_v(P // 2, P), _UNIT)
  # Twice the work of a stage per microbatch, P stages on P / 2 ranks.
  assert timing.makespan == 2 * 3 * P + (P // 2 - 1) * 2


def test_uneven_times_by_hand():
  # F0 F1 B0 B1 | F0 B0 F1 B1 with F = 2, B = 3:
  # rank 0: 0-2 2-4 7-10 12-15; rank 1: 2-4 4-7 7-9 9-12.
  schedule = schedule_lib.one_f_one_b(2, 2)
  timing = simulator.simulate(schedule, simulator.Durations(2, 3, 1, 5))
  assert timing.makespan == 15
  assert timing.idle == (5, 5)
  assert timing.idle_share == (1 / 3, 1 / 3)


def test_a_tick_lasts_as_long_as_its_longest_op():
  F, B = schedule_lib.Work('F', 0, 0), schedule_lib.Work('B', 0, 0)
  forward, backward = schedule_lib.Op(F, None), schedule_lib.Op(None, B)
  pair = schedule_lib.Op(F, B)
  rows = [[forward, None, pair], [backward, forward, None]]
  timing = simulator.simulate_lock_step(rows, simulator.Durations(1, 2, 1, 2.5))
  assert timing.makespan == 2 + 1 + 2.5
  assert timing.busy == (3.5, 3)


@pytest.mark.parametrize(
  ('schedule', 'ideal', 'op', 'unit'),
  [
    # Makespan; lock-step ticks, time (pair 3 / pair 2); ticks of unit mode.
    (schedule_lib.gpipe(8, 20), 81, (54, 81, 81), 74),
    (schedule_lib.one_f_one_b(8, 20), 81, (54, 100, 100), 74),
    (schedule_lib.zb1p(8, 20), 67, (67, 67, 67), 67),
    (schedule_lib.dualpipe(8, 20), 66, (38, 72, 56), 63),
    (schedule_lib.dualpipe_v(4, 10), 66, (38, 72, 56), 63),
    (schedule_lib.dualpipe(4, 8), 26, (16, 26, 22), 25),
    (schedule_lib.dualpipe(8, 40), 126, (58, 132, 96), 123),
  ],
)
def test_lock_step_takes_the_known_time(schedule, ideal, op, unit):
  assert simulator.simulate(schedule, _UNIT).makespan == ideal
  placed = table.place(schedule)
  times = [
    simulator.simulate_lock_step(placed, d).makespan for d in (_UNIT, _HIDDEN)
  ]
  assert (len(placed[0]), *times) == op
  placed = table.place(schedule, unit=True)
  assert len(placed[0]) == unit
  assert simulator.simulate_lock_step(placed, _UNIT).makespan == unit


@hypothesis.given(st.sampled_from(_ALL), st.integers(1, 8), st.integers(0, 20))
@hypothesis.settings(max_examples=50)
def test_every_size_is_legal(make, half, more):
  num_ranks = 2 * half if make is schedule_lib.dualpipe else half
  schedule = make(num_ranks, 2 * num_ranks + 2 * more)
  simulator.check(schedule)
  timing = simulator.simulate(schedule, _UNIT)
  assert min(timing.idle) >= 0


def _op(text):
  works = {}
  for part in text.split('&'):
    stream, chunk = map(int, part[1:].split('.'))
    half = 'forward' if part[0] == 'F' else 'backward'
    works[half] = schedule_lib.Work(part[0], stream, chunk)
  return schedule_lib.Op(works.get('forward'), works.get('backward'))


def _with(schedule, rank, text):
  ops = list(schedule.ops)
  ops[rank] = tuple(map(_op, text.split()))
  return dataclasses.replace(schedule, ops=tuple(ops))


@pytest.mark.parametrize(
  ('make', 'rank', 'text', 'message'),
  [
    # 1F1B, 2 ranks: F0.0 F0.1 B0.0 B0.1 | F0.0 B0.0 F0.1 B0.1.
    ('1f1b', 1, 'B0.0 F0.0 F0.1 B0.1', r'rank 1, op 0 \(B0.0\).*before its fo'),
    ('1f1b', 0, 'F0.0 F0.1&B0.1 B0.0', r'rank 0, op 1 \(F0.1&B0.1\).*before'),
    ('1f1b', 0, 'F0.0 F0.1 B0.0 B0.0', r'rank 0, op 3 \(B0.0\).*as op 2'),
    ('1f1b', 0, 'F0.0 F0.0 B0.0 B0.1', r'rank 0, op 1 \(F0.0\).*as op 0'),
    ('1f1b', 0, 'F0.0 F0.1 B0.0', r'rank 0: the backward of 0.1 never runs'),
    ('1f1b', 0, 'F0.0 B0.0', r'rank 0: the forward of 0.1 never runs'),
    ('1f1b', 0, 'F0.0 F0.2 B0.0 B0.1', r'rank 0, op 1 \(F0.2\).*no microb'),
    ('1f1b', 0, 'F0.0 F1.0 B0.0 B0.1', r'rank 0, op 1 \(F1.0\).*no microb'),
    # Rank 1 receives in another order than rank 0 sends, or the reverse.
    ('1f1b', 1, 'F0.1 B0.1 F0.0 B0.0', r'rank 1, op 0 \(F0.1\).*sends F0.0'),
    ('1f1b', 0, 'F0.0 F0.1 B0.1 B0.0', r'rank 0, op 2 \(B0.1\).*sends B0.0'),
    # Each waits for the other.
    ('1f1b', 1, 'F0.0 F0.1 B0.0 B0.1', None),
    ('wait', 0, 'F0.0 B0.0 F0.1 B0.1', r'rank 0, op 1 \(B0.0\) waits for ever'),
    # ZB1P: F0.0 F0.1 I0.0 W0.0 I0.1 W0.1 | F0.0 I0.0 F0.1 I0.1 W0.0 W0.1.
    ('zb1p', 1, 'F0.0 I0.0 F0.1 I0.1 W0.0', r'rank 1, after op 4.*W0.1 is nev'),
    ('zb1p', 1, 'F0.0 W0.0 I0.0 F0.1 I0.1 W0.1', r'rank 1, op 1.*due is none'),
    ('zb1p', 1, 'F0.0 I0.0 F0.1 I0.1 W0.1 W0.0', r'op 4 \(W0.1\).*due is 0.0'),
    ('zb1p', 1, 'F0.0 I0.0 F0.1 B0.1 W0.0', None),
    ('zb1p', 1, 'F0.0 I0.0 F0.1 B0.1 W0.0 W0.1', r'op 5 \(W0.1\).*is none'),
  ],
)  # fmt: skip
def test_a_broken_list_is_refused(make, rank, text, message):
  schedule = {
    '1f1b': schedule_lib.one_f_one_b(2, 2),
    'wait': _with(
      schedule_lib.one_f_one_b(2, 2), 1, 'F0.0 F0.1 B0.0 B0.1'
    ),
    'zb1p': schedule_lib.zb1p(2, 2),
  }[make]  # fmt: skip
  broken = _with(schedule, rank, text)
  if message is None:  # Another list, but a legal one.
    simulator.check(broken)
    return
  with pytest.raises(ValueError, match=message):
    simulator.check(broken)


def test_a_forward_and_a_backward_have_their_places():
  schedule = schedule_lib.gpipe(1, 1)
  work = schedule_lib.Work('B', 0, 0)
  broken = dataclasses.replace(schedule, ops=((schedule_lib.Op(work, None),),))
  with pytest.raises(ValueError, match='rank 0, op 0 .*B0.0 is none of F'):
    simulator.check(broken)


def test_every_swap_of_neighbouring_ops_is_legal_or_named():
  schedule = schedule_lib.dualpipe(4, 8)
  refused = 0
  for rank, ops in enumerate(schedule.ops):
    for i in range(len(ops) - 1):
      swapped = [*ops[:i], ops[i + 1], ops[i], *ops[i + 2 :]]
      lists = list(schedule.ops)
      lists[rank] = tuple(swapped)
      broken = dataclasses.replace(schedule, ops=tuple(lists))
      try:
        simulator.check(broken)
      except ValueError as error:
        assert 'rank ' in str(error) and ', op ' in str(error)
        refused += 1
        with pytest.raises(ValueError):
          table.place(broken)
      else:
        table.validate(table.make_table(broken))
  assert refused > 20
