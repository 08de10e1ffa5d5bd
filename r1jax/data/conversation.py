"""Conversations of files, as tokens with the assistant's marked: for SFT."""

import dataclasses
import math
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

TURNS = ('last', 'all')
AUTO = 'auto'


@dataclasses.dataclass(frozen=True)
class ConversationConfig:
  """Which files, and what a conversation is.

  Attributes:
    paths: Files or globs.
    template: How a model reads them, one of `chat_templates.TEMPLATES`; 'auto'
      is for who knows the model to replace.
    messages: Field with a list of {'role', 'content'} and nothing more; '' if
      a record is one question and its answer.
    question: Field of the question, where there are no messages.
    answer: Field of the answer, likewise.
    system: What stands before every conversation that has no system message;
      '' for nothing.
    held_out_fraction: Share of conversations, in [0, 1), kept for evaluation,
      chosen by a hash of their text alone; 0 for no evaluation.
    format: As `records.FORMATS`.
    turns: Which of the assistant's turns are learnt, one of TURNS: the 'last'
      of a conversation, or 'all'. Where the template rewrites earlier turns,
      'all' makes of each an example of its own, the conversation up to it.
  """

  paths: tuple[str, ...]
  template: str
  messages: str = ''
  question: str = 'question'
  answer: str = 'answer'
  system: str = ''
  held_out_fraction: float = 0.02
  format: str = 'auto'
  turns: str = 'all'

  def __post_init__(self):
    if not self.paths:
      raise ValueError('paths=() must name at least one file')
    template = chat_templates.TEMPLATES.get(self.template)
    if template is None and self.template != AUTO:
      raise ValueError(
        f'template={self.template!r}, it must be one of {AUTO}, '
        f'{", ".join(chat_templates.TEMPLATES)}'
      )
    if self.format not in records.FORMATS:
      raise ValueError(
        f'format={self.format!r} must be one of {", ".join(records.FORMATS)}'
      )
    if self.system and template is not None and template.is_single:
      raise ValueError(
        f'system={self.system!r} must be empty: template={self.template!r} '
        'holds one question alone'
      )
    if self.turns not in TURNS:
      raise ValueError(
        f'turns={self.turns!r} must be one of {", ".join(TURNS)}'
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
    row_length: Tokens of a row. A longer example is left out: cut, it would
      teach to stop in the middle or to answer nothing.
    seed: Of the packing order; None keeps the order of the files.
    split: 'train' or 'held_out'.

  Returns:
    The rows, and how many examples were left out.

  Raises:
    UserError: As `read`, or nothing is left.
  """
  wants_held_out = {'train': False, 'held_out': True}[split]
  sequences, targets, long, num_bytes = [], [], [], 0
  for messages in read(config):
    # By the whole conversation: its parts stay on one side.
    whole = _text(messages, config)
    if text.is_held_out(whole, config.held_out_fraction) != wants_held_out:
      continue
    for ids, mask, num_learnt_bytes in _examples(messages, config, tokenizer):
      if len(ids) > row_length:
        long.append(len(ids))
        continue
      sequences.append(ids)
      targets.append(mask)
      num_bytes += num_learnt_bytes
  if not sequences and long:
    raise config_lib.UserError(
      f'the {split} split is empty: row_length={row_length} tokens must be at '
      f'least {min(long)}, the shortest of its {len(long)} examples'
    )
  if not sequences:
    raise config_lib.UserError(
      f'the {split} split is empty: {_say_share(config)}'
    )
  rows = packing.PackedRows(
    sequences,
    pad_id=tokenizer.pad_id,
    row_length=row_length,
    seed=seed,
    targets=targets,
    num_bytes=num_bytes,
  )
  return rows, len(long)


def _examples(
  messages: list[chat.Message],
  config: ConversationConfig,
  tokenizer: chat_tokens.Tokenizer,
) -> Iterator[tuple[list[int], list[bool], int]]:
  """Yields what is learnt from one conversation: ids, targets, their bytes."""
  template = chat_templates.find(config.template)
  wants_all, parts = config.turns == 'all', [messages]
  if wants_all and template.rewrites_earlier:
    ends = [i for i, m in enumerate(messages, 1) if m.role == 'assistant']
    parts = [messages[:end] for end in ends]
  how = {
    'template': config.template,
    'train_on_earlier': wants_all and not template.rewrites_earlier,
  }
  for part in parts:
    segments = chat.render_segments(part, **how)
    learnt = ''.join(piece for piece, is_target in segments if is_target)
    said = learnt.replace(template.end_token or '', '')
    ids, mask = chat_tokens.encode_segments(part, tokenizer, **how)
    yield ids, mask, len(said.encode())


def _text(messages: list[chat.Message], config: ConversationConfig) -> str:
  segments = chat.render_segments(messages, template=config.template)
  return ''.join(piece for piece, _ in segments)


def _say_share(config: ConversationConfig) -> str:
  """Says why no conversation is on one side, and what would be right."""
  texts = [_text(messages, config) for messages in read(config)]
  share, num = config.held_out_fraction, len(texts)
  files = ', '.join(config.paths)
  holds_out_any = lambda share: any(text.is_held_out(t, share) for t in texts)
  if holds_out_any(share):
    return (
      f'held_out_fraction={share} holds out all {num} conversations of '
      f'{files}, it must be less'
    )
  # A conversation more at each step, rounded up.
  steps = (math.ceil(1e4 * i / num) / 1e4 for i in range(1, num))
  least = next(filter(holds_out_any, steps), None)
  right = '' if least is None else f'at least {least}, or '
  return (
    f'held_out_fraction={share} holds out none of the {num} conversations of '
    f'{files}, it must be {right}0 for no evaluation'
  )


def read(config: ConversationConfig) -> Iterator[list[chat.Message]]:
  """Yields the conversations of all files, in order.

  Raises:
    UserError: As `records.read`; messages that are none, or that the template
      cannot hold; or a file without a conversation.
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
      try:
        chat.check_messages(messages, template=config.template)
      except ValueError as e:
        raise config_lib.UserError(f'{where}: {e}') from e
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
    _refuse_more(message, at)
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


def _refuse_more(message: records.Record, where: str) -> None:
  """Refuses what a message has beside its text; what is empty is nothing."""
  for name, value in message.items():
    if name in ('role', 'content') or value in (None, '', [], {}):
      continue
    hint = ''
    if name.startswith('reasoning'):
      hint = ', reasoning as <think>…</think> before the answer'
    raise config_lib.UserError(
      f'{where}: field {name!r} would not be learnt; all that is must be in '
      f'content{hint}'
    )
