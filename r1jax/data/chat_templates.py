"""How each family of models writes a conversation.

Templates:
  deepseek: DeepSeek-V3, R1 and its distilled models. System messages, wherever
    they stand, are joined by a blank line and come first; an assistant's turn
    keeps only what follows the last </think>.
  deepseek_v3_1: V3.1 and V3.2. As before, but an answer that is read follows a
    closed block of thinking, '</think>', and the model opens one, '<think>',
    or not.
  deepseek_v2: V2 and V2-Lite, whose turns have names in plain text.
  qwen3: ChatML. An assistant's turn keeps its thinking only after the last
    user message, and the last turn then has an empty block if it has none.
  qwen2_5: ChatML without thinking; names the model where no system message is.
  llama3: Every turn has a header, its content no space around it.
  llama3_1: The same for Llama 3.1 and 3.3, which begin with two dates.
  r1_zero: The prompt that R1-Zero was trained on: one question.
  plain: The question alone, as our arithmetic models are asked.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

ROLES = ('system', 'user', 'assistant')
# A word of its own: neither </think> nor a part of a path.
_THINK_FLAG = re.compile(r'(?<![<\w/.])/(no_)?think(?![\w/>])', re.ASCII)


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn of a conversation.

  Attributes:
    role: One of ROLES.
    content: What was said; an assistant's thinking included, in <think> tags.
  """

  role: str
  content: str

  def __post_init__(self):
    if self.role not in ROLES:
      raise ValueError(f'role={self.role!r} must be one of {", ".join(ROLES)}')
    if not isinstance(self.content, str):
      raise ValueError(f'content={self.content!r} must be text')


def is_thinking(messages: Sequence[Message]) -> bool:
  """Says what the last /think or /no_think of system and user messages asks.

  True without any. Source: Qwen3, arXiv:2505.09388, §4.3.
  """
  flags = [
    flag[1] is None
    for message in messages
    if message.role != 'assistant'
    for flag in _THINK_FLAG.finditer(message.content)
  ]
  return flags[-1] if flags else True


_Pieces = Iterator[tuple[str, int | None]]


@dataclasses.dataclass(frozen=True)
class Template:
  """How one family of models writes a conversation.

  Attributes:
    write: (messages, keep_last) -> pairs of text and the index of the
      assistant's message that produces it, None for what is given; keep_last
      keeps the thinking of the last message in any case.
    opening: (messages, open_think, thinking) -> generation prompt.
    tokens: Special tokens that it writes.
    end_token: Which of them ends an assistant's turn; None if none does.
    hallmarks: Further tokens, which tell its models' tokenizers from others.
    switches: Arguments of `render` that it heeds.
    is_single: It holds one question and its answer.
    rewrites_earlier: Earlier answers stand there without their thinking.
  """

  write: Callable[[Sequence[Message], bool], _Pieces]
  opening: Callable[[Sequence[Message], bool, bool | None], str]
  tokens: tuple[str, ...] = ()
  end_token: str | None = None
  hallmarks: tuple[str, ...] = ()
  switches: tuple[str, ...] = ()
  is_single: bool = False
  rewrites_earlier: bool = False


_BOS = '<｜begin▁of▁sentence｜>'
_EOS = '<｜end▁of▁sentence｜>'
_USER = '<｜User｜>'
_ASSISTANT = '<｜Assistant｜>'


def _write_deepseek(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  yield _BOS + _join_system(messages), None
  for index, message in enumerate(messages):
    content = message.content
    if message.role == 'user':
      yield _USER + content, None
    elif message.role == 'assistant':
      yield _ASSISTANT, None
      if not keep_last or index < len(messages) - 1:
        content = content.split('</think>')[-1]
      yield content + _EOS, index


def _join_system(messages: Sequence[Message]) -> str:
  return '\n\n'.join(m.content for m in messages if m.role == 'system')


def _open_deepseek(
  messages: Sequence[Message], open_think: bool, thinking: bool | None
) -> str:
  return _ASSISTANT + ('<think>\n' if open_think else '')


def _write_deepseek_v3_1(
  messages: Sequence[Message], keep_last: bool
) -> _Pieces:
  yield _BOS + _join_system(messages), None
  follows_user = False
  for index, message in enumerate(messages):
    if message.role == 'user':
      yield _USER + message.content, None
      follows_user = True
    elif message.role == 'assistant':
      thought, tag, answer = message.content.partition('</think>')
      if not tag:
        thought, answer = '', message.content
      is_kept = bool(tag) and keep_last and index == len(messages) - 1
      if follows_user or is_kept:
        yield _ASSISTANT + ('<think>' if is_kept else '</think>'), None
      if is_kept:
        answer = thought.removeprefix('<think>') + tag + answer
      yield answer + _EOS, index
      follows_user = False


def _open_deepseek_v3_1(
  messages: Sequence[Message], open_think: bool, thinking: bool | None
) -> str:
  spoken = [message.role for message in messages if message.role != 'system']
  if spoken[-1:] != ['user']:
    return ''  # As its own template, which answers users only.
  return _ASSISTANT + ('</think>' if thinking is False else '<think>')


def _write_deepseek_v2(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  yield _BOS, None
  for index, message in enumerate(messages):
    if message.role == 'assistant':
      # The space is the model's: a prompt ends before it.
      yield 'Assistant:', None
      yield f' {message.content}{_EOS}', index
    else:
      name = 'User: ' if message.role == 'user' else ''
      yield f'{name}{message.content}\n\n', None


_IM_START = '<|im_start|>'
_IM_END = '<|im_end|>'


def _write_qwen3(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  last = len(messages) - 1
  queries = [i for i, message in enumerate(messages) if _is_query(message)]
  last_query = queries[-1] if queries else last
  for index, message in enumerate(messages):
    yield f'{_IM_START}{message.role}\n', None
    if message.role == 'assistant':
      reasoning, answer = _split_qwen3(message.content)
      is_last = index == last
      keeps = index > last_query and (is_last or reasoning)
      if keeps or (keep_last and is_last):
        answer = f'<think>\n{reasoning}\n</think>\n\n' + answer.lstrip('\n')
      yield answer + _IM_END, index
      yield '\n', None
    else:
      yield f'{message.content}{_IM_END}\n', None


def _is_query(message: Message) -> bool:
  """Says whether the user speaks, and not a tool in the user's name."""
  begins = message.content.startswith('<tool_response>')
  is_tool = begins and message.content.endswith('</tool_response>')
  return message.role == 'user' and not is_tool


def _split_qwen3(content: str) -> tuple[str, str]:
  """Returns the reasoning, '' if there is none, and the answer."""
  before, *rest = content.split('</think>')
  if not rest:
    return '', content
  return before.split('<think>')[-1].strip('\n'), rest[-1].lstrip('\n')


def _open_qwen3(
  messages: Sequence[Message], open_think: bool, thinking: bool | None
) -> str:
  if thinking is None:
    thinking = is_thinking(messages)
  empty = '' if thinking else '<think>\n\n</think>\n\n'
  return f'{_IM_START}assistant\n{empty}'


_QWEN2_5_SYSTEM = (
  'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.'
)


def _write_qwen2_5(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  if messages[0].role != 'system':
    yield f'{_IM_START}system\n{_QWEN2_5_SYSTEM}{_IM_END}\n', None
  for index, message in enumerate(messages):
    yield f'{_IM_START}{message.role}\n', None
    is_answer = message.role == 'assistant'
    yield message.content + _IM_END, index if is_answer else None
    yield '\n', None


_BEGIN_OF_TEXT = '<|begin_of_text|>'
_START_HEADER = '<|start_header_id|>'
_END_HEADER = '<|end_header_id|>'
_EOT = '<|eot_id|>'
_LLAMA_TOKENS = (_BEGIN_OF_TEXT, _START_HEADER, _END_HEADER, _EOT)
# Llama 3.1's template says so whatever the day.
_LLAMA3_1_DATES = (
  'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n'
)


def _write_llama3(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  yield _BEGIN_OF_TEXT, None
  yield from _write_llama_turns(messages)


def _write_llama3_1(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  has_system = messages[0].role == 'system'
  system = messages[0].content.strip() if has_system else ''
  header = f'{_START_HEADER}system{_END_HEADER}\n\n'
  yield f'{_BEGIN_OF_TEXT}{header}{_LLAMA3_1_DATES}{system}{_EOT}', None
  for text, index in _write_llama_turns(messages[has_system:]):
    yield text, None if index is None else index + has_system


def _write_llama_turns(messages: Sequence[Message]) -> _Pieces:
  for index, message in enumerate(messages):
    yield f'{_START_HEADER}{message.role}{_END_HEADER}\n\n', None
    is_answer = message.role == 'assistant'
    yield message.content.strip() + _EOT, index if is_answer else None


def _open_with(text: str) -> Callable[..., str]:
  return lambda messages, open_think, thinking: text


_open_llama = _open_with(f'{_START_HEADER}assistant{_END_HEADER}\n\n')


# Source: DeepSeek-R1, arXiv:2501.12948v1, Table 1.
_R1_ZERO = (
  'A conversation between User and Assistant. The user asks a question, and '
  'the Assistant solves it. The assistant first thinks about the reasoning '
  'process in the mind and then provides the user with the answer. The '
  'reasoning process and answer are enclosed within <think> </think> and '
  '<answer> </answer> tags, respectively, i.e., <think> reasoning process here '
  '</think> <answer> answer here </answer>. User: '
)


def _write_r1_zero(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  yield f'{_R1_ZERO}{messages[0].content}.', None
  for answer in messages[1:]:
    yield ' Assistant:', None
    yield answer.content, 1


def _write_plain(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  yield messages[0].content, None
  for answer in messages[1:]:
    yield answer.content, 1


# In the order in which `chat_tokens.detect` tries them.
TEMPLATES = {
  'deepseek': Template(
    _write_deepseek,
    _open_deepseek,
    tokens=(_BOS, _EOS, _USER, _ASSISTANT),
    end_token=_EOS,
    switches=('open_think',),
    rewrites_earlier=True,
  ),
  'deepseek_v3_1': Template(
    _write_deepseek_v3_1,
    _open_deepseek_v3_1,
    tokens=(_BOS, _EOS, _USER, _ASSISTANT),
    end_token=_EOS,
    switches=('thinking',),
    rewrites_earlier=True,
  ),
  'deepseek_v2': Template(
    _write_deepseek_v2,
    _open_with('Assistant:'),
    tokens=(_BOS, _EOS),
    end_token=_EOS,
  ),
  'qwen3': Template(
    _write_qwen3,
    _open_qwen3,
    tokens=(_IM_START, _IM_END),
    end_token=_IM_END,
    hallmarks=('<think>', '</think>'),
    switches=('thinking',),
    rewrites_earlier=True,
  ),
  'qwen2_5': Template(
    _write_qwen2_5,
    _open_with(f'{_IM_START}assistant\n'),
    tokens=(_IM_START, _IM_END),
    end_token=_IM_END,
  ),
  'llama3_1': Template(
    _write_llama3_1,
    _open_llama,
    tokens=_LLAMA_TOKENS,
    end_token=_EOT,
    hallmarks=('<|eom_id|>',),
  ),
  'llama3': Template(
    _write_llama3, _open_llama, tokens=_LLAMA_TOKENS, end_token=_EOT
  ),
  'r1_zero': Template(
    _write_r1_zero, _open_with(' Assistant:'), is_single=True
  ),
  'plain': Template(_write_plain, _open_with(''), is_single=True),
}


def find(template: str) -> Template:
  """Returns the template of a name.

  Raises:
    ValueError: There is none.
  """
  if template not in TEMPLATES:
    raise ValueError(
      f'template={template!r} must be one of {", ".join(TEMPLATES)}'
    )
  return TEMPLATES[template]
