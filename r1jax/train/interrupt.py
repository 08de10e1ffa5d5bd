"""Ctrl-C and SIGTERM: unwind the program, but not in the middle of a save."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def on_sigterm() -> Iterator[None]:
  """Lets SIGTERM unwind the program as Ctrl-C does, so that saves finish."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def interrupt(signum: int, frame: Any) -> None:
    del signum, frame
    raise KeyboardInterrupt('SIGTERM')

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
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
