"""A schedule laid out in ticks: the static table that the executor runs.

All ranks step together. `place` says what each runs at which tick; `make_table`
turns that into int32 [ticks, ranks, columns], with the slot of every array
that waits in a buffer.
"""

import dataclasses
import enum
import heapq
from collections.abc import Iterable, Sequence

import numpy as np

from r1jax.parallel import schedule as schedule_lib
from r1jax.parallel import simulator


class Column(enum.IntEnum):
  """What stands in a row of the table.

  A slot that is the size of its buffer means none: what arrives there is
  never read.
  """

  FORWARD = 0  # 1: a forward runs.
  F_STREAM = 1
  F_MICROBATCH = 2
  F_FIRST = 3  # 1: its input is embedded here.
  F_LAST = 4  # 1: its output goes to the head.
  F_INPUT = 5  # Slot of its input.
  F_SAVED = 6  # Slot of what it keeps for its backward.
  BACKWARD = 7  # A Backward.
  B_STREAM = 8
  B_MICROBATCH = 9
  B_FIRST = 10
  B_LAST = 11
  B_INPUT = 12
  B_GRADIENT = 13  # Slot of the gradient of its output.
  B_SAVED = 14
  B_STASH = 15  # Slot of what W needs: I writes it, W reads it.
  X_PREVIOUS = 16  # Slots of this tick's arrivals, activations first:
  X_NEXT = 17  # from the rank before, the rank after,
  X_OWN = 18  # and this rank itself, where a V turns.
  G_PREVIOUS = 19
  G_NEXT = 20
  G_OWN = 21
  G_HEAD = 22  # The head's gradient, where forwards are kept.


class Backward(enum.IntEnum):
  NONE = 0
  B = 1
  I = 2  # noqa: E741
  W = 3


# Columns of what arrives from the rank `step` further.
_X_COLUMNS = {-1: Column.X_PREVIOUS, 1: Column.X_NEXT, 0: Column.X_OWN}
_G_COLUMNS = {-1: Column.G_PREVIOUS, 1: Column.G_NEXT, 0: Column.G_OWN}
_ARRIVALS = {
  'input': [*_X_COLUMNS.values()],
  'gradient': [*_G_COLUMNS.values(), Column.G_HEAD],
}
# Columns that hold slots of each buffer.
_BUFFERS = {
  'input': [Column.F_INPUT, Column.B_INPUT, *_ARRIVALS['input']],
  'gradient': [Column.B_GRADIENT, *_ARRIVALS['gradient']],
  'saved': [Column.F_SAVED, Column.B_SAVED],
  'stash': [Column.B_STASH],
}


@dataclasses.dataclass(frozen=True)
class Table:
  """A schedule in ticks.

  Attributes:
    schedule: What it runs.
    rows: int32 [ticks, ranks, columns].
    latency: Ticks from a send to the first tick that can read it.
    recompute: Backwards recompute from the stage's input; otherwise from what
      the forward kept, and the head runs beside the last forward.
    split: A whole backward has a stash slot as well.
    num_inputs: Slots for inputs of stages.
    num_gradients: Slots for gradients of their outputs.
    num_saved: Slots for what forwards keep.
    num_stashes: Slots for what weight gradients need.
  """

  schedule: schedule_lib.Schedule
  rows: np.ndarray
  latency: int
  recompute: bool
  split: bool
  num_inputs: int
  num_gradients: int
  num_saved: int
  num_stashes: int

  @property
  def num_ticks(self) -> int:
    return self.rows.shape[0]


def place(
  schedule: schedule_lib.Schedule, *, unit: bool = False, latency: int = 1
) -> list[list[schedule_lib.Op | None]]:
  """Gives each op the first tick its rank is free and its inputs are there.

  Args:
    schedule: Checked first.
    unit: Give forward, input gradient and weight gradient a tick each, so
      that all ticks take equally long; otherwise each op has one tick.
    latency: Ticks from a send to the first tick that can read it: 2 lets the
      transfer run beside the tick between.

  Returns:
    What each rank runs at each tick, None where it waits.

  Raises:
    ValueError: An illegal schedule or latency.
  """
  if latency not in (1, 2):
    raise ValueError(f'latency={latency} must be 1 or 2')
  simulator.check(schedule)
  lists = schedule.ops
  if unit:
    lists = [[u for op in ops for u in _units(op)] for ops in lists]
  ready: dict[schedule_lib.Result, int] = {}
  rows = [[] for _ in lists]
  following = [0] * len(lists)

  def is_ready(rank: int, op: schedule_lib.Op, tick: int) -> bool:
    for need in (n for w in op.works for n in schedule.needs(rank, w)):
      wait = 1 if need[1] == rank else latency
      if need not in ready or ready[need] + wait > tick:
        return False
    return True

  tick = 0
  while any(i < len(ops) for i, ops in zip(following, lists, strict=True)):
    done = {}
    for rank, ops in enumerate(lists):
      op = ops[following[rank]] if following[rank] < len(ops) else None
      if op is None or not is_ready(rank, op, tick):
        rows[rank].append(None)
        continue
      rows[rank].append(op)
      following[rank] += 1
      for work in op.works:
        if result := schedule.result(rank, work):
          done[result] = tick
    ready |= done
    tick += 1
  return rows


def make_table(
  schedule: schedule_lib.Schedule,
  *,
  unit: bool = False,
  latency: int = 1,
  recompute: bool = True,
  split: bool = False,
) -> Table:
  """Places a schedule and gives every array that waits a slot.

  The arguments are those of `place` and the attributes of `Table`.
  """
  placed = place(schedule, unit=unit, latency=latency)
  shape = len(placed[0]), schedule.num_ranks, len(Column)
  rows = np.zeros(shape, np.int32)
  rows[..., sum(_BUFFERS.values(), [])] = -1
  for rank, row in enumerate(placed):
    for tick, op in enumerate(row):
      if op is not None:
        _write_op(schedule, rows[tick, rank], rank, op)
  counts = dict.fromkeys(_BUFFERS, 0)
  stays = _stays(schedule, placed, latency, recompute, split)
  for (buffer, rank), waiting in stays.items():
    slots = _colour([(s.first, s.last) for s in waiting])
    counts[buffer] = max(counts[buffer], 1 + max(slots))
    for slot, stay in zip(slots, waiting, strict=True):
      for tick, column in stay.cells:
        rows[tick, rank, column] = slot
  for buffer, columns in _BUFFERS.items():
    none = rows[..., columns] == -1
    rows[..., columns] = np.where(none, counts[buffer], rows[..., columns])
  return Table(
    schedule=schedule,
    rows=rows,
    latency=latency,
    recompute=recompute,
    split=split,
    num_inputs=counts['input'],
    num_gradients=counts['gradient'],
    num_saved=counts['saved'],
    num_stashes=counts['stash'],
  )


@dataclasses.dataclass(frozen=True)
class _Stay:
  """An array that holds its slot from tick `first` to `last`, both included.

  Arrivals are written when a tick ends, so they hold theirs from the next.
  `cells` are the (tick, column)s that name the slot.
  """

  first: int
  last: int
  cells: tuple[tuple[int, Column], ...]


def _units(op: schedule_lib.Op) -> Iterable[schedule_lib.Op]:
  """F, I and W each on its own."""
  if op.forward:
    yield schedule_lib.Op(op.forward, None)
  if op.backward:
    halves = 'IW' if op.backward.kind == 'B' else op.backward.kind
    for kind in halves:
      work = dataclasses.replace(op.backward, kind=kind)
      yield schedule_lib.Op(None, work)


def _write_op(
  schedule: schedule_lib.Schedule,
  row: np.ndarray,
  rank: int,
  op: schedule_lib.Op,
) -> None:
  """Everything about an op but its slots."""
  for work in op.works:
    stage = schedule.stages[rank][work.stream]
    is_forward = work.kind == 'F'
    column = Column.FORWARD if is_forward else Column.BACKWARD
    row[column : column + 5] = (
      1 if is_forward else Backward[work.kind],
      work.stream,
      schedule.microbatch(work.stream, work.chunk),
      stage == 0,
      stage == schedule.num_stages - 1,
    )


def _stays(
  schedule: schedule_lib.Schedule,
  placed: Sequence[Sequence[schedule_lib.Op | None]],
  latency: int,
  recompute: bool,
  split: bool,
) -> dict[tuple[str, int], list[_Stay]]:
  """What waits in each (buffer, rank)."""
  C = Column
  ticks = {
    (rank, work.kind, work.stream, work.chunk): tick
    for rank, row in enumerate(placed)
    for tick, op in enumerate(row)
    for work in (op.works if op else ())
  }
  stays: dict[tuple[str, int], list[_Stay]] = {}

  def add(buffer: str, rank: int, first: int, last: int, *cells) -> None:
    stays.setdefault((buffer, rank), []).append(_Stay(first, last, cells))

  def tick_of(kinds: str, rank: int, k: int, c: int) -> int:
    return next(
      ticks[rank, kind, k, c] for kind in kinds if (rank, kind, k, c) in ticks
    )

  def arrival(kinds, rank, source, c, columns) -> tuple[int, Column]:
    """At whose end it comes, and through which column."""
    tick = tick_of(kinds, *source, c)
    step = source[0] - rank
    return tick + (latency - 1 if step else 0), columns[step]

  for rank in range(schedule.num_ranks):
    for k in range(schedule.num_streams):
      before, after = (schedule.neighbour(rank, k, step) for step in (-1, 1))
      for c in range(schedule.num_chunks):
        forward = tick_of('F', rank, k, c)
        backward = tick_of('BI', rank, k, c)
        if before is not None:
          come = arrival('F', rank, before, c, _X_COLUMNS)
          cells = [come, (forward, C.F_INPUT)]
          if recompute:
            cells.append((backward, C.B_INPUT))
          add('input', rank, come[0] + 1, cells[-1][0], *cells)
        if after is not None or not recompute:
          come = forward, C.G_HEAD
          if after is not None:
            come = arrival('BI', rank, after, c, _G_COLUMNS)
          cells = come, (backward, C.B_GRADIENT)
          add('gradient', rank, come[0] + 1, backward, *cells)
        if not recompute:
          cells = (forward, C.F_SAVED), (backward, C.B_SAVED)
          add('saved', rank, forward, backward, *cells)
        weight = ticks.get((rank, 'W', k, c))
        if weight is not None or split:
          last = backward if weight is None else weight
          cells = (backward, C.B_STASH), (last, C.B_STASH)
          add('stash', rank, backward, last, *cells)
  return stays


def _colour(intervals: Sequence[tuple[int, int]]) -> list[int]:
  """Slots for closed intervals, as few as overlap at any one tick."""
  slots = [0] * len(intervals)
  held, free, count = [], [], 0  # held: (last tick, slot)
  for i in sorted(range(len(intervals)), key=lambda i: intervals[i]):
    first, last = intervals[i]
    while held and held[0][0] < first:
      heapq.heappush(free, heapq.heappop(held)[1])
    if not free:
      heapq.heappush(free, count)
      count += 1
    slots[i] = heapq.heappop(free)
    heapq.heappush(held, (last, slots[i]))
  return slots


def validate(table: Table) -> None:
  """Runs the finished rows with labels instead of arrays.

  Every read finds the microbatch it expects, nothing is overwritten before
  its last read, every send is received and every receipt was sent, and each
  microbatch passes each stage once, with one weight gradient.

  Raises:
    ValueError: Names the tick, the rank and what is wrong.
  """
  run = _Labels(table)
  for tick in range(table.num_ticks):
    run.step(tick)
  run.finish()


class _Labels:
  """Buffers that hold [label, reads to come]; a label is (stage, microbatch).

  Buffers are named 'input', 'gradient', 'saved' and 'stash', as the counts.
  """

  def __init__(self, table: Table):
    schedule = table.schedule
    self._table, self._schedule = table, schedule
    ranks = range(schedule.num_ranks)
    self._buffers = {b: [{} for _ in ranks] for b in _BUFFERS}
    self._sizes = {
      'input': table.num_inputs,
      'gradient': table.num_gradients,
      'saved': table.num_saved,
      'stash': table.num_stashes,
    }
    self._late: dict[tuple[int, int, Column], tuple[int, int]] = {}
    self._seen: dict[tuple, int] = {}
    self._tick = 0

  def step(self, tick: int) -> None:
    self._tick = tick
    sent: dict[tuple[int, int, Column], tuple[int, int]] = {}
    for rank in range(self._schedule.num_ranks):
      row = self._table.rows[tick, rank]
      if row[Column.FORWARD] not in (0, 1):
        self._fail(rank, f'FORWARD {row[Column.FORWARD]} is neither 0 nor 1')
      # Reads before writes: a pair's halves run in any order.
      if row[Column.BACKWARD]:
        self._backward(rank, row, sent)
      if row[Column.FORWARD]:
        self._forward(rank, row, sent)
    self._receive(sent)

  def finish(self) -> None:
    schedule = self._schedule
    for buffer, ranks in self._buffers.items():
      for rank, slots in enumerate(ranks):
        for slot, (label, reads) in slots.items():
          if reads:
            self._fail(rank, f'{buffer} slot {slot} still holds {label}')
    if self._late:
      self._fail(next(iter(self._late))[1], 'a message is never received')
    for rank in range(schedule.num_ranks):
      for k, stage in enumerate(schedule.stages[rank]):
        for c in range(schedule.num_chunks):
          label = stage, schedule.microbatch(k, c)
          for what in ('forward', 'gradient', 'weight'):
            if self._seen.get((what, rank, *label)) != 1:
              self._fail(rank, f'{what} of {label} does not run once')

  def _fail(self, rank: int, message: str) -> None:
    raise ValueError(f'tick {self._tick}, rank {rank}: {message}')

  def _label(self, rank: int, row: np.ndarray, base: Column):
    """(stage, microbatch) of a half of the row; checks its first and last."""
    stream, microbatch, first, last = row[base + 1 : base + 5].tolist()
    if not 0 <= stream < self._schedule.num_streams:
      self._fail(rank, f'there is no stream {stream}')
    stage = self._schedule.stages[rank][stream]
    ends = stage == 0, stage == self._schedule.num_stages - 1
    if (first, last) != ends:
      self._fail(rank, f'stage {stage} is first, last = {ends}, not so here')
    return stream, (stage, microbatch)

  def _count(self, what: str, rank: int, label: tuple[int, int]) -> None:
    key = what, rank, *label
    self._seen[key] = self._seen.get(key, 0) + 1

  def _read(self, buffer: str, rank: int, slot: int, label) -> None:
    held = self._buffers[buffer][rank].get(slot)
    if held is None or held[0] != label or not held[1]:
      self._fail(rank, f'{buffer} slot {slot} holds {held}, not {label}')
    held[1] -= 1

  def _write(self, buffer: str, rank: int, slot: int, label, reads=1) -> None:
    if not 0 <= slot < self._sizes[buffer]:
      self._fail(rank, f'{label} has no {buffer} slot')
    held = self._buffers[buffer][rank].get(slot)
    if held is not None and held[1]:
      self._fail(rank, f'{buffer} slot {slot}: {label} overwrites {held}')
    self._buffers[buffer][rank][slot] = [label, reads]

  def _send(self, sent, rank, stream, step, columns, label) -> None:
    """Notes where the output of `label` has to arrive, and under which name."""
    source = self._schedule.neighbour(rank, stream, step)
    if source is not None:
      move = rank - source[0]  # Seen from the receiver.
      stage, microbatch = label
      sent[rank, source[0], columns[move]] = stage + step, microbatch

  def _forward(self, rank: int, row: np.ndarray, sent) -> None:
    stream, label = self._label(rank, row, Column.FORWARD)
    self._count('forward', rank, label)
    if not row[Column.F_FIRST]:
      self._read('input', rank, row[Column.F_INPUT], label)
    if not self._table.recompute:
      self._write('saved', rank, row[Column.F_SAVED], label)
      if row[Column.F_LAST]:
        sent[rank, rank, Column.G_HEAD] = label
    self._send(sent, rank, stream, 1, _X_COLUMNS, label)

  def _backward(self, rank: int, row: np.ndarray, sent) -> None:
    kind = Backward(row[Column.BACKWARD])
    stream, label = self._label(rank, row, Column.BACKWARD)
    if kind in (Backward.B, Backward.W):
      self._count('weight', rank, label)
    if kind == Backward.W:
      self._read('stash', rank, row[Column.B_STASH], label)
      return
    self._count('gradient', rank, label)
    if not self._seen.get(('forward', rank, *label)):
      self._fail(rank, f'the backward of {label} comes before its forward')
    if self._table.recompute:
      if not row[Column.B_FIRST]:
        self._read('input', rank, row[Column.B_INPUT], label)
    else:
      self._read('saved', rank, row[Column.B_SAVED], label)
    if not (row[Column.B_LAST] and self._table.recompute):
      self._read('gradient', rank, row[Column.B_GRADIENT], label)
    if kind == Backward.I or self._table.split:
      self._write('stash', rank, row[Column.B_STASH], label)
      if kind == Backward.B:
        self._read('stash', rank, row[Column.B_STASH], label)
    self._send(sent, rank, stream, -1, _G_COLUMNS, label)

  def _receive(self, sent) -> None:
    """This tick's arrivals; with latency 2, what the tick before sent."""
    near = {key: v for key, v in sent.items() if key[0] == key[1]}
    far = {key: v for key, v in sent.items() if key[0] != key[1]}
    if self._table.latency == 2:
      far, self._late = self._late, far
    arriving = {key[1:]: label for key, label in (near | far).items()}
    for rank in range(self._schedule.num_ranks):
      row = self._table.rows[self._tick, rank]
      for buffer, columns in _ARRIVALS.items():
        for column in columns:
          label = arriving.get((rank, column))
          slot = row[column]
          if label is None:
            if slot != self._sizes[buffer]:
              self._fail(rank, f'{column.name} {slot}: nothing arrives')
            continue
          reads = 1
          if buffer == 'input' and self._table.recompute:
            reads = 2
          self._write(buffer, rank, slot, label, reads)
