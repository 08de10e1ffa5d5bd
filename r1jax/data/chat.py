"""Conversations written as a model was trained to read them.

  text = chat.render([chat.Message('user', 'Why?')], template='deepseek')

Special tokens written in a message count as such, as they do in the models'
own templates; tools are not supported. `chat_tokens` turns this into ids.
"""

import itertools
from collections.abc import Sequence

from r1jax.data import chat_templates

Message = chat_templates.Message


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
    template: A name in chat_templates.TEMPLATES.
    add_generation_prompt: Ends with what opens the assistant's next turn.
    open_think: For 'deepseek': the generation prompt goes on with '<think>\n',
      so that no answer skips the thinking. R1's first published template ends
      before it.
    thinking: For 'qwen3': False ends the generation prompt with an empty block
      of thinking, True leaves it to the model. None goes by `is_thinking`,
      where the model's own template leaves /no_think to the model, which then
      writes that block itself. For 'deepseek_v3_1': False closes the thinking
      before the answer; else it is opened, which that template leaves off
      unless asked.

  Raises:
    ValueError: There is no such template, it has no such switch, or it cannot
      hold the conversation.
  """
  chosen = chat_templates.find(template)
  check_messages(messages, template=template)
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
  included. Earlier turns stand as `render` writes them, since so the model sees
  them when it answers, and are no targets unless asked: of a template that
  `rewrites_earlier` they would teach to answer without thinking. To train on
  every turn of such a one, pass the conversation cut off after each.

  The joined texts are `render` without a generation prompt, except that
  'deepseek' there drops the thinking of the last turn too.

  Args:
    messages: The last is the assistant's.
    template: A name in chat_templates.TEMPLATES.
    train_on_earlier: Makes earlier turns targets too, as they stand.

  Returns:
    (text, is_target) of each segment; none is empty, and the two kinds
    alternate.

  Raises:
    ValueError: There is no such template, it cannot hold the conversation, or
      the last message is not the assistant's.
  """
  chosen = chat_templates.find(template)
  check_messages(messages, template=template)
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


def check_messages(messages: Sequence[Message], *, template: str) -> None:
  """Checks that a template can hold a conversation.

  Raises:
    ValueError: It cannot, or there is no such template.
  """
  if not messages:
    raise ValueError('messages are empty, there must be at least one')
  roles = [message.role for message in messages]
  single = (['user'], ['user', 'assistant'])
  if chat_templates.find(template).is_single and roles not in single:
    raise ValueError(
      f'template={template!r} holds one question, the roles '
      f'{", ".join(roles)} must be user, or user and assistant'
    )


def _check_switches(
  template: str, open_think: bool, thinking: bool | None
) -> None:
  given = {'open_think': open_think, 'thinking': thinking}
  for name, default in (('open_think', True), ('thinking', None)):
    if given[name] is default:
      continue
    owners = [
      owner
      for owner, chosen in chat_templates.TEMPLATES.items()
      if name in chosen.switches
    ]
    if template not in owners:
      raise ValueError(
        f'{name}={given[name]} is for template {" or ".join(owners)}, '
        f'not {template!r}'
      )
