"""Hugging Face checkpoints as our models, a slice at a time.

  config, variables = huggingface.load(path)
  logits = transformer.Transformer(config).apply(
      variables, tokens_BT, method='logits')

The buffers of this host's shards are filled straight from the mapped files and
handed to the devices: besides the shards it takes a few chunks of `_CHUNK`
numbers.
"""

import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from r1jax import config as config_lib
from r1jax.interop import fp8, hf_config, safetensors
from r1jax.interop import mapping as mapping_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import sharding

# Numbers that are converted at once.
_CHUNK = 1 << 23
# What only MTP modules have, of the layers in the files.
_MTP_PARTS = ('eh_proj', 'enorm', 'hnorm', 'shared_head')
PARAM_DTYPES = {
  'float32': np.dtype(np.float32),
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
}


def load(
  path: str | os.PathLike[str],
  *,
  mesh: jax.sharding.Mesh | None = None,
  param_dtype: str = 'float32',
  keep_fp8: bool = False,
  say: Callable[[str], None] = lambda message: None,
  **changes: Any,
) -> tuple[model_config.ModelConfig, Any]:
  """Loads a checkpoint.

  Args:
    path: Folder of config.json and safetensors files.
    mesh: Where the variables go; the first device if None.
    param_dtype: 'float32' or 'bfloat16'; router biases are float32 always.
    keep_fp8: Leaves FP8 weights as they are, `fp8.Quantized`: `export.save`
      takes them, the model does not compute with them.
    say: Takes remarks.
    **changes: Fields of the ModelConfig that are ours to choose, such as
      dtype='bfloat16', scan_layers=False or mtp_depth=0 (leaves MTP out).

  Returns:
    The model's config and its variables, sharded as the model shards them.

  Raises:
    UserError: Something is missing, too much, misshapen, cut short or not
      supported; the message names it.
  """
  config = load_config(path, say=say, **changes)
  variables = load_variables(
    path,
    config,
    mesh=mesh,
    param_dtype=param_dtype,
    keep_fp8=keep_fp8,
    say=say,
  )
  return config, variables


def load_config(
  folder: str | os.PathLike[str],
  *,
  say: Callable[[str], None] = lambda message: None,
  **changes: Any,
) -> model_config.ModelConfig:
  """The model of a checkpoint; without MTP if the files have none."""
  folder = pathlib.Path(folder)
  config = hf_config.read(read_config(folder), **changes)
  if not config.mtp_depth:
    return config
  with safetensors.closing(folder) as reader:
    if _mtp_layers(reader.entries, config.num_layers):
      return config
  say(
    f'{folder}: config.json has {config.mtp_depth} MTP modules, the files '
    'have none; loaded without'
  )
  return dataclasses.replace(config, mtp_depth=0)


def load_variables(
  folder: str | os.PathLike[str],
  config: model_config.ModelConfig,
  *,
  mesh: jax.sharding.Mesh | None = None,
  param_dtype: str = 'float32',
  keep_fp8: bool = False,
  say: Callable[[str], None] = lambda message: None,
) -> Any:
  """The variables of a checkpoint for a config that `load_config` gave.

  Or for that config with an indexer, which is random if config.json has none:
  so begins the warm-up of sparse attention.
  """
  if param_dtype not in PARAM_DTYPES:
    raise config_lib.UserError(
      f'param_dtype={param_dtype!r}, it must be one of '
      f'{", ".join(PARAM_DTYPES)}'
    )
  folder = pathlib.Path(folder)
  values = read_config(folder)
  blocks = _blocks(values)
  mapping = mapping_lib.make_mapping(config)
  shardings = _shardings(config, mesh)
  variables: dict[str, Any] = {'params': {}, 'router': {}}
  if _has_indexer(config) and not _has_indexer(hf_config.read(values)):
    mapping, indexers = mapping_lib.split_indexers(mapping)
    say(f'{folder}: config.json has no indexer; it begins with random weights')
    for leaf in indexers:
      target = mapping_lib.at(shardings, leaf.path)
      array = _draw(leaf, config.init_std, PARAM_DTYPES[param_dtype], target)
      _put(variables, leaf.path, array)
  with safetensors.closing(folder) as reader:
    stray = _stray_files(reader)
    try:
      check(mapping, reader.entries, blocks, folder, config.num_layers)
    except config_lib.UserError as e:
      raise config_lib.UserError(f'{e}{stray and f"; {stray}"}') from e
    if stray:
      say(f'{folder}: {stray}: left out')
    _check_copies(mapping, reader)
    loader = _Loader(reader, blocks, PARAM_DTYPES[param_dtype], keep_fp8)
    for leaf in mapping.leaves:
      array = loader.load(leaf, mapping_lib.at(shardings, leaf.path))
      _put(variables, leaf.path, array)
  return variables


def read_config(folder: pathlib.Path) -> dict[str, Any]:
  """config.json of a folder.

  Raises:
    UserError: There is none, or it is no JSON object.
  """
  path = folder / 'config.json'
  try:
    values = json.loads(path.read_text())
  except NotADirectoryError as e:
    raise config_lib.UserError(f'{folder} is no folder') from e
  except FileNotFoundError as e:
    raise config_lib.UserError(f'{path} does not exist') from e
  except OSError as e:
    raise config_lib.UserError(f'{path}: {e.strerror}') from e
  except (ValueError, RecursionError) as e:
    raise config_lib.UserError(f'{path} is no JSON: {e}') from e
  if not isinstance(values, dict):
    raise config_lib.UserError(f'{path} holds no JSON object')
  return values


def is_checkpoint(folder: str | os.PathLike[str]) -> bool:
  """Says whether a folder looks like one of Hugging Face."""
  path = pathlib.Path(folder) / 'config.json'
  try:
    return bool(folder) and 'model_type' in json.loads(path.read_text())
  except (OSError, ValueError, TypeError, RecursionError):
    return False


def tensor_dtypes(folder: str | os.PathLike[str]) -> dict[str, np.dtype]:
  """In what each tensor of a checkpoint is kept, for `export.save`."""
  with safetensors.closing(pathlib.Path(folder)) as reader:
    return {name: entry.dtype for name, entry in reader.entries.items()}


def check(
  mapping: mapping_lib.Mapping,
  entries: Mapping[str, safetensors.Entry],
  blocks: fp8.Blocks,
  folder: pathlib.Path,
  num_layers: int,
) -> None:
  """Each tensor is there once, in its shape, and nothing else is.

  Raises:
    UserError: Names the first tensor that is missing, too much or misshapen.
  """
  shapes = {
    s.name: s.shape for leaf in mapping.leaves for s in leaf.sources.values()
  }
  shapes |= {copy: shapes[name] for copy, name in mapping.copies.items()}
  spare = {copy: shapes[name] for copy, name in mapping.spare_copies.items()}
  spare |= mapping.empty
  shapes |= {name: shape for name, shape in spare.items() if name in entries}
  expected = dict(shapes)
  for name in shapes:
    entry = entries.get(name)
    if entry is not None and entry.dtype == fp8.E4M3:
      if len(entry.shape) != 2:
        raise config_lib.UserError(
          f'tensor {name} of {entry.file} is F8_E4M3 {list(entry.shape)}, FP8 '
          'in blocks must be a matrix'
        )
      expected[name + fp8.SCALE] = fp8.scale_shape(entry.shape, blocks)
  for name, shape in expected.items():
    if name not in entries:
      raise config_lib.UserError(f'{folder} lacks the tensor {name}')
    if entries[name].shape != shape:
      raise config_lib.UserError(
        f'tensor {name} of {entries[name].file} is {list(entries[name].shape)}'
        f', by config.json it must be {list(shape)}'
      )
  has_mtp = bool(mapping.copies)
  left_out = set() if has_mtp else _mtp_layers(entries, num_layers)
  for name in entries:
    if name in expected or name.endswith(safetensors.IGNORED):
      continue
    if _layer_of(name) in left_out:
      continue
    raise config_lib.UserError(
      f'{folder} has the tensor {name}, which the model does not have'
    )


class _Loader:
  """Reads leaves into shards."""

  def __init__(self, reader, blocks, dtype, keep_fp8):
    self._reader, self._blocks = reader, blocks
    self._dtype, self._keep_fp8 = dtype, keep_fp8

  def load(self, leaf, target) -> Any:
    """The leaf as a jax.Array, or as fp8.Quantized."""
    names = [source.name for source in leaf.sources.values()]
    if self._keep_fp8 and any(self._is_fp8(name) for name in names):
      self._refuse_mixed(names)
      self._refuse_mixed([name + fp8.SCALE for name in names])
      return self._load_quantized(leaf, target)
    dtype = np.dtype(np.float32) if leaf.path[0] == 'router' else self._dtype
    return _fill(
      leaf.shape,
      dtype,
      target,
      lambda index, out: self._read_box(leaf, index, out),
    )

  def _is_fp8(self, name):
    return self._reader.entries[name].dtype == fp8.E4M3

  def _refuse_mixed(self, names):
    """Tensors that are stacked must be alike to be kept as they are."""
    first, *others = names
    dtype = self._reader.entries[first].dtype
    for name in others:
      if self._reader.entries[name].dtype != dtype:
        raise config_lib.UserError(
          f'{first} is {dtype}, {name} is {self._reader.entries[name].dtype}: '
          'FP8 is kept only where all of a stack is alike'
        )

  def _load_quantized(self, leaf, target):
    q = _fill(
      leaf.shape,
      fp8.E4M3,
      target,
      lambda index, out: self._read_box(leaf, index, out),
    )
    one = next(iter(leaf.sources.values()))
    shape = (*leaf.stack, *fp8.scale_shape(one.shape, self._blocks))

    def read_scales(index, out):
      for at in mapping_lib.stack_indices(index[: len(leaf.stack)]):
        scale = self._reader.read(leaf.sources[at].name + fp8.SCALE)
        place = tuple(i - s.start for i, s in zip(at, index, strict=False))
        out[place] = scale[index[-2:]]

    everywhere = sharding.replicated_like(target)
    dtype = self._reader.entries[one.name + fp8.SCALE].dtype
    scale = _fill(shape, dtype, everywhere, read_scales)
    return fp8.Quantized(q, scale, self._blocks)

  def _read_box(self, leaf, index, out) -> None:
    """Fills `out` with the part `index` of the leaf."""
    depth = len(leaf.stack)
    for at in mapping_lib.stack_indices(index[:depth]):
      place = tuple(i - s.start for i, s in zip(at, index, strict=False))
      self._read_slice(leaf.sources[at], index[depth:], out[place])

  def _read_slice(self, source, index, out) -> None:
    """Fills `out` with the part `index` of one slice, chunk by chunk."""
    window = list(source.window)
    for axis, part in zip(source.axes, index, strict=True):
      start = source.window[axis].start
      window[axis] = slice(start + part.start, start + part.stop)
    inner = 1
    for part in window[1:]:
      inner *= part.stop - part.start
    step = max(_CHUNK // max(inner, 1), 1)
    first_axis = source.axes.index(0)
    for start in range(window[0].start, window[0].stop, step):
      chunk = (
        slice(start, min(start + step, window[0].stop)),
        *window[1:],
      )
      numbers = self._numbers(source, chunk, keep=out.dtype == fp8.E4M3)
      place = [slice(None)] * out.ndim
      place[first_axis] = slice(
        chunk[0].start - window[0].start, chunk[0].stop - window[0].start
      )
      out[tuple(place)] = numbers.transpose(source.axes)

  def _numbers(self, source, window, *, keep):
    """A window of a tensor's view, dequantised unless kept."""
    numbers = self._reader.read(source.name, source.view, window)
    if keep or numbers.dtype != fp8.E4M3:
      return numbers
    lines = lambda sizes, parts: (
      np.arange(np.prod(sizes, dtype=int)).reshape(sizes)[parts].ravel()
    )
    r = source.num_rows
    rows = lines(source.view[:r], window[:r])
    columns = lines(source.view[r:], window[r:])
    flat = fp8.dequantize(
      numbers.reshape(len(rows), len(columns)),
      self._reader.read(source.name + fp8.SCALE),
      rows,
      columns,
      self._blocks,
    )
    return flat.reshape(numbers.shape)


def _has_indexer(config: model_config.ModelConfig) -> bool:
  return getattr(config.attention, 'indexer', None) is not None


def _draw(
  leaf: mapping_lib.Leaf,
  std: float,
  dtype: np.dtype,
  target: jax.sharding.Sharding,
) -> jax.Array:
  """A leaf as the model initialises it, the same on any mesh."""
  depth, kind = len(leaf.stack), leaf.path[-1]

  def draw(index, out):
    if kind in ('scale', 'bias'):  # Of a norm.
      out[...] = float(kind == 'scale')
      return
    for at in mapping_lib.stack_indices(index[:depth]):
      place = tuple(i - s.start for i, s in zip(at, index, strict=False))
      seed = zlib.crc32(leaf.sources[at].name.encode())
      rng = np.random.default_rng(seed)
      noise = rng.standard_normal(leaf.shape[depth:], np.float32)
      out[place] = std * noise[index[depth:]]

  return _fill(leaf.shape, dtype, target, draw)


def _fill(
  shape: tuple[int, ...],
  dtype: np.dtype,
  target: jax.sharding.Sharding,
  read: Callable[[tuple[slice, ...], np.ndarray], None],
) -> jax.Array:
  """An array whose local shards `read`(index, out) fills, each once."""
  buffers: dict[Any, np.ndarray] = {}
  shards = []
  for device, index in target.addressable_devices_indices_map(shape).items():
    index = tuple(
      slice(*s.indices(size)[:2]) for s, size in zip(index, shape, strict=True)
    )
    key = tuple((s.start, s.stop) for s in index)
    if key not in buffers:
      buffers[key] = _aligned([s.stop - s.start for s in index], dtype)
      read(index, buffers[key])
    shards.append(jax.device_put(buffers[key], device))
  return jax.make_array_from_single_device_arrays(shape, target, shards)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
  """A buffer that a CPU device takes over without copying it."""
  num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
  raw = np.empty(num_bytes + 64, np.uint8)
  start = -raw.ctypes.data % 64
  return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _shardings(
  config: model_config.ModelConfig, mesh: jax.sharding.Mesh | None
) -> Any:
  if mesh is not None:
    return transformer.shardings(config, mesh)
  boxed = transformer.abstract(config)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda _: one, sharding.unbox(boxed))


def _check_copies(mapping, reader) -> None:
  """Copies are equal, number for number; each process checks its share."""
  copies = mapping.copies | mapping.spare_copies
  for copy, name in copies.items():
    if copy not in reader.entries:
      continue
    rows, columns = reader.entries[name].shape
    step = max(_CHUNK // columns, 1)
    mine = range(jax.process_index() * step, rows, jax.process_count() * step)
    for start in mine:
      window = (slice(start, min(start + step, rows)), slice(0, columns))
      if not np.array_equal(
        reader.read(copy, window=window), reader.read(name, window=window)
      ):
        raise config_lib.UserError(
          f'{copy} is not equal to {name}, which is shared here'
        )


def _stray_files(reader: safetensors.Reader) -> str:
  """Says which files the index passes over; '' if it names all."""
  names = ', '.join(file.name for file in reader.stray_files)
  return f'{safetensors.INDEX} does not name {names}' if names else ''


def _mtp_layers(names: Iterable[str], num_layers: int) -> set[int]:
  """Numbers of the layers that are MTP modules."""
  parts = [name.split('.') for name in names if _layer_of(name) >= num_layers]
  return {int(p[2]) for p in parts if p[3:] and p[3] in _MTP_PARTS}


def _layer_of(name: str) -> int:
  """Number of the layer that a tensor belongs to, -1 for none."""
  parts = name.split('.')
  if parts[:2] == ['model', 'layers'] and len(parts) > 2 and parts[2].isdigit():
    return int(parts[2])
  return -1


def _blocks(values: Mapping[str, Any]) -> fp8.Blocks:
  """Size of the FP8 blocks.

  Raises:
    UserError: Weights are quantised in another way.
  """
  found = values.get('quantization_config')
  if found is None:
    return fp8.DEFAULT_BLOCKS
  if not isinstance(found, dict):
    raise config_lib.UserError(
      f'quantization_config={found!r} must be an object'
    )
  if found.get('quant_method') != 'fp8' or found.get('fmt', 'e4m3') != 'e4m3':
    raise config_lib.UserError(
      f'quantization_config with quant_method={found.get("quant_method")!r}, '
      f'fmt={found.get("fmt")!r} is not supported, only block FP8 (e4m3) is'
    )
  blocks = found.get('weight_block_size') or fp8.DEFAULT_BLOCKS
  match blocks:
    case [int(rows), int(columns)] if rows > 0 and columns > 0:
      return rows, columns
  raise config_lib.UserError(
    f'weight_block_size={blocks!r} of quantization_config must be two sizes'
  )


def _put(tree: dict[str, Any], path: mapping_lib.Path, value: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value
