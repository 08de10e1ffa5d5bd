"""Tests run on the CPU with 8 host devices and a compilation cache."""

import os
import pathlib

from tests import quick

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CACHE = _ROOT / '.cache'
_MAX_SECONDS = 10.0

# Before anything imports jax. Programs started by a test inherit all of it.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    # 8 devices on few cores: a collective may wait long for its last thread.
    '--xla_cpu_collective_call_terminate_timeout_seconds=600',
    quick.XLA_FLAGS,
  ]
).strip()
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE / 'programs'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
os.environ.setdefault(
  'HYPOTHESIS_STORAGE_DIRECTORY', str(_CACHE / 'hypothesis')
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

quick.cache_programs_of_one_device()

# A draw that compiles takes far longer than hypothesis's 200 ms.
hypothesis.settings.register_profile('r1jax', deadline=None)
hypothesis.settings.load_profile('r1jax')


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """Real data beside the repository; tests that want it skip without it."""
  path = _ROOT.parent / 'shared' / 'data'
  if not path.is_dir():
    pytest.skip('no ../shared/data beside the repository')
  return path


_CPU_SECONDS = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  before = sum(os.times()[:4])  # This process and its finished children.
  try:
    return (yield)
  finally:
    item.stash[_CPU_SECONDS] = sum(os.times()[:4]) - before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Fails an unmarked test that takes over ten seconds.

  Ten seconds both on the clock and of processor time, so that a machine with
  other work does not fail tests; three times that on the clock in any case.
  R1JAX_NO_TIME_LIMIT=1 lifts the rule.
  """
  report = yield
  marked = any(item.get_closest_marker(m) for m in ('slow', 'tpu', 'tpu_smoke'))
  lifted = os.environ.get('R1JAX_NO_TIME_LIMIT')
  if report.when == 'call' and report.passed and not (marked or lifted):
    seconds = call.duration
    if seconds < 3 * _MAX_SECONDS:
      seconds = min(seconds, item.stash[_CPU_SECONDS])
    if seconds > _MAX_SECONDS:
      report.outcome = 'failed'
      report.longrepr = (
        f'{item.nodeid} took {seconds:.1f} s: a test over '
        f'{_MAX_SECONDS:.0f} s is made faster or marked slow '
        '(R1JAX_NO_TIME_LIMIT=1 lifts the rule)'
      )
  return report
