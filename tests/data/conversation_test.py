"""Conversations: what is learnt, what is left out, and mistakes in files."""

import collections
import dataclasses
import json
import re

import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.data import (
  chat,
  chat_templates,
  chat_tokens,
  conversation,
  hf_tokenizer,
  tokenizer,
)
from tests.data import tiny_tokenizer

_CHATS = [
  [
    {'role': 'user', 'content': f'What is {i}?'},
    {'role': 'assistant', 'content': f'<think>hm</think>It is {i}.'},
  ]
  for i in range(20)
]


def _write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def _config(tmp_path, rows=None, **changes):
  rows = [{'messages': c} for c in _CHATS] if rows is None else rows
  values = {
    'paths': (_write(tmp_path / 'chats.jsonl', rows),),
    'template': 'qwen3',
    'messages': 'messages',
    'held_out_fraction': 0.0,
  }
  return conversation.ConversationConfig(**(values | changes))


def test_a_chat_template_marks_the_turn_and_its_end(tmp_path):
  tok = hf_tokenizer.HfTokenizer.load(tiny_tokenizer.write_qwen(tmp_path / 't'))
  rows, _ = conversation.make_rows(
    _config(tmp_path), tok, row_length=256, seed=None, split='train'
  )
  row = rows[0]
  learnt = row['tokens'][(row['segment'] == 1) & (row['mask'] > 0)]
  answer = '<think>\nhm\n</think>\n\nIt is 0.<|im_end|>'
  assert learnt.tolist() == tok.encode(answer)
  given = row['tokens'][(row['segment'] == 1) & (row['mask'] == 0)]
  prompt = '<|im_start|>user\nWhat is 0?<|im_end|>\n<|im_start|>assistant\n'
  newline = tok.encode('\n')  # Behind the turn: given, too.
  assert given.tolist() == tok.encode(prompt) + newline


def test_the_assistants_tokens_and_their_end_are_learnt(tmp_path):
  tok = tokenizer.default()
  config = _config(tmp_path, template='plain')
  rows, num_long = conversation.make_rows(
    config, tok, row_length=64, seed=None, split='train'
  )
  assert num_long == 0 and rows.num_documents == 20
  row = rows[0]
  assert row['segment'].max() > 1  # Packed: samples see only themselves.
  first = row['segment'] == 1
  ids = row['tokens'][first].tolist()
  prompt = [tok.bos_id, *tok.encode('What is 0?')]
  answer = [*tok.encode('<think>hm</think>It is 0.'), tok.eos_id]
  assert ids == prompt + answer
  np.testing.assert_array_equal(
    row['mask'][first], [0] * len(prompt) + [1] * len(answer)
  )
  np.testing.assert_array_equal(row['position'][first], np.arange(len(ids)))
  texts = [f'<think>hm</think>It is {i}.' for i in range(20)]
  assert rows.num_bytes == sum(len(t.encode()) for t in texts)


# ---- Several turns --------------------------------------------------------

_HM, _SO = '<think>\nhm\n</think>\n\nA', '<think>\nso\n</think>\n\nC'
_TALK = [
  {'role': 'user', 'content': 'Q'},
  {'role': 'assistant', 'content': _HM},
  {'role': 'user', 'content': 'R'},
  {'role': 'assistant', 'content': 'B'},
  {'role': 'user', 'content': 'S'},
  {'role': 'assistant', 'content': _SO},
]
_BOS, _EOS = tiny_tokenizer.DEEPSEEK
_Q, _R, _S = (f'<｜User｜>{question}<｜Assistant｜>' for question in 'QRS')
_IM_Q, _IM_R, _IM_S = (
  f'<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n'
  for question in 'QRS'
)
_QWEN = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'
_LLAMA_Q, _LLAMA_R, _LLAMA_S = (
  f'<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>'
  '<|start_header_id|>assistant<|end_header_id|>\n\n'
  for question in 'QRS'
)
_LLAMA = (
  f'{_LLAMA_Q}[[{_HM}<|eot_id|>]]{_LLAMA_R}[[B<|eot_id|>]]'
  f'{_LLAMA_S}[[{_SO}<|eot_id|>]]'
)
_LLAMA_DATES = (
  '<|start_header_id|>system<|end_header_id|>\n\n'
  'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>'
)
# The examples of the talk, what is learnt in double brackets.
_LEARNT = {
  'deepseek': [
    f'{_BOS}{_Q}[[{_HM}{_EOS}]]',
    f'{_BOS}{_Q}\n\nA{_EOS}{_R}[[B{_EOS}]]',
    f'{_BOS}{_Q}\n\nA{_EOS}{_R}B{_EOS}{_S}[[{_SO}{_EOS}]]',
  ],
  'deepseek_v3_1': [
    f'{_BOS}{_Q}<think>[[\nhm\n</think>\n\nA{_EOS}]]',
    f'{_BOS}{_Q}</think>\n\nA{_EOS}{_R}</think>[[B{_EOS}]]',
    f'{_BOS}{_Q}</think>\n\nA{_EOS}{_R}</think>B{_EOS}'
    f'{_S}<think>[[\nso\n</think>\n\nC{_EOS}]]',
  ],
  'deepseek_v2': [
    f'{_BOS}User: Q\n\nAssistant:[[ {_HM}{_EOS}]]User: R\n\nAssistant:'
    f'[[ B{_EOS}]]User: S\n\nAssistant:[[ {_SO}{_EOS}]]'
  ],
  'qwen3': [
    f'{_IM_Q}[[{_HM}<|im_end|>]]\n',
    f'{_IM_Q}A<|im_end|>\n{_IM_R}[[<think>\n\n</think>\n\nB<|im_end|>]]\n',
    f'{_IM_Q}A<|im_end|>\n{_IM_R}B<|im_end|>\n{_IM_S}[[{_SO}<|im_end|>]]\n',
  ],
  'qwen2_5': [
    f'<|im_start|>system\n{_QWEN}<|im_end|>\n{_IM_Q}[[{_HM}<|im_end|>]]\n'
    f'{_IM_R}[[B<|im_end|>]]\n{_IM_S}[[{_SO}<|im_end|>]]\n'
  ],
  'llama3': [f'<|begin_of_text|>{_LLAMA}'],
  'llama3_1': [f'<|begin_of_text|>{_LLAMA_DATES}{_LLAMA}'],
}
_WRITERS = {
  'deepseek': tiny_tokenizer.write_deepseek,
  'deepseek_v3_1': tiny_tokenizer.write_deepseek,
  'deepseek_v2': tiny_tokenizer.write_deepseek_v2,
  'qwen3': tiny_tokenizer.write_qwen,
  'qwen2_5': tiny_tokenizer.write_qwen2_5,
  'llama3': tiny_tokenizer.write_llama3,
  'llama3_1': lambda path: tiny_tokenizer.write_llama3(path, '<|eom_id|>'),
}


def _tokenizer(tmp_path, template):
  folder = _WRITERS[template](tmp_path / template)
  return hf_tokenizer.HfTokenizer.load(folder)


def _segments(rows):
  """Yields tokens and mask of each example in the rows."""
  for index in range(len(rows)):
    row = rows[index]
    for segment in range(1, row['segment'].max() + 1):
      place = row['segment'] == segment
      np.testing.assert_array_equal(
        row['position'][place], np.arange(place.sum())
      )
      yield row['tokens'][place].tolist(), row['mask'][place].tolist()


def _parts(example):
  """Its texts in turn: given, learnt, given, and so on."""
  return re.split(r'\[\[|\]\]', example)


def _encoded(tok, example):
  """Ids and mask of an example."""
  parts = [tok.encode(text) for text in _parts(example)]
  mask = [float(i % 2) for i, ids in enumerate(parts) for _ in ids]
  return sum(parts, []), mask


def _make_rows(config, tok, row_length=512):
  return conversation.make_rows(
    config, tok, row_length=row_length, seed=None, split='train'
  )


@pytest.mark.parametrize('template', _LEARNT)
def test_every_turn_of_the_assistant_is_learnt(tmp_path, template):
  tok = _tokenizer(tmp_path, template)
  config = _config(tmp_path, [{'messages': _TALK}], template=template)
  rows, num_long = _make_rows(config, tok)
  examples = _LEARNT[template]
  assert list(_segments(rows)) == [_encoded(tok, e) for e in examples]
  assert (rows.num_documents, num_long) == (len(examples), 0)
  learnt = ''.join(text for e in examples for text in _parts(e)[1::2])
  end = chat_templates.find(template).end_token
  assert rows.num_bytes == len(learnt) - 3 * len(end)  # It prints nothing.


@pytest.mark.parametrize('template', _LEARNT)
def test_the_last_turn_alone_is_learnt_if_asked(tmp_path, template):
  tok = _tokenizer(tmp_path, template)
  config = _config(
    tmp_path, [{'messages': _TALK}], template=template, turns='last'
  )
  rows, _ = _make_rows(config, tok)
  given, last = _LEARNT[template][-1].rsplit('[[', 1)
  given = ''.join(_parts(given))
  assert list(_segments(rows)) == [_encoded(tok, f'{given}[[{last}')]


@pytest.mark.parametrize('template', _LEARNT)
def test_what_is_learnt_goes_on_from_a_sampler_s_prompt(tmp_path, template):
  tok = _tokenizer(tmp_path, template)
  config = _config(tmp_path, [{'messages': _TALK}], template=template)
  rows, _ = _make_rows(config, tok)
  given = [
    ids[:i]
    for ids, mask in _segments(rows)
    for i in range(1, len(ids))
    if mask[i - 1 : i + 1] == [0, 1]
  ]
  messages = [chat.Message(**message) for message in _TALK]
  prompts = []
  for turn in (1, 3, 5):
    switches = {
      'deepseek': {'open_think': False},
      'deepseek_v3_1': {'thinking': turn != 3},  # B was said without.
    }.get(template, {})
    prompts.append(
      chat_tokens.encode_prompt(
        messages[:turn], tok, template=template, **switches
      )
    )
  assert given == prompts


def test_a_longer_turn_is_left_out_without_those_before(tmp_path):
  tok = _tokenizer(tmp_path, 'deepseek')
  config = _config(tmp_path, [{'messages': _TALK}], template='deepseek')
  lengths = [len(_encoded(tok, t)[0]) for t in _LEARNT['deepseek']]
  rows, num_long = _make_rows(config, tok, lengths[2] - 1)
  assert (rows.num_documents, num_long) == (2, 1)
  with pytest.raises(config_lib.UserError) as error:
    _make_rows(config, tok, min(lengths) - 1)
  assert str(error.value) == (
    f'the train split is empty: row_length={min(lengths) - 1} tokens must be '
    f'at least {min(lengths)}, the shortest of its 3 examples'
  )


def _numbers(config, tok, split):
  """Which conversations are learnt from in a split, and how often."""
  rows, _ = conversation.make_rows(
    config, tok, row_length=128, seed=0, split=split
  )
  return collections.Counter(
    int(re.search(r'What is (\d+)', tok.decode(ids))[1])
    for ids, _ in _segments(rows)
  )


def test_all_turns_of_a_conversation_are_on_one_side(tmp_path):
  tok = _tokenizer(tmp_path, 'qwen3')
  more = [
    {'role': 'user', 'content': 'Sure?'},
    {'role': 'assistant', 'content': 'Yes.'},
  ]
  records = [{'messages': [*talk, *more]} for talk in _CHATS]
  config = _config(tmp_path, records, held_out_fraction=0.3)
  train, held_out = (_numbers(config, tok, s) for s in ('train', 'held_out'))
  assert train and held_out and not train.keys() & held_out.keys()
  assert train + held_out == dict.fromkeys(range(20), 2)
  # The side does not depend on what is learnt.
  last = dataclasses.replace(config, turns='last')
  assert _numbers(last, tok, 'held_out').keys() == held_out.keys()


# ---- What is read ---------------------------------------------------------


def test_question_and_answer_and_a_system_message(tmp_path):
  config = _config(
    tmp_path,
    [{'question': 'Why?', 'answer': 'So.'}],
    messages='',
    system='Be brief.',
  )
  (messages,) = conversation.read(config)
  assert messages == [
    chat.Message('system', 'Be brief.'),
    chat.Message('user', 'Why?'),
    chat.Message('assistant', 'So.'),
  ]


def test_fields_of_a_message_that_are_empty_are_nothing(tmp_path):
  empty = {'name': None, 'tool_calls': [], 'reasoning_content': '', 'more': {}}
  rows = [{'messages': [message | empty for message in _CHATS[0]]}]
  (messages,) = conversation.read(_config(tmp_path, rows))
  assert messages == [chat.Message(**message) for message in _CHATS[0]]


def test_a_longer_conversation_is_left_out_and_counted(tmp_path):
  long = [
    {'role': 'user', 'content': 'a ' * 100},
    {'role': 'assistant', 'content': 'b'},
  ]
  rows = [{'messages': c} for c in (_CHATS[0], long)]
  config = _config(tmp_path, rows, template='plain')
  packed, num_long = conversation.make_rows(
    config, tokenizer.default(), row_length=64, seed=None, split='train'
  )
  assert (packed.num_documents, num_long) == (1, 1)


def test_splits_share_no_conversation(tmp_path):
  config = _config(tmp_path, template='plain', held_out_fraction=0.3)
  counts = [
    conversation.make_rows(
      config, tokenizer.default(), row_length=64, seed=0, split=split
    )[0].num_documents
    for split in ('train', 'held_out')
  ]
  assert sum(counts) == 20 and min(counts) > 0


def test_a_share_too_small_is_refused_with_one_that_is_not(tmp_path):
  def make(held_out_fraction, rows=None, split='held_out'):
    config = _config(
      tmp_path, rows, template='plain', held_out_fraction=held_out_fraction
    )
    return conversation.make_rows(
      config, tokenizer.default(), row_length=64, seed=0, split=split
    )

  with pytest.raises(config_lib.UserError) as error:
    make(1e-6)
  found = re.fullmatch(
    'the held_out split is empty: held_out_fraction=1e-06 holds out none of '
    r'the 20 conversations of .*chats\.jsonl, it must be at least (0\.\d+), or '
    '0 for no evaluation',
    str(error.value),
  )
  least = float(found[1])
  assert make(least)[0].num_documents >= 1
  with pytest.raises(config_lib.UserError, match=f'at least {least}, or 0'):
    make(least - 1 / 20)  # It is the first of the steps.
  one = [{'messages': _CHATS[0]}]
  with pytest.raises(config_lib.UserError, match='1 conv.*, it must be 0 for'):
    make(1e-6, one)
  with pytest.raises(
    config_lib.UserError,
    match='train split is empty: held_out_fraction=0.999999 holds out all 1 ',
  ):
    make(0.999999, one, 'train')


@pytest.mark.slow
def test_gsm8k_is_learnt_by_its_answers(shared_data, tmp_path):
  path = shared_data / 'gsm8k' / 'train.jsonl'
  with open(path, encoding='utf-8') as f:
    records = [json.loads(line) for line in f]
  tok = _tokenizer(tmp_path, 'qwen3')
  config = conversation.ConversationConfig((str(path),), 'qwen3')
  counts, found = [], []
  for split in ('train', 'held_out'):
    rows, num_long = conversation.make_rows(
      config, tok, row_length=2048, seed=0, split=split
    )
    assert num_long == 0
    counts.append(rows.num_documents)
    for ids, mask in _segments(rows):
      start = mask.index(1.0)
      end = len(ids) - 1  # A newline follows.
      assert mask == [0.0] * start + [1.0] * (end - start) + [0.0]
      assert tok.encode('<|im_end|>') == ids[end - 1 : end]
      found.append((tok.decode(ids[:start]), tok.decode(ids[start:end])))
  # Each document once, alone in its segment, and nothing of another.
  expected = [
    (
      f'user\n{record["question"]}\nassistant\n',
      f'<think>\n\n</think>\n\n{record["answer"]}',
    )
    for record in records
  ]
  assert len(records) == 7473
  assert collections.Counter(found) == collections.Counter(expected)
  # 0.02 of 7,473: 149, give or take five standard deviations.
  assert sum(counts) == 7473 and abs(counts[1] - 149) < 60


@pytest.mark.parametrize(
  ('record', 'message'),
  [
    ({'chat': []}, "chats.jsonl:1: no field 'messages'; present: chat"),
    ({'messages': []}, "field 'messages' must be a list of messages"),
    ({'messages': ['hi']}, 'message 1 is a str, it must have role and content'),
    ({'messages': [{'role': 'user'}]}, "message 1: no field 'content'"),
    (
      {'messages': [{'role': 'tool', 'content': 'x'}]},
      "message 1: role='tool' must be one of system, user, assistant",
    ),
    (
      {'messages': [_CHATS[0][0], _CHATS[0][1] | {'reasoning_content': 'hm'}]},
      "chats.jsonl:1: message 2: field 'reasoning_content' would not be learnt"
      '; all that is must be in content, reasoning as <think>…</think> before',
    ),
    (
      {'messages': [_CHATS[0][0] | {'weight': 0}, _CHATS[0][1]]},
      "message 1: field 'weight' would not be learnt; all that is must be in",
    ),
    (
      {'messages': [{'role': 'user', 'content': 'x'}]},
      "the last message is of role 'user', there is nothing to learn",
    ),
  ],
)
def test_what_is_wrong_with_a_record_is_named(tmp_path, record, message):
  config = _config(tmp_path, [record])
  with pytest.raises(config_lib.UserError, match=message):
    list(conversation.read(config))


@pytest.mark.parametrize('template', ['plain', 'r1_zero'])
def test_what_a_template_cannot_hold_is_named_with_its_line(tmp_path, template):
  rows = [{'messages': _CHATS[0]}, {'messages': _TALK}]
  config = _config(tmp_path, rows, template=template)
  with pytest.raises(config_lib.UserError) as error:
    conversation.make_rows(
      config, tokenizer.default(), row_length=256, seed=0, split='train'
    )
  assert str(error.value) == (
    f'{config.paths[0]}:2: template={template!r} holds one question, the roles '
    'user, assistant, user, assistant, user, assistant must be user, or user '
    'and assistant'
  )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'template': 'x'}, "template='x', it must be one of auto, deepseek, "),
    ({'paths': ()}, 'paths=.. must name'),
    ({'held_out_fraction': 1.0}, 'held_out_fraction=1.0 must be in'),
    ({'format': 'csv'}, "format='csv' must be one of"),
    ({'turns': 'first'}, "turns='first' must be one of last, all"),
    (
      {'template': 'plain', 'system': 'Be brief.'},
      "system='Be brief.' must be empty: template='plain' holds one question",
    ),
  ],
)
def test_what_is_wrong_with_the_config_is_named(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    _config(tmp_path, **changes)
