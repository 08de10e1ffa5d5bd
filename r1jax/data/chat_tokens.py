"""Conversations as token ids, for a sampler and for training."""

from collections.abc import Sequence
from typing import Protocol

from r1jax.data import chat, chat_templates


class Tokenizer(Protocol):
  """What a conversation needs of a tokenizer."""

  bos_id: int | None
  eos_id: int
  stop_ids: tuple[int, ...]

  def encode(self, text: str) -> list[int]:
    """Returns ids; special tokens in the text become theirs."""


def encode_prompt(
  messages: Sequence[chat.Message],
  tokenizer: Tokenizer,
  *,
  template: str,
  open_think: bool = True,
  thinking: bool | None = None,
) -> list[int]:
  """Returns the ids after which the assistant answers, with bos if there is.

  Raises:
    ValueError: As `chat.render`, or the tokenizer lacks the template's tokens.
  """
  text = chat.render(
    messages, template=template, open_think=open_think, thinking=thinking
  )
  _check_tokens(tokenizer, template)
  return with_bos(tokenizer.encode(text), tokenizer)


def encode_segments(
  messages: Sequence[chat.Message],
  tokenizer: Tokenizer,
  *,
  template: str,
  train_on_earlier: bool = False,
) -> tuple[list[int], list[bool]]:
  """Returns the ids of a whole conversation, and which of them are targets.

  Segments are encoded apart: a sampler goes on from the ids of the prompt, so
  no token may span the seam. Where the template has no token that ends a turn,
  eos_id ends the last.

  Raises:
    ValueError: As `chat.render_segments`, or the tokenizer lacks the
      template's tokens.
  """
  segments = chat.render_segments(
    messages, template=template, train_on_earlier=train_on_earlier
  )
  _check_tokens(tokenizer, template)
  encoded = [(tokenizer.encode(text), target) for text, target in segments]
  if chat_templates.find(template).end_token is None:
    encoded.append(([tokenizer.eos_id], True))
  is_target = [target for ids, target in encoded for _ in ids]
  ids = with_bos([i for ids, _ in encoded for i in ids], tokenizer)
  return ids, [False] * (len(ids) - len(is_target)) + is_target


def stop_ids(tokenizer: Tokenizer, *, template: str) -> tuple[int, ...]:
  """Returns the ids at which an answer ends, each once.

  The template's own comes first: the files of a base model do not name it.

  Raises:
    ValueError: There is no such template, or the tokenizer lacks its tokens.
  """
  _check_tokens(tokenizer, template)
  end_token = chat_templates.find(template).end_token
  own = tokenizer.encode(end_token) if end_token else []
  return tuple(dict.fromkeys([*own, *tokenizer.stop_ids]))


def detect(tokenizer: Tokenizer) -> str:
  """Names the template whose special tokens a tokenizer has.

  V3.1 and V3.2 have R1's tokens, so that theirs is never found by them.

  Raises:
    ValueError: It has no template's.
  """
  for name, template in chat_templates.TEMPLATES.items():
    wanted = template.tokens + template.hallmarks
    if wanted and not _missing(tokenizer, wanted):
      return name
  known = dict.fromkeys(
    ' '.join(t.tokens) for t in chat_templates.TEMPLATES.values() if t.tokens
  )
  raise ValueError(
    f'the tokenizer has neither {" nor ".join(known)}: name the template, one '
    f'of {", ".join(chat_templates.TEMPLATES)}'
  )


def with_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
  """Puts bos first, unless it is there or the tokenizer has none."""
  if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id]:
    return ids
  return [tokenizer.bos_id, *ids]


def _missing(tokenizer: Tokenizer, tokens: Sequence[str]) -> list[str]:
  return [token for token in tokens if len(tokenizer.encode(token)) != 1]


def _check_tokens(tokenizer: Tokenizer, template: str) -> None:
  missing = _missing(tokenizer, chat_templates.find(template).tokens)
  if missing:
    raise ValueError(
      f'template={template!r} needs the token {missing[0]}, which the '
      'tokenizer does not have'
    )
