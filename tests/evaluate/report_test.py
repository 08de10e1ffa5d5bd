import functools
import html.parser
import re

import numpy as np
import pytest

from r1jax.evaluate import markup, report, runs, scores

_HOSTILE = '</script><img src=x onerror=alert(1)>\x00\x1b[31m\u202e\ud800'
_VOID = {'meta', 'input', 'br', 'wbr'}


class _Page(html.parser.HTMLParser):
  """Checks that tags nest, and collects tags, attributes and text."""

  def __init__(self, source):
    super().__init__()
    self.open, self.tags, self.attributes, self.text = [], [], [], ''
    self.feed(source)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in _VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def _write(path, **arguments):
  report.write_report(path / 'report.html', **({'title': 't'} | arguments))
  source = (path / 'report.html').read_bytes().decode('utf-8')
  return source, _Page(source)


@functools.cache
def _evaluation(share):
  def completion(correct):
    return scores.Completion('7' if correct else None, correct, True, 9, True)

  rng = np.random.default_rng(0)
  return scores.summarise(
    [
      scores.Samples(
        'p',
        '7',
        ('add', 'divide')[i % 2],
        ('en', 'zh')[i % 3 == 0],
        tuple(completion(bool(c)) for c in rng.random(4) < share),
        completion(True),
      )
      for i in range(30)
    ]
  )


def _runs(num_rows=50):
  rows = [
    {
      'step': i + 1,
      'train/loss': 1 / (i + 1),
      'rl/reward': i / num_rows,
      'rl/gap_mean': 1e-7,
      'rl/gap_max': 1e-5,
      'moe/max_vio': [0.1, 0.2],
      'mine/own': float(i),
    }
    for i in range(num_rows)
  ]
  sample = {
    'step': 1,
    'prompt': 'What is 3+4?\n',
    'completion': '<think>3+4=7</think><answer>7</answer>',
    'gold': '7',
    'reward': 1.0,
  }
  config = {'optim': {'lr': 1.0}, 'model': {'dim': 3}}
  return [
    runs.Run('base', rows, _evaluation(0.3), config, [sample], 61.0),
    runs.Run('r1_zero', rows, _evaluation(0.9), {'optim': {'lr': 2.0}}),
  ]


def test_report_shows_everything(tmp_path):
  all_runs = _runs()
  comparison = {
    'prompt': '3+4等于多少？',
    'gold': '7',
    'before': '8',
    'after': '<answer>7</answer>',
  }
  _, page = _write(
    tmp_path,
    title='My run',
    runs=all_runs,
    comparisons=[comparison],
    versions=report.environment(),
  )
  before = f'{100 * all_runs[0].evaluation["pass@1"]:.1f}%'
  after = f'{100 * all_runs[1].evaluation["pass@1"]:.1f}%'
  for text in (
    *('My run', before, after, 'divide', 'zh', 'cons@4', 'pass@k'),
    *('Training loss', 'Reward', 'Sampler gap', 'Expert load', 'mine/own'),
    *(
      '3+4等于多少？',
      'Samples during training',
      'optim.',
      'Python',
      '1 min 01 s',
    ),
  ):
    assert text in page.text, text
  ids = {value for name, value in page.attributes if name == 'id'}
  links = {value for name, value in page.attributes if name == 'href'}
  assert links == {f'#{i}' for i in ids} and 'results' in ids
  # train/loss, reward, gap, max_vio, own: five charts per run, and pass@k.
  assert page.tags.count('svg') == 2 * 5 + 1


def test_report_fetches_nothing(tmp_path):
  source, page = _write(tmp_path, runs=_runs())
  for name, value in page.attributes:
    if name in ('src', 'href', 'srcset', 'action', 'data', 'xlink:href'):
      assert value.startswith('#'), (name, value)
  assert not {'link', 'img', 'iframe', 'object', 'base'} & set(page.tags)
  assert '@import' not in source and 'url(' not in source
  # The name of the SVG namespace is the only address, and is never fetched.
  addresses = set(re.findall(r'https?://[^\'"\s]*', source))
  assert addresses == {'http://www.w3.org/2000/svg'}


def test_hostile_text_stays_text(tmp_path):
  rows = [{'step': 1, _HOSTILE: 1.0, 'train/loss': 1.0}]
  run = runs.Run(
    _HOSTILE,
    rows,
    _evaluation(0.5) | {'by_operation': {_HOSTILE: {'pass@1': 0.5}}},
    {_HOSTILE: {'x': _HOSTILE}},
    [{'step': 1, 'prompt': _HOSTILE, 'completion': _HOSTILE, 'gold': _HOSTILE}],
    notes=(_HOSTILE,),
  )
  item = dict.fromkeys(('prompt', 'gold', 'before', 'after'), _HOSTILE)
  source, page = _write(
    tmp_path,
    title=_HOSTILE,
    subtitle=_HOSTILE,
    runs=[run, run],
    comparisons=[item],
    seconds={_HOSTILE: 1.0},
    versions={_HOSTILE: _HOSTILE},
  )
  assert 'img' not in page.tags and page.tags.count('script') == 1
  assert not any(name.startswith('on') for name, _ in page.attributes)
  assert '<img src=x onerror=alert(1)>' in page.text
  assert not re.search('[\x00-\x08\x0b-\x1f\x7f\u202e]', source)
  assert r'\x1b[31m\u202e\ud800' in page.text


@pytest.mark.parametrize(
  'some_runs',
  [
    [],
    [runs.Run('empty')],
    [runs.Run('a', [{'step': 5, 'train/loss': 2.0}])],
    [runs.Run('a', [{}, {'step': 1, 'x': None}, {'x': float('nan')}])],
    [runs.Run('a', evaluation={'pass@1': None, 'by_operation': {'add': {}}})],
    [runs.Run('a', samples=[{}, {'completion': None}])],
    [runs.Run('a', config={}), runs.Run('b', config={'x': None})],
  ],
)
def test_little_or_nothing_to_show(tmp_path, some_runs):
  source, page = _write(tmp_path, runs=some_runs)
  assert 'h1' in page.tags and '>nan' not in source


def test_one_evaluation_has_no_before(tmp_path):
  _, page = _write(tmp_path, runs=_runs()[:1])
  assert 'Before and after' not in page.text and 'Results' in page.text
  assert '95% interval ' in page.text
  _, page = _write(tmp_path, runs=_runs())
  assert 'Before and after' in page.text
  assert '95% interval ' not in page.text and 'from ' in page.text


def test_size_with_many_rows(tmp_path):
  keys = [f'group/metric_{i}' for i in range(10)]
  rng = np.random.default_rng(0)
  rows = [
    {'step': s} | dict(zip(keys, rng.normal(size=10).tolist()))
    for s in range(5000)
  ]
  source, page = _write(tmp_path, runs=[runs.Run('a', rows)])
  assert page.tags.count('svg') == 10
  # Two runs of thirty metrics each then stay below 2 MB.
  assert len(source.encode()) < 2_000_000 * 10 / 60


def test_markup_escapes_all_but_markup():
  inner = markup.tag('b', '<i>', class_='a"b', hidden=True, open=False)
  assert inner == '<b class="a&quot;b" hidden>&lt;i&gt;</b>'
  assert markup.tag('p', [inner, None, (1, '&')]) == f'<p>{inner}1&amp;</p>'
  assert markup.text('a\tb\nc\r\nd\x07') == 'a\tb\nc\nd\\x07'
