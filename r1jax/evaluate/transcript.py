"""A completion on a terminal: the thinking apart from the answer."""

import codecs
from collections.abc import Iterable, Mapping
from typing import Any

import rich.console

from r1jax.data import tokenizer as tokenizer_lib
from r1jax.evaluate import completions

_STYLES = {'thinking': 'dim', 'answer': 'bold', 'text': ''}
# By the kinds of `completions.split`.
_SECTIONS = {'think': 'thinking', 'answer': 'answer', 'tag': 'text'}


class Writer:
  """Prints a completion as its tokens come, in labelled sections.

  On a terminal thinking is dim and the answer bold. Characters appear once
  all their bytes are there.
  """

  def __init__(
    self,
    tokenizer: tokenizer_lib.Tokenizer,
    console: rich.console.Console,
    *,
    is_thinking: bool = False,
  ):
    """Starts a completion; `is_thinking` if its prompt opened the thinking."""
    self._tokenizer, self._console = tokenizer, console
    self._decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    self._section = 'text'
    self._is_line_open = False
    t = tokenizer
    self._opening = {t.think_id: 'thinking', t.answer_id: 'answer'}
    self._closing = {t.end_think_id: 'thinking', t.end_answer_id: 'answer'}
    if is_thinking:
      self._enter('thinking')
      self._label('thinking')

  def write(self, token_id: int) -> None:
    """Prints one more token."""
    if self._section == 'text' and token_id in self._opening:
      self._enter(self._opening[token_id])
      self._label(self._section)
    elif self._closing.get(token_id) == self._section:
      self._enter('text')
    else:
      data = self._tokenizer.bytes_of(token_id)
      self._print(self._decoder.decode(data))

  def close(self) -> None:
    """Ends the completion and its line."""
    self._enter('text')

  def _enter(self, section: str) -> None:
    self._print(self._decoder.decode(b'', final=True))
    self._decoder.reset()
    if self._is_line_open:
      self._console.out()
      self._is_line_open = False
    self._section = section

  def _label(self, name: str) -> None:
    self._console.out(f'{name}:', style=_STYLES[name], highlight=False)

  def _print(self, text: str) -> None:
    if not text:
      return
    style = _STYLES[self._section]
    self._console.out(printable(text), style=style, end='', highlight=False)
    self._is_line_open = not text.endswith('\n')


def show(
  console: rich.console.Console, title: str, row: Mapping[str, Any]
) -> None:
  """Prints a finished completion.

  Args:
    console: Where to.
    title: Who said it.
    row: 'prompt', 'completion', 'gold', all text.
  """
  is_right = completions.answer(row['completion']) == row['gold']
  verdict = 'right' if is_right else f'wrong, the answer is {row["gold"]}'
  prompt = printable(row['prompt'].strip())
  console.out(f'  {title}: {prompt}  ({verdict})', highlight=False)
  for kind, text in completions.split(row['completion']):
    section = _SECTIONS.get(kind, 'text')
    lines = _indent(printable(text.strip('\n')).split('\n'))
    console.out(
      f'    {section:9}{lines}', style=_STYLES[section], highlight=False
    )


def printable(text: str) -> str:
  """Spells out control characters: a model must not steer the terminal."""
  spell = lambda c: c.encode('unicode_escape').decode()
  return ''.join(
    c if c.isprintable() or c in '\n\t' else spell(c) for c in text
  )


def _indent(lines: Iterable[str]) -> str:
  return ('\n' + ' ' * 13).join(lines)
