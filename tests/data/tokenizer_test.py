"""Tests of the tokenizer: exact round trips, ids that mean what they say."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from experiments import train_tokenizer
from r1jax import config as config_lib
from r1jax.data import corpus, tokenizer
from r1jax.data.tasks import arithmetic

_HARD_TEXTS = (
  '',
  ' ',
  '  two  spaces  ',
  '\n\t\r\n\x0b\x00\x01 ',
  '\u2581',
  'a\u2581 \u2581\u2581b',
  '\ufeffbom\ufffd\ufffe\U0010ffff',
  'e\u0301 é ﬁ ½ Å K \u00a0\u3000\u200b',
  '１２３ ٣ ² ①',
  '<think>a</think><answer>1</answer><s></s><unk><pad><0x41>',
  '<think><think> </think',
  '🧮 数学 математика',
)
# st.text would first build a table of all unicode, which takes seconds.
_CHARACTERS = st.one_of(
  st.integers(0, 0x2FF),
  st.integers(0x2000, 0x30FF),
  st.integers(0, 0xD7FF),
  st.integers(0xE000, 0x10FFFF),
).map(chr)


@pytest.fixture(scope='module')
def default() -> tokenizer.Tokenizer:
  return tokenizer.default()


@pytest.mark.parametrize('text', _HARD_TEXTS)
def test_round_trip_of_hard_texts(default, text):
  assert default.decode(default.encode(text)) == text
  assert default.encode_batch([text, 'x'])[0] == default.encode(text)


@hypothesis.given(
  st.lists(
    st.one_of(
      st.lists(_CHARACTERS, max_size=20).map(''.join),
      st.sampled_from([*tokenizer.TAGS, '\u2581', ' ', ', tens: ', '，']),
    ),
    max_size=6,
  ).map(''.join)
)
def test_round_trip_of_any_text(text):
  default = tokenizer.default()
  ids = default.encode(text)
  assert default.decode(ids) == text
  assert b''.join(map(default.bytes_of, ids)) == text.encode()
  assert default.encode_batch([text]) == [ids]


def test_a_lone_surrogate_is_refused(default):
  with pytest.raises(ValueError):
    default.encode('\ud800')


def test_special_ids(default):
  assert (default.pad_id, default.eos_id, default.bos_id, default.unk_id) == (
    0,
    1,
    2,
    3,
  )
  assert default.encode('<think>1</think><answer>2</answer>') == [
    default.think_id,
    *default.encode('1'),
    default.end_think_id,
    default.answer_id,
    *default.encode('2'),
    default.end_answer_id,
  ]
  # Text that looks like a control piece is not one.
  assert not set(default.encode('<s></s><unk><pad>')) & {0, 1, 2, 3}


@pytest.mark.parametrize('text', ['0123456789', '1000', 'x12y', '，7、8'])
def test_each_digit_is_one_token(default, text):
  printed = [default.bytes_of(i) for i in default.encode(text)]
  assert [p for p in printed if p.isdigit()] == [
    c.encode() for c in text if c.isdigit()
  ]


def test_no_piece_joins_a_digit_with_anything(default):
  for i in range(default.vocab_size):
    text = default.bytes_of(i)
    assert len(text) == 1 or not any(chr(c).isdigit() for c in text), text


def test_no_piece_goes_past_a_newline(default):
  # So a prompt has the same ids alone as before its completion.
  for i in range(default.vocab_size):
    assert b'\n' not in default.bytes_of(i)[:-1]


def test_clean_answers_are_digit_pieces(default):
  config = corpus.CorpusConfig(
    arithmetic.ArithmeticConfig(maximum=1000), 1.0, 0.0, 0.0, 0.0, 0.0, 0.0
  )
  for index in range(100):
    _, text, _ = corpus.document(config, 0, index)
    ids = default.encode(text)
    inside = ids[ids.index(default.answer_id) + 1 : -1]
    assert ids[-1] == default.end_answer_id
    assert all(default.id_to_piece(i) in '0123456789' for i in inside)


def test_decode_skips_control_ids_and_ids_past_the_vocabulary(default):
  a, b = default.encode('1')[0], default.encode('2')[0]
  ids = [2, a, 0, default.vocab_size, 10**6, -1, 3, b, 1]
  assert default.decode(ids) == '12'
  assert default.bytes_of(default.vocab_size) == b''
  assert str(default.vocab_size) in default.id_to_piece(default.vocab_size)


def test_byte_pieces_decode_exactly(default):
  byte_ids = {
    default.id_to_piece(i): i
    for i in range(default.vocab_size)
    if default.id_to_piece(i).startswith('<0x')
  }
  assert len(byte_ids) == 256
  for text in ('7', 'é', '数', '\u2581', '🧮', ' '):
    ids = [byte_ids[f'<0x{byte:02X}>'] for byte in text.encode()]
    assert default.decode(ids) == text
  assert default.decode([byte_ids['<0xE6>']]) == '\ufffd'


def test_training_is_deterministic():
  texts = list(itertools.islice(train_tokenizer.arithmetic_texts(), 1000))
  one, two = (train_tokenizer.train(iter(texts), 350) for _ in range(2))
  assert one == two


@pytest.mark.slow
def test_the_packaged_model_is_what_the_program_trains(default):
  trained = tokenizer.Tokenizer(
    train_tokenizer.train(train_tokenizer.arithmetic_texts(), 384)
  )
  assert [trained.id_to_piece(i) for i in range(trained.vocab_size)] == [
    default.id_to_piece(i) for i in range(default.vocab_size)
  ]


def test_a_missing_or_broken_model_is_one_clear_line(tmp_path):
  with pytest.raises(config_lib.UserError, match='none.model'):
    tokenizer.Tokenizer.load(tmp_path / 'none.model')
  broken = tmp_path / 'broken.model'
  broken.write_bytes(b'not a model')
  with pytest.raises(config_lib.UserError, match='broken.model'):
    tokenizer.Tokenizer.load(broken)


def test_too_small_a_vocabulary_is_a_user_error():
  with pytest.raises(config_lib.UserError, match='vocab_size=100'):
    train_tokenizer.train(iter(['1+2=3', 'abc']), 100)
