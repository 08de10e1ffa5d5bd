"""Our models as Hugging Face checkpoints, a tensor at a time."""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from r1jax.interop import folder as folder_lib
from r1jax.interop import fp8, hf_config, huggingface, safetensors
from r1jax.interop import mapping as mapping_lib
from r1jax.model import config as model_config

# What stays in bf16 when the rest is FP8.
_NOT_FP8 = ('embed_tokens', 'lm_head', 'mlp.gate', 'eh_proj', 'weights_proj')


def save(
  folder: str | os.PathLike[str],
  config: model_config.ModelConfig,
  variables: Any,
  *,
  dtype: str = 'bfloat16',
  dtypes: Mapping[str, np.dtype] | None = None,
  shard_bytes: int = 5 << 30,
  extra: Mapping[str, Any] | None = None,
  finish: Callable[[pathlib.Path], None] = lambda folder: None,
) -> None:
  """Writes config.json and safetensors files that transformers loads.

  Everything is written under another name first: the folder is complete or it
  is not there. Every process of a pod must call this; the first one writes.

  Args:
    folder: Must not exist, or be empty.
    config: Of the model.
    variables: Its variables; `fp8.Quantized` leaves are written as they are.
    dtype: 'float32', 'bfloat16' or 'fp8' (matrices inside the blocks, the
      rest bfloat16; where some leaves are FP8 already, those alone). Router
      biases are float32 always.
    dtypes: Of tensors that are to have another, by name: of FP8 checkpoints
      that are to stay as they are, `huggingface.tensor_dtypes`.
    shard_bytes: Most bytes of a file, but a tensor is never cut.
    extra: More keys for config.json.
    finish: Puts more files into the folder before it gets its name.

  Raises:
    UserError: The folder holds something, or no family has this shape.
  """
  folder_lib.refuse_used(folder)
  values = hf_config.write(config)
  mapping = mapping_lib.make_mapping(config)
  exporter = _Exporter(mapping, variables, dtype, dtypes or {})
  if exporter.blocks is not None:
    values['quantization_config'] = {
      'quant_method': 'fp8',
      'fmt': 'e4m3',
      'activation_scheme': 'dynamic',
      'weight_block_size': list(exporter.blocks),
    }
  values |= extra or {}
  values['torch_dtype'] = 'float32' if dtype == 'float32' else 'bfloat16'
  if jax.process_index():
    for _ in exporter.tensors():
      pass  # Takes part in the gathers.
    return
  with folder_lib.finished_under(folder, is_owner=True) as unfinished:
    files = safetensors.plan_files(exporter.plan(), shard_bytes)
    writer = safetensors.Writer(unfinished, files)
    writer.write(exporter.tensors())
    writer.write_index()
    text = json.dumps(values, indent=2, sort_keys=True) + '\n'
    (unfinished / 'config.json').write_text(text)
    finish(unfinished)


class _Exporter:
  """Puts a checkpoint's tensors together, one at a time."""

  def __init__(self, mapping, variables, dtype, dtypes):
    self._variables, self._dtype, self._dtypes = variables, dtype, dtypes
    self._parts = collections.defaultdict(list)
    for leaf in mapping.leaves:
      for index, source in leaf.sources.items():
        self._parts[source.name].append((leaf, index, source))
    self._copies, self._empty = mapping.copies, mapping.empty
    self._names = [*self._parts, *mapping.copies]
    leaves = jax.tree.leaves(variables, is_leaf=fp8.is_quantized)
    self._kept = [leaf for leaf in leaves if fp8.is_quantized(leaf)]

  @property
  def blocks(self) -> fp8.Blocks | None:
    """Of the FP8 tensors, None if there are none."""
    if self._kept:
      return self._kept[0].blocks
    return fp8.DEFAULT_BLOCKS if self._dtype == 'fp8' else None

  def plan(self) -> Iterator[safetensors.Planned]:
    for name in self._names:
      source = self._parts[self._origin(name)][0][2]
      dtype = self._dtype_of(name)
      yield safetensors.Planned(name, dtype, source.shape)
      if dtype == fp8.E4M3:
        kept = self._kept_of(name)
        scale_dtype = np.dtype(np.float32) if kept is None else kept.scale.dtype
        shape = fp8.scale_shape(source.shape, self.blocks)
        yield safetensors.Planned(name + fp8.SCALE, scale_dtype, shape)
    for name, shape in self._empty.items():
      yield safetensors.Planned(name, self._plain_dtype, shape)

  def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
    for name in self._names:
      parts = self._parts[self._origin(name)]
      kept = self._kept_of(name)
      if kept is not None:
        yield name, self._assemble(parts, lambda x: x.q)
        yield name + fp8.SCALE, _fetch(kept.scale, parts[0][1])
      elif self._dtype_of(name) == fp8.E4M3:
        whole = self._assemble(parts, lambda x: x)
        q, scale = fp8.quantize(whole, self.blocks)
        yield name, q
        yield name + fp8.SCALE, scale
      else:
        whole = self._assemble(parts, lambda x: x)
        yield name, whole.astype(self._dtype_of(name))
    for name, shape in self._empty.items():
      yield name, np.empty(shape, self._plain_dtype)

  def _origin(self, name):
    return self._copies.get(name, name)

  def _kept_of(self, name) -> fp8.Quantized | None:
    """The leaf that a tensor is of, if it is FP8 already."""
    leaf = self._parts[self._origin(name)][0][0]
    found = mapping_lib.at(self._variables, leaf.path)
    return found if fp8.is_quantized(found) else None

  @property
  def _plain_dtype(self) -> np.dtype:
    """Of what is neither FP8 nor a router bias."""
    wide = self._dtype == 'float32'
    return huggingface.PARAM_DTYPES['float32' if wide else 'bfloat16']

  def _dtype_of(self, name) -> np.dtype:
    leaf, _, source = self._parts[self._origin(name)][0]
    if self._kept_of(name) is not None:
      return fp8.E4M3
    if name in self._dtypes:
      return self._dtypes[name]
    if leaf.path[0] == 'router':
      return np.dtype(np.float32)
    is_matrix = source.num_rows < len(source.view)
    stem = name.removesuffix('.weight')
    is_quantised_now = self._dtype == 'fp8' and not self._kept
    if is_quantised_now and is_matrix and not stem.endswith(_NOT_FP8):
      if name not in self._copies:
        return fp8.E4M3
    return self._plain_dtype

  def _assemble(self, parts, pick) -> np.ndarray:
    """The tensor of all slices that are windows of it."""
    whole = None
    for leaf, index, source in parts:
      array = _fetch(pick(mapping_lib.at(self._variables, leaf.path)), index)
      array = array.transpose(np.argsort(source.axes))
      if len(parts) == 1:
        return np.ascontiguousarray(array).reshape(source.shape)
      if whole is None:
        whole = np.empty(source.view, array.dtype)
      whole[source.window] = array
    return whole.reshape(parts[0][2].shape)


_pick = jax.jit(lambda x, index: x[index])


def _fetch(x: jax.Array, index: tuple[int, ...]) -> np.ndarray:
  """A slice of an array on this host, wherever its shards are."""
  if index:
    x = _pick(x, tuple(np.int32(i) for i in index))
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
