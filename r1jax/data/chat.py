"""Conversations written as a model was trained to read them.

  text = chat.render([chat.Message('user', 'Why?')], template='deepseek')

Special tokens written in a message count as such, as they do in the models'
own templates; tools are not supported. `chat_tokens` turns this into ids.

Templates:
  deepseek: DeepSeek-V3, R1 and its distilled models. System messages, wherever
    they stand, are joined by a blank line and come first; an assistant's turn
    keeps only what follows the last </think>.
  qwen3: ChatML. An assistant's turn keeps its thinking only after the last
    user message, and the last turn then has an empty block if it has none.
  r1_zero: The prompt that R1-Zero was trained on: one question.
  plain: The question alone, as our arithmetic models are asked.
"""

import dataclasses
import itertools
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


def render(
  messages: Sequence[Message],
  *,
  template: str,
  add_generation_prompt: bool = True,
  open_think: bool = True,
  thinking: bool | None = None,
) -> str:
  r"""Writes a conversation as the model's own template does, byte for byte.

  Args:
    messages: At least one. For 'r1_zero' and 'plain' the user's question, and
      its answer where no generation prompt is asked for.
    template: A name in TEMPLATES.
    add_generation_prompt: Ends with what opens the assistant's next turn.
    open_think: For 'deepseek': the generation prompt goes on with '<think>\n',
      so that no answer skips the thinking. R1's first published template ends
      before it.
    thinking: For 'qwen3': False ends the generation prompt with an empty block
      of thinking, True leaves it to the model. None goes by `is_thinking`,
      where the model's own template leaves /no_think to the model, which then
      writes that block itself.

  Raises:
    ValueError: There is no such template, it has no such switch, or it cannot
      hold the conversation.
  """
  chosen = find(template)
  _check_messages(messages, template)
  _check_switches(template, open_think, thinking)
  text = ''.join(text for text, _ in chosen.write(messages, False))
  if not add_generation_prompt:
    return text
  if chosen.is_single and len(messages) > 1:
    raise ValueError(
      f'template={template!r} ends with the answer: '
      'add_generation_prompt=True must be False'
    )
  return text + chosen.opening(messages, open_think, thinking)


def render_segments(
  messages: Sequence[Message], *, template: str, train_on_earlier: bool = False
) -> list[tuple[str, bool]]:
  """Cuts a whole conversation into what is given and what is to be learnt.

  A target is what the assistant produces: its content and the token that ends
  its turn, not the header before them. The last turn is whole, thinking
  included. Earlier turns stand as `render` writes them, without their
  thinking, since so the model sees them when it answers. For that reason they
  are no targets unless asked: they would teach to answer without thinking. To
  train on every turn, pass the conversation cut off after each.

  The joined texts are `render` without a generation prompt, except that
  'deepseek' there drops the thinking of the last turn too.

  Args:
    messages: The last is the assistant's.
    template: A name in TEMPLATES.
    train_on_earlier: Makes earlier turns targets too, as they stand.

  Returns:
    (text, is_target) of each segment; none is empty, and the two kinds
    alternate.

  Raises:
    ValueError: There is no such template, it cannot hold the conversation, or
      the last message is not the assistant's.
  """
  chosen = find(template)
  _check_messages(messages, template)
  last = len(messages) - 1
  if messages[last].role != 'assistant':
    raise ValueError(
      f'the last message has role={messages[last].role!r}, for training it '
      'must be assistant'
    )
  flagged = (
    (text, turn == last or (train_on_earlier and turn is not None))
    for text, turn in chosen.write(messages, True)
    if text
  )
  return [
    (''.join(text for text, _ in group), is_target)
    for is_target, group in itertools.groupby(flagged, lambda pair: pair[1])
  ]


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


# ---- Templates ------------------------------------------------------------

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
    switches: Arguments of `render` that it heeds.
    is_single: It holds one question and its answer.
  """

  write: Callable[[Sequence[Message], bool], _Pieces]
  opening: Callable[[Sequence[Message], bool, bool | None], str]
  tokens: tuple[str, ...] = ()
  end_token: str | None = None
  switches: tuple[str, ...] = ()
  is_single: bool = False


_BOS = '<｜begin▁of▁sentence｜>'
_EOS = '<｜end▁of▁sentence｜>'
_USER = '<｜User｜>'
_ASSISTANT = '<｜Assistant｜>'


def _write_deepseek(messages: Sequence[Message], keep_last: bool) -> _Pieces:
  system = [m.content for m in messages if m.role == 'system']
  yield _BOS + '\n\n'.join(system), None
  for index, message in enumerate(messages):
    content = message.content
    if message.role == 'user':
      yield _USER + content, None
    elif message.role == 'assistant':
      yield _ASSISTANT, None
      if not keep_last or index < len(messages) - 1:
        content = content.split('</think>')[-1]
      yield content + _EOS, index


def _open_deepseek(
  messages: Sequence[Message], open_think: bool, thinking: bool | None
) -> str:
  return _ASSISTANT + ('<think>\n' if open_think else '')


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


TEMPLATES = {
  'deepseek': Template(
    _write_deepseek,
    _open_deepseek,
    tokens=(_BOS, _EOS, _USER, _ASSISTANT),
    end_token=_EOS,
    switches=('open_think',),
  ),
  'qwen3': Template(
    _write_qwen3,
    _open_qwen3,
    tokens=(_IM_START, _IM_END),
    end_token=_IM_END,
    switches=('thinking',),
  ),
  'r1_zero': Template(_write_r1_zero, lambda *_: ' Assistant:', is_single=True),
  'plain': Template(_write_plain, lambda *_: '', is_single=True),
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


def _check_messages(messages: Sequence[Message], template: str) -> None:
  if not messages:
    raise ValueError('messages are empty, there must be at least one')
  roles = [message.role for message in messages]
  single = (['user'], ['user', 'assistant'])
  if TEMPLATES[template].is_single and roles not in single:
    raise ValueError(
      f'template={template!r} holds one question, the roles '
      f'{", ".join(roles)} must be user, or user and assistant'
    )


def _check_switches(
  template: str, open_think: bool, thinking: bool | None
) -> None:
  given = {'open_think': open_think, 'thinking': thinking}
  for name, default in (('open_think', True), ('thinking', None)):
    if given[name] is not default and name not in TEMPLATES[template].switches:
      owner = next(n for n, t in TEMPLATES.items() if name in t.switches)
      raise ValueError(
        f'{name}={given[name]} is for template {owner!r}, not {template!r}'
      )
