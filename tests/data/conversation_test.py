"""Conversations: what is learnt, what is left out, and mistakes in files."""

import json

import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.data import chat, conversation, hf_tokenizer, tokenizer
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
      {'messages': [{'role': 'user', 'content': 'x'}]},
      "the last message is of role 'user', there is nothing to learn",
    ),
  ],
)
def test_what_is_wrong_with_a_record_is_named(tmp_path, record, message):
  config = _config(tmp_path, [record])
  with pytest.raises(config_lib.UserError, match=message):
    list(conversation.read(config))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'template': 'x'}, "template='x', it must be one of deepseek, "),
    ({'paths': ()}, 'paths=.. must name'),
    ({'held_out_fraction': 1.0}, 'held_out_fraction=1.0 must be in'),
    ({'format': 'csv'}, "format='csv' must be one of"),
  ],
)
def test_what_is_wrong_with_the_config_is_named(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    _config(tmp_path, **changes)
