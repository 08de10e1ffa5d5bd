"""Conversations of files, as tokens with the assistant's marked: for SFT."""

import dataclasses
from collections.abc import Iterator

from r1jax import config as config_lib
from r1jax.data import (
  chat,
  chat_templates,
  chat_tokens,
  packing,
  records,
  text,
)


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
  """Which files, and what a conversation is.

  Attributes:
    paths: Files or globs.
    template: How a model reads them, one of `chat_templates.TEMPLATES`.
    messages: Field with a list of {'role', 'content'}; '' if a record is one
      question and its answer.
    question: Field of the question, where there are no messages.
    answer: Field of the answer, likewise.
    system: What stands before every conversation that has no system message;
      '' for nothing.
    held_out_fraction: Share of conversations, in [0, 1), kept for evaluation,
      chosen by a hash of their text alone.
    format: As `records.FORMATS`.
  """

  paths: tuple[str, ...]
  template: str
  messages: str = ''
  question: str = 'question'
  answer: str = 'answer'
  system: str = ''
  held_out_fraction: float = 0.02
  format: str = 'auto'

  def __post_init__(self):
    if not self.paths:
      raise ValueError('paths=() must name at least one file')
    if self.template not in chat_templates.TEMPLATES:
      raise ValueError(
        f'template={self.template!r}, it must be one of '
        f'{", ".join(chat_templates.TEMPLATES)}'
      )
    if self.format not in records.FORMATS:
      raise ValueError(
        f'format={self.format!r} must be one of {", ".join(records.FORMATS)}'
      )
    if not 0 <= self.held_out_fraction < 1:
      raise ValueError(
        f'held_out_fraction={self.held_out_fraction} must be in [0, 1)'
      )


def make_rows(
  config: ConversationConfig,
  tokenizer: packing.Tokenizer,
  *,
  row_length: int,
  seed: int | None,
  split: str,
) -> tuple[packing.PackedRows, int]:
  """Reads the files and packs one split; loss on the assistant's tokens only.

  Args:
    config: What to read.
    tokenizer: Encodes; templates bring their own special tokens.
    row_length: Tokens of a row. A longer conversation is left out: cut, it
      would teach to stop in the middle or to answer nothing.
    seed: Of the packing order; None keeps the order of the files.
    split: 'train' or 'held_out'.

  Returns:
    The rows, and how many conversations were left out.

  Raises:
    UserError: As `read`, or nothing is left.
  """
  wants_held_out = {'train': False, 'held_out': True}[split]
  sequences, targets, num_bytes, num_long = [], [], 0, 0
  for messages in read(config):
    segments = chat.render_segments(messages, template=config.template)
    whole = ''.join(part for part, _ in segments)
    if text.is_held_out(whole, config.held_out_fraction) != wants_held_out:
      continue
    ids, mask = chat_tokens.encode_segments(
      messages, tokenizer, template=config.template
    )
    if len(ids) > row_length:
      num_long += 1
      continue
    sequences.append(ids)
    targets.append(mask)
    num_bytes += sum(
      len(part.encode()) for part, is_target in segments if is_target
    )
  if not sequences:
    raise config_lib.UserError(
      f'the {split} split is empty: {num_long} conversations are longer than '
      f'row_length={row_length}, held_out_fraction={config.held_out_fraction} '
      f'of {", ".join(config.paths)}'
    )
  rows = packing.PackedRows(
    sequences,
    pad_id=tokenizer.pad_id,
    row_length=row_length,
    seed=seed,
    targets=targets,
    num_bytes=num_bytes,
  )
  return rows, num_long


def read(config: ConversationConfig) -> Iterator[list[chat.Message]]:
  """Yields the conversations of all files, in order.

  Raises:
    UserError: As `records.read`; messages that are none; or a file without a
      conversation.
  """
  for path in records.expand(config.paths):
    fields = (
      (config.messages,)
      if config.messages
      else (config.question, config.answer)
    )
    count = 0
    for where, record in records.read(path, config.format, fields=fields):
      messages = _messages(config, record, where)
      if config.system and messages[0].role != 'system':
        messages = [chat.Message('system', config.system), *messages]
      yield messages
      count += 1
    if not count:
      raise config_lib.UserError(f'{path}: the file holds no conversation')


def _messages(
  config: ConversationConfig, record: records.Record, where: str
) -> list[chat.Message]:
  if not config.messages:
    return [
      chat.Message('user', records.text_of(record, config.question, where)),
      chat.Message('assistant', records.text_of(record, config.answer, where)),
    ]
  found = record[config.messages]
  if not isinstance(found, list) or not found:
    raise config_lib.UserError(
      f'{where}: field {config.messages!r} must be a list of messages'
    )
  messages = []
  for number, message in enumerate(found, 1):
    at = f'{where}: message {number}'
    if not isinstance(message, dict):
      raise config_lib.UserError(
        f'{at} is a {type(message).__name__}, it must have role and content'
      )
    records.check_fields(('role', 'content'), message, at)
    try:
      messages.append(
        chat.Message(
          records.text_of(message, 'role', at),
          records.text_of(message, 'content', at),
        )
      )
    except config_lib.UserError:
      raise
    except ValueError as e:
      raise config_lib.UserError(f'{at}: {e}') from e
  if messages[-1].role != 'assistant':
    raise config_lib.UserError(
      f'{where}: the last message is of role {messages[-1].role!r}, there is '
      'nothing to learn: it must be of the assistant'
    )
  return messages
