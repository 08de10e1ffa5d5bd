"""Where a model comes from: a workdir of ours, or a Hugging Face folder.

Every program that starts from a model takes either.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from pallas_kernels.mla_decode import ops as mla_decode_ops
from r1jax import config as config_lib
from r1jax.data import chat_templates, chat_tokens, conversation
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.interop import huggingface
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import sharding
from r1jax.recipe import tokenizer_files
from r1jax.train import checkpoint
from r1jax.train import workdir as workdir_lib

# What a model may have otherwise than the weights that it starts from: how it
# is computed, and what is added or left out.
_MAY_DIFFER = (
  *('dtype', 'precision', 'remat', 'scan_layers', 'init_std', 'max_length'),
  *('mtp_depth', 'attention.indexer', 'moe.block', 'moe.implementation'),
  *('attention_implementation', 'decode_implementation'),
  *('fp8_implementation', 'head_implementation'),
)


def load_model_config(folder: str) -> model_config.ModelConfig:
  """The model of a finished or running stage, or of a Hugging Face folder.

  Raises:
    UserError: The folder is neither.
  """
  if huggingface.is_checkpoint(folder):
    return huggingface.load_config(folder)
  model = read_config(folder)['model']
  return config_lib.from_dict(model_config.ModelConfig, model, 'model')


def find_source(init_from: str, workdir: str) -> str:
  """Where a stage has model, tokenizer and template from.

  That is `init_from`; of a run that began the workdir itself, which holds them
  all: what it began from may be gone.
  """
  try:
    config = read_config(workdir)
  except config_lib.UserError:
    return init_from
  has_tokenizer = (
    config.get('tokenizer') != tokenizer_files.FOLDER
    or (epath.Path(workdir) / tokenizer_files.FOLDER).exists()
  )
  is_same = config.get('init_from') == init_from
  return workdir if is_same and has_tokenizer else init_from


def check_model(
  model: model_config.ModelConfig, folder: str, *, say: Callable[[str], None]
) -> None:
  """A model that starts from a folder's weights must compute as they do.

  What shows in no shape would go unnoticed. YaRN is said, for a context that is
  extended on purpose; `_MAY_DIFFER` is free.

  Raises:
    UserError: Names the first key that differs, with both values.
  """
  there = load_model_config(folder)
  for key, (its, ours) in _differences(
    config_lib.to_dict(there), config_lib.to_dict(model)
  ).items():
    if key.startswith('attention.rope.scaling'):
      say(f'model.{key}={ours!r}, {folder} has {its!r}')
    elif not key.startswith(_MAY_DIFFER) and not _is_idle(key, model):
      raise config_lib.UserError(
        f'model.{key}={ours!r}, {folder} has {its!r}: make them equal, or take '
        'its model with model=None'
      )


def _is_idle(key: str, model: model_config.ModelConfig) -> bool:
  """Says whether a key means nothing to a model."""
  if key == 'dense_dim':
    return not model.num_dense_layers
  return key == 'moe.group_score' and model.moe.num_groups == 1


def _differences(
  a: dict[str, Any], b: dict[str, Any], path: str = ''
) -> dict[str, tuple[Any, Any]]:
  """Dotted keys with different values; an absent one is None."""
  found = {}
  for key in dict.fromkeys([*b, *a]):
    pair = a.get(key), b.get(key)
    if all(isinstance(value, dict) for value in pair):
      found |= _differences(*pair, f'{path}{key}.')
    elif pair[0] != pair[1]:
      found[path + key] = pair
  return found


def for_mesh(
  model: model_config.ModelConfig, folder: str, mesh: jax.sharding.Mesh
) -> model_config.ModelConfig:
  """A foreign model computes as suits the devices; ours as it was trained.

  config.json says nothing of it, see `suited`. So with a workdir that was made
  of it.
  """
  is_foreign = huggingface.is_checkpoint(folder)
  if not is_foreign and 'from_hf' not in read_config(folder):
    return model
  return suited(model, mesh.devices.flat[0].platform)


def suited(
  model: model_config.ModelConfig, platform: str
) -> model_config.ModelConfig:
  """A model that computes as suits a kind of devices: 'cpu', 'tpu', ….

  In bfloat16 with grouped matmuls on accelerators; on TPUs by kernels, as are
  attention and the head, and tokens travel with twice the room that even loads
  need. In float32 on a CPU.
  """
  if platform == 'cpu':
    return model
  moe = model.moe
  if platform == 'tpu':
    model = dataclasses.replace(
      model, head_implementation='pallas', **_attention_kernels(model.attention)
    )
  if moe is not None and platform == 'tpu' and model.precision == 'dtype':
    moe = dataclasses.replace(
      moe,
      implementation='pallas',
      block=16,
      exchange=model_config.ExchangeConfig(
        kind='ragged', receive_factor=2.0, tokens_at_once=2048
      ),
    )
  elif moe is not None:
    moe = dataclasses.replace(moe, implementation='grouped', block=128)
  return dataclasses.replace(
    model,
    moe=moe,
    dtype='bfloat16',
    remat=True,
  )


def _attention_kernels(
  attention: model_config.MlaConfig | model_config.GqaConfig,
) -> dict[str, str]:
  """The implementations for a TPU."""
  match attention:
    case model_config.GqaConfig():
      return {'attention_implementation': 'splash'}
    case model_config.MlaConfig(indexer=None):
      is_wide = attention.kv_lora_rank % mla_decode_ops.SCALE_CHANNELS == 0
      return {
        'attention_implementation': 'pallas',
        'decode_implementation': 'pallas' if is_wide else 'xla',
      }
  return {}


def load_tokenizer_path(folder: str) -> str:
  """The tokenizer of a workdir's model, '' if it ships; a foreign one's folder.

  Raises:
    UserError: The folder is no workdir with a model.
  """
  if huggingface.is_checkpoint(folder):
    return folder
  config = read_config(folder)
  path = config.get('tokenizer', '')
  if path == tokenizer_files.FOLDER:  # In the workdir, wherever that is.
    return os.fspath(workdir_lib.absolute(folder) / path)
  return path


def find_template(
  folder: str,
  model: model_config.ModelConfig,
  tokenizer: chat_tokens.Tokenizer,
) -> str:
  """How a folder's model is asked, one of `chat_templates.TEMPLATES`.

  That of the workdir's own training, if a folder is given; else 'plain' with
  our tokenizer, and with another the template whose special tokens it has. A
  model with V3.2's indexer reads 'deepseek_v3_1'.

  Raises:
    UserError: The folder is no workdir with a model, or its tokenizer has no
      template's tokens.
  """
  if folder and not huggingface.is_checkpoint(folder):
    config = read_config(folder)
    data = config.get('data', {})
    for template in (config.get('template'), data.get('template')):
      if template in chat_templates.TEMPLATES:
        return template
  if isinstance(tokenizer, tokenizer_lib.Tokenizer):
    return 'plain'
  try:
    template = chat_tokens.detect(tokenizer)
  except ValueError as e:
    raise config_lib.UserError(str(e)) from e
  is_sparse = getattr(model.attention, 'indexer', None) is not None
  return 'deepseek_v3_1' if is_sparse and template == 'deepseek' else template


def resolve_template(
  template: str,
  folder: str,
  model: model_config.ModelConfig,
  tokenizer: chat_tokens.Tokenizer,
) -> str:
  """The template of a config; that of `find_template` if it says 'auto'."""
  if template != conversation.AUTO:
    return template
  return find_template(folder, model, tokenizer)


def load_variables(
  folder: str,
  model: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
  *,
  say: Callable[[str], None],
) -> tuple[Any, int]:
  """Variables on a mesh and their step: 0 for those of a foreign folder.

  Of a workdir those of its newest good checkpoint, in the dtype that they were
  saved in.

  Raises:
    UserError: None can be read, or they are another model's.
  """
  if huggingface.is_checkpoint(folder):
    return huggingface.load_variables(folder, model, mesh=mesh, say=say), 0
  return checkpoint.restore_variables(
    epath.Path(folder) / 'checkpoints',
    abstract_variables(model, mesh),
    say=say,
  )


def abstract_variables(
  model: model_config.ModelConfig, mesh: jax.sharding.Mesh
) -> Any:
  """Shapes and shardings of a model's variables."""
  boxed = transformer.abstract(model)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    sharding.unbox(boxed),
    sharding.tree_shardings(mesh, boxed),
  )


def read_config(workdir: str) -> dict[str, Any]:
  """The config.json of a workdir with a model.

  Raises:
    UserError: There is none.
  """
  path = epath.Path(workdir) / 'config.json'
  try:
    values = json.loads(path.read_text())
  except OSError as e:
    raise config_lib.UserError(_no_workdir(workdir, e)) from e
  except (ValueError, RecursionError):  # No JSON, or no text at all.
    values = None
  if not isinstance(values, dict) or not isinstance(values.get('model'), dict):
    raise config_lib.UserError(f'{path} holds no model config')
  return values


def _no_workdir(workdir: str, error: OSError) -> str:
  """Says why a path is not what every program starts from."""
  wanted = 'it must be a workdir or a Hugging Face folder'
  folder = epath.Path(workdir)
  if not workdir or not folder.exists():
    return f'{workdir or repr("")} does not exist, {wanted}'
  if not folder.is_dir():
    return f'{workdir} is a file, {wanted}'
  if isinstance(error, FileNotFoundError):
    return f'{workdir} holds no config.json, {wanted}'
  return f'{folder / "config.json"}: {error.strerror or error}'
