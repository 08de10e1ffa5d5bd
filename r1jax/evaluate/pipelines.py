"""The report's picture of a pipeline: which rank ran what, and when."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from r1jax import config as config_lib
from r1jax.evaluate import charts, markup, results
from r1jax.evaluate import runs as runs_lib
from r1jax.parallel import pipeline, simulator, table
from r1jax.parallel import schedule as schedule_lib

TIMES = simulator.Durations(forward=1, backward=2, weight=1, pair=3)
# Beyond this many microbatches over all ranks nobody could read the picture.
MAX_SIZE = 4_000
_WORDS = {
  'F': 'forward',
  'B': 'backward',
  'I': 'input gradient',
  'W': 'weight gradient',
}
_INTRO = (
  'What each rank runs in a step. The ranks step together: a tick lasts as '
  'long as its longest op. The units of time are assumed, not measured: '
  'F\xa0=\xa01, B\xa0=\xa02, W\xa0=\xa01, so I\xa0=\xa01, a pair F&B\xa03; '
  'recomputing and sending take none.'
)
_MASKED = (
  'Masked: every rank runs F, I and W in every tick, which therefore takes 3, '
  'and drops what is not drawn here.'
)
# Pixels: a row with its gap, a box, the line of tick numbers, rank names.
_ROW, _BOX, _TOP, _NAMES = 29, 26, 20, 60
_FULL_WIDTH, _MAX_UNIT = 1050, 30


@dataclasses.dataclass(frozen=True)
class Layout:
  """A schedule in the time of the executor.

  Attributes:
    schedule: What it runs.
    rows: What each rank runs at each tick, see `table.place`.
    lengths: How long each tick lasts.
  """

  schedule: schedule_lib.Schedule
  rows: Sequence[Sequence[schedule_lib.Op | None]]
  lengths: tuple[float, ...]

  @property
  def timing(self) -> simulator.Timing:
    busy = simulator.simulate_lock_step(self.rows, TIMES).busy
    return simulator.Timing(sum(self.lengths), busy)


def section(runs: Sequence[runs_lib.Run]) -> markup.Html | None:
  """Draws the pipeline of each run that has one; None if none has.

  Runs with the same one share a picture. A config that gives no pipeline, or
  one too large to draw, is passed over.
  """
  names: dict[Any, list[str]] = {}
  for run in runs:
    if found := _read(run.config or {}):
      names.setdefault(found, []).append(run.name)
  blocks = [
    _block(', '.join(of_runs), config, lay_out(config, schedule))
    for (config, schedule), of_runs in names.items()
  ]
  if not blocks:
    return None
  return markup.tag(
    'section',
    markup.tag('h2', 'Pipeline'),
    markup.tag('p', _INTRO, class_='intro'),
    blocks,
    id='pipeline',
  )


def lay_out(
  config: pipeline.PipelineConfig, schedule: schedule_lib.Schedule
) -> Layout:
  """Places a schedule as the executor runs it.

  With latency 2 there are ticks in which all ranks wait; they take no time.
  """
  rows = table.place(schedule, unit=config.unit, latency=config.latency)
  lengths = tuple(
    TIMES.forward + TIMES.backward
    if config.masked
    else max(TIMES.of(op) if op else 0 for op in tick)
    for tick in zip(*rows, strict=True)
  )
  return Layout(schedule, rows, lengths)


def draw(layout: Layout) -> markup.Html:
  """The picture: one row per rank, which scrolls sideways beside its names."""
  schedule, makespan = layout.schedule, sum(layout.lengths)
  # Wide enough for the longest number in the shortest box.
  least = 6 * len(str(schedule.num_microbatches - 1)) + 4
  unit = max(least, min(_MAX_UNIT, int(_FULL_WIDTH / makespan)))
  starts = [0, *itertools.accumulate(layout.lengths)]
  width, height = unit * makespan, _TOP + _ROW * schedule.num_ranks
  rows = [_row(layout, rank, starts, unit) for rank in range(len(layout.rows))]
  lines = ''.join(f'M{unit * s} {_TOP - 3}V{height}' for s in starts)
  numbers = (
    _label(tick, unit * (starts[tick] + layout.lengths[tick] / 2), _TOP - 8)
    for tick in range(0, len(layout.lengths), 5)
  )
  names = (
    _label(f'rank {r}', _NAMES / 2, _TOP + _ROW * r + 17)
    for r in range(schedule.num_ranks)
  )
  return markup.tag(
    'div',
    markup.tag(
      'svg',
      _label('tick', _NAMES / 2, _TOP - 8),
      names,
      width=_NAMES,
      height=height,
      class_='ranks',
      aria_hidden='true',
    ),
    markup.tag(
      'svg',
      (
        markup.tag('rect', y=_TOP + _ROW * r, width=width, height=_BOX)
        for r in range(schedule.num_ranks)
      ),
      markup.tag('path', d=lines),
      numbers,
      rows,
      # The last line and tick number need a little room.
      width=width + 8,
      height=height,
      class_='ticks',
      role='img',
      aria_label=f'{_describe(schedule)}, {len(layout.lengths)} ticks',
    ),
    class_='wide schedule',
  )


def _read(
  config: Mapping[str, Any],
) -> tuple[pipeline.PipelineConfig, schedule_lib.Schedule] | None:
  """The pipeline of a config, which may be any JSON; None if there is none."""
  mesh, train = config.get('mesh'), config.get('train')
  if not isinstance(mesh, Mapping) or not isinstance(train, Mapping):
    return None
  num_ranks, count = mesh.get('pipe'), train.get('num_microbatches')
  options = mesh.get('pipeline', {})
  # Of JSON's numbers a bool is an int as well.
  if not type(num_ranks) is type(count) is int:
    return None
  if num_ranks < 2 or num_ranks * count > MAX_SIZE:
    return None
  if not isinstance(options, Mapping):
    return None
  try:
    options = config_lib.from_dict(pipeline.PipelineConfig, options)
    make = schedule_lib.SCHEDULES[options.schedule]
    return options, make(num_ranks, count)
  except ValueError:  # A wrong option, or a size that the schedule has not.
    return None


def _block(
  names: str, config: pipeline.PipelineConfig, layout: Layout
) -> markup.Html:
  own = [
    f'{field.name}={value}'
    for field in dataclasses.fields(config)
    if field.name != 'schedule'
    and (value := getattr(config, field.name)) != field.default
  ]
  facts = ', '.join([_describe(layout.schedule), *own])
  return markup.tag(
    'div',
    markup.tag('h3', names, ' ', markup.tag('small', facts)),
    markup.tag('p', _MASKED, class_='intro') if config.masked else None,
    _legend(layout),
    draw(layout),
    _figures(layout),
    class_='pipeline',
  )


def _describe(schedule: schedule_lib.Schedule) -> str:
  return (
    f'{schedule.name}, {schedule.num_ranks} ranks, '
    f'{schedule.num_microbatches} microbatches'
  )


def _row(
  layout: Layout, rank: int, starts: Sequence[float], unit: int
) -> markup.Html:
  """The boxes of one rank."""
  boxes = [
    _box(layout, rank, tick, op, starts[tick], unit)
    for tick, op in enumerate(layout.rows[rank])
    if op
  ]
  return markup.tag('g', boxes, transform=f'translate(0,{_TOP + _ROW * rank})')


def _box(
  layout: Layout,
  rank: int,
  tick: int,
  op: schedule_lib.Op,
  start: float,
  unit: int,
) -> markup.Html:
  """One op; of a pair the forward is the upper half, the backward the lower."""
  schedule, length = layout.schedule, TIMES.of(op)
  height = _BOX / len(op.works)
  halves, said = [], []
  for i, work in enumerate(op.works):
    number = schedule.microbatch(work.stream, work.chunk)
    stage = schedule.stages[rank][work.stream]
    said.append(f'{_WORDS[work.kind]} of {number} at stage {stage}')
    halves.append(
      markup.tag(
        'g',
        markup.tag(
          'rect',
          x=f'{unit * start:g}',
          y=f'{i * height:g}',
          width=f'{unit * length:g}',
          height=f'{height:g}',
        ),
        _label(number, unit * (start + length / 2), (i + 0.5) * height + 3.5),
        class_=f'{work.kind}{work.stream}',
      )
    )
  when = f'rank {rank}, tick {tick}, time {start:g} to {start + length:g}'
  title = markup.tag('title', f'{" & ".join(said)}: {when}')
  return markup.tag('g', title, halves, class_='box')


def _label(content: Any, x: float, y: float) -> markup.Html:
  return markup.tag('text', content, x=f'{x:g}', y=f'{y:g}')


def _legend(layout: Layout) -> markup.Html:
  """What the colours mean, of those that are there."""
  ops = [op for row in layout.rows for op in row if op]
  kinds = {work.kind for op in ops for work in op.works}
  is_mirrored = layout.schedule.is_mirrored
  second = 'the other direction' if is_mirrored else 'on the way up again'
  items = [(f'{k}0', f'{k} {w}') for k, w in _WORDS.items() if k in kinds]
  if any(len(op.works) > 1 for op in ops):
    items.append(('both', 'a pair, together'))
  if layout.schedule.num_streams > 1:
    items.append(('darker', f'darker: {second}'))
  items.append(('idle', 'idle'))
  return markup.tag(
    'div',
    (markup.tag('span', word, class_=name) for name, word in items),
    class_='legend',
  )


def _figures(layout: Layout) -> markup.Html:
  """Makespan and idle share by both clocks, with what is the same by each."""
  schedule = layout.schedule
  peak = max(simulator.peak_live(schedule))
  head = ('', 'makespan', 'idle share', 'ticks', 'peak live microbatches')
  body = []
  for name, timing, ticks in (
    ("textbook's time", simulator.simulate(schedule, TIMES), ''),
    ('lock step, as it ran', layout.timing, len(layout.lengths)),
  ):
    idle = sum(timing.idle_share) / schedule.num_ranks
    cells = (
      f'{timing.makespan:g}',
      charts.number(idle, percent=True),
      ticks,
      peak,
    )
    body.append(
      markup.tag(
        'tr',
        markup.tag('th', name, scope='row'),
        (markup.tag('td', cell, class_='n') for cell in cells),
      )
    )
  titles = (markup.tag('th', t, class_='n' if t else None) for t in head)
  return results.wide(markup.tag('tr', titles), *body)
