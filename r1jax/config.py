"""Config files become frozen dataclasses once, through a strict from_dict."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar('T')


class UserError(ValueError):
  """A mistake of the user's: programs show it as one line and exit with 2."""


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = '') -> T:
  """Builds the frozen dataclass `cls` from a mapping, strictly.

  Nested dataclasses are built from nested mappings, tuples from lists, a
  union `A | B` from the first member whose field names fit.

  Args:
    cls: A dataclass.
    values: One entry per field; a field with a default may be left out.
    path: Where `values` stands in the whole config, for messages.

  Raises:
    UserError: An unknown or missing key (the valid ones are listed), a value
      of the wrong type, or a ValueError of the dataclass's own check.
  """
  fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
  hints = typing.get_type_hints(cls)
  for key in values:
    if key not in fields:
      near = difflib.get_close_matches(key, fields, n=1)
      hint = f' (did you mean {near[0]!r}?)' if near else ''
      raise UserError(
        f'config has no key {_join(path, key)!r}{hint}; '
        f'valid keys here: {", ".join(sorted(fields))}'
      )
  for name, field in fields.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and name not in values:
      raise UserError(f'config lacks {_join(path, name)!r}')
  built = {
    name: _convert(hints[name], value, _join(path, name))
    for name, value in values.items()
  }
  try:
    return cls(**built)
  except UserError:
    raise
  except ValueError as e:
    raise UserError(f'{path}: {e}' if path else str(e)) from e


def replace(config: T, **changes: Any) -> T:
  """`dataclasses.replace`; what the dataclass refuses is the user's mistake.

  Raises:
    UserError: The dataclass's own check failed.
  """
  try:
    return dataclasses.replace(config, **changes)
  except UserError:
    raise
  except ValueError as e:
    raise UserError(str(e)) from e


def to_dict(value: Any) -> Any:
  """Turns dataclasses into plain dicts, tuples into lists: ready for JSON."""
  if dataclasses.is_dataclass(value):
    return {
      f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)
    }
  if isinstance(value, list | tuple):
    return [to_dict(v) for v in value]
  if isinstance(value, Mapping):
    return {k: to_dict(v) for k, v in value.items()}
  return value


def check_at_least(config: Any, least: float, *names: str) -> None:
  """Checks fields of a dataclass; None passes, nan does not.

  Raises:
    ValueError: A field is less; it is named with its value.
  """
  for name in names:
    value = getattr(config, name)
    if value is not None and not value >= least:
      raise ValueError(f'{name}={value} must be at least {least}')


def check_positive(config: Any, *names: str) -> None:
  """Checks fields of a dataclass likewise: more than 0."""
  for name in names:
    if not getattr(config, name) > 0:
      raise ValueError(f'{name}={getattr(config, name)} must be positive')


def _join(path: str, key: str) -> str:
  return f'{path}.{key}' if path else key


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks one value against its annotation; int becomes float if asked."""
  if hint is Any:
    return value
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return _convert_union(args, value, path)
  if dataclasses.is_dataclass(hint):
    if isinstance(value, hint):
      return value
    if isinstance(value, Mapping):
      return from_dict(hint, value, path)
  elif origin is typing.Literal:
    if value in args:
      return value
    raise UserError(
      f'{path}={value!r}, it must be one of {", ".join(map(repr, args))}'
    )
  elif origin is tuple:
    if isinstance(value, list | tuple):
      item = args[0] if args else Any
      return tuple(
        _convert(item, v, f'{path}[{i}]') for i, v in enumerate(value)
      )
  elif origin is dict:
    if isinstance(value, Mapping):
      return {k: _convert(args[1], v, _join(path, k)) for k, v in value.items()}
  elif hint is float and isinstance(value, int | float):
    if not isinstance(value, bool):
      return float(value)
  elif hint is bool or not isinstance(value, bool):
    if isinstance(value, hint):
      return value
  name = getattr(hint, '__name__', str(hint))
  raise UserError(
    f'{path}={value!r} is a {type(value).__name__}, it must be a {name}'
  )


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
  if value is None and type(None) in args:
    return None
  members = [a for a in args if a is not type(None)]
  if isinstance(value, Mapping) and len(members) > 1:
    for member in members:
      if _fits(member, value):
        return from_dict(member, value, path)
    options = ' or '.join(
      f'{m.__name__}({", ".join(f.name for f in dataclasses.fields(m))})'
      for m in members
    )
    raise UserError(
      f'{path} has keys {sorted(value)}, which fit none of: {options}'
    )
  errors = []
  for member in members:
    try:
      return _convert(member, value, path)
    except UserError as e:
      errors.append(e)
  raise errors[0]


def _fits(member: Any, value: Mapping[str, Any]) -> bool:
  """Says whether a mapping has this dataclass's keys: all needed, no other."""
  fields = {f.name: f for f in dataclasses.fields(member)}
  needed = {
    name
    for name, f in fields.items()
    if f.default is dataclasses.MISSING
    and f.default_factory is dataclasses.MISSING
  }
  return needed <= set(value) <= set(fields)
