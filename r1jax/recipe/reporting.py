"""report.html of a workdir, and what it compares a trained model with."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from r1jax.evaluate import completions, report, runs

_NUM_COMPARISONS = {'mended': 6, 'right': 2, 'wrong': 3, 'lost': 1}


def write_workdir_report(workdir: epath.PathLike) -> epath.Path:
  """Writes report.html into a workdir; returns its path.

  A run that started from another workdir is shown after that one.
  """
  workdir = epath.Path(workdir)
  shown = [(runs.load_run(workdir), workdir)]
  base = (shown[0][0].config or {}).get('init_from')
  if base and (epath.Path(base) / 'config.json').exists():
    shown.insert(0, (runs.load_run(base), epath.Path(base)))
  return write_report(workdir / 'report.html', shown, title=workdir.name)


def write_report(
  path: epath.Path,
  shown: Sequence[tuple[runs.Run, epath.Path]],
  *,
  title: str,
  subtitle: str = '',
  seconds: Mapping[str, float] | None = None,
) -> epath.Path:
  """Writes a report of runs and, of the first and last, their completions.

  Args:
    path: Of the HTML file.
    shown: Each run and its workdir, in order of time.
    title: Page title.
    subtitle: A line below it.
    seconds: Wall time by stage; by default of each run that knows it.

  Returns:
    The path.
  """
  compared = []
  if len(shown) > 1:
    before, after = (load_completions(w) for w in (shown[0][1], shown[-1][1]))
    compared = compare(before, after)
  report.write_report(
    path,
    title=title,
    subtitle=subtitle,
    runs=[run for run, _ in shown],
    comparisons=compared,
    seconds=seconds,
    versions=report.environment(),
  )
  return path


def load_completions(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Greedy completions of an evaluation, [] if there was none."""
  path = epath.Path(workdir) / 'completions.jsonl'
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def compare(
  before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
  """Picks prompts that both answered: mended, right, still wrong, lost.

  Returns:
    What `report.write_report` takes as comparisons.
  """
  old = {row['prompt']: row['completion'] for row in before}
  picked = {name: [] for name in _NUM_COMPARISONS}
  for row in after:
    if row['prompt'] not in old:
      continue
    pair = old[row['prompt']], row['completion']
    was, now = (completions.answer(c) == row['gold'] for c in pair)
    name = {
      (False, True): 'mended',
      (True, True): 'right',
      (False, False): 'wrong',
      (True, False): 'lost',
    }[was, now]
    if len(picked[name]) < _NUM_COMPARISONS[name]:
      item = {'prompt': row['prompt'], 'gold': row['gold']}
      picked[name].append(item | {'before': pair[0], 'after': pair[1]})
  return [item for items in picked.values() for item in items]
