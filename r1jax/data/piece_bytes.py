"""What the pieces of a tokenizer.json print, by its decoder."""

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

SPACE_MARK = '\u2581'
_BYTE_PIECE = re.compile('<0x([0-9A-Fa-f]{2})>')


def make_printed(
  decoder: Mapping[str, Any] | None, added: Collection[str]
) -> Callable[[str], bytes]:
  """Chooses how a piece becomes the bytes that it prints.

  Args:
    decoder: As in tokenizer.json.
    added: Pieces that were added to the vocabulary as they are.

  Raises:
    ValueError: The decoder is of no kind that says it.
  """
  kinds = {step['type'] for step in _steps(decoder)}
  if 'ByteLevel' in kinds:
    byte_of = _byte_of_character()

    def byte_level(piece: str) -> bytes:
      if piece in added or not all(c in byte_of for c in piece):
        return piece.encode()
      return bytes(byte_of[c] for c in piece)

    return byte_level
  if 'ByteFallback' in kinds:

    def byte_fallback(piece: str) -> bytes:
      byte = _BYTE_PIECE.fullmatch(piece)
      return bytes([int(byte[1], 16)]) if byte else _spell(piece)

    return byte_fallback
  if 'Metaspace' in kinds:
    return _spell
  found = ', '.join(sorted(kinds)) or 'none'
  raise ValueError(
    f'tokenizer.json: decoder {found}, it must have a step ByteLevel, '
    'ByteFallback or Metaspace'
  )


def strips_space(decoder: Mapping[str, Any] | None) -> bool:
  """Says whether decoding takes off a space that encoding put in front."""
  return any(
    step.get('prepend_scheme', 'always') != 'never'
    if step['type'] == 'Metaspace'
    else step['type'] == 'Strip' and step['content'] == ' ' and step['start']
    for step in _steps(decoder)
  )


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
  if decoder is None:
    return []
  if decoder['type'] != 'Sequence':
    return [decoder]
  return [s for step in decoder['decoders'] for s in _steps(step)]


def _spell(piece: str) -> bytes:
  return piece.replace(SPACE_MARK, ' ').encode()


def _byte_of_character() -> dict[str, int]:
  """Byte-level pieces spell each byte as one printable character.

  Printable Latin-1 stands for itself; the other bytes, in order, for what
  follows U+00FF. Source: GPT-2's encoder.
  """
  plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = [byte for byte in range(256) if byte not in plain]
  return {chr(byte): byte for byte in plain} | {
    chr(256 + i): byte for i, byte in enumerate(others)
  }
