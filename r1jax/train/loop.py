"""The one loop of every stage."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from r1jax import config
from r1jax.train import interrupt
from r1jax.train import state as state_lib
from r1jax.train import step as step_lib

Write = Callable[[int, dict[str, Any]], None]


class NonFiniteError(config.UserError):
  """The loss or the gradient norm of a step is not finite."""


class ExpertOverflowError(config.UserError):
  """Experts were sent more tokens than their devices have room for."""


class Source(Protocol):
  """Where batches come from; its state makes a resumed run bit-identical."""

  def next(self, state: state_lib.State) -> Any:
    """Returns the batch of the next step; it has a scalar `num_tokens`."""

  def get_state(self) -> dict[str, Any]:
    """Returns nested dicts of JSON-able values and numpy arrays."""

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes back to where `get_state` was called."""


class Hook(Protocol):
  """Something done between steps: a save, an evaluation, a profile."""

  def due(self, step: int) -> bool:
    """Says whether to call the hook after this step."""

  def __call__(self, step: int, state: state_lib.State) -> None:
    """Runs; the next step donates `state`, so keep no reference to it."""


@dataclasses.dataclass(frozen=True)
class Every:
  """A hook for each multiple of `num_steps`.

  Attributes:
    num_steps: The interval; 0 for never.
    call: What to do, (step, state) -> None.
    last_step: A step at which to call it in any case, or None.
  """

  num_steps: int
  call: Callable[[int, state_lib.State], None]
  last_step: int | None = None

  def due(self, step: int) -> bool:
    regular = self.num_steps > 0 and step % self.num_steps == 0
    return regular or step == self.last_step

  def __call__(self, step: int, state: state_lib.State) -> None:
    self.call(step, state)


@dataclasses.dataclass(frozen=True)
class At:
  """A hook for one step."""

  step: int
  call: Callable[[int, state_lib.State], None]

  def due(self, step: int) -> bool:
    return step == self.step

  def __call__(self, step: int, state: state_lib.State) -> None:
    self.call(step, state)


def fit(
  state: state_lib.State,
  train_step: step_lib.TrainStep,
  source: Source,
  *,
  num_steps: int,
  hooks: Sequence[Hook] = (),
  save: Callable[[int, state_lib.State], None] | None = None,
  write: Write,
) -> state_lib.State:
  """Runs to num_steps; hooks see (step, state) once its metrics are finite.

  Each step is reported once, after the next one was dispatched. Hooks run in
  order: put the save last, so that what the others wrote belongs to it. After
  a SIGTERM the step is finished and saved, and no other hook is called.

  Args:
    state: Where to start; given away to the jitted, donating `train_step`.
    train_step: (state, batch) -> (state, metrics), from `make_train_step`.
    source: Batches.
    num_steps: Last step to run; nothing happens if the state is there already.
    hooks: Called after the steps at which they are due.
    save: Called after the step at which a SIGTERM came, unless a hook was.
    write: Takes (step, metrics): floats, or numpy arrays of rank 1 and more.

  Raises:
    NonFiniteError: Before a hook sees the state of such a step.
    Preempted: After a SIGTERM.
  """
  report = _Reporter(write)
  pending = None
  with interrupt.on_sigterm() as termination:
    for step in range(int(state.step) + 1, num_steps + 1):
      batch = source.next(state)  # GRPO samples from state.variables here.
      state, metrics = train_step(state, batch)  # Returns before it ran.
      if pending is not None:
        report(*pending)
      pending = (step, metrics, batch.num_tokens)
      due = [hook for hook in hooks if hook.due(step)]
      is_over = termination.is_due(step) and step < num_steps
      if is_over and save is not None:
        due = [save]
      if due:
        report(*pending)  # Raises on a non-finite loss, before a save.
        pending = None
        for hook in due:
          hook(step, state)
        report.restart_clock()
      if is_over:
        raise interrupt.Preempted(
          f'stopped after step {step}, as told by SIGTERM; run the same '
          'command again to go on'
        )
    if pending is not None:
      report(*pending)
  return state


class _Reporter:
  """Fetches a step's metrics, checks them and writes them with its speed.

  The first step of a run has no speed: its time is that of the compilation.
  """

  def __init__(self, write: Write):
    self._write = write
    self._since: float | None = None

  def __call__(
    self, step: int, metrics: step_lib.Metrics, num_tokens: jax.Array
  ) -> None:
    host, tokens = jax.device_get((metrics, num_tokens))
    row = {k: v if np.ndim(v) else float(v) for k, v in host.items()}
    now = time.perf_counter()
    if self._since is not None:
      seconds = max(now - self._since, 1e-9)
      row['perf/step_seconds'] = seconds
      row['perf/tokens_per_second'] = float(tokens) / seconds
    self._since = now
    self._write(step, row)
    for name in ('train/loss', 'train/grad_norm'):
      if not math.isfinite(row[name]):
        raise NonFiniteError(
          f'{name} is {row[name]} at step {step}; the run stops here, its '
          'last checkpoint is kept'
        )
    if row.get(step_lib.SKIPPED):
      raise ExpertOverflowError(
        f'{step_lib.OVERFLOW} is {row[step_lib.OVERFLOW]:.0f} at step {step}; '
        'the run stops here, its last checkpoint is kept: raise '
        "model.moe.exchange.receive_factor, or set on_overflow='drop'"
      )

  def restart_clock(self) -> None:
    """Leaves the time of the hooks out of the next step's."""
    self._since = time.perf_counter()
