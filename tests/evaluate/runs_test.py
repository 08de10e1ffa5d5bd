import json

import numpy as np

from r1jax.evaluate import runs


def test_missing_workdir_is_an_empty_run(tmp_path):
  run = runs.load_run(tmp_path / 'none')
  assert run == runs.Run(name='none', metrics=[], samples=[])


def test_reads_what_is_there_and_passes_over_a_cut_last_line(tmp_path):
  (tmp_path / 'config.json').write_text('{"a": {"b": 1}}')
  (tmp_path / 'evaluation.json').write_text('{"pass@1": 0.5}')
  (tmp_path / 'summary.json').write_text('{"seconds": 3.5}')
  (tmp_path / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}\n{"st')
  (tmp_path / 'samples.jsonl').write_text('')
  run = runs.load_run(tmp_path, 'base')
  assert run.name == 'base' and run.notes == ()
  assert run.metrics == [{'step': 1}, {'step': 2}]
  assert run.config == {'a': {'b': 1}} and run.evaluation == {'pass@1': 0.5}
  assert run.samples == [] and run.seconds == 3.5


def test_broken_files_are_noted_not_fatal(tmp_path):
  (tmp_path / 'config.json').write_text('{"a": ')
  (tmp_path / 'evaluation.json').write_text('[1]')
  (tmp_path / 'metrics.jsonl').write_bytes(b'{"step": 1}\n\xff\xfe\n3\n{}\n')
  run = runs.load_run(tmp_path)
  assert run.metrics == [{'step': 1}, {}]
  assert run.config is None and run.evaluation is None
  assert len(run.notes) == 3
  assert '2 lines' in ' '.join(run.notes) and 'line 2' in ' '.join(run.notes)


def test_curve_is_finite_sorted_and_last_write_wins():
  rows = [
    {'step': 2, 'x': 5.0},
    {'step': 1, 'x': 1},
    {'step': 2, 'x': 6.0},
    {'step': 3, 'x': float('nan')},
    {'step': 4, 'x': None},
    {'step': 5, 'x': 'text'},
    {'step': None, 'x': 7.0},
    {'step': 7},
  ]
  steps_N, values_N = runs.curve(rows, 'x')
  np.testing.assert_array_equal(steps_N, [1, 2, 6])
  np.testing.assert_array_equal(values_N, [1, 6, 7])


def test_metric_keys_are_natural_and_lists_spread():
  rows = runs.flat_metrics([{'step': 1, 'load': [0.5] * 11, 'bad': None}])
  keys = runs.metric_keys(rows)
  assert keys == [f'load/{i}' for i in range(11)]


def test_flat_config():
  config = {'a': {'b': {'c': 1}, 'd': []}, 'e': '数', 'f': {}}
  assert runs.flat_config(config) == {
    'a.b.c': '1',
    'a.d': '[]',
    'e': '"数"',
    'f': '{}',
  }
  assert json.loads(runs.flat_config(config)['e']) == '数'
