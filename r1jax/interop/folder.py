"""Folders that are complete or not there."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from r1jax import config as config_lib


def refuse_used(folder: str | os.PathLike[str]) -> None:
  """Refuses what no new folder can be made of.

  Raises:
    UserError: Something is there that is no empty folder, or the path is not
      of this machine's file system.
  """
  if '://' in os.fspath(folder):
    raise config_lib.UserError(
      f'{folder} must be a folder of this machine; copy it there afterwards'
    )
  path = pathlib.Path(os.path.abspath(folder))
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise config_lib.UserError(f'{folder} exists and is not empty')
  above = next(parent for parent in path.parents if parent.exists())
  if not above.is_dir():
    raise config_lib.UserError(
      f'{folder} cannot be made: {above} is a file, it must be a folder'
    )
  if not os.access(above, os.W_OK | os.X_OK):
    raise config_lib.UserError(
      f'{folder} cannot be made: {above} must be writable'
    )


@contextlib.contextmanager
def finished_under(
  folder: str | os.PathLike[str], *, is_owner: bool
) -> Iterator[pathlib.Path]:
  """Yields a folder that gets its name when all is done; else it vanishes.

  Args:
    folder: The name; nothing or an empty folder is there.
    is_owner: This process makes, renames and removes it, others only use it.

  Raises:
    UserError: It cannot be made.
  """
  path = pathlib.Path(os.path.abspath(folder))
  unfinished = path.with_name(f'.{path.name}.unfinished')
  if is_owner:
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
      unfinished.mkdir(parents=True)
    except OSError as e:  # Such as below /proc.
      raise config_lib.UserError(
        f'{folder} cannot be made: {e.strerror}'
      ) from e
  try:
    yield unfinished
    if is_owner:
      if path.exists():
        path.rmdir()
      unfinished.rename(path)
  except BaseException:
    if is_owner:
      shutil.rmtree(unfinished, ignore_errors=True)
    raise
