"""libtpu as a compiler, on a machine whose devices are its CPU.

It may abort the process or never end: `run` has one of its own for it.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

_ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the line says that tells why a compile failed, the surest first.
_MARKS = (
  *('RESOURCE_EXHAUSTED', 'LLVM ERROR', 'Check failed', 'Error:'),
  *('*** SIG', 'Fatal Python error'),
)


def set_up() -> None:
  """Prepares the environment; call it before jax is imported."""
  os.environ.update(
    JAX_PLATFORMS='cpu',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_ACCELERATOR_TYPE='v5litepod-4',
    TPU_MIN_LOG_LEVEL='3',
    TPU_SKIP_MDS_QUERY='1',
    TPU_STDERR_LOG_LEVEL='3',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_WORKER_ID='0',
  )
  # Compiled for a topology, a program is written to the cache but never read.
  os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)


@dataclasses.dataclass(frozen=True)
class Run:
  """What became of a worker.

  Attributes:
    lines: Of its stdout.
    stderr: What else it said.
    code: Its exit status; None if it did not end in time.
  """

  lines: list[str]
  stderr: str
  code: int | None

  @property
  def reason(self) -> str:
    """The line that says why it failed, as far as one can tell."""
    said = [s.strip() for s in self.stderr.splitlines() if s.strip()]
    marked = (s for mark in _MARKS for s in said if mark in s)
    return next(marked, said[-1] if said else 'the process said nothing')


def run(
  arguments: Sequence[str], *, timeout: float, given: str | None = None
) -> Run:
  """Runs Python with these arguments in this tree.

  Args:
    arguments: '-m' and a module, or a file, and what it takes.
    timeout: Seconds.
    given: On its stdin.
  """
  paths = [str(_ROOT), os.environ.get('PYTHONPATH', '')]
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
  }
  try:
    done = subprocess.run(
      [sys.executable, *arguments],
      input=given,
      env=environment,
      capture_output=True,
      text=True,
      timeout=timeout,
    )
  except subprocess.TimeoutExpired as e:
    out, err = ((s or b'').decode() for s in (e.stdout, e.stderr))
    return Run(out.splitlines(), err, None)
  return Run(done.stdout.splitlines(), done.stderr, done.returncode)
