"""One self-contained HTML file that shows what a run, or several, did."""

import importlib.metadata
import importlib.resources
import os
import platform
import string
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from r1jax.evaluate import completions, curves, markup, pipelines, results
from r1jax.evaluate import runs as runs_lib

_PACKAGES = ('r1jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')
_SECTIONS = {
  'results': 'Results',
  'curves': 'Curves',
  'pipeline': 'Pipeline',
  'completions': 'Completions',
  'samples': 'Samples',
  'config': 'Config',
  'environment': 'Environment',
}


def write_report(
  path: epath.PathLike,
  *,
  title: str,
  runs: Sequence[runs_lib.Run],
  subtitle: str = '',
  comparisons: Sequence[Mapping[str, Any]] = (),
  seconds: Mapping[str, float] | None = None,
  versions: Mapping[str, str] | None = None,
) -> None:
  """Writes the report: no network, no script needed to read it.

  Args:
    path: Where the HTML file goes; its folder exists.
    title: Page title.
    runs: In order of time; the first and the last that have an evaluation are
      the before and after of the headline.
    subtitle: A line below the title.
    comparisons: See completions.comparisons_section.
    seconds: Wall time by stage; by default that of each run that knows it.
    versions: What ran it and where, see `environment`.
  """
  seconds = seconds or {r.name: r.seconds for r in runs if r.seconds}
  evaluated = [run for run in runs if run.evaluation]
  titles = [run.name for run in evaluated]
  titles = (titles[0], titles[-1]) if len(titles) > 1 else ('before', 'after')
  sections = {
    'results': results.section(evaluated),
    'curves': curves.section(runs),
    'pipeline': pipelines.section(runs),
    'completions': completions.comparisons_section(comparisons, titles),
    'samples': completions.samples_section(runs),
    'config': _config(runs),
    'environment': _environment(versions or {}, seconds),
  }
  sections = {name: body for name, body in sections.items() if body}
  body = markup.join(
    [
      _header(title, subtitle, sections),
      _notes(runs),
      results.cards(evaluated, seconds),
      list(sections.values()),
      None if sections else markup.tag('p', 'Nothing has been recorded yet.'),
    ]
  )
  page = string.Template(_asset('report.html')).substitute(
    title=markup.text(title),
    style=_asset('report.css'),
    script=_asset('report.js'),
    body=body,
  )
  epath.Path(path).write_bytes(page.encode('utf-8'))


def environment() -> dict[str, str]:
  """Describes the machine and the versions in use, for `write_report`."""
  devices = jax.devices()
  found = {
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'hosts': str(jax.process_count()),
    'host cores': str(len(os.sched_getaffinity(0)))
    if hasattr(os, 'sched_getaffinity')
    else str(os.cpu_count()),
    'system': f'{platform.system()} {platform.machine()}',
    'Python': platform.python_version(),
  }
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def _header(
  title: str, subtitle: str, sections: Mapping[str, markup.Html]
) -> markup.Html:
  links = (
    markup.tag('a', _SECTIONS[name], href=f'#{name}') for name in sections
  )
  return markup.tag(
    'header',
    markup.tag('h1', title),
    markup.tag('p', subtitle, class_='subtitle') if subtitle else None,
    markup.tag('nav', links) if len(sections) > 1 else None,
  )


def _notes(runs: Sequence[runs_lib.Run]) -> markup.Html | None:
  notes = [f'{run.name}: {note}' for run in runs for note in run.notes]
  if not notes:
    return None
  return markup.tag(
    'ul', (markup.tag('li', note) for note in notes), class_='notes'
  )


def _config(runs: Sequence[runs_lib.Run]) -> markup.Html | None:
  """All runs' configs in one table; rows that differ are marked."""
  runs = [run for run in runs if run.config]
  if not runs:
    return None
  flat = [runs_lib.flat_config(run.config) for run in runs]
  keys = dict.fromkeys(key for config in flat for key in config)
  rows = []
  for key in sorted(keys):
    values = [config.get(key) for config in flat]
    rows.append(
      markup.tag(
        'tr',
        markup.tag('th', _breakable(key), scope='row'),
        (markup.tag('td', '' if v is None else _breakable(v)) for v in values),
        class_='differs' if len(set(values)) > 1 else None,
      )
    )
  names = (markup.tag('th', run.name) for run in runs)
  head = markup.tag('tr', markup.tag('th', 'key'), names)
  differences = markup.tag(
    'label', markup.tag('input', type='checkbox'), ' only differences'
  )
  search = markup.tag(
    'p',
    markup.tag(
      'input', type='search', placeholder='search', aria_label='search'
    ),
    differences if len(runs) > 1 else None,
    class_='filter',
    hidden=True,
  )
  return markup.tag(
    'section',
    markup.tag('h2', 'Resolved config'),
    markup.tag(
      'details',
      markup.tag('summary', f'{len(keys)} values'),
      search,
      results.wide(head, *rows, class_='config'),
    ),
    id='config',
  )


def _environment(
  versions: Mapping[str, str], seconds: Mapping[str, float]
) -> markup.Html | None:
  """Wall time by stage, devices and versions."""
  if not versions and not seconds:
    return None
  times = []
  for name, value in seconds.items():
    share = 100 * value / max(sum(seconds.values()), 1e-9)
    times.append(
      markup.tag(
        'div',
        markup.tag('span', name, class_='stage'),
        markup.tag('i', markup.tag('b', style=f'width:{share:.1f}%')),
        markup.tag('span', results.duration(value)),
        class_='bar after time',
      )
    )
  facts = [
    markup.tag('div', markup.tag('dt', name), markup.tag('dd', value))
    for name, value in versions.items()
  ]
  return markup.tag(
    'section',
    markup.tag('h2', 'Environment'),
    markup.tag('div', times, class_='times') if times else None,
    markup.tag('dl', facts) if facts else None,
    id='environment',
  )


def _breakable(value: str) -> markup.Html:
  """Allows a line break after each dot, comma and underscore of a long word."""
  parts = str(value).replace('.', '.\0').replace(',', ',\0').split('\0')
  return markup.Html('<wbr>'.join(markup.text(part) for part in parts))


def _asset(name: str) -> str:
  folder = importlib.resources.files('r1jax.evaluate') / 'assets'
  return (folder / name).read_text(encoding='utf-8')
