"""The rule rewards on strings: the readable twin of `rule`.

The package's docstring defines format and accuracy.
"""

import html
import re
from collections.abc import Sequence

import numpy as np

from r1jax.rl.reward import rule

# Text never holds a bare '<' here, so [^<]* is text without a tag.
_FORMAT = re.compile(
  r'<think>[^<]*</think>[ \n\t\r]*'
  r'<answer>(?=[^<]*[^< \n\t\r])[^<]*</answer>[ \n\t\r]*<eos>'
)
_ANSWER = re.compile(r'<answer>([^<]*)</answer>')
_INTEGER = re.compile(r'0|-?[1-9][0-9]*', re.ASCII)


def format_reward(completion_ids: Sequence[int], tokenizer) -> float:
  """Returns 1.0 if the completion has the format, else 0.0."""
  return float(bool(_FORMAT.fullmatch(_render(completion_ids, tokenizer))))


def accuracy_reward(
  completion_ids: Sequence[int], answer: str, tokenizer
) -> float:
  """Returns 1.0 if the extracted answer is the canonical integer `answer`."""
  check_answer(answer)
  return float(extract_answer(completion_ids, tokenizer) == answer)


def extract_answer(completion_ids: Sequence[int], tokenizer) -> str | None:
  """Returns the stripped text of the last <answer>…</answer>, or None."""
  contents = _ANSWER.findall(_render(completion_ids, tokenizer))
  return html.unescape(contents[-1]).strip(' \n\t\r') if contents else None


def check_answer(answer: str) -> None:
  """Raises ValueError unless `answer` is an integer written canonically."""
  if not _INTEGER.fullmatch(answer):
    raise ValueError(
      f'answer={answer!r} must be an integer in ASCII digits, without leading '
      'zeros or a plus sign'
    )


def answer_ids(answers: Sequence[str], *, width: int) -> np.ndarray:
  """Writes gold answers as int32 [B, width] indices into rule.SYMBOLS.

  Args:
    answers: Canonical integers.
    width: Most characters of an answer; the rest of a row is -1.

  Raises:
    ValueError: An answer is not a canonical integer or longer than `width`.
  """
  ids_BA = np.full((len(answers), width), -1, np.int32)
  for row, answer in enumerate(answers):
    check_answer(answer)
    if len(answer) > width:
      raise ValueError(f'answer={answer!r} is longer than width={width}')
    ids_BA[row, : len(answer)] = [rule.SYMBOLS.index(c) for c in answer]
  return ids_BA


def _render(completion_ids: Sequence[int], tokenizer) -> str:
  """Prints tokens up to <eos> as markup, with '<' and '&' of text escaped."""
  tags = {
    tokenizer.think_id: b'<think>',
    tokenizer.end_think_id: b'</think>',
    tokenizer.answer_id: b'<answer>',
    tokenizer.end_answer_id: b'</answer>',
    tokenizer.eos_id: b'<eos>',
  }
  printed = []
  for token in map(int, completion_ids):
    if token in tags:
      printed.append(tags[token])
    elif 0 <= token < tokenizer.vocab_size:
      text = tokenizer.bytes_of(token)
      printed.append(text.replace(b'&', b'&amp;').replace(b'<', b'&lt;'))
    if token == tokenizer.eos_id:
      break
  # Bytes are joined first: a character may span several byte pieces.
  return b''.join(printed).decode('utf-8', errors='replace')
