import io

import pytest
import rich.console

from r1jax.evaluate import table

BASE = {
  'pass@1': 0.241,
  'pass@1_interval': [0.23, 0.252],
  'pass@2': 0.3,
  'greedy': 0.48,
  'cons@16': 0.5,
  'format': 0.8,
  'length': 31.24,
  'num_problems': 1000,
  'num_samples': 16,
  'by_operation': {
    'add': {'pass@1': 0.3, 'greedy': 0.5, 'num_problems': 500},
    'divide': {'pass@1': 0.2, 'greedy': 0.4, 'num_problems': 500},
  },
}
TRAINED = BASE | {
  'pass@1': 0.934,
  'pass@1_interval': [0.92, 0.95],
  'format': 0.75,
  'length': 38.0,
  'seconds': 12.0,
  'by_operation': {
    'add': {'pass@1': 0.99, 'greedy': 1.0, 'num_problems': 500},
  },
}


def _row(label, **options):
  rows = table.rows([BASE, TRAINED], **options)
  return next(r for r in rows if r.label == label)


def test_rows_hold_values_intervals_and_change():
  row = _row('pass@1')
  assert row.values == ('24.1%', '93.4%')
  assert row.intervals == ('[23.0, 25.2]', '[92.0, 95.0]')
  assert row.change == '+69.3 pp' and row.verdict == 1
  assert _row('format').change == '-5.0 pp' and _row('format').verdict == -1
  assert _row('cons@16').verdict == 0
  assert _row('mean length, tokens').change == '+6.8'
  assert _row('mean length, tokens').verdict == 0
  assert _row('seconds').values == ('-', '12.0')
  assert _row('seconds').change == ''


def test_other_k_only_on_demand_and_in_order():
  assert 'pass@2' not in [r.label for r in table.rows([BASE])]
  wide = BASE | {'pass@16': 0.6, 'pass@4': 0.4}
  labels = [r.label for r in table.rows([wide], all_k=True)]
  assert labels[:4] == ['pass@1', 'pass@2', 'pass@4', 'pass@16']


def test_plain_text_is_aligned_ascii_and_needs_no_width():
  text = table.plain_text(BASE, TRAINED, ['base', 'R1-Zero'])
  assert text.isascii() and '\x1b' not in text
  lines = text.splitlines()
  start = lines.index('') + 1
  body = lines[start : lines.index('', start)]
  # Seconds have no change here, so that line ends earlier.
  widths = {len(line) for line in body if not line.startswith('seconds')}
  assert len(widths) == 1
  points = [line.index('%') for line in body if '%' in line]
  assert len(set(points)) == 1
  assert 'divide' in text and '20.0%' in text


def test_show_prints_plain_text_unless_on_a_terminal():
  for terminal in (False, True):
    out = io.StringIO()
    console = rich.console.Console(
      file=out, force_terminal=terminal, width=100, color_system='standard'
    )
    table.show(console, BASE, TRAINED, ['base', 'R1-Zero'])
    assert ('\x1b[' in out.getvalue()) == terminal
    assert '93.4%' in out.getvalue() and 'divide' in out.getvalue()


def test_titles_are_text_not_markup():
  titles = ['base', '[bold]R1[/bold]']
  out = io.StringIO()
  console = rich.console.Console(file=out, width=200)
  console.print(table.before_after(BASE, TRAINED, titles))
  console.print(table.by_group(BASE, TRAINED, titles, 'operation'))
  assert out.getvalue().count('[bold]R1[/bold]') == 3


def test_empty_summaries_and_non_finite_values():
  assert table.rows([{}, {}]) == []
  assert table.plain_text({}, {}, ['a', 'b'])
  row = table.rows([{'pass@1': float('nan')}, {'pass@1': 0.5}])[0]
  assert row.values == ('-', '50.0%') and row.change == ''
  table.before_after({}, {}, ['a', 'b'])


@pytest.mark.parametrize(
  'value, expected',
  [(1, True), (0.5, True), (True, False), (None, False), (1e999, False)],
)
def test_is_number(value, expected):
  assert table.is_number(value) == expected


def test_a_single_evaluation_by_operation_and_language():
  by_language = {'zh': {'pass@1': 0.11, 'greedy': 0.22, 'num_problems': 7}}
  text = table.plain_text_single(BASE | {'by_language': by_language}, 'r1_zero')
  assert 'change' not in text and text.count('r1_zero') == 1
  lines = [line.split() for line in text.splitlines()]
  assert ['pass@1', '24.1%', '[23.0,', '25.2]'] in lines
  assert ['operation', 'problems', 'pass@1', 'greedy'] in lines
  assert ['divide', '500', '20.0%', '40.0%'] in lines
  assert ['zh', '7', '11.0%', '22.0%'] in lines
  out = io.StringIO()
  console = rich.console.Console(file=out, force_terminal=True, width=100)
  table.show_single(console, BASE, 'r1_zero')
  assert 'divide' in out.getvalue() and '24.1%' in out.getvalue()
