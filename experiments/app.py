"""The runner of every program: flags, config file, errors in one line.

  def main() -> None:
    app.set_up_jax()
    run_config = app.load(RunConfig)

  if __name__ == '__main__':
    app.run(main, config_file='configs/demo.py')

A mistake of the user's ends in one line `error: …` and exit code 2; a run
that stops for a reason outside the program (a non-finite loss, a full disk)
in one line and exit code 1. Any other exception is a bug and keeps its
traceback. jax is imported late, so that mistakes show at once.
"""

import difflib
import errno
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from absl import app as absl_app
from absl import flags, logging

from experiments import config_flag
from r1jax import config

T = TypeVar('T')

_REQUIRED = re.compile(r'Flag --(\w+) must have a value other than None')
_NON_BOOLEAN = re.compile(r"\('Non-boolean argument to boolean flag'.*\)$")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)

_TUNABLES = 'GLIBC_TUNABLES'

_DEBUG = flags.DEFINE_bool(
  'debug', False, 'Show the traceback of every error, and all logging.'
)
_HOST_DEVICES = flags.DEFINE_integer(
  'host_devices',
  None,
  'Split the CPU into this many devices. Default: one per core, for programs '
  'that split a batch.',
  1,
)
_COMPILATION_CACHE = flags.DEFINE_string(
  'compilation_cache',
  None,
  'Folder of compiled programs shared by all runs; "off" for none. Default: '
  '$JAX_COMPILATION_CACHE_DIR, or r1jax/jax in the cache folder of the user. '
  'Not used with several CPU devices.',
)

_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'One process of several: start the same command in each. On TPU pods, '
  'Kubernetes and Slurm they find each other; elsewhere give the next three.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'HOST:PORT of process 0; default $JAX_COORDINATOR_ADDRESS.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Processes of the run.', 1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0 on.', 0
)
_SIGTERM_EXIT_CODE = flags.DEFINE_integer(
  'sigterm_exit_code',
  0,
  'Exit code after a SIGTERM, when all is saved. Where 0 would count as '
  'finished, give another.',
  0,
  255,
)


def load(cls: type[T]) -> T:
  """Returns the config of the command line as the frozen dataclass `cls`.

  Raises:
    UserError: A key or value that `cls` does not accept.
  """
  return config.from_dict(cls, flags.FLAGS.config.to_dict())


def run(
  main: Callable[[], None],
  *,
  config_file: str | None = None,
  keeps_checkpoints: bool = True,
) -> None:
  """Parses the flags, runs `main()` and exits, with errors in one line.

  Args:
    main: The program; it reads its flags from absl.
    config_file: The default of --config; '' if the user must give it, None
      for a program without a config.
    keeps_checkpoints: What to say when the disk is full: a program that writes
      none keeps none.
  """
  _keep_memory()
  flags.adopt_module_key_flags(sys.modules[__name__])
  argv = sys.argv
  if config_file is not None:
    argv = config_flag.with_default(argv, config_file)
    config_flag.define(argv)

  def guarded_main(rest: list[str]) -> int:
    del rest
    return _guard(main, keeps_checkpoints=keeps_checkpoints)

  absl_app.run(guarded_main, argv=argv, flags_parser=_parse_flags)


def _keep_memory() -> None:
  """Starts the program again, once, with malloc told to keep its memory.

  XLA's CPU programs allocate their temporaries anew at each call; returned to
  the system, all their pages fault again, a third of a train step's time.
  glibc reads these settings only when a process starts.
  """
  if not sys.platform.startswith('linux') or _TUNABLES in os.environ:
    return
  os.environ[_TUNABLES] = ':'.join(
    (
      'glibc.malloc.hugetlb=1',  # Transparent huge pages.
      'glibc.malloc.mmap_max=0',  # Large blocks come from the heap,
      f'glibc.malloc.trim_threshold={2**40}',  # which never shrinks.
    )
  )
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_up_jax(*, default_host_devices: int | None = None) -> None:
  """Applies the flags about devices and compilation, and prints one line.

  Must come before the first use of a device. The number of host devices is
  that of --host_devices, else what jax's own variables say, else the default;
  it does not touch accelerators.

  Args:
    default_host_devices: None for `num_host_devices()`.

  Raises:
    UserError: No device can be used as asked.
  """
  import jax

  count = _HOST_DEVICES.value
  if count is None and not _is_split_already(jax.config.jax_num_cpu_devices):
    count = default_host_devices or num_host_devices()
  if count is not None:
    jax.config.update('jax_num_cpu_devices', count)
  _join_processes()
  try:
    devices = jax.devices()
  except RuntimeError as e:
    raise config.UserError(f'jax finds no device: {_one_line(e)}') from e
  # XLA's CPU programs come out of a cache without the order of their
  # collectives (each gets a communicator of its own): those of several devices
  # mix them up, and hang, abort or compute something else.
  cached = devices[0].platform != 'cpu' or len(devices) == 1
  folder = _compilation_cache() if cached else None
  jax.config.update('jax_compilation_cache_dir', folder)
  # Not on stdout, which belongs to what the program prints.
  print(
    f'jax {jax.__version__} on {devices[0].platform}: '
    f'{len(devices)} devices ({devices[0].device_kind})',
    file=sys.stderr,
    flush=True,
  )


def _join_processes() -> None:
  """Makes this one of several processes, if the flags say so.

  Raises:
    UserError: The flags do not fit each other, or nobody answers.
  """
  import jax

  given = {
    'coordinator_address': _COORDINATOR.value,
    'num_processes': _NUM_PROCESSES.value,
    'process_id': _PROCESS_ID.value,
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == len(given) and not _DISTRIBUTED.value:
    return
  if 0 < len(missing) < len(given):
    raise config.UserError(
      f'--{missing[0]} is missing: --coordinator_address, --num_processes and '
      '--process_id go together'
    )
  if not missing and given['process_id'] >= given['num_processes']:
    raise config.UserError(
      f'--process_id={given["process_id"]} must be less than '
      f'--num_processes={given["num_processes"]}'
    )
  try:
    jax.distributed.initialize(**given)
  except (RuntimeError, ValueError) as e:
    raise config.UserError(
      f'cannot join the other processes: {_one_line(e)}'
    ) from e


def num_host_devices() -> int:
  """How many devices to split this CPU into: a power of two, at most 8.

  Data parallel over single-threaded devices keeps the cores busier than one
  device with many threads does, as long as matrices are small.
  """
  if hasattr(os, 'sched_getaffinity'):
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  return min(8, 1 << (cores.bit_length() - 1))


def _is_split_already(configured: int) -> bool:
  """Whether JAX_NUM_CPU_DEVICES or XLA_FLAGS split the CPU."""
  xla_flag = 'xla_force_host_platform_device_count'
  return configured > 0 or xla_flag in os.environ.get('XLA_FLAGS', '')


def print_sizes(sizes: Mapping[str, Any]) -> None:
  """Prints named sizes as two aligned columns."""
  texts = {name: _size_text(value) for name, value in sizes.items()}
  left, right = (max(map(len, column)) for column in zip(*texts.items()))
  for name, text in texts.items():
    print(f'{name:<{left}}  {text:>{right}}')


def _size_text(value: Any) -> str:
  if isinstance(value, float):
    return f'{value:,.1f}'
  return f'{value:,}' if isinstance(value, int) else str(value)


def _compilation_cache() -> str | None:
  """Returns the folder of compiled programs, None for none."""
  given = _COMPILATION_CACHE.value or os.environ.get(
    'JAX_COMPILATION_CACHE_DIR'
  )
  if given:
    return None if given == 'off' else given
  home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return str(pathlib.Path(home) / 'r1jax' / 'jax')


def _guard(main: Callable[[], None], *, keeps_checkpoints: bool) -> int:
  """Runs main and returns the exit code; bugs go through."""
  try:
    main()
  except KeyboardInterrupt:
    return _fail('interrupted', 130)
  except Exception as e:
    if _is_a('r1jax.train.interrupt', 'Preempted', e):
      print(e, file=sys.stderr, flush=True)
      return _SIGTERM_EXIT_CODE.value
    if any(
      _is_a('r1jax.train.loop', name, e)
      for name in ('NonFiniteError', 'ExpertOverflowError')
    ):
      return _fail(_one_line(e), 1)
    full = _find_os_error(e, _NO_SPACE)
    if full is not None or 'No space left on device' in str(e):
      kept = '; checkpoints that were finished are kept' * keeps_checkpoints
      return _fail(f'the disk is full, writing {_path_of(full)}{kept}', 1)
    if isinstance(e, config.UserError):
      return _fail(_one_line(e), 2)
    denied = _find_os_error(e, _NO_ACCESS)
    if denied is not None and denied.filename is not None:
      return _fail(f'{denied.filename}: {denied.strerror}', 2)
    raise
  return 0


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses all flags as absl's own parser does, but in one line on error."""
  try:
    if 'config' in flags.FLAGS and not any(
      a.lstrip('-').startswith('help') for a in argv[1:]
    ):
      config_flag.check(argv)
    rest = flags.FLAGS(argv)
    if rest[1:]:
      raise config.UserError(
        f'unexpected argument {rest[1]!r}; a flag is written --name=value'
      )
  except (flags.Error, TypeError, ValueError) as e:
    sys.exit(_fail(_flag_error(e), 2, debug='--debug' in argv))
  # absl would lift an unset verbosity to INFO; orbax then logs every file.
  if flags.FLAGS['verbosity'].using_default_value and not _DEBUG.value:
    flags.FLAGS.verbosity = logging.WARNING
  return rest


def _flag_error(e: Exception) -> str:
  if isinstance(e, flags.UnrecognizedFlagError):
    near = difflib.get_close_matches(e.flagname, list(flags.FLAGS), n=1)
    hint = f' (did you mean --{near[0]}?)' if near else ''
    return f'unknown flag --{e.flagname}{hint}; --help lists the flags'
  required = _REQUIRED.search(str(e))
  if required:
    return f'--{required[1]} is required'
  # absl raises this one with two arguments, so that it prints as a tuple.
  message = _NON_BOOLEAN.sub('expected true or false', _one_line(e))
  return message.removeprefix('flag ')


def _fail(message: str, code: int, *, debug: bool | None = None) -> int:
  """Prints the line, after the traceback if asked, and returns `code`."""
  if _DEBUG.value if debug is None else debug:
    traceback.print_exc()
  sys.stdout.flush()
  print(f'error: {message}', file=sys.stderr, flush=True)
  return code


def _is_a(module: str, name: str, e: Exception) -> bool:
  # The module is loaded if it raised; importing it here would import jax.
  module = sys.modules.get(module)
  return module is not None and isinstance(e, getattr(module, name))


def _find_os_error(e: BaseException, codes: tuple[int, ...]) -> OSError | None:
  """Returns the first OSError with such an errno among `e` and its causes."""
  while e is not None:
    if isinstance(e, OSError) and e.errno in codes:
      return e
    e = e.__cause__ or e.__context__
  return None


def _path_of(e: OSError | None) -> str:
  if e is not None and e.filename is not None:
    return str(e.filename)
  for name in ('to_hf', 'workdir'):  # Exporting, both are given.
    if name in flags.FLAGS and flags.FLAGS[name].value:
      return str(flags.FLAGS[name].value)
  return 'a file'


def _one_line(e: BaseException) -> str:
  return ' '.join(str(e).split()) or type(e).__name__


# From here on, flags belong to the program that calls this module.
flags.disclaim_key_flags()
