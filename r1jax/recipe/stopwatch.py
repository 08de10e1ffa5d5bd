"""Wall time of a program's parts that adds up over kills and resumes."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator

from etils import epath

from r1jax.train import workdir as workdir_lib

_EVERY_SECONDS = 5.0


class Stopwatch:
  """Seconds by name, kept in a file that is rewritten every few seconds."""

  def __init__(self, path: epath.Path):
    self._path = path
    self.seconds: dict[str, float] = {}
    if path.exists():
      self.seconds = json.loads(path.read_text())

  @contextlib.contextmanager
  def measure(self, name: str) -> Iterator[None]:
    """Adds the time of the block, also of one that is killed."""
    before, start = self.seconds.get(name, 0.0), time.perf_counter()
    done = threading.Event()

    def write() -> None:
      self.seconds[name] = before + time.perf_counter() - start
      workdir_lib.write_text(self._path, json.dumps(self.seconds) + '\n')

    def keep_writing() -> None:
      while not done.wait(_EVERY_SECONDS):
        write()

    thread = threading.Thread(target=keep_writing, daemon=True)
    thread.start()
    try:
      yield
    finally:
      done.set()
      thread.join()
      write()
