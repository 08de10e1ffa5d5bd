"""Ctrl-C and SIGTERM: unwind the program, but not in the middle of a save."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preempted(Exception):
  """The run was told to end, and has saved what it had."""


class Termination:
  """Whether a SIGTERM came, for all processes of a run at the same step."""

  def __init__(self):
    self.received = False

  def is_due(self, step: int) -> bool:
    """Says whether to save after this step and end; ask after every step."""
    if jax.process_count() == 1:
      return self.received
    return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def on_sigterm() -> Iterator[Termination]:
  """Notes a SIGTERM, as machines that are taken away send it.

  A second one unwinds the program as Ctrl-C does. With several processes it
  is jax that listens, and they agree on a step.
  """
  termination = Termination()
  is_main = threading.current_thread() is threading.main_thread()
  if not is_main or jax.process_count() > 1:
    yield termination
    return

  def note(signum: int, frame: Any) -> None:
    del signum, frame
    if termination.received:
      raise KeyboardInterrupt('SIGTERM')
    termination.received = True

  before = signal.signal(signal.SIGTERM, note)
  try:
    yield termination
  finally:
    signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def put_off() -> Iterator[None]:
  """Puts off Ctrl-C and SIGTERM to the end of the block."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  received = []
  before = {
    s: signal.getsignal(s)
    for s in (signal.SIGINT, signal.SIGTERM)
    if callable(signal.getsignal(s))
  }
  for number in before:
    signal.signal(number, lambda number, _: received.append(number))
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
    for number in received[:1]:
      signal.raise_signal(number)
