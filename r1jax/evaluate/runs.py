"""What a run left in its workdir, read tolerantly, and its metric curves."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from r1jax.evaluate import table


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run as plain data; every part may be missing.

  Attributes:
    name: Its title in the report.
    metrics: Rows of metrics.jsonl, each with 'step' and metric values.
    evaluation: Summary of its held-out evaluation (scores.summarise).
    config: The resolved config, nested.
    samples: Rows of samples.jsonl: 'step', 'prompt', 'completion' and, where
      known, 'reward', 'gold' (the right answer as text) and 'correct'.
    seconds: Wall time.
    notes: What could not be read, one sentence each.
  """

  name: str
  metrics: Sequence[Mapping[str, Any]] = ()
  evaluation: Mapping[str, Any] | None = None
  config: Mapping[str, Any] | None = None
  samples: Sequence[Mapping[str, Any]] = ()
  seconds: float | None = None
  notes: tuple[str, ...] = ()


def load_run(workdir: epath.PathLike, name: str | None = None) -> Run:
  """Reads a workdir; what is missing or cut short is left out.

  A last line without its end is normal (the run was killed, or is running) and
  passed over; any other line or file that is not JSON gets a note.

  Args:
    workdir: Where the run keeps its files.
    name: Title of the run, by default the workdir's last component.
  """
  workdir = epath.Path(workdir)
  notes = []
  config = _read_json(workdir / 'config.json', notes)
  summary = _read_json(workdir / 'summary.json', notes) or {}
  seconds = summary.get('seconds')
  return Run(
    name=name or workdir.name,
    metrics=_read_lines(workdir / 'metrics.jsonl', notes),
    evaluation=_read_json(workdir / 'evaluation.json', notes),
    config=config,
    samples=_read_lines(workdir / 'samples.jsonl', notes),
    seconds=seconds if table.is_number(seconds) else None,
    notes=tuple(notes),
  )


def curve(
  metrics: Sequence[Mapping[str, Any]], key: str
) -> tuple[np.ndarray, np.ndarray]:
  """Extracts one metric: steps and values, finite ones only, by step.

  A step that was logged twice (the run was resumed) counts with its last value;
  a row without a step counts as its position.
  """
  points = {}
  for i, row in enumerate(metrics):
    step, value = row.get('step'), row.get(key)
    if table.is_number(value):
      points[step if table.is_number(step) else i] = value
  steps = sorted(points)
  return np.array(steps, np.float64), np.array([points[s] for s in steps])


def flat_metrics(
  metrics: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
  """Spreads list values over keys of their own: 'a': [x, y] to 'a/0', 'a/1'."""
  flat = []
  for row in metrics:
    out = {}
    for key, value in row.items():
      if isinstance(value, list):
        out |= {f'{key}/{i}': item for i, item in enumerate(value)}
      else:
        out[key] = value
    flat.append(out)
  return flat


def metric_keys(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
  """Names of all with a finite value, in natural order."""
  keys = {
    key
    for row in metrics
    for key, value in row.items()
    if key != 'step' and table.is_number(value)
  }
  return sorted(keys, key=_natural)


def flat_config(config: Mapping[str, Any], prefix: str = '') -> dict[str, str]:
  """Flattens a nested config to 'a.b.c': value as JSON."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, Mapping) and value:
      flat |= flat_config(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = json.dumps(
        value, ensure_ascii=False, default=str
      )
  return flat


def _natural(key: str) -> list[Any]:
  # Odd places hold the digits, so numbers meet only numbers.
  return [int(p) if i % 2 else p for i, p in enumerate(re.split(r'(\d+)', key))]


def _read_text(path: epath.Path) -> str | None:
  try:
    return path.read_bytes().decode('utf-8', errors='replace')
  except FileNotFoundError:
    return None


def _read_json(path: epath.Path, notes: list[str]) -> dict[str, Any] | None:
  content = _read_text(path)
  if content is None:
    return None
  try:
    value = json.loads(content)
  except ValueError:
    value = None
  if not isinstance(value, dict):
    notes.append(f'{os.fspath(path.name)} could not be read.')
    return None
  return value


def _read_lines(path: epath.Path, notes: list[str]) -> list[dict[str, Any]]:
  content = _read_text(path)
  if content is None:
    return []
  found, bad = [], []
  lines = content.split('\n')
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      value = json.loads(line)
    except ValueError:
      value = None
    if isinstance(value, dict):
      found.append(value)
    elif number < len(lines):
      bad.append(number)
  if bad:
    notes.append(
      f'{os.fspath(path.name)}: {len(bad)} lines could not be read, '
      f'the first is line {bad[0]}.'
    )
  return found
