"""The tokenizer of a Hugging Face model folder, read without transformers."""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from r1jax import config as config_lib
from r1jax.data import piece_bytes
from r1jax.data import tokenizer as tokenizer_lib

_SENTENCEPIECE = 'tokenizer.model'
# What models add or drop spaces around, and a sign that they rewrite.
_PROBE = ' a  \u00bd '
_NAMED = ('bos_token', 'eos_token', 'pad_token', 'unk_token')


class HfTokenizer:
  """Text to ids and back, with the surface of `tokenizer.Tokenizer`.

  `decode(encode(text)) == text` for any text without special tokens that the
  model's own normalizer leaves alone: DeepSeek's leaves everything, Qwen's
  composes (NFC).

  Attributes:
    vocab_size: One more than the largest id; a model may have more rows.
    pad_id: Fills rows; eos_id where the folder names no padding token.
    eos_id: Ends a document or a turn.
    stop_ids: eos_id and the other ids at which the model's own generation
      config stops.
    bos_id: Begins a document; None where none does, as in Qwen.
    unk_id: Stands for what has no id; None where there is no such token.
    think_id: '<think>', and so on for the other three tags; None where the
      tag is not a single token.
    end_think_id: '</think>'.
    answer_id: '<answer>'.
    end_answer_id: '</answer>'.
  """

  def __init__(
    self, model: str, settings: Mapping[str, Any], eos_ids: Sequence[int] = ()
  ):
    """Builds it from what the files of a folder hold.

    Args:
      model: The text of tokenizer.json.
      settings: The content of tokenizer_config.json.
      eos_ids: Further ids that end a completion.

    Raises:
      ValueError: tokenizer.json is none, is of a kind whose pieces have no
        known bytes, or a token that settings name is missing.
    """
    try:
      processor = tokenizers.Tokenizer.from_str(model)
    except Exception as e:  # The library raises no narrower one.
      raise ValueError(f'tokenizer.json is no tokenizer: {e}') from e
    # Files saved after training may cut or pad whatever is encoded.
    processor.no_truncation()
    processor.no_padding()
    self._processor = processor
    pieces = processor.get_vocab(with_added_tokens=True)
    self.vocab_size: int = max(pieces.values(), default=-1) + 1
    named = {name: _named_id(settings, name, processor) for name in _NAMED}
    eos_id = named['eos_token']
    stop_ids = [*eos_ids] if eos_id is None else [eos_id, *eos_ids]
    if not stop_ids:
      raise ValueError(
        'tokenizer_config.json has no eos_token, and neither '
        'generation_config.json nor config.json an eos_token_id'
      )
    self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(stop_ids))
    self.eos_id: int = self.stop_ids[0]
    pad_id = named['pad_token']
    self.pad_id: int = self.eos_id if pad_id is None else pad_id
    self.unk_id: int | None = named['unk_token']
    self.bos_id: int | None = named['bos_token']
    if not _begins_with_bos(settings, processor, self.bos_id):
      self.bos_id = None
    tags = [self._tag_id(tag) for tag in tokenizer_lib.TAGS]
    self.think_id, self.end_think_id, self.answer_id, self.end_answer_id = tags
    added = processor.get_added_tokens_decoder()
    control_ids = {
      token_id
      for token_id, token in added.items()
      if token.special or token_id in named.values()
    }.difference(tags)
    decoder = json.loads(model).get('decoder')
    self._strips_space = piece_bytes.strips_space(decoder)
    printed = piece_bytes.make_printed(
      decoder, {token.content for token in added.values()}
    )
    self._bytes = [b''] * self.vocab_size
    for piece, token_id in pieces.items():
      if token_id not in control_ids:
        self._bytes[token_id] = printed(piece)

  @classmethod
  def load(cls, folder: str | os.PathLike[str]) -> 'HfTokenizer':
    """Reads a model's folder: tokenizer.json, tokenizer_config.json and eos.

    Raises:
      UserError: A file is missing or broken, or the folder's tokenizer is a
        tiktoken file.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
      raise config_lib.UserError(f'tokenizer {str(folder)!r} is no folder')
    _refuse_tiktoken(folder)
    model = _read(folder / 'tokenizer.json')
    settings = _read_object(folder / 'tokenizer_config.json')
    eos_ids = _read_eos_ids(folder)
    try:
      return cls(model, settings, eos_ids)
    except ValueError as e:
      raise config_lib.UserError(f'{folder}: {e}') from e

  def encode(self, text: str) -> list[int]:
    """Turns text into ids; special tokens written in it become their ids.

    Nothing is added before or after.

    Raises:
      UnicodeEncodeError: A lone surrogate, which is no text.
    """
    try:
      return self._processor.encode(text, add_special_tokens=False).ids
    except TypeError:
      text.encode()  # Says which character it is.
      raise

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Encodes many texts at once, on all cores; raises as `encode` does."""
    try:
      encodings = self._processor.encode_batch_fast(
        list(texts), add_special_tokens=False
      )
    except TypeError:
      ''.join(texts).encode()
      raise
    return [encoding.ids for encoding in encodings]

  def decode(self, ids: Iterable[int]) -> str:
    """Turns ids into text; control ids and ids past the vocabulary vanish.

    Think and answer tags print as themselves. Bytes that are no UTF-8 become
    U+FFFD. Where `encode` puts a space in front, as Llama-2's does, one
    leading space is taken off again.
    """
    printed = b''.join(map(self.bytes_of, ids))
    if self._strips_space:
      printed = printed.removeprefix(b' ')
    return printed.decode(errors='replace')

  def bytes_of(self, token_id: int) -> bytes:
    """Returns what one id prints: nothing for control and unknown ids."""
    if 0 <= token_id < self.vocab_size:
      return self._bytes[token_id]
    return b''

  def id_to_piece(self, token_id: int) -> str:
    """Names one id for people, with ▁ for spaces and <0x41> for bytes."""
    printed = self.bytes_of(token_id)
    if not printed:
      piece = None
      if 0 <= token_id < self.vocab_size:
        piece = self._processor.id_to_token(int(token_id))
      return f'<{token_id}>' if piece is None else piece
    try:
      return printed.decode().replace(' ', piece_bytes.SPACE_MARK)
    except UnicodeDecodeError:
      return ''.join(f'<0x{byte:02X}>' for byte in printed)

  def _tag_id(self, tag: str) -> int | None:
    token_id = self._processor.token_to_id(tag)
    return token_id if token_id in self.encode(tag) else None


def load_tokenizer(
  path: str | os.PathLike[str],
) -> tokenizer_lib.Tokenizer | HfTokenizer:
  """Loads whichever tokenizer a path names.

  Args:
    path: A Hugging Face folder, a sentencepiece model file, or '' for the
      arithmetic tokenizer that ships. A folder without tokenizer.json may hold
      a sentencepiece model, tokenizer.model.

  Raises:
    UserError: There is no such path, or it holds no tokenizer.
  """
  if not os.fspath(path):
    return tokenizer_lib.default()
  if os.path.isdir(path):
    folder = pathlib.Path(path)
    model = folder / _SENTENCEPIECE
    if model.exists() and not (folder / 'tokenizer.json').exists():
      return _load_sentencepiece(model, _read_eos_ids(folder))
    return HfTokenizer.load(path)
  if os.path.basename(path) == 'tokenizer.json':
    raise config_lib.UserError(
      f'tokenizer {os.fspath(path)!r}: name the folder that holds it'
    )
  return _load_sentencepiece(path)


def _load_sentencepiece(
  path: str | os.PathLike[str], eos_ids: Sequence[int] = ()
) -> tokenizer_lib.Tokenizer:
  """Its own bos, eos and pad hold; eos_ids are further ids to stop at.

  Raises:
    UserError: The model lacks what ours must have.
  """
  tokenizer = tokenizer_lib.Tokenizer.load(path)
  for name in ('bos', 'eos', 'pad'):
    if getattr(tokenizer, f'{name}_id') < 0:
      raise config_lib.UserError(
        f'tokenizer {os.fspath(path)!r} has no {name} piece, it must have one'
      )
  found = tokenizer.decode(tokenizer.encode(_PROBE))
  if found != _PROBE:
    raise config_lib.UserError(
      f'tokenizer {os.fspath(path)!r} makes {found!r} of {_PROBE!r}, it must '
      'leave text as it is: no space in front, no normalization'
    )
  tokenizer.stop_ids = tuple(dict.fromkeys([tokenizer.eos_id, *eos_ids]))
  return tokenizer


# ---- Files ----------------------------------------------------------------


def _refuse_tiktoken(folder: pathlib.Path) -> None:
  if (folder / 'tokenizer.json').exists():
    return
  for path in sorted(folder.iterdir()):
    if path.name == 'tiktoken.model' or path.suffix == '.tiktoken':
      raise config_lib.UserError(
        f'{path}: a tiktoken file cannot be read, the folder must hold a '
        'tokenizer.json made from it'
      )


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding='utf-8')
  except FileNotFoundError as e:
    raise config_lib.UserError(f'{path} does not exist') from e
  except OSError as e:
    raise config_lib.UserError(f'{path}: {e.strerror}') from e
  except UnicodeDecodeError as e:
    raise config_lib.UserError(f'{path} is not UTF-8 text') from e


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  text = _read(path)
  try:
    values = json.loads(text)
  except ValueError as e:
    raise config_lib.UserError(f'{path} is no JSON: {e}') from e
  if not isinstance(values, dict):
    raise config_lib.UserError(f'{path} holds no JSON object')
  return values


def _read_eos_ids(folder: pathlib.Path) -> list[int]:
  """What generation stops at: generation_config.json's ids, else config's."""
  for name in ('generation_config.json', 'config.json'):
    path = folder / name
    value = (_read_object(path) if path.exists() else {}).get('eos_token_id')
    if value is None:
      continue
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
      raise config_lib.UserError(
        f'{path}: eos_token_id={value!r} must be an id or a list of ids'
      )
    return ids
  return []


# ---- What the files mean --------------------------------------------------


def _named_id(
  settings: Mapping[str, Any], name: str, processor: tokenizers.Tokenizer
) -> int | None:
  """The id of a token that tokenizer_config.json names; None if it does not."""
  value = settings.get(name)
  if value is None:
    return None
  text = value.get('content') if isinstance(value, dict) else value
  if not isinstance(text, str):
    raise ValueError(
      f'tokenizer_config.json: {name}={value!r} must be text or hold "content"'
    )
  token_id = processor.token_to_id(text)
  if token_id is None:
    raise ValueError(
      f'tokenizer_config.json: {name}={text!r} is no token of tokenizer.json'
    )
  return token_id


def _begins_with_bos(
  settings: Mapping[str, Any],
  processor: tokenizers.Tokenizer,
  bos_id: int | None,
) -> bool:
  """Says whether documents begin with bos: some models name one for nothing.

  add_bos_token says it; without, the post-processor does.
  """
  add_bos = settings.get('add_bos_token')
  return (
    processor.encode('').ids[:1] == [bos_id] if add_bos is None else add_bos
  )
