"""The fixture that compiles programs for TPUs in a process of its own."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

_FOLDER = pathlib.Path(__file__).parent
_ROOT = _FOLDER.parents[1]


@pytest.fixture(scope='session')
def compile_for_tpu():
  """Returns compile(topology, names, timeout) -> {name: report}.

  See worker.py for the report. A compile error, a crash of the compiler or a
  timeout fails the test with the program it happened in.
  """
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: make test-tpu installs it')
  return _compile


def _compile(
  topology: str, names: list[str], *, timeout: float = 300
) -> dict[str, dict]:
  command = [sys.executable, str(_FOLDER / 'worker.py'), topology, *names]
  paths = [str(_ROOT), os.environ.get('PYTHONPATH', '')]
  environment = {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
  }
  try:
    result = subprocess.run(
      command, env=environment, capture_output=True, text=True, timeout=timeout
    )
    out, err, code = result.stdout, result.stderr, result.returncode
  except subprocess.TimeoutExpired as e:
    out, err = ((s or b'').decode() for s in (e.stdout, e.stderr))
    code = f'none after {timeout} s'
  reports = [json.loads(line) for line in out.splitlines()]
  done = {report['program']: report for report in reports}
  missing = [name for name in names if name not in done]
  if missing or code:
    pytest.fail(
      f'{topology}: {missing[0] if missing else "exit"} failed, '
      f'return code {code}:\n{err[-3000:]}',
      pytrace=False,
    )
  return done
