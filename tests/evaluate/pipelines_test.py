"""The picture shows the executor's table, the figures are the simulator's."""

import importlib.resources
import re
from xml.etree import ElementTree

import pytest

from r1jax import config as config_lib
from r1jax.evaluate import charts, pipelines, report, runs
from r1jax.parallel import pipeline, simulator
from r1jax.parallel import schedule as schedule_lib
from r1jax.parallel.table import Backward, Column

_RANKS, _MICROBATCHES = 4, 10
_OPTIONS = (
  *({'schedule': name} for name in schedule_lib.SCHEDULES),
  {'schedule': '1f1b', 'unit': True},
  {'schedule': 'dualpipe', 'latency': 2, 'keep': 'layers', 'fused': True},
  {'schedule': 'dualpipe_v', 'masked': True},
)
_PLAIN = _OPTIONS[:5]


def _name(options):
  return ','.join(map(str, options.values()))


_each = pytest.mark.parametrize('options', _OPTIONS, ids=_name)


def _run(options, name='a', ranks=_RANKS, microbatches=_MICROBATCHES):
  return runs.Run(
    name,
    config={
      'mesh': {'pipe': ranks, 'data': -1, 'pipeline': options},
      'train': {'num_microbatches': microbatches, 'seed': 0},
    },
  )


def _section(*some_runs):
  return ElementTree.fromstring(pipelines.section(some_runs))


def _with_class(tree, name):
  return [e for e in tree.iter() if name in e.get('class', '').split()]


def _rows(tree):
  """The boxes of each rank, from the top."""
  groups = tree.findall('.//svg[@class="ticks"]/g')
  groups.sort(key=lambda g: float(g.get('transform').split(',')[1][:-1]))
  return [_with_class(group, 'box') for group in groups]


def _span(rect, start='x', size='width'):
  return float(rect.get(start)), float(rect.get(start)) + float(rect.get(size))


def _tick(box):
  return int(re.search(r'tick (\d+)', box.findtext('title'))[1])


def _unit(tree):
  """Pixels of a unit of time: what a forward alone takes."""
  boxes = (b for b in _with_class(tree, 'box') if len(b.findall('g')) == 1)
  box = next(b for b in boxes if b.find('g').get('class') == 'F0')
  return float(box.find('g/rect').get('width'))


@pytest.mark.parametrize('options', _PLAIN, ids=_name)
def test_every_op_has_a_box(options):
  make = schedule_lib.SCHEDULES[options['schedule']]
  rows = _rows(_section(_run(options)))
  ops = make(_RANKS, _MICROBATCHES).ops
  assert [len(boxes) for boxes in rows] == [len(of_rank) for of_rank in ops]


@_each
def test_boxes_are_what_the_table_says(options):
  config = config_lib.from_dict(pipeline.PipelineConfig, options)
  expected = {}
  for tick, row in enumerate(config.make_table(_RANKS, _MICROBATCHES).rows):
    for rank, cells in enumerate(row):
      works = []
      if cells[Column.FORWARD]:
        stream, number = cells[[Column.F_STREAM, Column.F_MICROBATCH]]
        works.append((f'F{stream}', str(number)))
      if cells[Column.BACKWARD]:
        stream, number = cells[[Column.B_STREAM, Column.B_MICROBATCH]]
        kind = Backward(cells[Column.BACKWARD]).name
        works.append((f'{kind}{stream}', str(number)))
      if works:
        expected[rank, tick] = works
  found = {
    (rank, _tick(box)): [
      (half.get('class'), half.findtext('text')) for half in box.findall('g')
    ]
    for rank, boxes in enumerate(_rows(_section(_run(options))))
    for box in boxes
  }
  assert found == expected


@_each
def test_ranks_step_together_and_no_boxes_overlap(options):
  tree = _section(_run(options))
  unit = _unit(tree)
  makespan = float(tree.findall('.//tbody/tr')[1].findtext('td'))
  ticks = {}
  for boxes in _rows(tree):
    free = 0
    for box in boxes:
      start, end = _span(box.find('g/rect'))
      assert free <= start < end <= makespan * unit
      free = end
      ticks.setdefault(_tick(box), []).append((start, end))
      said = re.search(r'time (\d+) to (\d+)', box.findtext('title')).groups()
      assert [unit * int(time) for time in said] == [start, end]
  begun = 0
  for _, spans in sorted(ticks.items()):
    assert len({start for start, _ in spans}) == 1
    assert spans[0][0] >= begun
    begun = max(end for _, end in spans)
  # The white behind the boxes is as long as all ticks.
  behind = tree.findall('.//svg[@class="ticks"]/rect')
  assert {float(rect.get('width')) for rect in behind} == {unit * makespan}


@pytest.mark.parametrize('name', ['dualpipe', 'dualpipe_v'])
def test_pairs_have_two_halves(name):
  boxes = _with_class(_section(_run({'schedule': name})), 'box')
  ops = schedule_lib.SCHEDULES[name](_RANKS, _MICROBATCHES).ops
  num_pairs = sum(len(op.works) == 2 for of_rank in ops for op in of_rank)
  pairs = [b.findall('g') for b in boxes if len(b.findall('g')) == 2]
  assert len(pairs) == num_pairs > 0
  whole = next(b for b in boxes if len(b.findall('g')) == 1).find('g/rect')
  for upper, lower in pairs:
    assert upper.get('class')[0] == 'F' and lower.get('class')[0] == 'B'
    upper, lower = upper.find('rect'), lower.find('rect')
    assert _span(upper) == _span(lower)
    top, middle = _span(upper, 'y', 'height')
    assert _span(lower, 'y', 'height') == (middle, 2 * middle - top)
    assert (top, 2 * middle - top) == _span(whole, 'y', 'height')


@pytest.mark.parametrize('options', _OPTIONS[:7], ids=_name)
def test_figures_are_the_simulators(options):
  config = config_lib.from_dict(pipeline.PipelineConfig, options)
  schedule = schedule_lib.SCHEDULES[config.schedule](_RANKS, _MICROBATCHES)
  durations = simulator.Durations(forward=1, backward=2, weight=1, pair=3)
  layout = pipelines.lay_out(config, schedule)
  num_ticks = config.make_table(_RANKS, _MICROBATCHES).num_ticks
  peak = str(max(simulator.peak_live(schedule)))
  expected = [
    [
      f'{timing.makespan:g}',
      # All ranks have as much to do.
      charts.number(timing.idle_share[0], percent=True),
      ticks,
      peak,
    ]
    for timing, ticks in (
      (simulator.simulate(schedule, durations), None),
      (simulator.simulate_lock_step(layout.rows, durations), str(num_ticks)),
    )
  ]
  rows = _section(_run(options)).findall('.//tbody/tr')
  assert [[cell.text for cell in r.findall('td')] for r in rows] == expected


def test_known_figures():
  tree = _section(_run({'schedule': '1f1b'}, ranks=8, microbatches=20))
  cells = [cell.text for cell in tree.findall('.//tbody//td')]
  # 3·20 + 7·3 in the textbook; simulator_test.py knows that 54 ticks take 100.
  # A rank is busy for 60.
  assert cells == ['81', '25.9%', None, '8', '100', '40%', '54', '8']


def test_masked_ticks_all_take_a_forward_and_a_backward():
  tree = _section(_run({'schedule': 'zb1p', 'masked': True}))
  makespan, idle, ticks, _ = (
    cell.text for cell in tree.findall('.//tbody/tr')[1].findall('td')
  )
  assert int(makespan) == 3 * int(ticks)
  busy = 3 * _MICROBATCHES
  assert idle == charts.number(1 - busy / int(makespan), percent=True)
  assert 'Masked' in ''.join(tree.itertext())


def test_colours_and_legend():
  folder = importlib.resources.files('r1jax.evaluate') / 'assets'
  style = (folder / 'report.css').read_text(encoding='utf-8')
  tree = _section(_run({'schedule': 'dualpipe'}))
  used = {half.get('class') for half in tree.iterfind('.//g[@class="box"]/g')}
  assert used == {f'{kind}{stream}' for kind in 'FBIW' for stream in '01'}
  colours = [
    re.search(rf'\.{name} {{ --c: (.*); }}', style)[1] for name in used
  ]
  assert len(set(colours)) == len(used)
  for colour in colours:
    name = re.fullmatch(r'var\((--[a-z-]+)\)', colour)[1]
    assert len(re.findall(rf'{name}: #', style)) == 2  # Light and dark.

  def legend(name):
    (found,) = _with_class(_section(_run({'schedule': name})), 'legend')
    return [item.get('class') for item in found]

  assert legend('dualpipe') == [
    'F0',
    'B0',
    'I0',
    'W0',
    'both',
    'darker',
    'idle',
  ]
  assert legend('gpipe') == ['F0', 'B0', 'idle']
  assert legend('zb1p') == ['F0', 'I0', 'W0', 'idle']


def test_runs_with_the_same_pipeline_share_a_picture():
  same, other = {'schedule': 'gpipe'}, {'schedule': 'gpipe', 'keep': 'all'}
  tree = _section(
    _run(same, 'a'), runs.Run('none'), _run(other, 'b'), _run(same, '<c>')
  )
  titles = [''.join(h3.itertext()) for h3 in tree.iter('h3')]
  facts = 'gpipe, 4 ranks, 10 microbatches'
  assert titles == [f'a, <c> {facts}', f'b {facts}, keep=all']


def _config(mesh, microbatches=_MICROBATCHES):
  return {'mesh': mesh, 'train': {'num_microbatches': microbatches}}


_GPIPE = {'schedule': 'gpipe'}


@pytest.mark.parametrize(
  'config',
  [
    None,
    {},
    {'mesh': None, 'train': 3},
    {'mesh': {'pipe': 4}},
    {'mesh': {'pipe': 4}, 'train': {}},
    _config({}),
    _config({'pipe': 1, 'pipeline': _GPIPE}),
    _config({'pipe': -1, 'pipeline': _GPIPE}),
    _config({'pipe': True, 'pipeline': _GPIPE}),
    _config({'pipe': '4', 'pipeline': _GPIPE}),
    _config({'pipe': 4.0, 'pipeline': _GPIPE}),
    _config({'pipe': 4, 'pipeline': _GPIPE}, None),
    _config({'pipe': 4, 'pipeline': _GPIPE}, [10]),
    _config({'pipe': 4, 'pipeline': _GPIPE}, 0),
    _config({'pipe': 4, 'pipeline': _GPIPE}, pipelines.MAX_SIZE // 4 + 1),
    _config({'pipe': 4, 'pipeline': 3}),
    _config({'pipe': 4, 'pipeline': None}),
    _config({'pipe': 4, 'pipeline': {'schedule': 'another'}}),
    _config({'pipe': 4, 'pipeline': {'schedule': []}}),
    _config({'pipe': 4, 'pipeline': _GPIPE | {'latency': 3}}),
    _config({'pipe': 4, 'pipeline': _GPIPE | {'of_the_future': 1}}),
    _config({'pipe': 4, 'pipeline': {'schedule': 'dualpipe'}}, 6),
    _config({'pipe': 3, 'pipeline': {'schedule': 'dualpipe'}}),
  ],
)
def test_nothing_without_a_pipeline(config):
  assert pipelines.section([runs.Run('a', config=config)]) is None


def test_large_pictures_have_room_for_their_numbers():
  tree = _section(_run({'schedule': 'dualpipe'}, ranks=16, microbatches=120))
  digits = max(len(t.text) for t in tree.iterfind('.//g[@class="box"]/g/text'))
  assert digits == 3 and _unit(tree) >= 6 * digits
  # It scrolls in its box, the names of the ranks stay.
  (box,) = _with_class(tree, 'schedule')
  assert 'wide' in box.get('class').split()
  assert [svg.get('class') for svg in box] == ['ranks', 'ticks']


def test_report_has_it_after_the_curves(tmp_path):
  run = _run({'schedule': 'dualpipe'})
  rows = [{'step': 1, 'train/loss': 1.0}]
  run = runs.Run(run.name, rows, config=run.config)
  report.write_report(tmp_path / 'report.html', title='t', runs=[run])
  page = (tmp_path / 'report.html').read_text(encoding='utf-8')
  assert re.findall('<section id="(.*?)"', page) == [
    'curves',
    'pipeline',
    'config',
  ]
  assert '<a href="#pipeline">Pipeline</a>' in page
  none = [runs.Run('a', rows)]
  report.write_report(tmp_path / 'report.html', title='t', runs=none)
  page = (tmp_path / 'report.html').read_text(encoding='utf-8')
  assert '#pipeline' not in page and '"ticks"' not in page
