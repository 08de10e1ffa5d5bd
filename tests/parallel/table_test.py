"""Finished tables are what their schedules say; every wrong cell is found."""

import dataclasses

import numpy as np
import pytest

from r1jax.parallel import schedule as schedule_lib
from r1jax.parallel import simulator, table
from r1jax.parallel.table import Backward, Column

_SCHEDULES = [
  schedule_lib.gpipe(4, 8),
  schedule_lib.one_f_one_b(4, 8),
  schedule_lib.one_f_one_b(4, 2),
  schedule_lib.zb1p(4, 8),
  schedule_lib.dualpipe(4, 8),
  schedule_lib.dualpipe(8, 20),
  schedule_lib.dualpipe_v(1, 2),
  schedule_lib.dualpipe_v(4, 10),
]
_NAMES = [f'{s.name}_{s.num_ranks}_{s.num_microbatches}' for s in _SCHEDULES]


@pytest.mark.parametrize('schedule', _SCHEDULES, ids=_NAMES)
@pytest.mark.parametrize('unit', [False, True])
@pytest.mark.parametrize('latency', [1, 2])
def test_every_table_is_valid(schedule, unit, latency):
  for recompute in (True, False):
    for split in (True, False):
      made = table.make_table(
        schedule, unit=unit, latency=latency, recompute=recompute, split=split
      )
      table.validate(made)
      assert made.rows.dtype == np.int32
      assert made.rows.shape[1:] == (schedule.num_ranks, len(Column))


@pytest.mark.parametrize(
  ('schedule', 'op', 'unit'),
  [
    # Slots of inputs, gradients and stashes.
    (schedule_lib.gpipe(4, 8), (8, 1, 0), (8, 1, 1)),
    (schedule_lib.one_f_one_b(4, 8), (4, 1, 0), (4, 1, 1)),
    (schedule_lib.zb1p(4, 8), (4, 1, 4), (4, 1, 4)),
    (schedule_lib.dualpipe(4, 8), (6, 1, 2), (6, 2, 2)),
    (schedule_lib.dualpipe_v(2, 4), (6, 1, 2), (6, 2, 2)),
    (schedule_lib.dualpipe_v(4, 10), (10, 2, 4), (10, 2, 4)),
    (schedule_lib.dualpipe(8, 20), (10, 2, 4), (10, 2, 4)),
    (schedule_lib.one_f_one_b(8, 20), (8, 1, 0), (8, 1, 1)),
    (schedule_lib.zb1p(8, 20), (8, 1, 8), (8, 1, 8)),
  ],
)
def test_buffers_have_the_known_sizes(schedule, op, unit):
  for is_unit, known in ((False, op), (True, unit)):
    made = table.make_table(schedule, unit=is_unit)
    sizes = made.num_inputs, made.num_gradients, made.num_stashes
    assert sizes == known
    assert made.num_saved == 0


@pytest.mark.parametrize('schedule', _SCHEDULES, ids=_NAMES)
def test_forwards_are_kept_for_no_more_than_live_microbatches(schedule):
  made = table.make_table(schedule, recompute=False)
  assert made.num_saved <= max(simulator.peak_live(schedule))
  assert made.num_inputs <= 2 * schedule.num_streams


def _messages(made):
  """Reads (kind, stage, microbatch) of each tick and rank off the rows."""
  schedule, found = made.schedule, []
  for tick, row in enumerate(made.rows):
    for rank, cells in enumerate(row):
      if cells[Column.FORWARD]:
        stage = schedule.stages[rank][cells[Column.F_STREAM]]
        found.append((tick, rank, 'F', stage, cells[Column.F_MICROBATCH]))
      if cells[Column.BACKWARD]:
        kind = Backward(cells[Column.BACKWARD]).name
        stage = schedule.stages[rank][cells[Column.B_STREAM]]
        found.append((tick, rank, kind, stage, cells[Column.B_MICROBATCH]))
  return found


@pytest.mark.parametrize('schedule', _SCHEDULES, ids=_NAMES)
@pytest.mark.parametrize('latency', [1, 2])
def test_a_row_runs_after_what_it_needs(schedule, latency):
  made = table.make_table(schedule, latency=latency)
  ticks, rank_of = {}, {}
  for tick, rank, kind, stage, microbatch in _messages(made):
    for half in {'B': 'GW', 'I': 'G'}.get(kind, kind):
      ticks[half, stage, microbatch] = tick
    rank_of[stage, microbatch] = rank
  last = schedule.num_stages - 1
  for (half, stage, microbatch), tick in ticks.items():
    wait = lambda s, m=microbatch, r=stage: (
      1 if rank_of[s, m] == rank_of[r, m] else latency
    )
    if half == 'F' and stage > 0:
      assert ticks['F', stage - 1, microbatch] + wait(stage - 1) <= tick
    if half == 'G':
      assert ticks['F', stage, microbatch] < tick
      if stage < last:
        assert ticks['G', stage + 1, microbatch] + wait(stage + 1) <= tick
    if half == 'W':
      assert ticks['G', stage, microbatch] <= tick
  count = 3 * schedule.num_stages * schedule.num_microbatches
  assert len(ticks) == count


def _used(made, tick, rank, column):
  """Says whether a cell matters."""
  row = made.rows[tick, rank]
  if column in (Column.FORWARD, Column.BACKWARD):
    return True
  if column >= Column.X_PREVIOUS:
    return True
  if column < Column.BACKWARD:
    if not row[Column.FORWARD]:
      return False
    if column == Column.F_INPUT:
      return not row[Column.F_FIRST]
    return column != Column.F_SAVED or not made.recompute
  kind = row[Column.BACKWARD]
  return {
    Column.B_INPUT: kind in (1, 2) and made.recompute and not row[10],
    Column.B_GRADIENT: kind in (1, 2) and not (row[11] and made.recompute),
    Column.B_SAVED: kind in (1, 2) and not made.recompute,
    Column.B_STASH: kind in (2, 3) or (kind == 1 and made.split),
  }.get(column, kind > 0)


@pytest.mark.parametrize(
  'schedule',
  [
    schedule_lib.dualpipe(2, 4),
    schedule_lib.dualpipe_v(2, 4),
    schedule_lib.zb1p(2, 4),
  ],
)
@pytest.mark.parametrize('recompute', [True, False])
def test_every_wrong_cell_is_found(schedule, recompute):
  made = table.make_table(schedule, recompute=recompute)
  for tick, rank, column in np.ndindex(made.rows.shape):
    for change in (-1, 1):
      rows = made.rows.copy()
      rows[tick, rank, column] += change
      broken = dataclasses.replace(made, rows=rows)
      if not _used(made, tick, rank, column):
        table.validate(broken)
        continue
      with pytest.raises(ValueError):
        table.validate(broken)


def test_later_arrivals_cost_the_known_ticks():
  schedule = schedule_lib.dualpipe(8, 20)
  for unit, ticks in ((False, 64), (True, 78)):
    assert table.make_table(schedule, unit=unit, latency=2).num_ticks == ticks


def test_latency_counts_between_ranks_only():
  # One rank: F0 F1 (the V turns) … need no transfer at all.
  schedule = schedule_lib.dualpipe_v(1, 2)
  ticks = [table.make_table(schedule, latency=n).num_ticks for n in (1, 2)]
  assert ticks[0] == ticks[1]


def test_latency_is_one_or_two():
  with pytest.raises(ValueError, match='latency=3 must be 1 or 2'):
    table.make_table(schedule_lib.gpipe(2, 2), latency=3)
