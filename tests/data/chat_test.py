"""Tests of conversations: against R1's own template, and known strings.

deepseek_r1_chat_template.jinja is `chat_template` of DeepSeek-R1's
tokenizer_config.json, MIT licence.
"""

import json

import hypothesis
import jinja2.sandbox
import pytest
from hypothesis import strategies as st

from r1jax.data import chat, chat_templates
from tests import known_answers

_FRAGMENTS = (
  '<think>',
  '</think>',
  '\n',
  '\n\n',
  ' ',
  'why',
  '数{{ x }}{% if %}',
  '<｜User｜>',
  '<tool_response>',
  '</tool_response>',
  '/no_think',
)
_CONTENTS = st.lists(st.sampled_from(_FRAGMENTS), max_size=6).map(''.join)
_CONVERSATIONS = st.lists(
  st.builds(chat.Message, st.sampled_from(chat_templates.ROLES), _CONTENTS),
  min_size=1,
  max_size=7,
)
_USER_ASKS = chat.Message('user', 'Q')
_THOUGHT = '<think>\nhm\n</think>\n\nA'


def _talk(*contents: str, system: str | None = None) -> list[chat.Message]:
  """A conversation in turns, the user's first."""
  roles = ('user', 'assistant')
  turns = [chat.Message(roles[i % 2], c) for i, c in enumerate(contents)]
  return ([] if system is None else [chat.Message('system', system)]) + turns


def _join(segments: list[tuple[str, bool]]) -> str:
  return ''.join(text for text, _ in segments)


def _targets(segments: list[tuple[str, bool]]) -> list[str]:
  return [text for text, is_target in segments if is_target]


# ---- DeepSeek -------------------------------------------------------------


@pytest.fixture(scope='module')
def official() -> jinja2.Template:
  """R1's template, set up as transformers does."""
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True
  )
  path = known_answers.DATA / 'deepseek_r1_chat_template.jinja'
  return environment.from_string(path.read_text(encoding='utf-8'))


def _render_official(
  official: jinja2.Template, messages: list[chat.Message], add: bool
) -> str:
  return official.render(
    messages=[{'role': m.role, 'content': m.content} for m in messages],
    bos_token='<｜begin▁of▁sentence｜>',
    add_generation_prompt=add,
  )


@hypothesis.given(_CONVERSATIONS, st.booleans())
@hypothesis.settings(max_examples=500)
def test_deepseek_is_r1_s_own_template(official, messages, add):
  ours = chat.render(
    messages,
    template='deepseek',
    add_generation_prompt=add,
    open_think=False,
  )
  assert ours == _render_official(official, messages, add)


def test_the_stored_template_is_r1_s(shared_data):
  path = shared_data / 'deepseek_r1_tokenizer' / 'tokenizer_config.json'
  stored = known_answers.DATA / 'deepseek_r1_chat_template.jinja'
  config = json.loads(path.read_text(encoding='utf-8'))
  assert stored.read_text(encoding='utf-8') == config['chat_template']


def test_deepseek_s_generation_prompt_opens_the_thinking():
  assert chat.render(_talk('Q', system='S'), template='deepseek') == (
    '<｜begin▁of▁sentence｜>S<｜User｜>Q<｜Assistant｜><think>\n'
  )


def test_deepseek_drops_the_thinking_of_earlier_turns():
  messages = _talk('Q', _THOUGHT, 'R')
  assert chat.render(messages, template='deepseek') == (
    '<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>\n\nA'
    '<｜end▁of▁sentence｜><｜User｜>R<｜Assistant｜><think>\n'
  )


def test_deepseek_joins_system_messages_in_front():
  messages = [
    chat.Message('system', 'S'),
    _USER_ASKS,
    chat.Message('system', 'T'),
  ]
  text = chat.render(messages, template='deepseek', add_generation_prompt=False)
  assert text == '<｜begin▁of▁sentence｜>S\n\nT<｜User｜>Q'


# ---- Qwen3 ----------------------------------------------------------------


@pytest.mark.parametrize(
  ('thinking', 'question', 'opened'),
  [
    (None, 'Q', ''),
    (True, 'Q', ''),
    (False, 'Q', '<think>\n\n</think>\n\n'),
    (None, 'Q /no_think', '<think>\n\n</think>\n\n'),
    (True, 'Q /no_think', ''),
    (False, 'Q /think', '<think>\n\n</think>\n\n'),
  ],
)
def test_qwen3_s_generation_prompt(thinking, question, opened):
  text = chat.render(
    _talk(question, system='S'), template='qwen3', thinking=thinking
  )
  assert text == (
    '<|im_start|>system\nS<|im_end|>\n'
    f'<|im_start|>user\n{question}<|im_end|>\n'
    f'<|im_start|>assistant\n{opened}'
  )


@pytest.mark.parametrize(
  ('contents', 'system', 'expected'),
  [
    (('Q',), None, True),
    (('Q',), '/no_think', False),
    (('Q /think',), '/no_think', True),
    (('/no_think Q', 'A', 'R /think and /no_think.'), None, False),
    (('Q /no_think', 'A /think', 'R'), None, False),
    (('Q /no_think', 'A', '为什么/think'), None, True),
    (('Q /no_think', 'A', 'what is </think>?'), None, False),
    (('Q /no_think', 'A', 'see /think/tank and a/think'), None, False),
    (('Q /no_think', 'A', '/thinking and /no_thinking'), None, False),
  ],
)
def test_the_last_flag_wins(contents, system, expected):
  assert chat_templates.is_thinking(_talk(*contents, system=system)) is expected


def test_qwen3_of_one_turn():
  text = chat.render(
    _talk('Q', _THOUGHT), template='qwen3', add_generation_prompt=False
  )
  assert text == (
    '<|im_start|>user\nQ<|im_end|>\n'
    '<|im_start|>assistant\n<think>\nhm\n</think>\n\nA<|im_end|>\n'
  )


def test_qwen3_drops_the_thinking_before_the_last_question():
  text = chat.render(_talk('Q', _THOUGHT, 'R'), template='qwen3')
  assert text == (
    '<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n'
    '<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n'
  )


@pytest.mark.parametrize(
  ('content', 'written'),
  [
    ('A', '<think>\n\n</think>\n\nA'),
    ('\nA\n', '<think>\n\n</think>\n\nA\n'),
    ('<think>\n\n</think>\n\nA', '<think>\n\n</think>\n\nA'),
    ('hm</think>A', '<think>\nhm\n</think>\n\nA'),
    ('<think>\n\n hm \n\n</think>\nA', '<think>\n hm \n</think>\n\nA'),
  ],
)
def test_qwen3_s_last_turn_has_a_block_of_thinking(content, written):
  text = chat.render(
    _talk('Q', content), template='qwen3', add_generation_prompt=False
  )
  assert text == (
    '<|im_start|>user\nQ<|im_end|>\n'
    f'<|im_start|>assistant\n{written}<|im_end|>\n'
  )


def test_qwen3_keeps_thinking_across_the_answers_of_tools():
  # A tool's answer is no question: what was thought before it still counts.
  result = '<tool_response>\n82\n</tool_response>'
  head = f'<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{_THOUGHT}'
  text = chat.render(_talk('Q', _THOUGHT, result), template='qwen3')
  assert text.startswith(head)
  # One tag alone makes no answer of a tool.
  for question in ('<tool_response>', '82</tool_response>'):
    text = chat.render(_talk('Q', _THOUGHT, question), template='qwen3')
    assert not text.startswith(head)
  # A turn without thinking gets no empty block unless it is the last.
  text = chat.render(_talk('Q', 'A', result), template='qwen3')
  assert '<|im_start|>assistant\nA<|im_end|>\n' in text


def test_qwen3_keeps_no_thinking_where_there_is_no_question():
  messages = [chat.Message('system', 'S'), chat.Message('assistant', _THOUGHT)]
  text = chat.render(messages, template='qwen3', add_generation_prompt=False)
  assert text == (
    '<|im_start|>system\nS<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n'
  )


# ---- The others, as their models' own templates write them -----------------


@pytest.mark.parametrize(
  ('template', 'system', 'expected'),
  [
    (
      'deepseek_v3_1',
      None,
      '<｜begin▁of▁sentence｜><｜User｜> Q<｜Assistant｜></think>\n\nA'
      '<｜end▁of▁sentence｜><｜User｜>R\n<｜Assistant｜><think>',
    ),
    (
      'deepseek_v2',
      'S',
      f'<｜begin▁of▁sentence｜>S\n\nUser:  Q\n\nAssistant: {_THOUGHT}'
      '<｜end▁of▁sentence｜>User: R\n\n\nAssistant:',
    ),
    (
      'qwen2_5',
      None,
      '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a '
      'helpful assistant.<|im_end|>\n<|im_start|>user\n Q<|im_end|>\n'
      f'<|im_start|>assistant\n{_THOUGHT}<|im_end|>\n'
      '<|im_start|>user\nR\n<|im_end|>\n<|im_start|>assistant\n',
    ),
    (
      'qwen2_5',
      'S',
      '<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n Q<|im_end|>\n'
      f'<|im_start|>assistant\n{_THOUGHT}<|im_end|>\n'
      '<|im_start|>user\nR\n<|im_end|>\n<|im_start|>assistant\n',
    ),
    (
      'llama3',
      None,
      '<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n'
      'Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
      f'{_THOUGHT}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n'
      'R<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
    ),
    (
      'llama3_1',
      ' S\n',
      '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n'
      'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'
      'S<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n'
      'Q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n'
      f'{_THOUGHT}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n'
      'R<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n',
    ),
  ],
)
def test_a_conversation_of_two_questions(template, system, expected):
  messages = _talk(' Q', _THOUGHT, 'R\n', system=system)
  assert chat.render(messages, template=template) == expected


def test_llama3_1_says_the_dates_without_a_system_message_too():
  text = chat.render(_talk('Q'), template='llama3_1')
  assert text.startswith(
    '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n'
    'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'
    '<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>'
  )


@pytest.mark.parametrize(
  ('thinking', 'opened'),
  [(None, '<think>'), (True, '<think>'), (False, '</think>')],
)
def test_deepseek_v3_1_opens_or_closes_the_thinking(thinking, opened):
  render = lambda messages: chat.render(
    messages, template='deepseek_v3_1', thinking=thinking
  )
  assert render(_talk('Q')).endswith(f'Q<｜Assistant｜>{opened}')
  # It answers users only.
  assert render(_talk('Q', 'A')).endswith('</think>A<｜end▁of▁sentence｜>')
  answers = _talk('Q', 'A')[1:] * 2
  assert render(answers) == (
    '<｜begin▁of▁sentence｜>A<｜end▁of▁sentence｜>A<｜end▁of▁sentence｜>'
  )


def test_what_deepseek_v3_1_learns_of_an_answer():
  learn = lambda answer: chat.render_segments(
    _talk('Q', answer), template='deepseek_v3_1'
  )
  head = '<｜begin▁of▁sentence｜><｜User｜>Q<｜Assistant｜>'
  end = '<｜end▁of▁sentence｜>'
  thought = f'{_THOUGHT.removeprefix("<think>")}{end}'
  assert learn(_THOUGHT) == [(f'{head}<think>', False), (thought, True)]
  assert learn('A') == [(f'{head}</think>', False), (f'A{end}', True)]


@pytest.mark.parametrize(
  'template', ['deepseek_v2', 'qwen2_5', 'llama3', 'llama3_1']
)
@pytest.mark.parametrize('system', [None, 'S'])
def test_targets_of_the_others_go_on_from_the_prompt(template, system):
  messages = _talk('Q', 'A', 'R', _THOUGHT, system=system)
  segments = chat.render_segments(
    messages, template=template, train_on_earlier=True
  )
  whole = chat.render(messages, template=template, add_generation_prompt=False)
  assert _join(segments) == whole
  end = chat_templates.TEMPLATES[template].end_token
  targets = [target.lstrip() for target in _targets(segments)]
  assert targets == [f'A{end}', f'{_THOUGHT}{end}']
  alone = _targets(chat.render_segments(messages, template=template))
  assert [target.lstrip() for target in alone] == targets[1:]
  prompt = chat.render(messages[:-1], template=template)
  last = max(i for i, (_, is_target) in enumerate(segments) if is_target)
  assert _join(segments[:last]) == prompt


# ---- One question ---------------------------------------------------------


def test_r1_zero_s_prompt():
  # The paper's Table 1, with braces that must not be read as a format.
  assert chat.render([chat.Message('user', '{x}?')], template='r1_zero') == (
    'A conversation between User and Assistant. The user asks a question, and '
    'the Assistant solves it. The assistant first thinks about the reasoning '
    'process in the mind and then provides the user with the answer. The '
    'reasoning process and answer are enclosed within <think> </think> and '
    '<answer> </answer> tags, respectively, i.e., <think> reasoning process '
    'here </think> <answer> answer here </answer>. User: {x}?. Assistant:'
  )


def test_plain_is_the_question_alone():
  assert chat.render(_talk('37+45=\n'), template='plain') == '37+45=\n'


@pytest.mark.parametrize('template', ['r1_zero', 'plain'])
def test_one_question_and_its_answer_is_all_they_hold(template):
  for messages in (_talk('Q', 'A', 'R'), _talk('Q', system='S')):
    with pytest.raises(ValueError, match='holds one question'):
      chat.render(messages, template=template)
  with pytest.raises(ValueError, match='ends with the answer'):
    chat.render(_talk('Q', 'A'), template=template)
  whole = chat.render(
    _talk('Q', 'A'), template=template, add_generation_prompt=False
  )
  assert whole == chat.render(_talk('Q'), template=template) + 'A'


# ---- Segments -------------------------------------------------------------


@hypothesis.given(_CONVERSATIONS, _CONTENTS, st.booleans())
@hypothesis.settings(max_examples=300)
def test_deepseek_s_target_goes_on_from_the_prompt(messages, answer, earlier):
  segments = chat.render_segments(
    [*messages, chat.Message('assistant', answer)],
    template='deepseek',
    train_on_earlier=earlier,
  )
  prompt = chat.render(messages, template='deepseek', open_think=False)
  assert _join(segments) == f'{prompt}{answer}<｜end▁of▁sentence｜>'
  assert segments[-1] == (f'{answer}<｜end▁of▁sentence｜>', True)


@hypothesis.given(_CONVERSATIONS, _CONTENTS, st.booleans())
@hypothesis.settings(max_examples=300)
def test_qwen3_s_segments_are_the_rendering(messages, answer, earlier):
  messages += [_USER_ASKS, chat.Message('assistant', answer)]
  segments = chat.render_segments(
    messages, template='qwen3', train_on_earlier=earlier
  )
  assert _join(segments) == chat.render(
    messages, template='qwen3', add_generation_prompt=False
  )
  prompt = chat.render(messages[:-1], template='qwen3', thinking=True)
  assert _join(segments[:-2]) == prompt
  assert segments[-2][0].startswith('<think>\n')
  assert segments[-2][0].endswith('<|im_end|>')
  assert segments[-1] == ('\n', False)


@pytest.mark.parametrize('template', ['r1_zero', 'plain'])
def test_segments_of_one_question(template):
  segments = chat.render_segments(_talk('Q', _THOUGHT), template=template)
  prompt = chat.render(_talk('Q'), template=template)
  assert segments == [(prompt, False), (_THOUGHT, True)]


def test_no_segment_is_empty():
  render = lambda *turns: chat.render_segments(_talk(*turns), template='plain')
  assert render('', 'A') == [('A', True)]
  assert render('Q', '') == [('Q', False)]


@pytest.mark.parametrize(
  ('template', 'targets'),
  [
    ('deepseek', ['\n\nA<｜end▁of▁sentence｜>', '<think>hm</think>B']),
    ('qwen3', ['A<|im_end|>', '<think>\nhm\n</think>\n\nB']),
  ],
)
def test_earlier_turns_are_targets_only_if_asked(template, targets):
  messages = _talk('Q', _THOUGHT, 'R', '<think>hm</think>B')
  end = chat_templates.TEMPLATES[template].end_token
  targets = [targets[0], targets[1] + end]
  render_segments = lambda **switches: _targets(
    chat.render_segments(messages, template=template, **switches)
  )
  assert render_segments() == targets[1:]
  assert render_segments(train_on_earlier=True) == targets


def test_the_last_turn_of_qwen3_is_whole_even_without_a_question():
  messages = [chat.Message('system', 'S'), chat.Message('assistant', _THOUGHT)]
  segments = chat.render_segments(messages, template='qwen3')
  assert _targets(segments) == [f'{_THOUGHT}<|im_end|>']


# ---- What is refused ------------------------------------------------------


@pytest.mark.parametrize('role', ['tool', 'User', ''])
def test_an_unknown_role_is_refused_with_the_list(role):
  with pytest.raises(ValueError, match='one of system, user, assistant'):
    chat.Message(role, 'x')


def test_content_must_be_text():
  with pytest.raises(ValueError, match='content=None must be text'):
    chat.Message('user', None)


def test_an_unknown_template_is_refused_with_the_list():
  names = "template='llama' must be one of deepseek, .*, r1_zero, plain"
  with pytest.raises(ValueError, match=names):
    chat.render([_USER_ASKS], template='llama')
  with pytest.raises(ValueError, match=names):
    chat.render_segments(_talk('Q', 'A'), template='llama')


@pytest.mark.parametrize('template', chat_templates.TEMPLATES)
def test_what_cannot_be_rendered(template):
  with pytest.raises(ValueError, match='at least one'):
    chat.render([], template=template)
  with pytest.raises(ValueError, match='at least one'):
    chat.render_segments([], template=template)
  with pytest.raises(ValueError, match="role='user', for training"):
    chat.render_segments([_USER_ASKS], template=template)


@pytest.mark.parametrize(
  ('template', 'switch', 'owner'),
  [
    ('qwen3', {'open_think': False}, 'deepseek'),
    ('deepseek', {'thinking': False}, 'deepseek_v3_1 or qwen3'),
    ('deepseek', {'thinking': True}, 'deepseek_v3_1 or qwen3'),
    ('plain', {'open_think': False}, 'deepseek'),
    ('llama3', {'thinking': False}, 'deepseek_v3_1 or qwen3'),
  ],
)
def test_a_switch_of_another_template_is_refused(template, switch, owner):
  with pytest.raises(ValueError, match=f'is for template {owner}, not'):
    chat.render([_USER_ASKS], template=template, **switch)
