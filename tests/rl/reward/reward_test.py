"""Rule rewards: known cases, and the device against its string twin."""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from r1jax.data import tokenizer as tokenizer_lib
from r1jax.rl.reward import rule, strings

_WIDTH = 4
_LENGTH = 24
_ANSWERS = ('0', '7', '63', '632', '-5', '1000')
_CONTROLS = {
  '<pad>': 0,
  '<eos>': 1,
  '<bos>': 2,
  '<think>': 4,
  '</think>': 5,
  '<answer>': 6,
  '</answer>': 7,
}
# Pieces that a trained vocabulary may hold, and some that would be awkward.
_PIECES = (
  [*'0123456789', '-', ' ', '\n', '\t', '<', '>', '/', 'think', 'answer', 'a']
  + [', ', ' \n', '等于', '是 ', ' 6', '3 ', '\n-', '--', '- 5', '6a', '&lt;']
  + ['<think>', '</answer>', '٣', '\u3000', '\x00']
)


class _Tokenizer:
  """Controls and tags, then all 256 byte pieces, then _PIECES."""

  pad_id, eos_id, bos_id, think_id, end_think_id = 0, 1, 2, 4, 5
  answer_id, end_answer_id = 6, 7
  vocab_size = 8 + 256 + len(_PIECES)

  def bytes_of(self, token: int) -> bytes:
    if token < 8:
      # A tokenizer may or may not print its tags.
      return b'<think>' if token == 4 else b''
    if token < 264:
      return bytes([token - 8])
    return _PIECES[token - 264].encode()

  def ids(self, *parts: str | bytes) -> list[int]:
    """Piece or control by name; bytes become byte pieces."""
    ids = []
    for part in parts:
      if isinstance(part, bytes):
        ids += [8 + byte for byte in part]
      elif part in _CONTROLS:
        ids.append(_CONTROLS[part])
      else:
        ids.append(264 + _PIECES.index(part))
    return ids


_TOKENIZER = _Tokenizer()


@functools.cache
def _vocabulary() -> rule.Vocabulary:
  return rule.make_vocabulary(_TOKENIZER)


@jax.jit
def _device(tokens_BT, mask_BT, answer_BA, vocabulary):
  return (
    rule.format_reward(tokens_BT, mask_BT, vocabulary),
    rule.accuracy_reward(tokens_BT, mask_BT, answer_BA, vocabulary),
  )


def _twin(tokens_T, mask_T, answer):
  ids = tokens_T[mask_T > 0].tolist()
  return (
    strings.format_reward(ids, _TOKENIZER),
    strings.accuracy_reward(ids, answer, _TOKENIZER),
  )


_OPEN = ('<think>', 'a', '</think>', '<answer>')
_CLOSE = ('</answer>', '<eos>')


# Each: what is sampled, the gold answer, format, accuracy.
_CASES = {
  'clean': ((*_OPEN, '6', '3', *_CLOSE), '63', 1, 1),
  'empty thought': (
    ('<think>', '</think>', '<answer>', '7', *_CLOSE),
    '7',
    1,
    1,
  ),
  'wrong digit': ((*_OPEN, '6', '4', *_CLOSE), '63', 1, 0),
  'too short': ((*_OPEN, '6', *_CLOSE), '63', 1, 0),
  'too long': ((*_OPEN, '6', '3', '2', *_CLOSE), '63', 1, 0),
  'byte digits': ((*_OPEN, b'6', '3', b'2', *_CLOSE), '632', 1, 1),
  'byte whitespace': ((*_OPEN, b' \n', '7', b'\t\r', *_CLOSE), '7', 1, 1),
  'wide piece': ((*_OPEN, ' 6', '3 ', *_CLOSE), '63', 1, 1),
  'space inside': ((*_OPEN, '6', ' ', '3', *_CLOSE), '63', 1, 0),
  'space in piece': ((*_OPEN, '6', '3 ', '2', *_CLOSE), '632', 1, 0),
  'space before piece': ((*_OPEN, '3', ' 6', *_CLOSE), '36', 1, 0),
  'negative': ((*_OPEN, '\n-', b'5', *_CLOSE), '-5', 1, 1),
  'sign dropped': ((*_OPEN, '5', *_CLOSE), '-5', 1, 0),
  'sign added': ((*_OPEN, '-', '5', *_CLOSE), '5', 1, 0),
  'minus apart': ((*_OPEN, '- 5', *_CLOSE), '-5', 1, 0),
  'leading zero': ((*_OPEN, '0', '7', *_CLOSE), '7', 1, 0),
  'arabic digit': ((*_OPEN, '٣', *_CLOSE), '3', 1, 0),
  'unit': ((*_OPEN, '6', 'a', *_CLOSE), '6', 1, 0),
  'control inside': ((*_OPEN, '6', '<pad>', '3', *_CLOSE), '63', 1, 1),
  'empty answer': ((*_OPEN, *_CLOSE), '7', 0, 0),
  'blank answer': ((*_OPEN, ' ', b'\n', *_CLOSE), '7', 0, 0),
  'wide blank answer': ((*_OPEN, '\u3000', *_CLOSE), '7', 1, 0),
  'broken character': ((*_OPEN, b'\xe7\xad', *_CLOSE), '7', 1, 0),
  'no eos': ((*_OPEN, '7', '</answer>'), '7', 0, 1),
  'no thought': (('<answer>', '7', *_CLOSE), '7', 0, 1),
  'text first': (('a', *_OPEN, '7', *_CLOSE), '7', 0, 1),
  'blank first': (('\n', *_OPEN, '7', *_CLOSE), '7', 0, 1),
  'blank between': (
    ('<think>', '</think>', ' \n', '<answer>', '7', *_CLOSE),
    '7',
    1,
    1,
  ),
  'text between': (
    ('<think>', '</think>', ', ', '<answer>', '7', *_CLOSE),
    '7',
    0,
    1,
  ),
  'blank after': ((*_OPEN, '7', '</answer>', ' \n', '<eos>'), '7', 1, 1),
  'text after': ((*_OPEN, '7', '</answer>', 'a', '<eos>'), '7', 0, 1),
  'two thoughts': (('<think>', *_OPEN, '7', *_CLOSE), '7', 0, 1),
  'two answers, last counts': (
    (*_OPEN, '6', '</answer>', '<answer>', '7', *_CLOSE),
    '7',
    0,
    1,
  ),
  'two answers, first does not': (
    (*_OPEN, '7', '</answer>', '<answer>', '6', *_CLOSE),
    '7',
    0,
    0,
  ),
  'open again': ((*_OPEN, '7', '</answer>', '<answer>', '<eos>'), '7', 0, 1),
  'opened twice': ((*_OPEN, '6', '<answer>', '7', *_CLOSE), '7', 0, 1),
  'tag in answer': ((*_OPEN, '7', '<think>', *_CLOSE), '7', 0, 0),
  'wrong order': (('</answer>', '7', '<answer>', '<eos>'), '7', 0, 0),
  'spelt tag': (
    ('<', 'think', '>', '</think>', '<answer>', '7', *_CLOSE),
    '7',
    0,
    1,
  ),
  'byte tag': ((b'<think>', '</think>', '<answer>', '7', *_CLOSE), '7', 0, 1),
  'spelt tag as text': (
    ('<think>', b'</think>', '</think>', '<answer>', '7', *_CLOSE),
    '7',
    1,
    1,
  ),
  'spelt end': ((*_OPEN, '7', '<', '/', 'answer', '>'), '7', 0, 0),
  'spelt end in answer': ((*_OPEN, '7', '</answer>'[:1], *_CLOSE), '7', 1, 0),
  'eos first': (('<eos>', *_OPEN, '7', *_CLOSE), '7', 0, 0),
  'eos inside': ((*_OPEN, '7', '<eos>', '</answer>'), '7', 0, 0),
  'eos twice': ((*_OPEN, '7', *_CLOSE, '<eos>', 'a'), '7', 1, 1),
  'nothing': ((), '7', 0, 0),
}


@pytest.fixture(scope='module')
def case_rewards():
  """Device rewards of all cases, after a prompt that is not sampled."""
  prompt = _TOKENIZER.ids('<bos>', '<answer>', '7', '</answer>', '<eos>')
  B = len(_CASES)
  tokens_BT = np.zeros((B, _LENGTH), np.int32)
  mask_BT = np.zeros((B, _LENGTH), np.float32)
  for row, (parts, *_) in enumerate(_CASES.values()):
    ids = _TOKENIZER.ids(*parts)
    stop = len(prompt) + len(ids)
    tokens_BT[row, :stop] = prompt + ids
    mask_BT[row, len(prompt) : stop] = 1
  gold_BA = strings.answer_ids(
    [case[1] for case in _CASES.values()], width=_WIDTH
  )
  format_B, accuracy_B = _device(tokens_BT, mask_BT, gold_BA, _vocabulary())
  return dict(zip(_CASES, zip(format_B, accuracy_B, strict=True), strict=True))


@pytest.mark.parametrize('name', _CASES)
def test_known_case(name, case_rewards):
  parts, gold, expected_format, expected_accuracy = _CASES[name]
  ids = _TOKENIZER.ids(*parts)
  expected = (expected_format, expected_accuracy)
  twin = (
    strings.format_reward(ids, _TOKENIZER),
    strings.accuracy_reward(ids, gold, _TOKENIZER),
  )
  assert twin == expected
  assert tuple(map(float, case_rewards[name])) == expected


def _near_miss(rng: random.Random) -> tuple[list[int], str]:
  """A right completion with a few tokens replaced, dropped or inserted."""
  gold = rng.choice(_ANSWERS)
  digits = [c if rng.random() < 0.7 else c.encode() for c in gold]
  blanks = [' ', b'\n', ' \n', b'\r', '<pad>']
  blank = lambda: [rng.choice(blanks)] * int(rng.random() < 0.2)  # noqa: E731
  parts = ['<think>', *blank(), 'a', '</think>', *blank(), '<answer>']
  parts += [*blank(), *digits, *blank(), '</answer>', *blank(), '<eos>']
  ids = _TOKENIZER.ids(*parts)
  for _ in range(rng.randrange(5)):
    place = rng.randrange(len(ids) + 1)
    token = _random_token(rng)
    edit = rng.randrange(4)
    if edit == 0:
      ids = ids[:place] + ids[place + 1 :]
    elif edit == 1:
      ids = ids[:place] + [token] + ids[place + 1 :]
    elif edit == 2:
      ids = ids[:place] + [token] + ids[place:]
    else:
      other = rng.randrange(len(ids) + 1)
      ids = ids[:place] + ids[place:other] + ids[place:]
  return ids, gold


def _random_token(rng: random.Random) -> int:
  kind = rng.randrange(4)
  if kind == 0:  # Controls and tags, eos among them.
    return rng.randrange(8)
  if kind == 1:  # ASCII that matters, as bytes.
    return 8 + rng.choice(b'0123456789- \n\t\r<>&/a\x00\xe7\xad')
  if kind == 2:
    return 264 + rng.randrange(len(_PIECES))
  return rng.randrange(-3, _TOKENIZER.vocab_size + 9)


# A seed has nothing to shrink.
@settings(max_examples=3, derandomize=True, phases=[Phase.generate])
@given(st.integers(0, 2**32 - 1))
def test_device_equals_twin(seed):
  rng = random.Random(seed)
  B = 1024
  tokens_BT = np.zeros((B, _LENGTH), np.int32)
  mask_BT = np.zeros((B, _LENGTH), np.float32)
  golds = []
  for row in range(B):
    if rng.random() < 0.8:
      ids, gold = _near_miss(rng)
    else:
      ids = [_random_token(rng) for _ in range(rng.randrange(_LENGTH))]
      gold = rng.choice(_ANSWERS)
    golds.append(gold)
    tokens_BT[row] = [_random_token(rng) for _ in range(_LENGTH)]
    start = rng.randrange(4)  # Before it stands a prompt; after it, junk.
    ids = ids[: _LENGTH - start]
    tokens_BT[row, start : start + len(ids)] = ids
    mask_BT[row, start : start + len(ids)] = rng.random() < 0.98
  gold_BA = strings.answer_ids(golds, width=_WIDTH)
  device = _device(tokens_BT, mask_BT, gold_BA, _vocabulary())
  device_B2 = np.stack([np.asarray(reward) for reward in device], axis=1)
  twin_B2 = np.array(
    [_twin(tokens_BT[row], mask_BT[row], golds[row]) for row in range(B)]
  )
  wrong = np.flatnonzero((device_B2 != twin_B2).any(1))
  shown = [
    (
      [_TOKENIZER.bytes_of(t) or t for t in tokens_BT[r][mask_BT[r] > 0]],
      golds[r],
      device_B2[r],
      twin_B2[r],
    )
    for r in wrong[:3]
    if ((tokens_BT[r] >= 0) & (tokens_BT[r] < _TOKENIZER.vocab_size)).all()
  ]
  assert not len(wrong), shown
  # The draw must not be all wrong or all right.
  assert (0.05 < twin_B2.mean(0)).all() and (twin_B2.mean(0) < 0.8).all()


def test_leading_axes():
  ids = _TOKENIZER.ids(*_OPEN, '6', '3', *_CLOSE)
  tokens_PGT = np.tile(np.array(ids, np.int32), (2, 3, 1))
  tokens_PGT[1, 2, 4] = _TOKENIZER.ids('7')[0]
  gold_P1A = strings.answer_ids(['63', '7'], width=_WIDTH)[:, None]
  format_PG, accuracy_PG = _device(
    jnp.asarray(tokens_PGT),
    np.ones(tokens_PGT.shape, np.float32),
    gold_P1A,
    _vocabulary(),
  )
  np.testing.assert_array_equal(format_PG, np.ones((2, 3)))
  np.testing.assert_array_equal(accuracy_PG, [[1, 1, 1], [0, 0, 0]])


def test_extract_answer_restores_text():
  ids = _TOKENIZER.ids('<answer>', ' ', '<', b'&lt;', '&lt;', b'\n', *_CLOSE)
  assert strings.extract_answer(ids, _TOKENIZER) == '<&lt;&lt;'
  assert strings.extract_answer(ids[:-2], _TOKENIZER) is None


def test_masked_gold_is_never_met():
  ids_1T = np.array([_TOKENIZER.ids('<answer>', *_CLOSE)], np.int32)
  none_1A = np.full((1, _WIDTH), -1, np.int32)
  _, accuracy_B = _device(ids_1T, np.ones_like(ids_1T), none_1A, _vocabulary())
  assert float(accuracy_B[0]) == 0


def test_answer_ids():
  ids_BA = strings.answer_ids(['632', '-5', '0'], width=3)
  np.testing.assert_array_equal(ids_BA, [[6, 3, 2], [10, 5, -1], [0, -1, -1]])
  for answer in ('', '07', '+7', '7.0', '-0', '٣', ' 7', '1000'):
    with pytest.raises(
      ValueError, match=f'answer={answer!r}'.replace('+', '.')
    ):
      strings.answer_ids([answer], width=3)


@pytest.mark.parametrize('piece', ['63', ' 63', '-5', '12\n'])
def test_piece_of_several_digits_is_refused(piece):
  class Joined(_Tokenizer):
    def bytes_of(self, token):
      return piece.encode() if token == 264 else super().bytes_of(token)

  with pytest.raises(ValueError, match='token 264 .* splits digits'):
    rule.make_vocabulary(Joined())


def test_package_tokenizer():
  tokenizer = tokenizer_lib.default()
  ids = tokenizer.encode('<think>300+47\n</think><answer>347</answer>')
  ids.append(tokenizer.eos_id)
  vocabulary = rule.make_vocabulary(tokenizer)
  tokens_1T = np.array([ids], np.int32)
  gold_1A = strings.answer_ids(['347'], width=_WIDTH)
  rewards = _device(tokens_1T, np.ones_like(tokens_1T), gold_1A, vocabulary)
  assert [float(reward[0]) for reward in rewards] == [1, 1]
  assert strings.format_reward(ids, tokenizer) == 1
  assert strings.accuracy_reward(ids, '347', tokenizer) == 1
