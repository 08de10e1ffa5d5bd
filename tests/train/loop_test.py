"""Who sees which step when, and what stops the loop."""

import dataclasses
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.train import interrupt, loop
from r1jax.train import step as step_lib
from tests.train import toy


class _Log:
  """Writes what happens, in order."""

  def __init__(self):
    self.events = []
    self.rows = {}

  def write(self, step, metrics):
    self.events.append(('report', step))
    self.rows[step] = metrics

  def hook(self, step, state):
    assert int(state.step) == step
    self.events.append(('hook', step))


def _fit(
  log,
  *,
  num_steps=5,
  hooks=(),
  save=None,
  state=None,
  train_step=None,
  **source,
):
  return loop.fit(
    toy.make_state() if state is None else state,
    train_step or toy.make_step(),
    toy.Source(0, **source),
    num_steps=num_steps,
    hooks=hooks,
    save=save,
    write=log.write,
  )


def test_each_step_is_reported_once_and_before_its_hooks():
  log = _Log()
  state = _fit(log, hooks=[loop.Every(2, log.hook, last_step=5)])
  assert int(state.step) == 5
  assert log.events == [
      ('report', 1), ('report', 2), ('hook', 2), ('report', 3),
      ('report', 4), ('hook', 4), ('report', 5), ('hook', 5),
  ]  # fmt: skip
  assert set(log.rows[1]) >= {'train/loss', 'train/grad_norm'}
  assert log.rows[1]['moe/counts'].shape == (1, toy.NUM_EXPERTS)
  assert 'perf/step_seconds' not in log.rows[1]  # It compiled.
  row = log.rows[3]
  np.testing.assert_allclose(
    row['perf/tokens_per_second'] * row['perf/step_seconds'], toy.NUM_ROWS
  )


def test_a_step_is_reported_after_the_next_was_dispatched():
  log, step = _Log(), toy.make_step()

  def train_step(state, batch):
    log.events.append('dispatch')
    return step(state, batch)

  _fit(log, num_steps=3, train_step=train_step)
  assert log.events == [
      'dispatch', 'dispatch', ('report', 1), 'dispatch', ('report', 2),
      ('report', 3),
  ]  # fmt: skip


def test_every_is_due_at_multiples_and_at_the_last_step():
  due = [s for s in range(1, 9) if loop.Every(3, print, last_step=8).due(s)]
  assert due == [3, 6, 8]
  assert not any(loop.Every(0, print).due(s) for s in range(1, 9))


def test_a_finished_run_does_nothing():
  log = _Log()
  state = _fit(log)
  log.events.clear()
  assert int(_fit(log, state=state).step) == 5
  assert log.events == []


@pytest.mark.parametrize('bad_step', [1, 3, 4, 5])
def test_a_non_finite_step_stops_the_run_before_a_save(bad_step):
  log = _Log()
  with pytest.raises(
    loop.NonFiniteError, match=f'train/loss is nan at step {bad_step}'
  ):
    _fit(log, hooks=[loop.Every(1, log.hook)], bad_step=bad_step)
  hooked = [step for kind, step in log.events if kind == 'hook']
  assert hooked == list(range(1, bad_step))


def _terminate(step, state):
  del step, state
  os.kill(os.getpid(), signal.SIGTERM)


def test_after_a_sigterm_the_step_is_saved_and_the_old_handler_returns():
  before, log = signal.getsignal(signal.SIGTERM), _Log()
  saved = []
  with pytest.raises(interrupt.Preempted, match='stopped after step 3'):
    _fit(
      log,
      hooks=[loop.Every(2, _terminate)],
      save=lambda step, state: saved.append((step, int(state.step))),
    )
  # It came after step 2, the next one was the last.
  assert saved == [(3, 3)]
  assert [step for kind, step in log.events if kind == 'report'][-1] == 3
  assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_becomes_an_interrupt():
  before = signal.getsignal(signal.SIGTERM)
  twice = lambda *args: (_terminate(*args), _terminate(*args))
  with pytest.raises(KeyboardInterrupt):
    _fit(_Log(), hooks=[loop.Every(2, twice)])
  assert signal.getsignal(signal.SIGTERM) is before


def test_overflow_leaves_the_step_out_and_stops_the_run():
  def loss_fn(variables, batch):
    loss, metrics = toy.loss_fn(variables, batch)
    overflow = jnp.where(batch.num_tokens == 8, 0.0, 3.0)
    return loss, metrics | {step_lib.OVERFLOW: overflow}

  class Source(toy.Source):
    def next(self, state):
      batch = super().next(state)
      tokens = np.float32(8 + (self._step == 3))
      return dataclasses.replace(batch, num_tokens=tokens)

  def run(stop_on_overflow, log):
    train_step = toy.make_step(
      loss_fn=loss_fn, stop_on_overflow=stop_on_overflow
    )
    return loop.fit(
      toy.make_state(), train_step, Source(0), num_steps=4,
      hooks=[loop.Every(1, log.hook)], write=log.write,
    )  # fmt: skip

  log = _Log()
  message = 'moe/overflow_tokens is 3 at step 3; .*receive_factor, or set'
  with pytest.raises(loop.ExpertOverflowError, match=message):
    run(True, log)
  assert [s for kind, s in log.events if kind == 'hook'] == [1, 2]
  # As after a non-finite step, nothing but the step number has changed.
  source, before = Source(0), toy.make_state()
  kept = jax.tree.map(np.array, before.variables)
  batch = [source.next(None) for _ in range(3)][-1]
  after, _ = toy.make_step(loss_fn=loss_fn, stop_on_overflow=True)(
    before, batch
  )
  jax.tree.map(np.testing.assert_array_equal, after.variables, kept)
  assert int(after.step) == 1
  log = _Log()
  assert int(run(False, log).step) == 4
  assert log.rows[3][step_lib.OVERFLOW] == 3
