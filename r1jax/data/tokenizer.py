"""A sentencepiece tokenizer with byte fallback and an exact round trip."""

import functools
import os
from collections.abc import Iterable, Sequence
from importlib import resources

import sentencepiece

from r1jax import config as config_lib

TAGS = ('<think>', '</think>', '<answer>', '</answer>')
# sentencepiece writes a space as this character and cannot tell the two
# apart, so the character itself is spelt in byte pieces.
_SPACE_MARK = '\u2581'


class Tokenizer:
  """Text to ids and back; `decode(encode(text)) == text` for any unicode.

  Attributes:
    vocab_size: Number of ids.
    pad_id: Fills rows; prints nothing, as do the next three.
    eos_id: Ends a document.
    bos_id: Begins a document.
    unk_id: Never produced, since unknown characters fall back to bytes.
    stop_ids: Only eos_id; other tokenizers may have several.
    think_id: '<think>', and so on for the other three tags.
    end_think_id: '</think>'.
    answer_id: '<answer>'.
    end_answer_id: '</answer>'.
  """

  def __init__(self, model: bytes):
    """Builds it from the bytes of a model that `train` made.

    Raises:
      ValueError: The model is no sentencepiece model, or lacks byte pieces
        or tags.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(model)
    except RuntimeError as e:
      raise ValueError(f'this is no sentencepiece model: {e}') from e
    self._processor = processor
    self.vocab_size: int = processor.get_piece_size()
    self.pad_id: int = processor.pad_id()
    self.eos_id: int = processor.eos_id()
    self.stop_ids: tuple[int, ...] = (self.eos_id,)
    self.bos_id: int = processor.bos_id()
    self.unk_id: int = processor.unk_id()
    tags = [processor.piece_to_id(tag) for tag in TAGS]
    mark = [
      processor.piece_to_id(f'<0x{byte:02X}>') for byte in _SPACE_MARK.encode()
    ]
    if self.unk_id in tags or self.unk_id in mark:
      raise ValueError(f'the model must have byte pieces and the tags {TAGS}')
    self.think_id, self.end_think_id, self.answer_id, self.end_answer_id = tags
    self._space_mark_ids = mark
    self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Tokenizer':
    """Reads a model file.

    Raises:
      UserError: The file is missing or is not such a model.
    """
    try:
      with open(path, 'rb') as f:
        return cls(f.read())
    except OSError as e:
      raise config_lib.UserError(
        f'cannot read tokenizer {os.fspath(path)!r}: {e.strerror}'
      ) from e
    except ValueError as e:
      raise config_lib.UserError(f'tokenizer {os.fspath(path)!r}: {e}') from e

  def encode(self, text: str) -> list[int]:
    """Turns text into ids, without bos or eos; tags become their own ids.

    Raises:
      UnicodeEncodeError: A lone surrogate, which is no text.
    """
    if _SPACE_MARK in text:
      return self._encode_space_marks(text)
    try:
      return self._processor.encode(text)
    except RuntimeError:
      text.encode()  # Says which character it is.
      raise

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes many texts at once; raises as `encode` does."""
    if any(_SPACE_MARK in text for text in texts):
      return [self.encode(text) for text in texts]
    try:
      # One thread: starting more costs more than these short texts do.
      return self._processor.encode(list(texts), num_threads=1)
    except RuntimeError:
      ''.join(texts).encode()
      raise

  def _encode_space_marks(self, text: str) -> list[int]:
    ids = []
    for i, part in enumerate(text.split(_SPACE_MARK)):
      if i:
        ids += self._space_mark_ids
      ids += self.encode(part)
    return ids

  def decode(self, ids: Iterable[int]) -> str:
    """Turns ids into text; control ids and ids past the vocabulary vanish.

    Bytes that are no UTF-8 become U+FFFD.
    """
    return b''.join(map(self.bytes_of, ids)).decode(errors='replace')

  def bytes_of(self, token_id: int) -> bytes:
    """Returns what one id prints: nothing for control and unknown ids."""
    if 0 <= token_id < self.vocab_size:
      return self._bytes[token_id]
    return b''

  def id_to_piece(self, token_id: int) -> str:
    """Names one id for people, with ▁ for spaces and <0x41> for bytes."""
    if 0 <= token_id < self.vocab_size:
      return self._processor.id_to_piece(int(token_id))
    return f'<{token_id}>'

  def _piece_bytes(self, token_id: int) -> bytes:
    processor = self._processor
    if processor.is_control(token_id) or processor.is_unknown(token_id):
      return b''
    piece = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
      return bytes([int(piece[3:-1], 16)])
    return piece.replace(_SPACE_MARK, ' ').encode()


@functools.cache
def default() -> Tokenizer:
  """Returns the arithmetic tokenizer that ships with the package."""
  return Tokenizer(default_model())


def default_model() -> bytes:
  """Returns the sentencepiece model file of `default`."""
  asset = resources.files('r1jax.data') / 'assets' / 'arithmetic.model'
  return asset.read_bytes()
