"""The state of a batch source on disk: nested JSON values and numpy arrays."""

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

_ARRAY = '__array__'


def pack(state: Mapping[str, Any]) -> bytes:
  """Serialises nested dicts and lists of JSON values and arrays.

  Arrays keep dtype and shape; tuples come back as lists. The format is an
  .npz without pickles, whose checksums find a damaged file.

  Raises:
    TypeError: A value that could not come back, with its place.
  """
  arrays: dict[str, np.ndarray] = {}
  text = json.dumps(_encode(state, arrays, ''))
  arrays['json'] = np.frombuffer(text.encode(), np.uint8)
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def unpack(data: bytes) -> dict[str, Any]:
  """Returns what was packed."""
  with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
    return _decode(json.loads(arrays['json'].tobytes()), arrays)


class Handler(ocp.CheckpointHandler):
  """Reads and writes it for orbax: a file per process, which has its share."""

  def save(self, directory: epath.Path, args: 'Save') -> None:
    _path(directory).write_bytes(args.packed)

  def restore(self, directory: epath.Path, args: 'Restore') -> dict[str, Any]:
    del args
    return unpack(_path(directory).read_bytes())


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):
  packed: bytes


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.CheckpointArgs):
  pass


def _path(directory: epath.Path) -> epath.Path:
  name = f'process_{jax.process_index()}_of_{jax.process_count()}.npz'
  return directory / name


def _encode(value: Any, arrays: dict[str, np.ndarray], path: str) -> Any:
  if isinstance(value, Mapping):
    if any(not isinstance(k, str) or k == _ARRAY for k in value):
      raise TypeError(f'keys of {path or "the source state"} must be strings')
    return {k: _encode(v, arrays, f'{path}/{k}') for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_encode(v, arrays, f'{path}/{i}') for i, v in enumerate(value)]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    value = np.asarray(value)
    if value.dtype.kind not in 'biufc':
      raise TypeError(f'{path} is an array of {value.dtype}: not supported')
    name = f'array_{len(arrays)}'
    arrays[name] = value
    return {_ARRAY: name}
  if value is None or isinstance(value, bool | int | float | str):
    return value
  raise TypeError(f'{path} is a {type(value).__name__}: not supported')


def _decode(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
  if isinstance(value, dict):
    if _ARRAY in value:
      return arrays[value[_ARRAY]]
    return {k: _decode(v, arrays) for k, v in value.items()}
  if isinstance(value, list):
    return [_decode(v, arrays) for v in value]
  return value
