"""The runner: what a user may get wrong ends in one line and exit code 2."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest

from experiments import app

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_CONFIG = """
import ml_collections

def get_config(arg='none'):
  if arg == 'wrong':
    raise ValueError(f'no variant {arg}')
  c = ml_collections.ConfigDict()
  c.steps = 3
  c.rate = 0.5
  c.name = arg
  c.on = True
  c.pair = ('a', 'b')
  c.sizes = [1, 2]
  c.init = None
  c.model = ml_collections.ConfigDict({'dim': 4})
  return c
"""

_PROGRAM = """
import dataclasses, errno, json, os, sys, time
from absl import flags
from experiments import app
from r1jax import config

_MODE = flags.DEFINE_string('mode', 'print', 'What to do.')
flags.DEFINE_string('to_hf', None, 'Folder.')
flags.DEFINE_string(
    'workdir', None, 'Folder.', required='REQUIRED' in os.environ)

@dataclasses.dataclass(frozen=True)
class Model:
  dim: int

@dataclasses.dataclass(frozen=True)
class Config:
  steps: int
  rate: float
  name: str
  on: bool
  pair: tuple[str, ...]
  sizes: tuple[int, ...]
  init: str | None
  model: Model

def main():
  if _MODE.value == 'print':
    print(json.dumps(dataclasses.asdict(app.load(Config))))
  elif _MODE.value == 'user':
    raise config.UserError('top_k=9 of 8\\nexperts')
  elif _MODE.value == 'bug':
    raise ZeroDivisionError('a bug')
  elif _MODE.value == 'full':
    with open('/dev/full', 'w') as f:
      f.write('x')
  elif _MODE.value == 'quota':
    e = OSError(errno.EDQUOT, 'Disk quota exceeded', '/place/file')
    raise RuntimeError('a save failed') from e
  elif _MODE.value == 'save':
    e = OSError(errno.ENOSPC, 'No space left on device')
    raise config.UserError('could not save step 3') from e
  elif _MODE.value == 'native':
    raise ValueError('RESOURCE_EXHAUSTED: No space left on device')
  elif _MODE.value == 'denied':
    raise PermissionError(13, 'Permission denied', '/place')
  elif _MODE.value == 'wait':
    print('ready', flush=True)
    time.sleep(60)
  elif _MODE.value == 'jax':
    app.set_up_jax()
    import jax
    print(jax.config.jax_compilation_cache_dir)
  elif _MODE.value == 'non_finite':
    from r1jax.train import loop
    raise loop.NonFiniteError('step 7: train/loss is nan')
  assert _MODE.value == 'jax' or 'jax' not in sys.modules

if __name__ == '__main__':
  app.run(
      main,
      config_file=sys.argv.pop(1),
      keeps_checkpoints='KEEPS_NONE' not in os.environ)
"""


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('app')
  (path / 'config.py').write_text(_CONFIG)
  (path / 'program.py').write_text(textwrap.dedent(_PROGRAM))
  return path


def _command(*arguments, default='config.py'):
  return [sys.executable, 'program.py', default, *arguments]


def _environment(**environment):
  return {**os.environ, 'PYTHONPATH': str(_ROOT), **environment}


def _run(folder, *arguments, default='config.py', **environment):
  return subprocess.run(
    _command(*arguments, default=default),
    cwd=folder,
    env=_environment(**environment),
    capture_output=True,
    text=True,
    timeout=60,
  )


def _assert_one_line(result, message, code=2):
  assert result.stderr == f'error: {message}\n'
  assert result.returncode == code


_KEYS = 'init, model, name, on, pair, rate, sizes, steps'


@pytest.mark.parametrize(
  ('argument', 'message'),
  [
    (
      '--config.stpes=1',
      "--config.stpes: config has no key 'stpes' (did you mean 'steps'?); "
      f'valid keys here: {_KEYS}',
    ),
    (
      '--config.model.width=1',
      "--config.model.width: config.model has no key 'width'; "
      'valid keys here: dim',
    ),
    (
      '--config.steps.x=1',
      '--config.steps.x: config.steps is not a group of keys but 3',
    ),
    ('--config.steps=abc', '--config.steps=abc: expected an integer'),
    ('--config.rate=fast', '--config.rate=fast: expected a number'),
    ('--config.on=maybe', '--config.on=maybe: expected true or false'),
    ('--config.steps', 'Missing value for flag --config.steps'),
    (
      '--config.sizes=a',
      "sizes[0]='a' is a str, it must be a int",
    ),
    ('--config=none.py', '--config=none.py: there is no file none.py'),
    ('--config', '--config=FILE.py is required'),
    (
      '--config=config.py:wrong',
      'config.py:6: ValueError: no variant wrong',
    ),
    (
      '--mod=print',
      'unknown flag --mod (did you mean --mode?); --help lists the flags',
    ),
    (
      'config.steps=4',
      "unexpected argument 'config.steps=4'; a flag is written --name=value",
    ),
  ],
)
def test_wrong_command_line_is_one_line(folder, argument, message):
  _assert_one_line(_run(folder, argument), message)


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('def get_config()\n  pass', "wrong.py:1: expected ':'"),
    ('import nothing_here', 'wrong.py:1: ModuleNotFoundError: No module'),
    ('x = 1', '--config=wrong.py: it defines no get_config()'),
    (
      'def get_config():\n  return {}',
      'wrong.py: get_config() returned a dict',
    ),
    (
      'def get_config(x):\n  pass',
      '--config=wrong.py: TypeError: get_config()',
    ),
  ],
)
def test_wrong_config_file_is_one_line(tmp_path, folder, source, message):
  (tmp_path / 'program.py').write_text((folder / 'program.py').read_text())
  (tmp_path / 'wrong.py').write_text(source)
  result = _run(tmp_path, '--config=wrong.py')
  assert result.stderr.startswith(f'error: {message}')
  assert result.stderr.count('\n') == 1
  assert result.returncode == 2


def test_overrides_reach_the_dataclass(folder):
  result = _run(
    folder,
    '--config=config.py:given',
    '--config.steps',
    '5',
    '--config.rate=2',
    '--noconfig.on',
    '--config.pair=en,zh',
    '--config.sizes=(7,)',
    '--config.init=some/path',
    '--config.model.dim=8',
  )
  assert result.stderr == ''
  assert json.loads(result.stdout) == {
    'steps': 5,
    'rate': 2.0,
    'name': 'given',
    'on': False,
    'pair': ['en', 'zh'],
    'sizes': [7],
    'init': 'some/path',
    'model': {'dim': 8},
  }


def test_config_without_default_must_be_given(folder):
  _assert_one_line(_run(folder, default=''), '--config=FILE.py is required')
  assert _run(folder, '--config=config.py', default='').returncode == 0


def test_required_flag(folder):
  _assert_one_line(_run(folder, REQUIRED='1'), '--workdir is required')


def test_help_lists_the_flags_of_program_and_runner(folder):
  result = _run(folder, '--help', default='')
  for name in ('config', 'debug', 'host_devices', 'mode'):
    assert f'--{name}:' in result.stdout.replace('--[no]', '--')


@pytest.mark.parametrize(
  ('mode', 'message', 'code'),
  [
    ('user', 'top_k=9 of 8 experts', 2),
    ('denied', '/place: Permission denied', 2),
    ('non_finite', 'step 7: train/loss is nan', 1),
  ],
)
def test_known_errors_of_the_program(folder, mode, message, code):
  _assert_one_line(_run(folder, f'--mode={mode}'), message, code)


@pytest.mark.parametrize(
  ('mode', 'path'),
  [
    ('full', 'runs/x'),
    ('quota', '/place/file'),
    ('native', 'runs/x'),
    ('save', 'runs/x'),
  ],
)
def test_full_disk_names_the_file_or_the_workdir(folder, mode, path):
  if mode == 'full' and not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full')
  _assert_one_line(
    _run(folder, f'--mode={mode}', '--workdir=runs/x'),
    f'the disk is full, writing {path}; '
    'checkpoints that were finished are kept',
    1,
  )


@pytest.mark.parametrize(
  ('mode', 'path'), [('native', 'hf'), ('quota', '/place/file')]
)
def test_full_disk_of_an_export_speaks_of_no_checkpoints(folder, mode, path):
  arguments = (f'--mode={mode}', '--workdir=runs/x', '--to_hf=hf')
  result = _run(folder, *arguments, KEEPS_NONE='1')
  _assert_one_line(result, f'the disk is full, writing {path}', 1)


def test_a_bug_keeps_its_traceback(folder):
  result = _run(folder, '--mode=bug')
  assert 'Traceback' in result.stderr
  assert 'ZeroDivisionError: a bug' in result.stderr
  assert result.returncode == 1


@pytest.mark.parametrize('argument', ['--mode=user', '--config.stpes=1'])
def test_debug_shows_the_traceback(folder, argument):
  result = _run(folder, '--debug', argument)
  assert 'Traceback' in result.stderr
  assert result.stderr.splitlines()[-1].startswith('error: ')
  assert result.returncode == 2


def test_interrupt_is_one_line(folder):
  process = subprocess.Popen(
    _command('--mode=wait'),
    cwd=folder,
    env=_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    # A shell's background jobs, these tests perhaps, ignore it.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert stderr == 'error: interrupted\n'
  assert process.returncode == 130


@pytest.mark.parametrize(
  ('devices', 'cache'), [(1, '/home/cache/r1jax/jax'), (3, 'None')]
)
def test_set_up_jax_splits_the_host_and_finds_the_cache(folder, devices, cache):
  result = _run(
    folder,
    '--mode=jax',
    f'--host_devices={devices}',
    JAX_COMPILATION_CACHE_DIR='',
    XDG_CACHE_HOME='/home/cache',
  )
  assert result.returncode == 0
  assert f' on cpu: {devices} devices (cpu)\n' in result.stderr
  assert result.stdout == f'{cache}\n'


@pytest.mark.parametrize(
  ('given', 'used'), [('off', 'None'), ('/elsewhere', '/elsewhere')]
)
def test_compilation_cache_as_given(folder, given, used):
  arguments = ('--mode=jax', '--host_devices=1', f'--compilation_cache={given}')
  result = _run(folder, *arguments)
  assert result.stdout == f'{used}\n'


@pytest.mark.parametrize(
  ('cores', 'devices'), [(1, 1), (2, 2), (3, 2), (6, 4), (8, 8), (96, 8)]
)
def test_a_host_is_split_into_a_power_of_two(monkeypatch, cores, devices):
  monkeypatch.setattr(
    app.os, 'sched_getaffinity', lambda pid: set(range(cores)), raising=False
  )
  assert app.num_host_devices() == devices


@pytest.mark.parametrize(
  ('environment', 'devices'),
  [
    ({'XLA_FLAGS': ''}, app.num_host_devices()),
    ({'XLA_FLAGS': '--xla_force_host_platform_device_count=5'}, 5),
    ({'XLA_FLAGS': '', 'JAX_NUM_CPU_DEVICES': '3'}, 3),
  ],
)
def test_host_devices_by_default(folder, environment, devices):
  result = _run(folder, '--mode=jax', **environment)
  assert f' on cpu: {devices} devices (cpu)\n' in result.stderr


def test_sizes_are_an_aligned_table(capsys):
  app.print_sizes({'parameters': 1083000, 'rows x tokens': '8x64', 'MiB': 2.04})
  assert capsys.readouterr().out == (
    'parameters     1,083,000\n'
    'rows x tokens       8x64\n'
    'MiB                  2.0\n'
  )
