"""The fixture that compiles programs for TPUs in a process of its own."""

import importlib.util

import pytest

from tests.tpu import compiling


@pytest.fixture(scope='session', autouse=True)
def libtpu():
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: make test-tpu installs it')


@pytest.fixture(scope='session')
def compile_for_tpu():
  """Returns compile(topology, names, timeout) -> {name: report}.

  See worker.py for the report. A compile error, a crash of the compiler or a
  timeout fails the test with the program it happened in.
  """
  return _compile


def _compile(
  topology: str, names: list[str], *, timeout: float = 300
) -> dict[str, dict]:
  run = compiling.run_worker(topology, names, timeout=timeout)
  missing = [name for name in names if name not in run.reports]
  if missing or run.code:
    pytest.fail(
      f'{topology}: {missing[0] if missing else "exit"} failed, '
      f'return code {run.code}:\n{run.worker.stderr[-3000:]}',
      pytrace=False,
    )
  return run.reports
