"""HTML that is escaped where it is built, not where someone remembers to."""

import html
import re
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({'br', 'input', 'meta', 'wbr'})
# Control characters, bidirectional overrides and isolates, lone surrogates:
# all of them could change how the text around them is read, or written.
_UNSAFE = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e'
  '\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]'
)


class Html(str):
  """Text that is markup already; `tag` escapes everything else."""


def text(value: Any) -> Html:
  r"""Escapes a value for element content and quoted attributes.

  Characters without a visible form appear as their code, for instance \x1b.
  """
  visible = _UNSAFE.sub(_code, str(value).replace('\r\n', '\n'))
  return Html(html.escape(visible, quote=True))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
  """Builds one element.

  Args:
    name: Element name.
    *children: Html goes in as it is, lists and generators are flattened, None
      is dropped, anything else is escaped.
    **attributes: `class_` gives class, `data_x` gives data-x; True gives a
      bare attribute, None and False give none.
  """
  parts = []
  for key, value in attributes.items():
    if value is None or value is False:
      continue
    key = key.rstrip('_').replace('_', '-')
    parts.append(f' {key}' if value is True else f' {key}="{text(value)}"')
  opening = f'<{name}{"".join(parts)}>'
  if name in _VOID:
    return Html(opening)
  return Html(f'{opening}{join(children)}</{name}>')


def join(children: Any) -> Html:
  """Concatenates children, see `tag`."""
  if children is None:
    return Html('')
  if isinstance(children, Html):
    return children
  if isinstance(children, str) or not isinstance(children, Iterable):
    return text(children)
  return Html(''.join(join(child) for child in children))


def _code(match: re.Match[str]) -> str:
  code = ord(match[0])
  return f'\\x{code:02x}' if code < 0x100 else f'\\u{code:04x}'
