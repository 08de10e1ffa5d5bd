"""Speed on this machine, beside transformers and TRL if they are given.

  python -m experiments.bench                   # or: make bench
  python -m experiments.bench --peers=DIR --peers_python=VENV/bin/python

DIR holds transformers_deepseek_v3.py and trl_grpo.py, and their Python has
torch, transformers and trl. Everything has the same model of 4.6 M parameters
and runs in turn, round by round; each side may use the machine as suits it
(r1jax: one device or one per core; the peers: NT threads) and the better way
counts. Figures are medians with (least-most); keep the machine quiet.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

from absl import flags

from experiments import app, json_flag
from r1jax import config

_PEERS = flags.DEFINE_string('peers', None, "Folder of the peers' scripts.")
_PEERS_PYTHON = flags.DEFINE_string(
  'peers_python', 'python3', 'Python with torch, transformers and trl.'
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', None, 'Turns of everything; default 1, with peers 3.', 1
)
_REPEATS = flags.DEFINE_integer(
  'repeats', 5, 'Times each of our figures is taken in a round.', 1
)
_DEVICES = flags.DEFINE_list(
  'devices', None, 'CPU devices to try; default 1 and one per core, at most 8.'
)
flags.adopt_module_key_flags(json_flag)

_TIMEOUT_SECONDS = 900
_ROOT = pathlib.Path(__file__).resolve().parents[1]

# Of one series: a list of repeats for each round, by way of running.
Series = dict[str, list[list[float]]]


@dataclasses.dataclass(frozen=True)
class Figure:
  """One row of the table.

  Attributes:
    title: What is measured.
    unit: 'tokens/s', more is better, or 's', less is better.
  """

  title: str
  unit: str

  @property
  def best(self) -> Callable[..., str]:
    return max if self.unit == 'tokens/s' else min


FIGURES = {
  'train': Figure('train step 8 x 128', 'tokens/s'),
  'dense': Figure('the same, our dense model', 'tokens/s'),
  'decode': Figure('decode 8 x (32 + 64)', 'tokens/s'),
  'grpo': Figure('GRPO step, 8 x (32 + 64)', 's'),
  'transformers train': Figure('transformers: train step', 'tokens/s'),
  'transformers decode': Figure('transformers: decode', 'tokens/s'),
  'trl grpo': Figure('TRL: GRPO step', 's'),
}


@dataclasses.dataclass(frozen=True)
class Ratio:
  """One series over another, and the bound it must keep."""

  title: str
  over: str
  under: str
  bound: float

  def is_met(self, value: float) -> bool:
    is_speed = FIGURES[self.over].unit == 'tokens/s'
    return value >= self.bound if is_speed else value <= self.bound


RATIOS = (
  Ratio('train step / our dense model', 'train', 'dense', 0.8),
  Ratio('train step / transformers', 'train', 'transformers train', 1.2),
  Ratio('decode / transformers', 'decode', 'transformers decode', 2.0),
  Ratio('GRPO step / TRL', 'grpo', 'trl grpo', 0.5),
)


def main() -> None:
  rounds = _ROUNDS.value or (3 if _PEERS.value else 1)
  if _PEERS.value:
    peers = pathlib.Path(_PEERS.value).absolute()
    python = _check_peers(peers, _PEERS_PYTHON.value)
  ways = _ways(_DEVICES.value)
  series: dict[str, Series] = {name: {} for name in FIGURES}
  loads = []
  for number in range(1, rounds + 1):
    loads.append(os.getloadavg()[0])
    print(f'round {number} of {rounds}, load {loads[-1]:.1f}', flush=True)
    print('  r1jax …', flush=True)
    for devices, figures in run_ours(ways, _REPEATS.value).items():
      add(series, _count(devices, 'device'), figures)
    for threads in (1, 2) if _PEERS.value else ():
      way = _count(threads, 'thread')
      print(f'  transformers and TRL, {way} …', flush=True)
      add(series, way, run_peers(peers, python, threads))
  print(table(series))
  if json_flag.FILE.value:
    report = {
      'cores': os.cpu_count(),
      'load': loads,
      'series': series,
      'ratios': {
        r.title: {'bound': r.bound, 'rounds': ratio(series, r)} for r in RATIOS
      },
    }
    pathlib.Path(json_flag.FILE.value).write_text(
      json.dumps(report, indent=2) + '\n'
    )


def add(
  series: dict[str, Series], way: str, figures: dict[str, list[float]]
) -> None:
  """Adds one round's repeats."""
  for name, repeats in figures.items():
    series[name].setdefault(way, []).append(repeats)


def run_ours(
  ways: Sequence[int], repeats: int
) -> dict[int, dict[str, list[float]]]:
  """One round of r1jax on so many CPU devices each, in turn in one process."""
  command = [
    sys.executable,
    '-m',
    'experiments.bench_worker',
    f'--host_devices={max(ways)}',
    f'--ways={",".join(map(str, ways))}',
    f'--times={repeats}',
  ]
  out = _run(command, {'JAX_PLATFORMS': 'cpu'}, _ROOT)
  figures = json.loads(out.splitlines()[-1])
  return {int(way): of_way for way, of_way in figures.items()}


def run_peers(
  folder: pathlib.Path, python: str, threads: int
) -> dict[str, list[float]]:
  """One round of both peers; TRL's figure is the median of its steps."""
  environment = {
    'NT': str(threads),
    'ATTN': 'sdpa',
    'MODEL': 'dsv3',
    'OMP_WAIT_POLICY': 'passive',
    'GLIBC_TUNABLES': '',  # Those that app.run sets are ours.
  }
  run = lambda name: _run([python, name], environment, folder)
  transformers = parse_transformers(run('transformers_deepseek_v3.py'))
  return transformers | {'trl grpo': [parse_trl(run('trl_grpo.py'))]}


def parse_transformers(out: str) -> dict[str, list[float]]:
  """Reads tokens/s of the train step and of generation."""
  return {
    'transformers train': [_find(r'^train step .* (\d+) tok/s', out)],
    'transformers decode': [_find(r'^generate .* (\d+) tok/s', out)],
  }


def parse_trl(out: str) -> float:
  """Reads the seconds of the steps after the first; their median."""
  steps = re.search(r'^sec/GRPO step .*\[([\d., ]+)\]', out, re.MULTILINE)
  if steps is None:
    raise config.UserError(f'TRL printed no seconds per step: {out[-200:]!r}')
  return statistics.median(float(s) for s in steps[1].split(','))


def _find(pattern: str, out: str) -> float:
  found = re.search(pattern, out, re.MULTILINE)
  if found is None:
    raise config.UserError(f'no line {pattern!r} in a peer: {out[-200:]!r}')
  return float(found[1])


def _run(
  command: Sequence[str], environment: dict[str, str], folder: pathlib.Path
) -> str:
  """Runs a program to its end and returns its stdout."""
  try:
    done = subprocess.run(
      command,
      cwd=folder,
      env={**os.environ, **environment},
      capture_output=True,
      text=True,
      timeout=_TIMEOUT_SECONDS,
    )
  except (OSError, subprocess.TimeoutExpired) as e:
    raise config.UserError(f'{" ".join(command)}: {e}') from e
  if done.returncode:
    lines = done.stderr.strip().splitlines() or ['no message']
    raise config.UserError(
      f'{" ".join(command)} failed with code {done.returncode}: {lines[-1]}'
    )
  return done.stdout


def _check_peers(folder: pathlib.Path, python: str) -> str:
  """Returns the whole path of the peers' Python."""
  for name in ('transformers_deepseek_v3.py', 'trl_grpo.py'):
    if not (folder / name).is_file():
      raise config.UserError(f'--peers={folder}: there is no {folder / name}')
  found = shutil.which(python)
  if found is None:
    raise config.UserError(f'--peers_python={python}: there is no such program')
  return os.path.abspath(found)


def _ways(given: Sequence[str] | None) -> list[int]:
  """Numbers of devices to try; 8 rows must divide over them."""
  if given is None:
    cores = min(os.cpu_count() or 1, 8)
    return sorted({1, 1 << cores.bit_length() - 1})
  if any(text not in ('1', '2', '4', '8') for text in given):
    raise config.UserError(f'--devices={",".join(given)}: each is 1, 2, 4 or 8')
  return [int(text) for text in given]


def _count(number: int, noun: str) -> str:
  return f'{number} {noun}{"s" * (number > 1)}'


def best_way(series: dict[str, Series], name: str) -> str | None:
  """The way of running with the best median; None if it did not run."""
  ways = series[name]
  if not ways:
    return None
  middle = lambda way: statistics.median(sum(ways[way], []))
  return FIGURES[name].best(ways, key=middle)


def ratio(series: dict[str, Series], wanted: Ratio) -> list[float]:
  """The ratio in each round, or of our own two series in each repeat."""
  over, under = (best_way(series, n) for n in (wanted.over, wanted.under))
  if over is None or under is None:
    return []
  pairs = zip(
    series[wanted.over][over], series[wanted.under][under], strict=True
  )
  out = []
  for a, b in pairs:
    if len(a) == len(b):
      out += [x / y for x, y in zip(a, b, strict=True)]
    else:
      out.append(statistics.median(a) / statistics.median(b))
  return out


def table(series: dict[str, Series]) -> str:
  """All figures, each way in a column, then the ratios and their bounds."""
  lines = []
  for name, figure in FIGURES.items():
    best = best_way(series, name)
    for way, rounds in series[name].items():
      mark = '  *' if way == best else ''
      text = f'{spread(sum(rounds, []))} {figure.unit}'
      lines.append(f'{figure.title:28}{way:11}{text}{mark}')
  lines.append('(* the better way: it counts below)')
  for wanted in RATIOS:
    values = ratio(series, wanted)
    if not values:
      continue
    rule = '>=' if FIGURES[wanted.over].unit == 'tokens/s' else '<='
    verdict = 'met' if wanted.is_met(statistics.median(values)) else 'MISSED'
    lines.append(
      f'{wanted.title:39}{spread(values)}, '
      f'aim {rule} {wanted.bound:g}: {verdict}'
    )
  return '\n'.join(lines)


def spread(values: Sequence[float]) -> str:
  """Median (least-most), with three digits that count."""
  show = lambda x: f'{x:,.0f}' if x >= 100 else f'{x:.3g}'
  low, high = show(min(values)), show(max(values))
  return f'{show(statistics.median(values))} ({low}-{high})'


if __name__ == '__main__':
  app.run(main)
