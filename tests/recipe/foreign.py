"""Hugging Face folders with random weights and a tokenizer of their own."""

import dataclasses
import pathlib

from r1jax.interop import export
from r1jax.model import config as model_config
from tests.data import tiny_tokenizer
from tests.recipe import micro

_WRITERS = {
  'deepseek': tiny_tokenizer.write_deepseek,
  'qwen3': tiny_tokenizer.write_qwen,
}


def model(kind: str, **changes) -> model_config.ModelConfig:
  """A tiny model with a row for each id of its tokenizer."""
  config = micro.model(mtp_depth=0, vocab_size=320, max_length=128)
  if kind == 'deepseek':
    return dataclasses.replace(config, **changes)
  attention = model_config.GqaConfig(
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    rope=model_config.RopeConfig(theta=1e6, interleaved=False),
    qk_norm=True,
  )
  qwen = {
    'attention': attention,
    'moe': None,
    'num_dense_layers': 2,
    'tie_embeddings': True,
  }
  return dataclasses.replace(config, **(qwen | changes))


def write(path: pathlib.Path, kind: str) -> str:
  """Writes a folder of a kind, 'deepseek' or 'qwen3'; returns its path."""
  config = model(kind)
  export.save(path, config, micro.variables(config), dtype='float32')
  _WRITERS[kind](path)
  return str(path)
