"""Pipeline schedules as data: what each rank runs, in which order.

A rank holds one stage per stream: one for GPipe, 1F1B and ZB1P; two for
DualPipe (rank r has stage r for the microbatches that enter at rank 0 and
stage P-1-r for those that enter at rank P-1) and for DualPipeV (stages r and
2P-1-r of one pipeline that goes down the ranks and up again).
"""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Work:
  """One microbatch at one of its rank's stages.

  Attributes:
    kind: 'F' forward, 'B' the whole backward, or its two halves: 'I' the
      gradient of the input, 'W' that of the weights.
    stream: Which of the rank's stages.
    chunk: Number of the microbatch within its stream.
  """

  kind: str
  stream: int
  chunk: int

  def __str__(self) -> str:
    return f'{self.kind}{self.stream}.{self.chunk}'


@dataclasses.dataclass(frozen=True)
class Op:
  """A forward, a backward, or a pair that runs together."""

  forward: Work | None
  backward: Work | None

  @property
  def works(self) -> tuple[Work, ...]:
    return tuple(w for w in (self.forward, self.backward) if w is not None)

  def __str__(self) -> str:
    return '&'.join(map(str, self.works))


# What a work leaves behind for others: ('x' | 'gradient' | 'stash', rank,
# stream, chunk): its output, the gradient of its input, what W needs.
Result = tuple[str, int, int, int]


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Who holds which stage, and in which order each rank works.

  Attributes:
    name: Of the method.
    stages: The stage of each rank and stream.
    num_microbatches: M, over all streams.
    ops: The list of each rank.
  """

  name: str
  stages: tuple[tuple[int, ...], ...]
  num_microbatches: int
  ops: tuple[tuple[Op, ...], ...]

  @property
  def num_ranks(self) -> int:
    return len(self.stages)

  @property
  def num_streams(self) -> int:
    return len(self.stages[0])

  @property
  def num_stages(self) -> int:
    return 1 + max(map(max, self.stages))

  @property
  def is_mirrored(self) -> bool:
    """Says whether every stage lives on two ranks (DualPipe)."""
    return self.num_stages < self.num_ranks * self.num_streams

  @property
  def num_chunks(self) -> int:
    """Microbatches per stream."""
    entries = self.num_streams if self.is_mirrored else 1
    return self.num_microbatches // entries

  @property
  def stage_order(self) -> tuple[int, ...]:
    """The stages as the ranks hold them: rank 0's, rank 1's, …

    A mirrored schedule's second copies are not listed.
    """
    if self.is_mirrored:
      return tuple(row[0] for row in self.stages)
    return tuple(stage for row in self.stages for stage in row)

  def microbatch(self, stream: int, chunk: int) -> int:
    return chunk + stream * self.num_chunks * self.is_mirrored

  def neighbour(
    self, rank: int, stream: int, step: int
  ) -> tuple[int, int] | None:
    """(rank, stream) of the stage `step` = ±1 further; None past the ends."""
    stage = self.stages[rank][stream] + step
    # The same stream first: in DualPipe both hold every stage.
    for k in sorted(range(self.num_streams), key=lambda k: k != stream):
      for r in range(self.num_ranks):
        if self.stages[r][k] == stage:
          return r, k
    return None

  def result(self, rank: int, work: Work) -> Result | None:
    """What others may wait for; None for a weight gradient."""
    kind = {'F': 'x', 'B': 'gradient', 'I': 'gradient', 'W': None}[work.kind]
    return kind and (kind, rank, work.stream, work.chunk)

  def needs(self, rank: int, work: Work) -> tuple[Result, ...]:
    """What must be there before `work` starts."""
    k, c = work.stream, work.chunk
    if work.kind == 'F':
      source = self.neighbour(rank, k, -1)
      return () if source is None else (('x', *source, c),)
    if work.kind == 'W':
      return (('gradient', rank, k, c),)
    source = self.neighbour(rank, k, 1)
    own = ('x', rank, k, c)
    return (own,) if source is None else (own, ('gradient', *source, c))


def gpipe(num_ranks: int, num_microbatches: int) -> Schedule:
  """All forwards, then all backwards. Source: arXiv:1811.06965."""
  _check_sizes('GPipe', num_ranks, num_microbatches)
  lists = []
  for _ in range(num_ranks):
    rank = _Rank()
    for kind in 'FB':
      for _ in range(num_microbatches):
        rank.add(kind)
    lists.append(rank.ops)
  return _one_stream('gpipe', num_microbatches, lists)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Schedule:
  """Forwards until the first gradient is due, then one of each in turn.

  Source: PipeDream-Flush, arXiv:2006.09503, §3.2.
  """
  _check_sizes('1F1B', num_ranks, num_microbatches)
  return _in_turn('1f1b', num_ranks, num_microbatches, split=False)


def zb1p(num_ranks: int, num_microbatches: int) -> Schedule:
  """1F1B with the weight gradients of rank r put off by r microbatches.

  Source: ZB-H1, arXiv:2401.10241, §2.2.
  """
  _check_sizes('ZB1P', num_ranks, num_microbatches)
  return _in_turn('zb1p', num_ranks, num_microbatches, split=True)


def _in_turn(
  name: str, num_ranks: int, num_microbatches: int, *, split: bool
) -> Schedule:
  lists = []
  for r in range(num_ranks):
    rank, warm_up = _Rank(), min(num_ranks - 1 - r, num_microbatches)
    for i in range(num_microbatches + warm_up):
      if i < num_microbatches:
        rank.add('F')
      if i >= warm_up:
        rank.add('I' if split else 'B')
        if len(rank.put_off) > r:
          rank.add('W')
    while rank.put_off:
      rank.add('W')
    lists.append(rank.ops)
  return _one_stream(name, num_microbatches, lists)


def dualpipe(num_ranks: int, num_microbatches: int) -> Schedule:
  """Two directions at once; forwards and backwards in pairs.

  Source: DeepSeek-V3, arXiv:2412.19437, §3.2.1.
  """
  P, M = num_ranks, num_microbatches
  if P < 2 or P % 2:
    raise ValueError(
      f'DualPipe: num_ranks={P} must be even, at least 2; {max(P + P % 2, 2)} '
      'would do'
    )
  if M % 2 or M < 2 * P:
    raise ValueError(
      f'DualPipe: num_microbatches={M} must be even and at least '
      f'2 * num_ranks; {max(M + M % 2, 2 * P)} would do'
    )
  lists = []
  for r in range(P):
    near = int(r >= P // 2)  # The stream that enters at the near end.
    lists.append(
      _bidirectional(min(r, P - 1 - r), P // 2, M // 2, (near, 1 - near))
    )
  stages = tuple((r, P - 1 - r) for r in range(P))
  return Schedule('dualpipe', stages, M, tuple(lists))


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Schedule:
  """DualPipe cut in half: one pipeline, down the ranks and up again.

  Source: https://github.com/deepseek-ai/DualPipe, DualPipeV.
  """
  P, M = num_ranks, num_microbatches
  _check_sizes('DualPipeV', P, M)
  if M < 2 * P:
    raise ValueError(
      f'DualPipeV: num_microbatches={M} must be at least 2 * num_ranks; '
      f'{2 * P} would do'
    )
  lists = tuple(_bidirectional(r, P, M, (0, 1)) for r in range(P))
  stages = tuple((r, 2 * P - 1 - r) for r in range(P))
  return Schedule('dualpipe_v', stages, M, lists)


class _Rank:
  """The list of one rank as it grows; counts the chunks of each stream."""

  def __init__(self):
    self.put_off = collections.deque()
    self._ops, self._next = [], collections.Counter()

  @property
  def ops(self) -> tuple[Op, ...]:
    return tuple(self._ops)

  def add(self, kind: str, stream: int = 0) -> None:
    """Appends the next F, B or I of a stream, or the oldest W put off."""
    work = self._take(kind, stream)
    is_forward = kind == 'F'
    self._ops.append(Op(work, None) if is_forward else Op(None, work))

  def add_pair(self, forward: int, backward: int) -> None:
    self._ops.append(Op(self._take('F', forward), self._take('B', backward)))

  def _take(self, kind: str, stream: int) -> Work:
    if kind == 'W':
      return self.put_off.popleft()
    key = kind == 'F', stream
    work = Work(kind, stream, self._next[key])
    self._next[key] += 1
    if kind == 'I':
      self.put_off.append(dataclasses.replace(work, kind='W'))
    return work


def _bidirectional(
  h: int, H: int, n: int, streams: tuple[int, int]
) -> tuple[Op, ...]:
  """The eight steps of DualPipe on a rank `h` from the near end.

  Args:
    h: Distance to the near end.
    H: Ranks in half of the ring: h < H.
    n: Microbatches per stream.
    streams: The one that enters at the near end, and the other.
  """
  rank, (near, far) = _Rank(), streams
  after = H - h - 1  # Ranks between this one and the middle.
  for _ in range(2 * after):
    rank.add('F', near)
  for _ in range(h + 1):
    rank.add('F', near)
    rank.add('F', far)
  for _ in range(after):
    rank.add('I', far)
    rank.add('W')
    rank.add('F', far)
  for i in range(n - 2 * H + h + 1):
    if i == 0 and after == 0:  # The far stream turns here: nothing to hide.
      rank.add('F', near)
      rank.add('B', far)
    else:
      rank.add_pair(near, far)
    rank.add_pair(far, near)
  for _ in range(after):
    rank.add('B', far)
    rank.add_pair(far, near)
  # From the middle on the weight gradients are put off.
  for i in range(2 * (h + 1)):
    rank.add('B' if i < h + 1 else 'I', near if i % 2 else far)
  for _ in range(after):
    rank.add('W')
    rank.add('I', near)
  for _ in range(h + 1):
    rank.add('W')
  return rank.ops


def _one_stream(name: str, num_microbatches: int, lists: list) -> Schedule:
  stages = tuple((r,) for r in range(len(lists)))
  return Schedule(name, stages, num_microbatches, tuple(lists))


def _check_sizes(name: str, num_ranks: int, num_microbatches: int) -> None:
  if num_ranks < 1:
    raise ValueError(f'{name}: num_ranks={num_ranks} must be positive')
  if num_microbatches < 1:
    raise ValueError(
      f'{name}: num_microbatches={num_microbatches} must be positive; '
      f'{2 * num_ranks} would do'
    )


SCHEDULES = {
  'gpipe': gpipe,
  '1f1b': one_f_one_b,
  'zb1p': zb1p,
  'dualpipe': dualpipe,
  'dualpipe_v': dualpipe_v,
}
