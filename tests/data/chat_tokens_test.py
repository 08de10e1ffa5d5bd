"""Tests of conversations as ids: seams, bos, ends, and wrong tokenizers."""

import pytest

from r1jax.data import (
  chat,
  chat_templates,
  chat_tokens,
  hf_tokenizer,
  tokenizer,
)
from tests.data import tiny_tokenizer

_QUESTION = [chat.Message('user', 'What is 37+45?')]
_ANSWER = '<think>\n37+45=82\n</think>\n\n82'
_BOTH = [*_QUESTION, chat.Message('assistant', _ANSWER)]


@pytest.fixture(scope='module')
def tokenizers(tmp_path_factory) -> dict:
  """By the template that each is for."""
  folder = tmp_path_factory.mktemp('tokenizers')
  folders = {
    'deepseek': tiny_tokenizer.write_deepseek(folder / 'deepseek'),
    'deepseek_v2': tiny_tokenizer.write_deepseek_v2(folder / 'v2'),
    'qwen3': tiny_tokenizer.write_qwen(folder / 'qwen'),
    'qwen2_5': tiny_tokenizer.write_qwen2_5(folder / 'qwen2_5'),
    'llama3': tiny_tokenizer.write_llama3(folder / 'llama3'),
    'llama3_1': tiny_tokenizer.write_llama3(folder / 'llama', '<|eom_id|>'),
  }
  loaded = {k: hf_tokenizer.HfTokenizer.load(v) for k, v in folders.items()}
  loaded['deepseek_v3_1'] = loaded['deepseek']
  return loaded | dict.fromkeys(('r1_zero', 'plain'), tokenizer.default())


@pytest.mark.parametrize('template', chat_templates.TEMPLATES)
def test_a_prompt_begins_with_bos_once(tokenizers, template):
  tok = tokenizers[template]
  ids = chat_tokens.encode_prompt(_QUESTION, tok, template=template)
  text = chat.render(_QUESTION, template=template)
  if tok.bos_id is None:
    assert ids == tok.encode(text)
  else:
    assert ids[0] == tok.bos_id
    assert ids.count(tok.bos_id) == 1
    bos = chat_templates.TEMPLATES[template].tokens[:1]
    assert ids[1:] == tok.encode(text.removeprefix(''.join(bos)))


@pytest.mark.parametrize(
  ('template', 'switches'),
  [
    ('deepseek', {'open_think': False}),
    ('deepseek_v3_1', {'thinking': False}),
    ('qwen3', {'thinking': False}),
  ],
)
def test_switches_reach_the_prompt(tokenizers, template, switches):
  tok = tokenizers[template]
  ids = chat_tokens.encode_prompt(_QUESTION, tok, template=template, **switches)
  text = chat.render(_QUESTION, template=template, **switches)
  assert ids == tok.encode(text)
  assert ids != chat_tokens.encode_prompt(_QUESTION, tok, template=template)


@pytest.mark.parametrize('template', chat_templates.TEMPLATES)
def test_targets_go_on_from_the_prompt_and_end_at_a_stop_id(
  tokenizers, template
):
  tok = tokenizers[template]
  ids, is_target = chat_tokens.encode_segments(_BOTH, tok, template=template)
  switches = {'open_think': False} if template == 'deepseek' else {}
  prompt = chat_tokens.encode_prompt(
    _QUESTION, tok, template=template, **switches
  )
  assert ids[: len(prompt)] == prompt
  assert len(ids) == len(is_target)
  targets = [i for i, target in zip(ids, is_target) if target]
  assert is_target.index(True) == len(prompt)
  # V2 writes the space after its own name; V3.1's prompt opened the thinking.
  before = {'deepseek_v2': (' ', ''), 'deepseek_v3_1': ('', '<think>')}
  added, opened = before.get(template, ('', ''))
  assert tok.decode(targets) == added + _ANSWER.removeprefix(opened)
  assert targets[-1] == tok.eos_id
  assert targets[-1] in chat_tokens.stop_ids(tok, template=template)
  # Only ChatML goes on after the end of a turn.
  after = ids[len(prompt) + len(targets) :]
  is_chatml = template in ('qwen3', 'qwen2_5')
  assert after == (tok.encode('\n') if is_chatml else [])


def test_no_token_spans_the_seam():
  # A sampler goes on from the ids of the prompt: it cannot join a token.
  tok = hf_tokenizer.HfTokenizer(
    tiny_tokenizer.byte_level(['</s>']).to_str(), {'eos_token': '</s>'}
  )
  prompt, answer = tok.encode('the ans'), tok.encode('wer is 82')
  assert tok.encode('the answer is 82') != prompt + answer
  messages = [
    chat.Message('user', 'the ans'),
    chat.Message('assistant', 'wer is 82'),
  ]
  ids, is_target = chat_tokens.encode_segments(messages, tok, template='plain')
  assert ids == prompt + answer + [tok.eos_id]
  assert is_target == [False] * len(prompt) + [True] * (len(answer) + 1)


def test_earlier_turns_are_targets_only_if_asked(tokenizers):
  tok = tokenizers['deepseek']
  messages = [*_BOTH, *_BOTH]
  encode = lambda **switches: chat_tokens.encode_segments(
    messages, tok, template='deepseek', **switches
  )
  ids, last = encode()
  same_ids, both = encode(train_on_earlier=True)
  assert ids == same_ids
  targets = [i for i, target in zip(ids, both) if target]
  assert tok.decode(targets) == '\n\n82' + _ANSWER
  assert sum(last) == len(tok.encode(_ANSWER)) + 1


# ---- Stop ids -------------------------------------------------------------


def test_stop_ids(tokenizers):
  stop_ids = lambda name: chat_tokens.stop_ids(tokenizers[name], template=name)
  assert stop_ids('deepseek') == (1,)
  assert stop_ids('qwen3') == (2, 0)
  assert stop_ids('plain') == (tokenizer.default().eos_id,)


def test_a_base_model_stops_at_the_end_of_a_turn_too():
  # Its files name the end of a document alone.
  tok = hf_tokenizer.HfTokenizer(
    tiny_tokenizer.byte_level(tiny_tokenizer.QWEN).to_str(),
    {'eos_token': '<|endoftext|>'},
  )
  assert tok.stop_ids == (0,)
  assert chat_tokens.stop_ids(tok, template='qwen3') == (2, 0)


# ---- Which template -------------------------------------------------------


@pytest.mark.parametrize(
  'template',
  ['deepseek', 'deepseek_v2', 'qwen3', 'qwen2_5', 'llama3', 'llama3_1'],
)
def test_the_special_tokens_tell_the_template(tokenizers, template):
  assert chat_tokens.detect(tokenizers[template]) == template


def test_the_real_r1_is_deepseek_s(shared_data):
  tok = hf_tokenizer.HfTokenizer(
    *tiny_tokenizer.read_r1(shared_data / 'deepseek_r1_tokenizer')
  )
  assert chat_tokens.detect(tok) == 'deepseek'
  ids = chat_tokens.encode_prompt(_QUESTION, tok, template='deepseek')
  assert ids[:2] == [0, 128_803]
  assert ids[-3:] == [128_804, 128_798, 201]


def test_a_tokenizer_of_neither_is_refused_with_the_list():
  with pytest.raises(ValueError) as error:
    chat_tokens.detect(tokenizer.default())
  for name in ('<｜User｜>', '<|im_start|>', 'r1_zero', 'plain'):
    assert name in str(error.value)


@pytest.mark.parametrize(
  ('template', 'other', 'token'),
  [
    ('deepseek', 'qwen3', '<｜begin▁of▁sentence｜>'),
    ('qwen3', 'deepseek', '<.im_start.>'),
    ('deepseek', 'plain', '<｜begin▁of▁sentence｜>'),
  ],
)
def test_a_template_of_another_tokenizer_is_refused(
  tokenizers, template, other, token
):
  tok = tokenizers[other]
  with pytest.raises(ValueError, match=token):
    chat_tokens.encode_prompt(_QUESTION, tok, template=template)
  with pytest.raises(ValueError, match=token):
    chat_tokens.encode_segments(_BOTH, tok, template=template)
  with pytest.raises(ValueError, match=token):
    chat_tokens.stop_ids(tok, template=template)


def test_an_unknown_template_is_refused_with_the_list(tokenizers):
  with pytest.raises(ValueError, match='must be one of deepseek, '):
    chat_tokens.stop_ids(tokenizers['plain'], template='llama')
