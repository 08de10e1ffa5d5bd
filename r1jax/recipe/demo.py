"""R1-Zero in miniature: a base model, GRPO on it, both evaluated."""

import dataclasses
import gc
import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
from etils import epath

from r1jax import config as config_lib
from r1jax.evaluate import completions, runs, table, transcript
from r1jax.recipe import evaluation, grpo, pretrain, reporting, stopwatch
from r1jax.train import metrics
from r1jax.train import workdir as workdir_lib

TITLES = ('base', 'R1-Zero')

# What a demo that goes on may change. An evaluation of another config is
# simply made again; a base of other length would leave R1-Zero behind.
_MAY_DIFFER = (
  'evaluate',
  'base.mesh',
  'base.train.checkpoint_every',
  'base.train.eval_every',
  'base.train.max_to_keep',
  'r1_zero.mesh',
  'r1_zero.rollout.gap_every',
  'r1_zero.rollout.samples_every',
  'r1_zero.train.checkpoint_every',
  'r1_zero.train.eval_every',
  'r1_zero.train.max_to_keep',
  'r1_zero.train.num_steps',
)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
  """The stages of the demo.

  Attributes:
    base: Pretraining.
    r1_zero: GRPO; its seed and init_from are set by `run`.
    evaluate: Of both; its seed also chooses the questions and stays.
  """

  base: pretrain.PretrainConfig
  r1_zero: grpo.GrpoConfig
  evaluate: evaluation.EvaluateConfig


def run(
  config: DemoConfig, workdir: str, console: rich.console.Console
) -> dict[str, Any]:
  """Runs what is not done yet of the four stages, and shows what came of it.

  The stages live in workdir/seed_<seed of the base>; workdir/summary.json and
  report.html are those of this call.

  Returns:
    What summary.json holds.

  Raises:
    UserError: What the config asks for cannot be, or the stages that are
      there belong to another config.
  """
  seed = config.base.seed
  workdir = workdir_lib.absolute(workdir)
  folder = workdir / f'seed_{seed}'
  config = _with_paths(config, folder)
  # Before anything runs: half an hour later is too late for a wrong config.
  workdir_lib.prepare(
    folder, config_lib.to_dict(config), may_differ=_MAY_DIFFER
  )
  demo = _Demo(config, folder, console)
  base = demo.run_base()
  r1_zero = demo.run_r1_zero()
  seconds = base['seconds'] + r1_zero['seconds']
  summary = {'seed': seed, 'seconds': seconds, 'base': base, 'r1_zero': r1_zero}
  path = write_demo_report(workdir, folder, summary)
  workdir_lib.write_text(
    workdir / 'summary.json', json.dumps(summary, indent=2) + '\n'
  )
  console.out()
  table.show(console, base, r1_zero, TITLES)
  console.out(
    f'{seconds / 60:.1f} minutes in all, seed {seed}, at most '
    f'{peak_memory_mib():,.0f} MiB of memory',
    highlight=False,
  )
  console.out(f'report: {os.fspath(path)}', highlight=False)
  return summary


def peak_memory_mib() -> float:
  """Most memory that this process ever held: what this call ran, no more."""
  most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most / (2**20 if sys.platform == 'darwin' else 2**10)


def _with_paths(config: DemoConfig, folder: epath.Path) -> DemoConfig:
  r1_zero = dataclasses.replace(
    config.r1_zero,
    seed=config.base.seed,
    init_from=os.fspath(folder / 'base'),
  )
  return dataclasses.replace(config, r1_zero=r1_zero)


class _Demo:
  """The stages of one seed, each of which says what it does."""

  def __init__(
    self,
    config: DemoConfig,
    folder: epath.Path,
    console: rich.console.Console,
  ):
    self._config, self._folder, self._console = config, folder, console
    self._watch = stopwatch.Stopwatch(folder / 'seconds.json')
    self._examples: list[str] = []

  def run_base(self) -> dict[str, Any]:
    """Stages 1 and 2; returns the evaluation."""
    c = self._config
    self._announce(
      f'1 of 4: pretrain a base model for {c.base.train.num_steps} steps on a '
      'mixture of clean, wrong, untagged and unreasoned solutions'
    )
    step = self._train('base', pretrain.run, c.base)
    self._say_what_it_learned()
    self._announce(f'2 of 4: evaluate the base on {self._questions()}')
    summary = self._evaluate('base', step)
    rows = reporting.load_completions(self._folder / 'base')
    chosen = choose_examples(rows)
    self._examples = [row['prompt'] for row in chosen]
    self._show('base', chosen)
    return summary

  def run_r1_zero(self) -> dict[str, Any]:
    """Stages 3 and 4; returns the evaluation."""
    c = self._config.r1_zero
    self._announce(
      f'3 of 4: R1-Zero: {c.train.num_steps} steps of GRPO on the base, '
      f'{c.rollout.group_size} completions a prompt, rewarded by rules for '
      'format and answer; no supervised finetuning'
    )
    step = self._train('r1_zero', grpo.run, c)
    self._announce(f'4 of 4: evaluate R1-Zero on {self._questions()}')
    summary = self._evaluate('r1_zero', step)
    rows = reporting.load_completions(self._folder / 'r1_zero')
    by_prompt = {row['prompt']: row for row in rows}
    self._show(
      'R1-Zero', [by_prompt[p] for p in self._examples if p in by_prompt]
    )
    return summary

  def _train(self, name: str, train: Callable[..., Any], config: Any) -> int:
    """Runs a stage to its end, unless it is there; returns its last step."""
    last = config.train.num_steps
    if _num_steps(self._folder / name) == last:
      self._say(f'{name}: finished already, at step {last}')
      return last
    with self._watch.measure(f'train {name}'):
      step = int(train(config, os.fspath(self._folder / name)).step)
    gc.collect()  # The state is gone before the next stage takes its place.
    reporting.write_workdir_report(self._folder / name)
    return step

  def _evaluate(self, name: str, step: int) -> dict[str, Any]:
    """Evaluates a stage, or reads what it did; adds the seconds of both."""
    config, workdir = self._config.evaluate, os.fspath(self._folder / name)
    summary = evaluation.load_finished(config, workdir, step)
    if summary is None:
      with self._watch.measure(f'evaluate {name}'):
        summary = evaluation.run(config, workdir, self._say)
    else:
      self._say(f'evaluate: finished already, for step {step}')
    reporting.write_workdir_report(workdir)
    times = self._watch.seconds
    train, evaluate = (
      times.get(f'{kind} {name}', 0.0) for kind in ('train', 'evaluate')
    )
    return summary | {
      'seconds': train + evaluate,
      'train_seconds': train,
      'evaluate_seconds': evaluate,
    }

  def _say_what_it_learned(self) -> None:
    """The share of good MTP drafts and the expert load, as last measured."""
    last = {}
    for row in metrics.read(self._folder / 'base'):
      last |= row
    if 'mtp/accept' in last:
      self._say(
        f'MTP: {last["mtp/accept"]:.1%} of its drafts are what the main '
        'model would say itself'
      )
    if 'eval/max_vio' in last:
      self._say(
        f'experts: the busiest has {last["eval/max_vio"]:.0%} more than its '
        'share of the tokens (MaxVio)'
      )

  def _questions(self) -> str:
    c = self._config.evaluate
    return (
      f'{c.num_problems} held-out problems, {c.num_samples} sampled '
      'completions of each and a greedy one'
    )

  def _announce(self, sentence: str) -> None:
    self._console.out()
    self._console.out(f'Stage {sentence}.', style='bold', highlight=False)

  def _say(self, line: str) -> None:
    self._console.out(line, highlight=False)

  def _show(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
      transcript.show(self._console, title, row)


def _num_steps(workdir: epath.Path) -> int | None:
  """Steps of a finished stage: its summary is written last."""
  path = workdir / 'summary.json'
  return json.loads(path.read_text())['num_steps'] if path.exists() else None


def choose_examples(
  rows: Sequence[Mapping[str, Any]], count: int = 3
) -> list[Mapping[str, Any]]:
  """Picks completions to show: wrong ones first, the last one right.

  Where there are not enough of a kind the other takes its place.
  """
  is_right = lambda row: completions.answer(row['completion']) == row['gold']
  wrong = [row for row in rows if not is_right(row)]
  right = [row for row in rows if is_right(row)]
  chosen = wrong[: count - min(1, len(right))]
  return chosen + right[: count - len(chosen)]


def write_demo_report(
  workdir: epath.Path, folder: epath.Path, summary: Mapping[str, Any]
) -> epath.Path:
  """Writes workdir/report.html of the stages in a folder; returns its path."""
  shown = []
  for name, title in zip(('base', 'r1_zero'), TITLES):
    run = runs.load_run(folder / name, title)
    # With the seconds of the whole stage, as the table shows them.
    run = dataclasses.replace(run, evaluation=summary[name])
    shown.append((run, folder / name))
  seconds = {
    f'{kind} {title}': summary[name][f'{kind}_seconds']
    for name, title in zip(('base', 'r1_zero'), TITLES)
    for kind in ('train', 'evaluate')
  }
  return reporting.write_report(
    workdir / 'report.html',
    shown,
    title='R1-Zero in miniature',
    subtitle=f'A base model before and after GRPO with rule rewards, seed '
    f'{summary["seed"]}',
    seconds=seconds,
  )
