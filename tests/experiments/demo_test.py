"""The whole demo with a model of a few thousand parameters, and its parts."""

import html.parser
import io
import json
import re
import time

import jax
import numpy as np
import pytest
import rich.console
from etils import epath

from r1jax import config as config_lib
from r1jax.recipe import demo, evaluation, grpo, reporting, stopwatch
from r1jax.recipe import stage as stage_lib
from r1jax.train import metrics
from tests.experiments import micro
from tests.recipe import micro as recipe_micro

_FIGURES = ('pass@1', 'greedy', 'cons@2', 'format', 'length', 'num_problems')


def _config(**changes):
  values = micro.get_config().to_dict()
  values['base']['seed'] = 7
  values['evaluate'] |= changes
  return config_lib.from_dict(demo.DemoConfig, values)


def _run(config, workdir):
  """Returns (summary, what was printed)."""
  out = io.StringIO()
  console = rich.console.Console(file=out, width=80)
  return demo.run(config, str(workdir), console), out.getvalue()


class _Page(html.parser.HTMLParser):
  """Open tags, text and what the page would fetch."""

  def __init__(self, path):
    super().__init__()
    self.open, self.text, self.fetched = [], '', []
    self.feed(path.read_text())

  def handle_starttag(self, tag, attributes):
    void = ('meta', 'link', 'input', 'br', 'wbr', 'hr', 'img')
    self.open += [] if tag in void else [tag]
    self.fetched += [
      v
      for k, v in attributes
      if k in ('src', 'href', 'data') and not v.startswith(('#', 'data:'))
    ]

  def handle_startendtag(self, tag, attributes):
    pass

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


@pytest.mark.slow
def test_demo_interrupted_resumed_and_run_again(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'jit', jax.jit)
  mesh = recipe_micro.one_device()
  monkeypatch.setattr(stage_lib, 'make_mesh', lambda config: mesh)
  with monkeypatch.context() as patch:
    patch.setattr(grpo, 'run', _raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
      _run(_config(), tmp_path)
  assert not (tmp_path / 'summary.json').exists()
  folder = tmp_path / 'seed_7'
  base_seconds = json.loads((folder / 'seconds.json').read_text())

  summary, printed = _run(_config(), tmp_path)
  assert 'base: finished already, at step 6' in printed
  assert 'evaluate: finished already, for step 6' in printed
  _check_summary(summary, tmp_path)
  times = json.loads((folder / 'seconds.json').read_text())
  for name in ('train base', 'evaluate base'):
    assert times[name] == base_seconds[name] > 0
  assert summary['seconds'] == pytest.approx(sum(times.values()))
  _check_printed(printed, tmp_path)
  _check_report(tmp_path / 'report.html')
  for name in ('base', 'r1_zero'):
    assert (folder / name / 'report.html').exists()
  assert 'grpo 4/4' in capsys.readouterr().out

  start = time.perf_counter()
  again, printed = _run(_config(), tmp_path)
  assert time.perf_counter() - start < 20
  assert again == summary
  assert printed.count('finished already') == 4

  with pytest.raises(config_lib.UserError, match='base.mtp_coef is 0.3 there'):
    values = config_lib.to_dict(_config())
    values['base']['mtp_coef'] = 0.1
    _run(config_lib.from_dict(demo.DemoConfig, values), tmp_path)


def _raise_interrupt(*args, **kwargs):
  raise KeyboardInterrupt


def _check_summary(summary, workdir):
  assert json.loads((workdir / 'summary.json').read_text()) == summary
  assert set(summary) == {'seed', 'seconds', 'base', 'r1_zero'}
  assert summary['seed'] == 7
  for name, step in (('base', 6), ('r1_zero', 4)):
    figures = summary[name]
    assert set(_FIGURES) <= set(figures)
    assert all(0 <= figures[f] <= 1 for f in _FIGURES[:4])
    assert figures['num_problems'] == 8 and figures['step'] == step
    assert set(figures['by_operation']) == {
      'add',
      'subtract',
      'multiply',
      'divide',
    }
  rows = metrics.read(workdir / 'seed_7' / 'r1_zero')
  held_out = [r for r in rows if 'eval/greedy' in r]
  assert [r['step'] for r in held_out] == [2, 4]
  # The same questions and variables as those of the last evaluation.
  for name, figure in (('greedy', 'greedy'), ('length', 'greedy_length')):
    expected = np.mean(
      [
        summary['r1_zero']['by_operation'][o][figure]
        for o in ('add', 'subtract', 'multiply', 'divide')
      ]
    )
    assert held_out[-1][f'eval/{name}'] == pytest.approx(expected)


def _check_printed(printed, workdir):
  for number in range(1, 5):
    assert f'\nStage {number} of 4: ' in printed
  assert re.search(r'MTP: \d+\.\d% of its drafts', printed)
  assert 'MaxVio' in printed
  assert len(re.findall(r'^  base: ', printed, re.MULTILINE)) == 3
  assert len(re.findall(r'^  R1-Zero: ', printed, re.MULTILINE)) == 3
  for label in ('pass@1', 'greedy', 'cons@2', 'format', 'mean length, tokens'):
    assert re.search(rf'^{label} .*%|^{label} .*\d', printed, re.MULTILINE)
  assert re.search(r'^divide ', printed, re.MULTILINE)
  assert re.search(
    r'^\d+\.\d minutes in all, seed 7, at most [\d,]+ MiB of memory$',
    printed,
    re.MULTILINE,
  )
  assert printed.endswith(f'report: {workdir}/report.html\n')


def _check_report(path):
  page = _Page(path)
  assert page.open == [] and page.fetched == []
  for text in ('R1-Zero', 'seed 7', 'train base', 'evaluate R1-Zero'):
    assert text in page.text
  assert 'The same prompts, before and after' in page.text
  assert 'Samples during training' in page.text


def test_seed_and_start_are_those_of_the_base():
  config = demo._with_paths(_config(), epath.Path('/runs/seed_7'))
  assert config.r1_zero.seed == 7
  assert config.r1_zero.init_from == '/runs/seed_7/base'
  assert config.evaluate == _config().evaluate


def _row(prompt, answer, gold='1'):
  completion = f'<think></think><answer>{answer}</answer>'
  return {'prompt': prompt, 'gold': gold, 'completion': completion}


def test_examples_show_what_is_wrong_and_one_that_is_right():
  rows = [_row('a', '1'), _row('b', '2'), _row('c', '1'), _row('d', '3')]
  prompts = lambda chosen: ''.join(row['prompt'] for row in chosen)
  assert prompts(demo.choose_examples(rows)) == 'bda'
  assert prompts(demo.choose_examples(rows[:3])) == 'bac'
  assert prompts(demo.choose_examples([_row(p, '0') for p in 'abcd'])) == 'abc'
  assert prompts(demo.choose_examples([])) == ''


def test_comparisons_of_every_kind_on_the_same_prompts():
  before = [_row(f'{kind}{i}', kind[0]) for kind in '01' for i in range(9)]
  after = [
    _row(f'{kind}{i}', '1' if i % 3 else '0') for kind in '01' for i in range(9)
  ]
  picked = reporting.compare(before, [*after, _row('unasked', '1')])
  kinds = [item['prompt'][0] for item in picked]
  assert kinds == ['0'] * 6 + ['1'] * 2 + ['0'] * 3 + ['1']
  assert all('<answer>1' in item['after'] for item in picked[:8])
  assert all('<answer>0' in item['after'] for item in picked[8:])
  assert reporting.compare([], after) == []


def test_an_evaluation_counts_for_its_step_and_config(tmp_path):
  config = _config().evaluate
  kept = {'pass@1': 0.5, 'step': 6}
  path = tmp_path / 'evaluation.json'
  load = lambda c, step: evaluation.load_finished(c, str(tmp_path), step)
  assert load(config, 6) is None
  path.write_text(json.dumps(kept | {'config': config_lib.to_dict(config)}))
  assert load(config, 6) == kept
  assert load(config, 5) is None
  assert load(_config(mesh={'data': 1, 'fsdp': 1}).evaluate, 6) == kept
  assert load(_config(num_samples=4).evaluate, 6) is None
  path.write_text(path.read_text()[:50])
  assert load(config, 6) is None


def test_stopwatch_adds_up_and_survives_a_kill(tmp_path, monkeypatch):
  monkeypatch.setattr(stopwatch, '_EVERY_SECONDS', 0.01)
  path = epath.Path(tmp_path / 'seconds.json')
  watch = stopwatch.Stopwatch(path)
  with pytest.raises(KeyboardInterrupt), watch.measure('a'):
    time.sleep(0.2)
    killed = json.loads(path.read_text())  # What a kill here would leave.
    raise KeyboardInterrupt
  first = json.loads(path.read_text())['a']
  assert 0 < killed['a'] <= first
  watch = stopwatch.Stopwatch(path)
  for name in 'ab':
    with watch.measure(name):
      time.sleep(0.1)
  assert watch.seconds == json.loads(path.read_text())
  assert watch.seconds['a'] >= first + 0.1 > watch.seconds['b'] >= 0.1
