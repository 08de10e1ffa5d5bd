"""The files of a tokenizer: what goes along with a model's weights."""

import filecmp
import json
import os
import pathlib
import shutil
from typing import Any

from etils import epath

from r1jax import config as config_lib
from r1jax.interop import huggingface
from r1jax.train import workdir as workdir_lib

# Where a workdir keeps its tokenizer; so config.json names it.
FOLDER = 'tokenizer'
SENTENCEPIECE = 'tokenizer.model'
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')
# Names and patterns. Tiktoken files cannot be read here, by others they can,
# with the Python files beside them.
_PATTERNS = (
  'tokenizer*.json',
  '*.model',
  '*.tiktoken',
  'tokenization_*.py',
  'tool_declaration*.py',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  'generation_config.json',
  'chat_template*',
)


def copy(source: str | os.PathLike[str], target: pathlib.Path) -> None:
  """Copies a tokenizer into a folder, which is made.

  Args:
    source: Hugging Face folder, or a sentencepiece model file.
    target: The folder.
  """
  source = pathlib.Path(source)
  target.mkdir(parents=True, exist_ok=True)
  if not source.is_dir():
    shutil.copyfile(source, target / SENTENCEPIECE)
    return
  for path in find(source):
    shutil.copyfile(path, target / path.name)
  # Where generation stops may stand beside the model's sizes only.
  generation = target / 'generation_config.json'
  if not generation.exists() and (source / 'config.json').exists():
    found = token_ids(source).items()
    ids = {key: value for key, value in found if value is not None}
    if ids:
      generation.write_text(json.dumps(ids, indent=2) + '\n')


def find(folder: pathlib.Path) -> list[pathlib.Path]:
  """The tokenizer's files in a Hugging Face folder."""
  found = {path for pattern in _PATTERNS for path in folder.glob(pattern)}
  return sorted(path for path in found if path.is_file())


def token_ids(folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Where documents begin and end, as a folder's config.json says it."""
  values = huggingface.read_config(pathlib.Path(folder))
  return {key: values[key] for key in TOKEN_IDS if key in values}


def name_in(workdir: epath.PathLike, path: str) -> str:
  """What a run's config.json says of its tokenizer.

  Args:
    workdir: Of the run. An object store keeps no tokenizer: it is named where
      it is.
    path: The tokenizer; '' for the one that ships, which is not kept.
  """
  if not path:
    return ''
  return FOLDER if workdir_lib.is_local(workdir) else os.path.abspath(path)


def keep(workdir: epath.PathLike, path: str) -> None:
  """Makes a run's workdir hold its tokenizer, so that both may be moved.

  Raises:
    UserError: It holds another one.
  """
  if not path or not workdir_lib.is_local(workdir):
    return
  target = pathlib.Path(workdir) / FOLDER
  part = target.with_name(f'.{FOLDER}.part')
  shutil.rmtree(part, ignore_errors=True)
  copy(path, part)
  if not target.exists():
    part.rename(target)
    return
  try:
    differing = _first_difference(part, target)
  finally:
    shutil.rmtree(part)
  if differing:
    raise config_lib.UserError(
      f'{target} is not the tokenizer of {path}, {differing} differs; '
      'use another --workdir'
    )


def _first_difference(a: pathlib.Path, b: pathlib.Path) -> str | None:
  """Name of a file that two folders do not share; None if they are equal."""
  names = sorted({path.name for folder in (a, b) for path in folder.iterdir()})
  _, differing, missing = filecmp.cmpfiles(a, b, names, shallow=False)
  return min(differing + missing, default=None)
