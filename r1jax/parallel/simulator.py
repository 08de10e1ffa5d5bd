"""What a pipeline schedule costs, computed on the host.

Two timings: the textbook's, where an op starts as soon as its inputs are
there and its rank is free, and that of the executor, whose ranks step
together, a tick lasting as long as its longest op.
"""

import collections
import dataclasses
from collections.abc import Sequence

from r1jax.parallel import schedule as schedule_lib


@dataclasses.dataclass(frozen=True)
class Durations:
  """Time units of the ops; an input gradient takes backward - weight.

  Attributes:
    forward: F.
    backward: B, both halves.
    weight: W.
    pair: A forward and a whole backward together.
  """

  forward: float
  backward: float
  weight: float
  pair: float

  def of(self, op: schedule_lib.Op) -> float:
    if op.forward and op.backward and op.backward.kind == 'B':
      return self.pair
    each = {
      'F': self.forward,
      'B': self.backward,
      'I': self.backward - self.weight,
      'W': self.weight,
    }
    return sum(each[w.kind] for w in op.works)


@dataclasses.dataclass(frozen=True)
class Timing:
  """How long a schedule takes.

  Attributes:
    makespan: From the first op's start to the last one's end.
    busy: Time each rank works.
  """

  makespan: float
  busy: tuple[float, ...]

  @property
  def idle(self) -> tuple[float, ...]:
    return tuple(self.makespan - b for b in self.busy)

  @property
  def idle_share(self) -> tuple[float, ...]:
    return tuple(idle / self.makespan for idle in self.idle)


def check(schedule: schedule_lib.Schedule) -> None:
  """Refuses a schedule that would compute something else, or never end.

  Every rank runs each forward once, before its backward; takes each weight
  gradient once, in the order of the input gradients, none left over; and
  neighbours send in the order in which the other receives.

  Raises:
    ValueError: Names the rank and the op.
  """
  for rank, ops in enumerate(schedule.ops):
    _check_rank(schedule, rank, ops)
  for kinds, step in (('F', -1), ('BI', 1)):
    for rank in range(schedule.num_ranks):
      for stream in range(schedule.num_streams):
        _check_channel(schedule, rank, stream, kinds, step)
  _starts(schedule, Durations(1, 2, 1, 3))


def simulate(schedule: schedule_lib.Schedule, durations: Durations) -> Timing:
  """Each op starts as soon as its inputs are there and its rank is free.

  Raises:
    ValueError: An op waits for ever; names the rank and the op.
  """
  starts = _starts(schedule, durations)
  makespan = max(
    start[-1] + durations.of(ops[-1])
    for start, ops in zip(starts, schedule.ops, strict=True)
  )
  busy = (sum(map(durations.of, ops)) for ops in schedule.ops)
  return Timing(makespan, tuple(busy))


def simulate_lock_step(
  rows: Sequence[Sequence[schedule_lib.Op | None]], durations: Durations
) -> Timing:
  """Each tick lasts as long as its longest op.

  Args:
    rows: What each rank runs at each tick (None: nothing), as `table.place`
      returns it.
    durations: Of the ops.
  """
  times = [[durations.of(op) if op else 0 for op in row] for row in rows]
  makespan = sum(map(max, zip(*times, strict=True)))
  return Timing(makespan, tuple(map(sum, times)))


def peak_live(schedule: schedule_lib.Schedule) -> tuple[int, ...]:
  """Most microbatches each rank holds: forward begun, weight gradient due."""
  peaks = []
  for ops in schedule.ops:
    live = peak = 0
    for op in ops:
      live += op.forward is not None
      peak = max(peak, live)
      live -= op.backward is not None and op.backward.kind in 'BW'
    peaks.append(peak)
  return tuple(peaks)


def _starts(
  schedule: schedule_lib.Schedule, durations: Durations
) -> list[list[float]]:
  """When each op of each rank starts."""
  ready: dict[schedule_lib.Result, float] = {}
  starts = [[] for _ in schedule.ops]
  free = [0.0] * schedule.num_ranks

  def missing(rank: int, op: schedule_lib.Op) -> schedule_lib.Result | None:
    needs = (n for w in op.works for n in schedule.needs(rank, w))
    return next((n for n in needs if n not in ready), None)

  moved = True
  while moved:
    moved = False
    for rank, ops in enumerate(schedule.ops):
      while len(starts[rank]) < len(ops):
        op = ops[len(starts[rank])]
        if missing(rank, op):
          break
        needs = (n for w in op.works for n in schedule.needs(rank, w))
        start = max([free[rank], *(ready[n] for n in needs)])
        starts[rank].append(start)
        free[rank] = start + durations.of(op)
        for work in op.works:
          if result := schedule.result(rank, work):
            ready[result] = free[rank]
        moved = True
  for rank, ops in enumerate(schedule.ops):
    if len(starts[rank]) < len(ops):
      op = ops[len(starts[rank])]
      kind, source, stream, chunk = missing(rank, op)
      raise ValueError(
        f'{_name(rank, len(starts[rank]), op)} waits for ever: rank {source} '
        f'never gives it the {kind} of {stream}.{chunk}'
      )
  return starts


def _name(rank: int, index: int, op: schedule_lib.Op) -> str:
  return f'rank {rank}, op {index} ({op})'


def _check_rank(
  schedule: schedule_lib.Schedule,
  rank: int,
  ops: Sequence[schedule_lib.Op],
) -> None:
  """One list on its own: what runs, how often, and after what."""
  seen: dict[tuple[str, int, int], int] = {}
  put_off = collections.deque()
  for index, op in enumerate(ops):
    name = _name(rank, index, op)
    for work, kinds in ((op.forward, 'F'), (op.backward, 'BIW')):
      if work is None:
        continue
      if work.kind not in kinds:
        raise ValueError(f'{name}: {work} is none of {", ".join(kinds)}')
      if not (
        0 <= work.stream < schedule.num_streams
        and 0 <= work.chunk < schedule.num_chunks
      ):
        raise ValueError(f'{name}: there is no microbatch {work}')
    # A pair's halves run together, so neither may need the other.
    for work in reversed(op.works):
      place = work.stream, work.chunk
      forward, gradient = ('F', *place), ('I', *place)
      if work.kind == 'W':
        if not put_off or put_off[0] != place:
          due = f'{put_off[0][0]}.{put_off[0][1]}' if put_off else 'none'
          raise ValueError(f'{name}: the next weight gradient due is {due}')
        put_off.popleft()
        continue
      if work.kind != 'F' and forward not in seen:
        raise ValueError(f'{name}: {work} comes before its forward')
      key = forward if work.kind == 'F' else gradient
      if key in seen:
        raise ValueError(f'{name}: {work} ran already, as op {seen[key]}')
      seen[key] = index
      if work.kind == 'I':
        put_off.append(place)
  if put_off:
    stream, chunk = put_off[0]
    raise ValueError(
      f'rank {rank}, after op {len(ops) - 1} ({ops[-1]}): the weight gradient '
      f'W{stream}.{chunk} is never taken'
    )
  for stream in range(schedule.num_streams):
    for chunk in range(schedule.num_chunks):
      for kind, word in (('F', 'forward'), ('I', 'backward')):
        if (kind, stream, chunk) not in seen:
          raise ValueError(
            f'rank {rank}: the {word} of {stream}.{chunk} never runs'
          )


def _check_channel(
  schedule: schedule_lib.Schedule,
  rank: int,
  stream: int,
  kinds: str,
  step: int,
) -> None:
  """The order in which `rank` receives is that in which its source sends."""
  source = schedule.neighbour(rank, stream, step)
  if source is None:
    return

  def in_order(rank, stream):
    return [
      (index, op, work)
      for index, op in enumerate(schedule.ops[rank])
      for work in op.works
      if work.kind in kinds and work.stream == stream
    ]

  sent = in_order(*source)
  for (index, op, got), (_, _, given) in zip(
    in_order(rank, stream), sent, strict=True
  ):
    if got.chunk != given.chunk:
      raise ValueError(
        f'{_name(rank, index, op)}: rank {source[0]} sends {given} there'
      )
