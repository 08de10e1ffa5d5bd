"""Live progress on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich import console as rich_console
from rich import markup
from rich import progress as rich_progress

SHOWN = (
    'train/loss', 'eval/loss', 'eval/bits_per_byte', 'rl/accuracy',
    'rl/format', 'rl/length',
)  # fmt: skip


class Progress:
  """Shows step, chosen metrics, tokens per second and the time left.

  On a terminal one line is redrawn in place; elsewhere (a file, a pipe) a
  plain line is printed every few seconds and for the last step.
  """

  def __init__(
    self,
    total_steps: int,
    *,
    start_step: int = 0,
    title: str = 'train',
    shown: Sequence[str] = SHOWN,
    every_seconds: float = 10.0,
    console: rich_console.Console | None = None,
  ):
    self._total = total_steps
    self._start = start_step
    self._title = title
    self._shown = shown
    self._every = every_seconds
    quiet = jax.process_index() > 0  # One of several processes speaks.
    self._console = console or rich_console.Console(quiet=quiet)
    self._latest: dict[str, float] = {}
    self._begin: float | None = None
    self._printed = -float('inf')
    self._bar = self._task = None
    if self._console.is_terminal:
      self._bar = _make_bar(self._console)
      self._task = self._bar.add_task(
        title, total=total_steps, completed=start_step, note='compiling'
      )

  def __enter__(self) -> 'Progress':
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Takes the metrics of a step; older values of other names stay shown."""
    self._latest |= {k: float(v) for k, v in metrics.items() if not np.ndim(v)}
    now = time.perf_counter()
    if self._begin is None:
      self._begin, self._start = now, step  # The first step compiled.
    if self._bar is not None:
      self._bar.update(self._task, completed=step, note=self._note())
    elif now - self._printed >= self._every or step == self._total:
      self._printed = now
      left = f'  {duration(self._eta(step, now))} left' if step else ''
      self._console.print(
          f'{self._title} {step}/{self._total}  {self._note()}{left}',
          markup=False, highlight=False, soft_wrap=True,
      )  # fmt: skip

  def say(self, line: str) -> None:
    """Prints a line above the progress."""
    self._console.print(line, markup=False, highlight=False, soft_wrap=True)

  def _note(self) -> str:
    parts = [
      f'{_label(name)} {self._latest[name]:.4g}'
      for name in self._shown
      if name in self._latest
    ]
    speed = self._latest.get('perf/tokens_per_second')
    if speed is not None:
      parts.append(f'{_count(speed)} tokens/s')
    return markup.escape('  '.join(parts))

  def _eta(self, step: int, now: float) -> float | None:
    done = step - self._start
    return (now - self._begin) / done * (self._total - step) if done else None


def _make_bar(console: rich_console.Console) -> rich_progress.Progress:
  return rich_progress.Progress(
    rich_progress.TextColumn('{task.description}'),
    rich_progress.BarColumn(bar_width=20),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TextColumn('{task.fields[note]}'),
    rich_progress.TimeElapsedColumn(),
    rich_progress.TextColumn('left'),
    rich_progress.TimeRemainingColumn(),
    console=console,
    refresh_per_second=4,
  )


def _label(name: str) -> str:
  kind, _, rest = name.partition('/')
  short = rest if kind in ('train', 'rl') else name
  return short.replace('/', ' ').replace('_', ' ')


def _count(value: float) -> str:
  for size, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if value >= size:
      return f'{value / size:.1f}{unit}'
  return f'{value:.0f}'


def duration(seconds: float | None) -> str:
  """Formats seconds as h:mm:ss; `?` if unknown."""
  if seconds is None:
    return '?'
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'
