"""The report's figures: headline cards and tables by run and by group."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r1jax.evaluate import charts, curves, markup, table
from r1jax.evaluate import runs as runs_lib


def duration(seconds: float) -> str:
  """Formats a time span: '8.2 s', '9 min 45 s', '3 h 05 min'."""
  if seconds < 60:
    return f'{seconds:.1f} s'
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 60:
    return f'{minutes} min {rest:02d} s'
  return f'{minutes // 60} h {minutes % 60:02d} min'


def cards(
  evaluated: Sequence[runs_lib.Run], seconds: Mapping[str, float]
) -> markup.Html | None:
  """The headline numbers: each after training, with what it was before."""
  boxes = []
  rows = table.rows([run.evaluation for run in evaluated]) if evaluated else []
  for row in rows:
    if not row.label.startswith(
      ('pass@1', 'greedy', 'cons@', 'format', 'mean')
    ):
      continue
    note = f'95% interval {row.intervals[-1]}' if row.intervals[-1] else ''
    if len(evaluated) > 1:
      note = f'from {row.values[0]}'
    boxes.append(_card(row.label, row.values[-1], note))
  if seconds:
    stages = f'{len(seconds)} stages' if len(seconds) > 1 else ''
    boxes.append(_card('wall time', _short(sum(seconds.values())), stages))
  return markup.tag('div', boxes, class_='cards') if boxes else None


def section(evaluated: Sequence[runs_lib.Run]) -> markup.Html | None:
  """The table of all figures, then one table per kind of group."""
  if not evaluated:
    return None
  last = evaluated[-1].evaluation
  intro = [
    f'{last["num_problems"]:,} held-out problems'
    if table.is_number(last.get('num_problems'))
    else None,
    f'{last["num_samples"]} samples each'
    if table.is_number(last.get('num_samples'))
    else None,
    '95% bootstrap intervals over problems in brackets',
  ]
  return markup.tag(
    'section',
    markup.tag('h2', 'Before and after' if len(evaluated) > 1 else 'Results'),
    markup.tag('p', ', '.join(i for i in intro if i) + '.', class_='intro'),
    markup.tag(
      'div',
      _figures(evaluated),
      _pass_at_k(evaluated),
      class_='beside duel' if len(evaluated) == 2 else 'beside',
    ),
    _groups(evaluated, 'operation'),
    _groups(evaluated, 'language'),
    id='results',
  )


def wide(*rows: Any, **attributes: Any) -> markup.Html:
  """A table that scrolls sideways inside its own box on narrow windows."""
  head, *body = rows
  return markup.tag(
    'div',
    markup.tag(
      'table',
      markup.tag('thead', head),
      markup.tag('tbody', body),
      **attributes,
    ),
    class_='wide',
  )


def _short(seconds: float) -> str:
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = seconds / 60
  return f'{minutes:.1f} min' if minutes < 100 else f'{minutes / 60:.1f} h'


def _card(label: str, value: str, note: str) -> markup.Html:
  return markup.tag(
    'div',
    markup.tag('span', label, class_='label'),
    markup.tag('strong', value),
    markup.tag('span', note, class_='note'),
    class_='card',
  )


def _figures(evaluated: Sequence[runs_lib.Run]) -> markup.Html:
  """One row per figure, one column per run, the change at the end."""
  change = len(evaluated) > 1
  head = markup.tag(
    'tr',
    markup.tag('th', ''),
    (markup.tag('th', run.name, class_='n', colspan=2) for run in evaluated),
    markup.tag('th', 'change', class_='n') if change else None,
  )
  body = []
  for row in table.rows([run.evaluation for run in evaluated], all_k=True):
    verdict = {1: 'n good', -1: 'n bad', 0: 'n'}[row.verdict]
    cells = [
      (
        # Narrow windows show the interval below the value, wide ones beside.
        markup.tag(
          'td',
          value,
          markup.tag('small', interval) if interval else None,
          class_='n value',
        ),
        markup.tag('td', interval, class_='interval'),
      )
      for value, interval in zip(row.values, row.intervals)
    ]
    body.append(
      markup.tag(
        'tr',
        markup.tag('th', row.label, scope='row'),
        cells,
        markup.tag('td', row.change, class_=verdict) if change else None,
      )
    )
  return wide(head, *body)


def _pass_at_k(evaluated: Sequence[runs_lib.Run]) -> markup.Html | None:
  """The chart of pass@k over k, one line per run."""
  lines = []
  for run in evaluated:
    points = table.pass_at(run.evaluation)
    if len(points) > 1:
      k_N, share_N = np.array(list(points.items()), np.float64).T
      lines.append(charts.Line(run.name, k_N, share_N))
  if not lines:
    return None
  return curves.figure(
    'pass@k',
    'over k samples',
    lines,
    percent=True,
    domain=(0.0, 1.0),
    marks=sorted({k for line in lines for k in line.steps_N}),
  )


def _groups(
  evaluated: Sequence[runs_lib.Run], group: str
) -> markup.Html | None:
  """One row per group: pass@1 and greedy as bars, format and length."""
  summaries = [run.evaluation.get(f'by_{group}') or {} for run in evaluated]
  names = sorted({name for summary in summaries for name in summary})
  if not names:
    return None
  legend = (
    markup.tag('span', run.name, class_=_bar_class(i, len(evaluated)))
    for i, run in enumerate(evaluated)
  )
  columns = (group, 'problems', 'pass@1', 'greedy', 'format', 'tokens')
  head = markup.tag(
    'tr',
    (
      markup.tag('th', c, class_='n' if i in (1, 4, 5) else None)
      for i, c in enumerate(columns)
    ),
  )
  body = [
    _group_row(name, [s.get(name, {}) for s in summaries]) for name in names
  ]
  return markup.join(
    [
      markup.tag('h3', f'By {group}'),
      markup.tag('div', legend, class_='legend bars-legend'),
      wide(head, *body, class_='groups'),
    ]
  )


def _group_row(name: str, scores: Sequence[Mapping[str, Any]]) -> markup.Html:
  counts = [s['num_problems'] for s in scores if 'num_problems' in s]
  lengths = [
    f'{s["length"]:.1f}' if table.is_number(s.get('length')) else table.MISSING
    for s in scores
  ]
  formats = [table.share_text(s.get('format')) for s in scores]
  return markup.tag(
    'tr',
    markup.tag('th', name, scope='row'),
    markup.tag('td', f'{max(counts):,}' if counts else '', class_='n'),
    markup.tag('td', _bars([s.get('pass@1') for s in scores])),
    markup.tag('td', _bars([s.get('greedy') for s in scores])),
    markup.tag('td', ' → '.join(formats), class_='n'),
    markup.tag('td', ' → '.join(lengths), class_='n'),
  )


def _bars(shares: Sequence[float | None]) -> markup.Html:
  """One thin bar per run with its value."""
  bars = []
  for i, share in enumerate(shares):
    width = 100 * min(1.0, max(0.0, share)) if table.is_number(share) else 0
    bars.append(
      markup.tag(
        'div',
        markup.tag('i', markup.tag('b', style=f'width:{width:.1f}%')),
        markup.tag('span', table.share_text(share)),
        class_=f'bar {_bar_class(i, len(shares))}',
      )
    )
  return markup.join(bars)


def _bar_class(index: int, count: int) -> str:
  return 'after' if index == count - 1 else 'before'
