"""The --config flag: a file with get_config(), and --config.key=value.

ml_collections does the work; what the user may get wrong is checked here
first, because it would answer with a long traceback, or not at all.
"""

import ast
import difflib
import itertools
import pathlib
import re
import runpy
import traceback
import types
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from r1jax import config

_FILE = re.compile(r'--?config(?:=(.*))?$', re.DOTALL)
_OVERRIDE = re.compile(r'--?(?:no)?config\.([^=]*)')


class _NumberParser(flags.ArgumentParser):
  """A number, or None for a key that may be None."""

  def __init__(self, kind: type[int] | type[float], words: str):
    self._kind = kind
    self._words = words

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):
      return argument
    if argument == 'None':
      return None
    try:
      return self._kind(argument)
    except ValueError:
      raise ValueError(f'expected {self._words}') from None


class _SequenceParser(flags.ArgumentParser):
  """A tuple or list: `(1, 2)`, `[1, 2]`, `1,2`, `en,zh` or empty."""

  def __init__(self, kind: type[tuple] | type[list]):
    self._kind = kind

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):
      return argument
    value = _literal(argument)
    if isinstance(value, str):
      words = argument.strip('()[] ').split(',')
      value = [_literal(word.strip()) for word in words if word.strip()]
    return self._kind(value if isinstance(value, tuple | list) else [value])


class _LiteralParser(flags.ArgumentParser):
  """Any literal, else a string: for a key whose default is None."""

  def parse(self, argument: Any) -> Any:
    return _literal(argument) if isinstance(argument, str) else argument


def define(argv: list[str]) -> None:
  """Defines --config and, once it is parsed, one flag per override.

  Args:
    argv: The whole command line, --config=FILE.py included.
  """
  parsers = {
    int: _NumberParser(int, 'an integer'),
    float: _NumberParser(float, 'a number'),
    tuple: _SequenceParser(tuple),
    list: _SequenceParser(list),
    types.NoneType: _LiteralParser(),
  }
  for kind, parser in parsers.items():
    config_flags.register_flag_parser_for_type(kind, parser)
  config_flags.DEFINE_config_file(
    'config',
    None,
    'FILE.py or FILE.py:argument; --config.key=value overrides a value.',
    lock_config=True,
    sys_argv=argv,
  )


def with_default(argv: list[str], default: str) -> list[str]:
  """Returns argv with --config=`default` in front if it names no file."""
  if not default or _file_of(argv) is not None:
    return list(argv)
  return [argv[0], f'--config={default}', *argv[1:]]


def check(argv: list[str]) -> None:
  """Loads the file and looks up every override.

  Raises:
    UserError: No file, an error in it, or an override of a key it lacks.
  """
  spec = _file_of(argv)
  if not spec:
    raise config.UserError('--config=FILE.py is required')
  values = load(spec)
  if not isinstance(values, ml_collections.ConfigDict):
    raise config.UserError(
      f'{spec}: get_config() returned a {type(values).__name__}, it must be '
      'an ml_collections.ConfigDict'
    )
  for argument in _flags_of(argv):
    match = _OVERRIDE.match(argument)
    if match:
      _check_key(values, match[1])


def _flags_of(argv: list[str]) -> list[str]:
  return list(itertools.takewhile(lambda a: a != '--', argv[1:]))


def _file_of(argv: list[str]) -> str | None:
  """Returns the value of the last --config, '' if it has none."""
  arguments, found = _flags_of(argv), None
  for argument, following in itertools.zip_longest(arguments, arguments[1:]):
    match = _FILE.match(argument)
    if match:
      found = (following or '') if match[1] is None else match[1]
  return found


def load(spec: str) -> Any:
  """Runs the file's get_config(), with its errors in one line."""
  path, *argument = spec.split(':', 1)
  if not pathlib.Path(path).is_file():
    raise config.UserError(f'--config={spec}: there is no file {path}')
  try:
    names = runpy.run_path(path)
    if 'get_config' not in names:
      raise config.UserError(f'--config={spec}: it defines no get_config()')
    return names['get_config'](*argument)
  except config.UserError:
    raise
  except SyntaxError as e:
    place = f'{e.filename or path}:{e.lineno}'
    raise config.UserError(f'{place}: {e.msg}') from e
  except Exception as e:
    place = _place(e, path) or f'--config={spec}'
    raise config.UserError(f'{place}: {type(e).__name__}: {e}') from e


def _place(e: Exception, path: str) -> str | None:
  """Returns file:line of the last frame in the config file, if any."""
  frames = traceback.extract_tb(e.__traceback__)
  lines = [f.lineno for f in frames if f.filename == path]
  return f'{path}:{lines[-1]}' if lines else None


def _check_key(values: Any, key: str) -> None:
  """Raises UserError unless the dotted `key` exists."""
  path = 'config'
  for part in key.split('.'):
    if not isinstance(values, ml_collections.ConfigDict):
      raise config.UserError(
        f'--config.{key}: {path} is not a group of keys but {values!r}'
      )
    if part not in values:
      near = difflib.get_close_matches(part, list(values), n=1)
      hint = f' (did you mean {near[0]!r}?)' if near else ''
      raise config.UserError(
        f'--config.{key}: {path} has no key {part!r}{hint}; '
        f'valid keys here: {", ".join(sorted(values))}'
      )
    path, values = f'{path}.{part}', values[part]


def _literal(text: str) -> Any:
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return text


# --help lists --config as a flag of the program that runs.
flags.disclaim_key_flags()
