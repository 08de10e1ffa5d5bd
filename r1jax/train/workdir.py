"""A workdir belongs to one config: a first run writes it, later ones match."""

import errno
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from r1jax import config as config_lib
from r1jax.parallel import sharding

_ABSENT = object()
_NUM_SHOWN = 3


def prepare(
  workdir: epath.PathLike,
  config: Mapping[str, Any],
  *,
  may_differ: Collection[str] = (),
) -> bool:
  """Claims a workdir for a config; returns whether an earlier run did so.

  Writes `config.json` at the first use, and again when a key that may differ
  has a new value.

  Args:
    workdir: Any path etils.epath knows; created if it is not there.
    config: The resolved config, nested, JSON-able.
    may_differ: Dotted keys that a resumed run may change; a key stands for
      everything below it, too.

  Raises:
    UserError: The workdir belongs to another config, or cannot be used.
  """
  # Process 0 writes; only then do the others compare.
  claimed, error = -1, None
  if jax.process_index() == 0:
    try:
      claimed = _claim(epath.Path(workdir), config, may_differ)
    except config_lib.UserError as e:
      error = e
  claimed = sharding.first_says(claimed)
  if error is not None:
    raise error
  if claimed < 0:
    raise config_lib.UserError(f'process 0 cannot use workdir {workdir}')
  return bool(claimed)


def _claim(
  workdir: epath.Path, config: Mapping[str, Any], may_differ: Collection[str]
) -> bool:
  """`prepare` in one process."""
  path = workdir / 'config.json'
  new = json.loads(json.dumps(config))
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if is_local(workdir) and not os.access(workdir, os.W_OK | os.X_OK):
      raise PermissionError(errno.EACCES, 'Permission denied')
    old = json.loads(path.read_text()) if path.exists() else None
    if old is not None:
      _compare(workdir, old, new, may_differ)
    if old != new:
      write_text(path, json.dumps(new, indent=2) + '\n')
  except OSError as e:
    reason = e.strerror or e
    raise config_lib.UserError(f'cannot use workdir {workdir}: {reason}') from e
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise config_lib.UserError(
      f'{path} is not valid JSON ({e}); use another --workdir'
    ) from e
  return old is not None


def write_text(path: epath.Path, text: str) -> None:
  """Replaces a file at once: a kill leaves the old text or the new one.

  Object stores replace whole objects anyway and need no rename. Of several
  processes only the first writes.
  """
  if jax.process_index():
    return
  if not is_local(path):
    path.write_text(text)
    return
  part = f'{os.fspath(path)}.part'
  with open(part, 'w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  os.replace(part, path)


def absolute(path: epath.PathLike) -> epath.Path:
  """A local path from the root on, as orbax wants it; others as they are."""
  return epath.Path(os.path.abspath(path) if is_local(path) else path)


def is_local(path: epath.PathLike) -> bool:
  """Says whether a path is on this machine's file system, not gs:// or s3://."""
  return '://' not in os.fspath(path)


def _compare(
  workdir: epath.Path,
  old: Mapping[str, Any],
  new: Mapping[str, Any],
  may_differ: Collection[str],
) -> None:
  old, new = dict(_leaves(old)), dict(_leaves(new))
  differ = [
    f'{key} is {_show(old, key)} there, {_show(new, key)} here'
    for key in dict.fromkeys([*new, *old])
    if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    and not any(key == k or key.startswith(f'{k}.') for k in may_differ)
  ]
  if differ:
    more = len(differ) - _NUM_SHOWN
    shown = ', '.join(differ[:_NUM_SHOWN])
    shown += f' and {more} more' if more > 0 else ''
    raise config_lib.UserError(
      f'workdir {workdir} belongs to another config: {shown}; '
      'use another --workdir'
    )


def _leaves(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields (dotted key, value); lists and empty dicts are values."""
  if isinstance(value, Mapping) and (value or not path):
    for key, child in value.items():
      yield from _leaves(child, f'{path}.{key}' if path else key)
  else:
    yield path, value


def _show(values: Mapping[str, Any], key: str) -> str:
  value = values.get(key, _ABSENT)
  if value is _ABSENT:
    return 'absent'
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= 60 else text[:57] + '…'
