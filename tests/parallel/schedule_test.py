"""Schedules equal DeepSeek's op for op; wrong sizes are named."""

import collections
import json
import pathlib

import pytest

from r1jax.parallel import schedule as schedule_lib

_VECTORS = json.loads(
  (
    pathlib.Path(__file__).parents[1] / 'data' / 'dualpipe_vectors.json'
  ).read_text()
)
ALL = (
  schedule_lib.gpipe,
  schedule_lib.one_f_one_b,
  schedule_lib.zb1p,
  schedule_lib.dualpipe,
  schedule_lib.dualpipe_v,
)


def _texts(schedule, by_stage):
  """As the vectors write ops: W has no number, V's streams are stages."""

  def text(rank, work):
    if work.kind == 'W':
      return 'W'
    if by_stage:
      stage = schedule.stages[rank][work.stream]
      return f'{work.kind}@{stage}.{work.chunk}'
    return str(work)

  return [
    ['&'.join(text(rank, w) for w in op.works) for op in ops]
    for rank, ops in enumerate(schedule.ops)
  ]


@pytest.mark.parametrize(
  ('schedule', 'name', 'by_stage'),
  [
    (schedule_lib.dualpipe(8, 20), 'ops_DualPipe_P8_M20', False),
    (schedule_lib.dualpipe_v(4, 10), 'ops_DualPipeV_P4_M10', True),
  ],
)
def test_dualpipe_is_deepseeks(schedule, name, by_stage):
  assert _texts(schedule, by_stage) == _VECTORS[name]


def _steps(counts):
  """Ops of each kind in a rank whose eight steps have these lengths."""
  one, two, three, four, five, six, seven, eight = counts
  return {
    'F': one + 2 * two + three,
    'pair': 2 * four + five,
    'W': three + seven + eight,
    'backward': three + five + 2 * six + seven,
  }


@pytest.mark.parametrize(
  'name', [k for k in _VECTORS if k.endswith('_overlapfree')]
)
def test_steps_have_the_known_lengths(name):
  method, P, M, _ = name.split('_')
  make = {
    'DualPipe': schedule_lib.dualpipe,
    'DualPipeV': schedule_lib.dualpipe_v,
  }[method]
  schedule = make(int(P[1:]), int(M[1:]))
  for ops, counts in zip(
    schedule.ops, _VECTORS[name]['step_counts'], strict=True
  ):
    expected = _steps(counts)
    if counts[0] + counts[2] + counts[4] == 0:  # Beside the turning point,
      expected['F'] += 1  # where the first pair is taken apart.
      expected['backward'] += 1
      expected['pair'] -= 1
    kinds = collections.Counter()
    for op in ops:
      pair = op.forward and op.backward
      kind = 'pair' if pair else op.works[0].kind
      kinds[{'B': 'backward', 'I': 'backward'}.get(kind, kind)] += 1
    assert kinds == expected


def test_1f1b_by_hand():
  lists = [
    ' '.join(map(str, ops)) for ops in schedule_lib.one_f_one_b(3, 4).ops
  ]
  assert lists == [
    'F0.0 F0.1 F0.2 B0.0 F0.3 B0.1 B0.2 B0.3',
    'F0.0 F0.1 B0.0 F0.2 B0.1 F0.3 B0.2 B0.3',
    'F0.0 B0.0 F0.1 B0.1 F0.2 B0.2 F0.3 B0.3',
  ]


def test_zb1p_by_hand():
  lists = [' '.join(map(str, ops)) for ops in schedule_lib.zb1p(2, 3).ops]
  assert lists == [
    'F0.0 F0.1 I0.0 W0.0 F0.2 I0.1 W0.1 I0.2 W0.2',
    'F0.0 I0.0 F0.1 I0.1 W0.0 F0.2 I0.2 W0.1 W0.2',
  ]


def test_gpipe_by_hand():
  lists = [' '.join(map(str, ops)) for ops in schedule_lib.gpipe(2, 2).ops]
  assert lists == ['F0.0 F0.1 B0.0 B0.1'] * 2


@pytest.mark.parametrize('make', ALL)
@pytest.mark.parametrize('num_ranks', [2, 4])
def test_every_microbatch_passes_every_stage_once(make, num_ranks):
  schedule = make(num_ranks, 2 * num_ranks)
  passed = collections.Counter()
  for rank, ops in enumerate(schedule.ops):
    for work in (w for op in ops for w in op.works):
      microbatch = schedule.microbatch(work.stream, work.chunk)
      stage = schedule.stages[rank][work.stream]
      for kind in {'B': 'GW', 'I': 'G'}.get(work.kind, work.kind):
        passed[kind, stage, microbatch] += 1
  assert set(passed.values()) == {1}
  expected = 3 * schedule.num_stages * schedule.num_microbatches
  assert len(passed) == expected


def test_where_the_stages_are():
  dual, v = schedule_lib.dualpipe(4, 8), schedule_lib.dualpipe_v(4, 8)
  assert dual.is_mirrored and not v.is_mirrored
  assert dual.num_stages == 4 and v.num_stages == 8
  assert dual.stage_order == (0, 1, 2, 3)
  assert v.stage_order == (0, 7, 1, 6, 2, 5, 3, 4)
  assert [dual.microbatch(1, 0), v.microbatch(1, 0)] == [4, 0]
  # Down and up; the V turns on its last rank.
  assert dual.neighbour(1, 0, 1) == (2, 0)
  assert dual.neighbour(1, 1, 1) == (0, 1)
  assert dual.neighbour(3, 0, 1) is None
  assert v.neighbour(3, 0, 1) == (3, 1)
  assert v.neighbour(3, 1, -1) == (3, 0)
  assert v.neighbour(0, 1, 1) is None


@pytest.mark.parametrize(
  ('make', 'num_ranks', 'num_microbatches', 'message'),
  [
    (schedule_lib.dualpipe, 3, 8, 'num_ranks=3 must be even.* 4 would do'),
    (schedule_lib.dualpipe, 0, 8, 'num_ranks=0 must be even.* 2 would do'),
    (schedule_lib.dualpipe, 4, 9, 'microbatches=9 must be even.* 10 would do'),
    (schedule_lib.dualpipe, 4, 6, 'at least 2 . num_ranks; 8 would do'),
    (schedule_lib.dualpipe_v, 4, 7, 'at least 2 . num_ranks; 8 would do'),
    (schedule_lib.dualpipe_v, 0, 7, 'num_ranks=0 must be positive'),
    (schedule_lib.one_f_one_b, 4, 0, 'microbatches=0 must be .* 8 would do'),
    (schedule_lib.zb1p, -1, 4, 'ZB1P: num_ranks=-1 must be positive'),
    (schedule_lib.gpipe, 0, 4, 'GPipe: num_ranks=0 must be positive'),
  ],
)
def test_wrong_sizes_raise(make, num_ranks, num_microbatches, message):
  with pytest.raises(ValueError, match=message):
    make(num_ranks, num_microbatches)
