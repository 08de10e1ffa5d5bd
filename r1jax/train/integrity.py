"""Whether what was read is what was saved, and how to say so in one line."""

import contextlib
import functools
import gc
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from r1jax import config

_MAX_REASON = 160  # Characters of a library's error that are shown.


class RestoreError(Exception):
  """A checkpoint cannot be read, in one line."""


def attempt(read: Callable[[], Any]) -> Any:
  """Calls `read`; what a library raises on a damaged file is one line."""
  with quiet():
    try:
      return read()
    except config.UserError:
      raise
    except Exception as e:
      reason = one_line(e)
    # Coroutines that died with their file complain when they are freed; a
    # `with` around the reading would keep them alive past this line.
    gc.collect()
  _ignore_dead_reads()
  raise RestoreError(reason)


def _ignore_dead_reads() -> None:
  """Silences those that are freed later still, at the exit of Python even."""
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if '_read_array_index' not in repr(unraisable.object):
      before(unraisable)

  sys.unraisablehook = hook


def checksums(tree: dict[str, Any]) -> dict[str, list[int]]:
  """Returns a number per array, under each name of the top level.

  Storage checks its index but not the bits of the arrays.
  """
  platform = next(iter(jax.tree.leaves(tree)[0].devices())).platform
  sums = jax.device_get(_sums(platform)(tree))
  return {name: [int(x) for x in values] for name, values in sums.items()}


def check_sums(tree: dict[str, Any], there: dict[str, list[int]]) -> None:
  """Raises ValueError if an array is not what was saved."""
  for name, sums in checksums(tree).items():
    if sums != there[name]:
      raise ValueError(f'the checksum of {name} is wrong')


def shapes(tree: Any) -> dict[str, list[int]]:
  """Returns the shape of each array by its path, 'params/head/weight'."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): list(x.shape)
    for path, x in leaves
  }


@functools.cache
def _sums(platform: str) -> Callable[..., dict[str, list[jax.Array]]]:
  def sums(tree: dict[str, Any]) -> dict[str, list[jax.Array]]:
    return {k: [_sum(x) for x in jax.tree.leaves(v)] for k, v in tree.items()}

  # A CPU adds in a tree, for which it copies all arrays: twice the memory in
  # bfloat16, ten times the time, and integers gain nothing by it.
  passes = {'xla_disable_hlo_passes': 'tree_reduction_rewriter'}
  return jax.jit(sums, compiler_options=passes if platform == 'cpu' else None)


def _sum(x: jax.Array) -> jax.Array:
  """Σ of the array's bits as integers, mod 2³²: the same on any mesh."""
  if x.dtype == jnp.bool_:
    x = x.astype(jnp.uint8)
  bits = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}')
  return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Keeps warnings of the libraries from hiding our one line."""
  logger, hook = logging.getLogger('absl'), sys.unraisablehook
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  sys.unraisablehook = lambda *_: None
  try:
    yield
  finally:
    logger.setLevel(level)
    sys.unraisablehook = hook


def one_line(error: BaseException) -> str:
  """Returns the part of an error that a user can act on."""
  text = ' '.join(str(error).split())
  for known in (
    'No space left on device',
    'File too large',
    'Disk quota exceeded',
    'Read-only file system',
    'Permission denied',
  ):
    if known in text:
      return known
  text = re.split(r' See full TensorStore details|\[source locations', text)[0]
  text = text or type(error).__name__
  return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 1] + '…'
