"""Tests of Hugging Face tokenizers: against the library, and round trips."""

import io
import json
from importlib import resources

import hypothesis
import pytest
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors, trainers

from r1jax import config as config_lib
from r1jax.data import hf_tokenizer, tokenizer
from tests.data import tiny_tokenizer

# st.text would first build a table of all unicode, which takes seconds.
_CHARACTERS = st.one_of(
  st.integers(0, 0x2FF),
  st.integers(0x2000, 0x30FF),
  st.integers(0, 0xD7FF),
  st.integers(0xE000, 0x10FFFF),
).map(chr)
_PIECES = [
  '<think>',
  '</think>',
  '\n\n',
  '  ',
  'answer',
  '<｜User｜>',
  '123456',
]
_TEXTS = st.lists(
  st.one_of(
    st.lists(_CHARACTERS, max_size=20).map(''.join), st.sampled_from(_PIECES)
  ),
  max_size=6,
).map(''.join)


@pytest.fixture(scope='module')
def deepseek(tmp_path_factory) -> hf_tokenizer.HfTokenizer:
  folder = tmp_path_factory.mktemp('deepseek')
  return hf_tokenizer.HfTokenizer.load(tiny_tokenizer.write_deepseek(folder))


@pytest.fixture(scope='module')
def qwen(tmp_path_factory) -> hf_tokenizer.HfTokenizer:
  folder = tmp_path_factory.mktemp('qwen')
  return hf_tokenizer.HfTokenizer.load(tiny_tokenizer.write_qwen(folder))


@pytest.fixture(scope='module')
def r1_files(shared_data) -> tuple[str, dict]:
  """The text of the real tokenizer.json, and tokenizer_config.json."""
  return tiny_tokenizer.read_r1(shared_data / 'deepseek_r1_tokenizer')


@pytest.fixture(scope='module')
def r1(r1_files) -> hf_tokenizer.HfTokenizer:
  return hf_tokenizer.HfTokenizer(*r1_files)


# ---- Round trips ----------------------------------------------------------


def _check_round_trip(tok: hf_tokenizer.HfTokenizer, text: str) -> None:
  ids = tok.encode(text)
  assert tok.decode(ids) == text
  assert b''.join(map(tok.bytes_of, ids)) == text.encode()
  assert tok.encode_batch([text, 'x']) == [ids, tok.encode('x')]


@hypothesis.given(_TEXTS)
def test_round_trip_of_any_text(deepseek, text):
  _check_round_trip(deepseek, text)


@hypothesis.given(_TEXTS)
def test_round_trip_of_any_text_with_the_real_r1(r1, text):
  _check_round_trip(r1, text)


@pytest.mark.parametrize('text', ['a\ud800', '\udfff'])
def test_a_lone_surrogate_is_refused(deepseek, text):
  with pytest.raises(UnicodeEncodeError):
    deepseek.encode(text)
  with pytest.raises(UnicodeEncodeError):
    deepseek.encode_batch(['a', text])


# ---- Against the library --------------------------------------------------


def test_every_id_of_the_real_r1_prints_what_the_library_prints(r1, r1_files):
  library = tokenizers.Tokenizer.from_str(r1_files[0])
  for token_id in range(r1.vocab_size):
    expected = library.decode([token_id], skip_special_tokens=True)
    assert r1.decode([token_id]) == expected, token_id


def test_ids_of_the_real_r1(r1):
  assert r1.vocab_size == 128_815
  assert (r1.bos_id, r1.eos_id, r1.pad_id, r1.unk_id) == (0, 1, 1, None)
  assert (r1.think_id, r1.end_think_id) == (128_798, 128_799)
  assert (r1.answer_id, r1.end_answer_id) == (None, None)
  prompt = '<｜begin▁of▁sentence｜><｜User｜>1<｜Assistant｜><think>\n'
  assert r1.encode(prompt) == [0, 128_803, 19, 128_804, 128_798, 201]


def test_added_tokens_print_as_they_are_written():
  # As pieces they would be read as bytes: é is how 0xE9 is spelt.
  tok = hf_tokenizer.HfTokenizer(
    tiny_tokenizer.byte_level(['</s>'], ['<é>', '<a b>']).to_str(),
    {'eos_token': '</s>'},
  )
  assert len(tok.encode('<é>')) == len(tok.encode('<a b>')) == 1
  assert tok.decode(tok.encode('<é><a b>é')) == '<é><a b>é'


def test_a_piece_that_nothing_is_encoded_to():
  values = json.loads(tiny_tokenizer.byte_level(['</s>']).to_str())
  vocab = values['model']['vocab']
  first = len(vocab)
  vocab |= {'<think>': first, 'no bytes': first + 1, 'gap': first + 5}
  tok = hf_tokenizer.HfTokenizer(json.dumps(values), {'eos_token': '</s>'})
  assert tok.think_id is None
  assert tok.vocab_size == first + 6
  ids = range(first, first + 6)
  assert tok.decode(ids) == '<think>no bytesgap'
  assert tok.id_to_piece(first + 2) == f'<{first + 2}>'


# ---- Special ids ----------------------------------------------------------


def test_special_ids(deepseek):
  assert (deepseek.bos_id, deepseek.eos_id, deepseek.pad_id) == (0, 1, 1)
  assert deepseek.unk_id is None
  assert deepseek.stop_ids == (1,)
  last = deepseek.vocab_size - 1
  assert deepseek.encode('<think></think>') == [last - 3, last - 2]
  assert (deepseek.think_id, deepseek.end_think_id) == (last - 3, last - 2)
  assert (deepseek.answer_id, deepseek.end_answer_id) == (None, None)
  assert deepseek.encode(tiny_tokenizer.DEEPSEEK[0] + '1')[0] == 0


def test_a_model_without_bos_and_with_two_stop_ids(qwen):
  assert qwen.bos_id is None
  assert (qwen.eos_id, qwen.pad_id, qwen.stop_ids) == (2, 0, (2, 0))


def test_decode_skips_control_ids_and_ids_past_the_vocabulary(deepseek):
  one, two = deepseek.encode('1') + deepseek.encode('2')
  past = deepseek.vocab_size
  assert deepseek.decode([0, one, past, 10**6, -1, two, 1]) == '12'
  assert deepseek.bytes_of(0) == deepseek.bytes_of(past) == b''
  assert deepseek.id_to_piece(0) == tiny_tokenizer.DEEPSEEK[0]
  assert str(past) in deepseek.id_to_piece(past)


def test_a_token_that_the_settings_name_prints_nothing():
  model = tiny_tokenizer.byte_level(['</s>'], ['<pad>', '<tool>'])
  tok = hf_tokenizer.HfTokenizer(
    model.to_str(), {'eos_token': '</s>', 'pad_token': '<pad>'}
  )
  assert tok.decode(tok.encode('1<pad><tool>2')) == '1<tool>2'
  assert tok.pad_id == tok.encode('<pad>')[0]


def test_all_four_tags_print_even_as_special_tokens():
  tok = hf_tokenizer.HfTokenizer(
    tiny_tokenizer.byte_level(['</s>', *tokenizer.TAGS]).to_str(),
    {'eos_token': '</s>'},
  )
  text = '<think>1</think><answer>2</answer>'
  assert tok.decode(tok.encode(text) + [tok.eos_id]) == text
  assert tok.encode(text) == [
    tok.think_id,
    *tok.encode('1'),
    tok.end_think_id,
    tok.answer_id,
    *tok.encode('2'),
    tok.end_answer_id,
  ]


def test_pieces_are_named_for_people(r1):
  assert [r1.id_to_piece(i) for i in r1.encode(' so 数')] == ['▁so', '▁', '数']
  assert ''.join(map(r1.id_to_piece, r1.encode('𒀀'))) == (
    '<0xF0><0x92><0x80><0x80>'
  )


def test_bytes_that_are_no_utf8_become_the_replacement_character(deepseek):
  ids = deepseek.encode('数')
  assert len(ids) == 3
  assert deepseek.decode(ids[:1]) == deepseek.decode(ids[:2]) == '\ufffd'


def test_the_model_s_own_limits_and_additions_are_not_applied():
  model = tiny_tokenizer.byte_level(['<s>', '</s>'])
  model.enable_truncation(2)
  model.enable_padding(length=9)
  model.post_processor = processors.TemplateProcessing(
    single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)]
  )
  tok = hf_tokenizer.HfTokenizer(
    model.to_str(), {'bos_token': '<s>', 'eos_token': '</s>'}
  )
  assert tok.decode(tok.encode('xyz' * 9)) == 'xyz' * 9
  assert tok.encode_batch(['x']) == [tok.encode('x')]
  assert len(tok.encode('x')) == 1


@pytest.mark.parametrize(
  ('add_bos', 'processed', 'bos_id'),
  [
    (True, False, 0),
    (False, True, None),
    (None, True, 0),
    (None, False, None),
  ],
)
def test_bos_is_none_where_no_document_begins_with_it(
  add_bos, processed, bos_id
):
  model = tiny_tokenizer.byte_level(['<s>', '</s>'])
  if processed:
    model.post_processor = processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)]
    )
  settings = {'bos_token': '<s>', 'eos_token': '</s>'}
  if add_bos is not None:
    settings['add_bos_token'] = add_bos
  assert hf_tokenizer.HfTokenizer(model.to_str(), settings).bos_id == bos_id


@pytest.mark.parametrize(
  ('files', 'stop_ids'),
  [
    ({}, (1,)),
    ({'config': {'eos_token_id': 2}}, (1, 2)),
    ({'config': {'eos_token_id': 2}, 'generation_config': {}}, (1, 2)),
    (
      {
        'config': {'eos_token_id': 2},
        'generation_config': {'eos_token_id': [0, 1]},
      },
      (1, 0),
    ),
  ],
)
def test_stop_ids_are_those_of_generation(tmp_path, files, stop_ids):
  model = tiny_tokenizer.byte_level(['<s>', '</s>', '<|end|>'])
  tiny_tokenizer.write(
    tmp_path, model, tokenizer_config={'eos_token': '</s>'}, **files
  )
  tok = hf_tokenizer.HfTokenizer.load(tmp_path)
  assert (tok.eos_id, tok.stop_ids) == (1, stop_ids)


def test_eos_may_come_from_the_model_s_config_alone(tmp_path):
  model = tiny_tokenizer.byte_level(['<s>', '</s>'])
  tiny_tokenizer.write(
    tmp_path, model, tokenizer_config={}, config={'eos_token_id': 1}
  )
  tok = hf_tokenizer.HfTokenizer.load(tmp_path)
  assert (tok.eos_id, tok.pad_id, tok.stop_ids) == (1, 1, (1,))


# ---- Sentencepiece's kind -------------------------------------------------


@pytest.fixture(scope='module')
def llama() -> tuple[hf_tokenizer.HfTokenizer, tokenizers.Tokenizer]:
  """Spaces as ▁, one in front of all text, unknown bytes as <0x41>."""
  model = tokenizers.Tokenizer(
    models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True)
  )
  model.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  model.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  special = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
  trainer = trainers.BpeTrainer(
    vocab_size=300, special_tokens=special, show_progress=False
  )
  model.train_from_iterator([' the answer is 82'] * 3, trainer)
  # The trainer marks the byte pieces as special; in real files they are not.
  values = json.loads(model.to_str())
  values['added_tokens'] = values['added_tokens'][:3]
  text = json.dumps(values)
  settings = {
    'add_bos_token': True,
    'bos_token': '<s>',
    'eos_token': '</s>',
    'unk_token': '<unk>',
  }
  tok = hf_tokenizer.HfTokenizer(text, settings)
  return tok, tokenizers.Tokenizer.from_str(text)


@hypothesis.given(
  st.lists(st.one_of(_CHARACTERS, st.sampled_from(' the answer')), max_size=20)
)
def test_llama_s_kind_makes_a_round_trip(llama, characters):
  tok, library = llama
  text = ''.join(characters)
  # The mark cannot be told from the space that it stands for.
  hypothesis.assume('▁' not in text)
  ids = tok.encode(text)
  assert tok.decode(ids) == text
  assert tok.decode(ids) == library.decode(ids)


def test_llama_s_kind_prints_bytes_and_spaces(llama):
  tok, _ = llama
  assert (tok.unk_id, tok.bos_id, tok.eos_id) == (0, 1, 2)
  assert b''.join(map(tok.bytes_of, tok.encode('is ü'))) == ' is ü'.encode()
  assert tok.encode('ü')[-2:] == [3 + 0xC3, 3 + 0xBC]
  assert tok.id_to_piece(3 + 0xC3) == '<0xC3>'
  assert tok.decode([1, 0, *tok.encode('is'), 2]) == 'is'


def test_metaspace_takes_off_the_space_it_put_in_front():
  model = tokenizers.Tokenizer(
    models.Unigram([('<unk>', 0.0), ('▁', -2.0), ('a', -3.0), ('</s>', 0.0)], 0)
  )
  for scheme, text in (('always', 'a a'), ('never', ' a a')):
    model.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tok = hf_tokenizer.HfTokenizer(model.to_str(), {'eos_token': '</s>'})
    assert tok.decode([1, 2, 1, 2]) == text == model.decode([1, 2, 1, 2])


# ---- What is refused ------------------------------------------------------


def _broken(tmp_path, **contents: str):
  tiny_tokenizer.write_deepseek(tmp_path)
  for name, content in contents.items():
    (tmp_path / f'{name}.json').write_text(content)
  return tmp_path


@pytest.mark.parametrize(
  ('contents', 'message'),
  [
    ({'tokenizer': '{"version": "1.0", "mo'}, 'tokenizer.json is no tokenizer'),
    ({'tokenizer': '[]'}, 'tokenizer.json is no tokenizer'),
    ({'tokenizer_config': '{'}, 'tokenizer_config.json is no JSON'),
    ({'tokenizer_config': '3'}, 'tokenizer_config.json holds no JSON object'),
    ({'tokenizer_config': '{}'}, 'tokenizer_config.json has no eos_token'),
    ({'tokenizer_config': '{"eos_token": "<e>"}'}, "eos_token='<e>' is no tok"),
    ({'tokenizer_config': '{"eos_token": 1}'}, 'eos_token=1 must be text'),
    ({'config': '{"eos_token_id": "1"}'}, "eos_token_id='1' must be an id or"),
    ({'generation_config': '{"eos_token_id": [-1]}'}, 'must be an id or a'),
  ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, contents, message):
  folder = _broken(tmp_path, **contents)
  with pytest.raises(config_lib.UserError) as error:
    hf_tokenizer.HfTokenizer.load(folder)
  assert message in str(error.value)
  assert str(folder) in str(error.value)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json'])
def test_a_missing_file_is_named(tmp_path, name):
  tiny_tokenizer.write_deepseek(tmp_path)
  (tmp_path / name).unlink()
  with pytest.raises(config_lib.UserError, match=f'{name} does not exist'):
    hf_tokenizer.HfTokenizer.load(tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path):
  tiny_tokenizer.write_deepseek(tmp_path)
  (tmp_path / 'tokenizer.json').write_bytes(b'\xff\xfe')
  with pytest.raises(config_lib.UserError, match='json is not UTF-8'):
    hf_tokenizer.HfTokenizer.load(tmp_path)


@pytest.mark.parametrize('name', ['tiktoken.model', 'qwen.tiktoken'])
def test_a_tiktoken_file_is_refused(tmp_path, name):
  (tmp_path / name).write_text('IQ== 0\n')
  (tmp_path / 'tokenizer_config.json').write_text('{}')
  with pytest.raises(config_lib.UserError, match=f'{name}: a tiktoken file'):
    hf_tokenizer.HfTokenizer.load(tmp_path)
  # Beside a tokenizer.json it does no harm.
  tiny_tokenizer.write_deepseek(tmp_path)
  assert hf_tokenizer.HfTokenizer.load(tmp_path).eos_id == 1


def test_a_decoder_of_unknown_kind_is_refused():
  model = tiny_tokenizer.byte_level(['</s>'])
  for decoder, name in ((decoders.WordPiece(), 'WordPiece'), (None, 'none')):
    values = json.loads(model.to_str())
    values['decoder'] = decoder and json.loads(decoder.__getstate__())
    with pytest.raises(ValueError, match=f'decoder {name}'):
      hf_tokenizer.HfTokenizer(json.dumps(values), {'eos_token': '</s>'})


# ---- Which class ----------------------------------------------------------


def test_the_path_says_which_tokenizer_it_is(tmp_path):
  folder = tiny_tokenizer.write_qwen(tmp_path)
  assert hf_tokenizer.load_tokenizer(folder).stop_ids == (2, 0)
  assert hf_tokenizer.load_tokenizer(str(folder)).bos_id is None
  assert hf_tokenizer.load_tokenizer('') is tokenizer.default()
  with pytest.raises(config_lib.UserError, match='name the folder'):
    hf_tokenizer.load_tokenizer(folder / 'tokenizer.json')
  with pytest.raises(config_lib.UserError, match='absent'):
    hf_tokenizer.load_tokenizer(folder / 'absent')
  with pytest.raises(config_lib.UserError, match='absent'):
    hf_tokenizer.HfTokenizer.load(folder / 'absent')


def test_a_sentencepiece_file_is_loaded_as_such():
  default = tokenizer.default()
  asset = resources.files('r1jax.data') / 'assets' / 'arithmetic.model'
  with resources.as_file(asset) as path:
    loaded = hf_tokenizer.load_tokenizer(path)
  assert isinstance(loaded, tokenizer.Tokenizer)
  assert loaded.encode('37+45') == default.encode('37+45')
  assert loaded.stop_ids == (loaded.eos_id,)


# ---- A folder with a sentencepiece model -----------------------------------


def _train(path, **changes):
  """A sentencepiece model as Llama-2's, but for the changes."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the answer is 82', 'what is 37+45?'] * 3),
    model_writer=model,
    model_type='bpe',
    vocab_size=300,
    hard_vocab_limit=False,
    byte_fallback=True,
    minloglevel=2,
    **changes,
  )
  path.write_bytes(model.getvalue())


_OURS = {
  'user_defined_symbols': list(tokenizer.TAGS),
  'add_dummy_prefix': False,
  'normalization_rule_name': 'identity',
  'remove_extra_whitespaces': False,
  'pad_id': 3,
}


@pytest.mark.parametrize(
  ('files', 'stop_ids'),
  [
    ({}, (1,)),
    ({'config': {'bos_token_id': 2, 'eos_token_id': 1}}, (1,)),
    ({'config': {}, 'generation_config': {'eos_token_id': [2, 1]}}, (1, 2)),
  ],
)
def test_a_folder_may_hold_a_sentencepiece_model(tmp_path, files, stop_ids):
  (tmp_path / 'tokenizer.model').write_bytes(tokenizer.default_model())
  for name, values in files.items():
    (tmp_path / f'{name}.json').write_text(json.dumps(values))
  default = tokenizer.default()
  loaded = hf_tokenizer.load_tokenizer(tmp_path)
  assert isinstance(loaded, tokenizer.Tokenizer)
  assert loaded.encode('<think>37+45') == default.encode('<think>37+45')
  # What the model says of itself holds, other ends come after it.
  for name in ('bos_id', 'eos_id', 'pad_id', 'vocab_size'):
    assert getattr(loaded, name) == getattr(default, name)
  assert loaded.stop_ids == stop_ids
  assert default.stop_ids == (1,)


def test_a_sentencepiece_model_beside_tokenizer_json_is_not_read(tmp_path):
  folder = tiny_tokenizer.write_deepseek(tmp_path)
  (folder / 'tokenizer.model').write_bytes(tokenizer.default_model())
  loaded = hf_tokenizer.load_tokenizer(folder)
  assert isinstance(loaded, hf_tokenizer.HfTokenizer)


def test_a_sentencepiece_model_of_others_may_do(tmp_path):
  _train(tmp_path / 'tokenizer.model', **_OURS)
  loaded = hf_tokenizer.load_tokenizer(tmp_path)
  assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 3)
  text = ' <think> the  answer\n'
  assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'user_defined_symbols': []},
      "the tags .'<think>', '</think>', '<answer>'",
    ),
    ({'pad_id': -1}, 'has no pad piece, it must have one'),
    ({'bos_id': -1}, 'has no bos piece, it must have one'),
    ({'add_dummy_prefix': True}, "makes '  a  ½ ' of ' a  ½ ', it must leave"),
    (
      {'normalization_rule_name': 'nmt_nfkc'},
      "makes ' a  1⁄2 ' of ' a  ½ ', it",
    ),
    ({'remove_extra_whitespaces': True}, "makes 'a ½' of ' a  ½ ', it must"),
  ],
)
def test_what_a_sentencepiece_model_lacks_is_one_line(
  tmp_path, changes, message
):
  path = tmp_path / 'tokenizer.model'
  _train(path, **(_OURS | changes))
  for given in (tmp_path, path):  # The folder, and the file itself.
    with pytest.raises(config_lib.UserError, match=message) as error:
      hf_tokenizer.load_tokenizer(given)
    assert str(error.value).startswith(f'tokenizer {str(path)!r}')
    assert '\n' not in str(error.value)
