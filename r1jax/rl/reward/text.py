"""Rewards on text, for tokenizers that spell the tags in several tokens.

Two formats. 'tags' is R1-Zero's: <think>…</think><answer>…</answer> and
nothing else. 'boxed' is R1's: reasoning, one </think>, then text with the
answer in \\boxed{…}; the prompt may have opened the <think>.

An answer is right if it is the gold one as text or as a number: '1,200.0',
'$1200' and '1200' are one number.
"""

import dataclasses
import decimal
import re

FORMATS = ('tags', 'boxed')

_TAGS = re.compile(
  r'\s*<think>(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>\s*',
  re.DOTALL,
)
_TAG = re.compile(r'</?(?:think|answer)>')
_ANSWER = re.compile(r'<answer>(.*?)</answer>', re.DOTALL)
_BOXED = '\\boxed{'
_NUMBER = re.compile(r'[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?')


@dataclasses.dataclass(frozen=True)
class Grade:
  """What a completion is worth.

  Attributes:
    answer: As it was written, None if there is none.
    correct: It is the gold answer.
    format: The completion has the format.
  """

  answer: str | None
  correct: bool
  format: bool


def grade(text: str, gold: str, *, format_name: str, finished: bool) -> Grade:
  """Grades a completion.

  Args:
    text: Of the completion, without its stop token.
    gold: The right answer.
    format_name: One of FORMATS.
    finished: It ended by itself; what was cut off has no format.
  """
  if format_name == 'tags':
    answer = _last_answer(text)
    has_format = _has_tags(text)
  else:
    answer = last_boxed(text.rpartition('</think>')[2])
    has_format = _is_boxed(text)
  return Grade(
    answer=answer,
    correct=answer is not None and is_same(answer, gold),
    format=has_format and finished,
  )


def is_same(answer: str, gold: str) -> bool:
  """Says whether two answers are equal as text or as numbers."""
  if _plain(answer) == _plain(gold):
    return True
  numbers = number(answer), number(gold)
  return None not in numbers and numbers[0] == numbers[1]


def number(text: str) -> decimal.Decimal | None:
  """The number that a text is, without $, %, commas and a last full stop."""
  text = _plain(text).removeprefix('$').removesuffix('%').removesuffix('\\')
  text = text.removesuffix('.')
  if not _NUMBER.fullmatch(text):
    return None
  try:
    return decimal.Decimal(text.replace(',', ''))
  except decimal.InvalidOperation:
    return None


def last_boxed(text: str) -> str | None:
  """Content of the last \\boxed{…} whose braces are closed."""
  start = text.rfind(_BOXED)
  while start >= 0:
    depth, first = 1, start + len(_BOXED)
    for i in range(first, len(text)):
      depth += {'{': 1, '}': -1}.get(text[i], 0)
      if not depth:
        return text[first:i].strip()
    start = text.rfind(_BOXED, 0, start)
  return None


def _has_tags(text: str) -> bool:
  match = _TAGS.fullmatch(text)
  if not match or len(_TAG.findall(text)) != 4:
    return False
  return bool(match['answer'].strip())


def _is_boxed(text: str) -> bool:
  before, _, after = text.partition('</think>')
  opened = before.lstrip().removeprefix('<think>')
  rest = _TAG.findall(opened) + _TAG.findall(after)
  closed = '</think>' in text and not rest
  return closed and bool(before.strip()) and bool(last_boxed(after))


def _last_answer(text: str) -> str | None:
  answers = _ANSWER.findall(text)
  return answers[-1].strip() if answers else None


def _plain(text: str) -> str:
  return ' '.join(text.split())
