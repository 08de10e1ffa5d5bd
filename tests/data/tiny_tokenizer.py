"""Tokenizer folders of the Hugging Face kind, trained in a moment."""

import gzip
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

_TEXTS = ['What is 37+45? 37+45=82, so the answer is 82.'] * 3
DEEPSEEK = ('<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>')
DEEPSEEK_ADDED = ('<think>', '</think>', '<｜User｜>', '<｜Assistant｜>')
QWEN = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
QWEN_ADDED = ('<think>', '</think>')
LLAMA = (
  '<|begin_of_text|>',
  '<|eot_id|>',
  '<|start_header_id|>',
  '<|end_header_id|>',
)


def byte_level(
  special: Sequence[str], added: Sequence[str] = ()
) -> tokenizers.Tokenizer:
  """A byte-level BPE of a few merges.

  Args:
    special: Control tokens, the first ids.
    added: Tokens that print as themselves, the last ids.
  """
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=len(special) + 300,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=list(special),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_TEXTS, trainer)
  tokenizer.add_tokens(list(added))
  return tokenizer


def write(
  folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, **files: Any
) -> pathlib.Path:
  """Writes tokenizer.json and, by name, JSON files beside it."""
  folder.mkdir(exist_ok=True)
  tokenizer.save(str(folder / 'tokenizer.json'))
  for name, values in files.items():
    (folder / f'{name}.json').write_text(json.dumps(values))
  return folder


def write_deepseek(folder: pathlib.Path) -> pathlib.Path:
  """Begins documents with bos, as R1 does."""
  bos, eos = DEEPSEEK
  return write(
    folder,
    byte_level(DEEPSEEK, DEEPSEEK_ADDED),
    tokenizer_config={
      'add_bos_token': True,
      'bos_token': {'__type': 'AddedToken', 'content': bos},
      'eos_token': {'__type': 'AddedToken', 'content': eos},
      'pad_token': {'__type': 'AddedToken', 'content': eos},
      'unk_token': None,
    },
  )


def write_qwen(folder: pathlib.Path) -> pathlib.Path:
  """Has no bos and two ids to stop at, as Qwen3 has."""
  return write(
    folder,
    byte_level(QWEN, QWEN_ADDED),
    tokenizer_config={
      'bos_token': None,
      'eos_token': '<|im_end|>',
      'pad_token': '<|endoftext|>',
    },
    generation_config={'eos_token_id': [2, 0]},
  )


def write_deepseek_v2(folder: pathlib.Path) -> pathlib.Path:
  """Has no tokens for who speaks."""
  bos, eos = DEEPSEEK
  settings = {'add_bos_token': True, 'bos_token': bos, 'eos_token': eos}
  return write(folder, byte_level(DEEPSEEK), tokenizer_config=settings)


def write_qwen2_5(folder: pathlib.Path) -> pathlib.Path:
  """Has ChatML and no tags of thinking."""
  settings = {'eos_token': '<|im_end|>', 'pad_token': '<|endoftext|>'}
  return write(folder, byte_level(QWEN), tokenizer_config=settings)


def write_llama3(folder: pathlib.Path, *further: str) -> pathlib.Path:
  """Begins with bos; 3.1 has '<|eom_id|>' further."""
  settings = {'bos_token': '<|begin_of_text|>', 'eos_token': '<|eot_id|>'}
  tokenizer = byte_level((*LLAMA, *further))
  return write(folder, tokenizer, tokenizer_config=settings)


def read_r1(folder: pathlib.Path) -> tuple[str, dict[str, Any]]:
  """The text of the real tokenizer.json, and tokenizer_config.json."""
  with gzip.open(folder / 'tokenizer.json.gz', 'rt', encoding='utf-8') as f:
    model = f.read()
  settings = (folder / 'tokenizer_config.json').read_text(encoding='utf-8')
  return model, json.loads(settings)
