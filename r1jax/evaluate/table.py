"""Evaluations, alone or before and after: for a terminal and as plain text."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.cells
import rich.console
import rich.table
import rich.text

Summary = Mapping[str, Any]
MISSING = '-'


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure of several evaluations, ready to print.

  Attributes:
    label: What it is.
    values: One text per evaluation; '-' where it was not measured.
    intervals: One '[low, high]' per evaluation, '' where there is none.
    change: Last against first, signed, '' with fewer than two values.
    verdict: 1 better, -1 worse, 0 neither.
  """

  label: str
  values: tuple[str, ...]
  intervals: tuple[str, ...]
  change: str
  verdict: int


def rows(summaries: Sequence[Summary], *, all_k: bool = False) -> list[Row]:
  """Lays out evaluation summaries (see scores.summarise), one row per figure.

  Args:
    summaries: The evaluations, earliest first; keys may be missing.
    all_k: Whether to show pass@k for every k rather than k = 1 only.
  """
  names = {name for summary in summaries for name in summary}
  shown = sorted((n for n in names if _is_at(n, 'pass@')), key=_k)
  shown = shown if all_k else [n for n in shown if n == 'pass@1']
  shown += ['greedy', *sorted((n for n in names if _is_at(n, 'cons@')), key=_k)]
  result = [_row(n, n, summaries, share=True) for n in [*shown, 'format']]
  if all_k:
    result.append(_row('finished', 'finished', summaries, share=True))
  result.append(_row('length', 'mean length, tokens', summaries, share=False))
  result.append(_row('seconds', 'seconds', summaries, share=False))
  return [r for r in result if any(v != MISSING for v in r.values)]


def before_after(
  base: Summary, trained: Summary, titles: Sequence[str]
) -> rich.table.Table:
  """Makes the table of two evaluations and their change, for a terminal.

  Args:
    base: Summary of the model before training.
    trained: Summary of the model after it.
    titles: The two column titles.
  """
  return _figures([base, trained], titles)


def by_group(
  base: Summary, trained: Summary, titles: Sequence[str], group: str
) -> rich.table.Table:
  """Makes the table of pass@1 and greedy per group, for a terminal.

  Args:
    base: As in before_after.
    trained: As in before_after.
    titles: As in before_after.
    group: 'operation' or 'language'.
  """
  return _groups([base, trained], titles, group)


def plain_text(base: Summary, trained: Summary, titles: Sequence[str]) -> str:
  """Returns both tables as aligned text without colours or lines."""
  return _plain([base, trained], titles, ('operation',))


def plain_text_single(summary: Summary, title: str) -> str:
  """Returns one evaluation as `show_single` prints it elsewhere."""
  return _plain([summary], [title], ('operation', 'language'))


def show(
  console: rich.console.Console,
  base: Summary,
  trained: Summary,
  titles: Sequence[str],
) -> None:
  """Prints the tables: in colour on a terminal, as plain text elsewhere."""
  _show(console, [base, trained], titles, ('operation',))


def show_single(
  console: rich.console.Console, summary: Summary, title: str
) -> None:
  """Prints one evaluation, also by operation and language; as `show`."""
  _show(console, [summary], [title], ('operation', 'language'))


def _show(
  console: rich.console.Console,
  summaries: Sequence[Summary],
  titles: Sequence[str],
  groups: Sequence[str],
) -> None:
  if not console.is_terminal:
    console.out(_plain(summaries, titles, groups), highlight=False)
    return
  console.print(_figures(summaries, titles))
  for group in _measured(summaries, groups):
    console.print(_groups(summaries, titles, group))


def _plain(
  summaries: Sequence[Summary], titles: Sequence[str], groups: Sequence[str]
) -> str:
  """All tables as aligned text."""
  has_change = len(summaries) > 1
  lines = [['', *titles, *(['change'] if has_change else [])]]
  body = rows(summaries)
  # Intervals are padded to one width, so that the figures before them align.
  width = max((len(i) for row in body for i in row.intervals), default=0)
  for row in body:
    pairs = zip(row.values, row.intervals)
    cells = (f'{value} {interval:<{width}}' for value, interval in pairs)
    lines.append([row.label, *cells, *([row.change] if has_change else [])])
  blocks = [_align(lines)]
  for group in _measured(summaries, groups):
    blocks.append(_align(_group_cells(summaries, titles, group)))
  return '\n\n'.join([_caption(summaries), *blocks]) + '\n'


def _figures(
  summaries: Sequence[Summary], titles: Sequence[str]
) -> rich.table.Table:
  """One row per figure, one column per evaluation."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD, title=_caption(summaries))
  table.add_column('')
  for title in titles:
    table.add_column(rich.text.Text(title), justify='right')
    table.add_column('', style='dim')  # Intervals, apart so that values align.
  if len(summaries) > 1:
    table.add_column('change', justify='right')
  for row in rows(summaries):
    pairs = zip(row.values, row.intervals)
    cells = [rich.text.Text(text) for pair in pairs for text in pair]
    if len(summaries) > 1:
      style = {1: 'green', -1: 'red', 0: ''}[row.verdict]
      cells.append(rich.text.Text(row.change, style=style))
    table.add_row(row.label, *cells)
  return table


def _groups(
  summaries: Sequence[Summary], titles: Sequence[str], group: str
) -> rich.table.Table:
  """One row per group, pass@1 and greedy of each evaluation."""
  table = rich.table.Table(box=rich.box.SIMPLE_HEAD)
  header, *body = _group_cells(summaries, titles, group)
  for i, title in enumerate(header):
    table.add_column(rich.text.Text(title), justify='right' if i else 'left')
  for cells in body:
    table.add_row(*(rich.text.Text(c) for c in cells))
  return table


def _measured(summaries: Sequence[Summary], groups: Sequence[str]) -> list[str]:
  return [g for g in groups if any(s.get(f'by_{g}') for s in summaries)]


def pass_at(summary: Summary) -> dict[int, float]:
  """The measured pass@k by k, in increasing order."""
  names = sorted((n for n in summary if _is_at(n, 'pass@')), key=_k)
  return {_k(n): summary[n] for n in names if is_number(summary[n])}


def share_text(value: float | None) -> str:
  """Formats a share in [0, 1] as a percentage: '93.4%'."""
  return MISSING if not is_number(value) else f'{100 * value:.1f}%'


def change_text(first: float | None, last: float | None) -> str:
  """Formats the difference of two shares in percentage points."""
  if not (is_number(first) and is_number(last)):
    return ''
  return f'{100 * (last - first):+.1f} pp'


def is_number(value: Any) -> bool:
  """Whether the value can be shown: a finite number, not a bool."""
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and math.isfinite(value)
  )


def _row(
  name: str, label: str, summaries: Sequence[Summary], *, share: bool
) -> Row:
  """Formats one figure of all evaluations."""
  values = [s.get(name) for s in summaries]
  intervals = [s.get(f'{name}_interval') for s in summaries]
  first, last = values[0], values[-1]
  change, verdict = '', 0
  if len(values) > 1 and is_number(first) and is_number(last):
    change = change_text(first, last) if share else f'{last - first:+.1f}'
    # Neither longer completions nor more seconds are good or bad in themselves.
    verdict = (last > first) - (last < first) if share else 0
  return Row(
    label=label,
    values=tuple(
      share_text(v) if share else f'{v:.1f}' if is_number(v) else MISSING
      for v in values
    ),
    intervals=tuple(
      f'[{100 * i[0]:.1f}, {100 * i[1]:.1f}]' if i else '' for i in intervals
    ),
    change=change,
    verdict=verdict,
  )


def _group_cells(
  summaries: Sequence[Summary], titles: Sequence[str], group: str
) -> list[list[str]]:
  """Header and rows: group, problems, then each score of each evaluation."""
  groups = [s.get(f'by_{group}') or {} for s in summaries]
  lines = [[group, 'problems']]
  for score in ('pass@1', 'greedy'):
    several = len(titles) > 1
    lines[0] += [f'{score} {t}' if several else score for t in titles]
  for name in sorted({name for g in groups for name in g}):
    each = [g.get(name, {}) for g in groups]
    counts = [s['num_problems'] for s in each if 'num_problems' in s]
    scores = [share_text(s.get(k)) for k in ('pass@1', 'greedy') for s in each]
    lines.append([str(name), str(counts[-1] if counts else MISSING), *scores])
  return lines


def _caption(summaries: Sequence[Summary]) -> str:
  known = {k: v for s in summaries for k, v in s.items()}
  problems, samples = known.get('num_problems'), known.get('num_samples')
  text = 'Held-out evaluation'
  text += f', {problems} problems' if problems is not None else ''
  return text + (f' x {samples} samples' if samples is not None else '')


def _align(lines: Sequence[Sequence[str]]) -> str:
  """Pads columns to their width: the first to the left, the rest right."""
  widths = [max(rich.cells.cell_len(c) for c in col) for col in zip(*lines)]
  out = []
  for line in lines:
    pads = [w - rich.cells.cell_len(c) for c, w in zip(line, widths)]
    cells = [line[0] + ' ' * pads[0]]
    cells += [' ' * pad + cell for pad, cell in zip(pads[1:], line[1:])]
    out.append('  '.join(cells).rstrip())
  return '\n'.join(out)


def _is_at(name: str, prefix: str) -> bool:
  return name.startswith(prefix) and name[len(prefix) :].isdigit()


def _k(name: str) -> int:
  return int(name.partition('@')[2])
