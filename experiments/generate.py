"""Completes a prompt with a workdir's newest checkpoint, as it is sampled.

  python -m experiments.generate --workdir=runs/demo/seed_0/r1_zero \
      --prompt='What is 37+45?' --config.sampling.temperature=0.6

Without --prompt it asks for one line after another until Ctrl-D.
"""

import sys
import typing
from collections.abc import Iterator

from absl import flags

from experiments import app
from r1jax import config as config_lib

if typing.TYPE_CHECKING:
  from r1jax.data import tokenizer as tokenizer_lib
  from r1jax.model import config as model_config
  from r1jax.sampling import stream as stream_lib

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The run whose model answers.', required=True
)
_PROMPT = flags.DEFINE_string(
  'prompt',
  None,
  'What to complete; \\n stands for a newline. Without it, every line of the '
  'standard input is a prompt.',
)
_TEMPLATE = flags.DEFINE_string(
  'template',
  'auto',
  'How prompts are put to the model: plain, r1_zero, deepseek, deepseek_v3_1, '
  'deepseek_v2, qwen3, qwen2_5, llama3, llama3_1, or auto: as the run was '
  'trained, else plain for our tokenizer, for another the one whose special '
  'tokens it has.',
)
_SYSTEM = flags.DEFINE_string('system', '', 'System message, for templates.')
_THINK = flags.DEFINE_bool(
  'think',
  True,
  'Let the model think: deepseek opens <think> for it; --nothink leaves that '
  'to the model, and with qwen3 and deepseek_v3_1 closes the thinking.',
)
_ADD_NEWLINE = flags.DEFINE_bool(
  'add_newline',
  True,
  'End a plain prompt that does not with a newline, as arithmetic prompts do.',
)


def main() -> None:
  from r1jax.data import hf_tokenizer
  from r1jax.recipe import origin, pretrain
  from r1jax.sampling import stream

  config = app.load(stream.StreamConfig)
  model = origin.load_model_config(_WORKDIR.value)
  path = origin.load_tokenizer_path(_WORKDIR.value)
  tokenizer = hf_tokenizer.load_tokenizer(path)
  template = find_template(tokenizer, model)
  pretrain.prepare_tokenizer(tokenizer, model, template=template)
  encode = lambda text: encode_prompt(
    text, tokenizer, template, model.max_length
  )
  if _PROMPT.value is not None:
    encode(_PROMPT.value)  # What cannot be is said before anything is loaded.
  complete = _make_complete(model, tokenizer, config)
  for index, text in enumerate(_prompts()):
    try:
      prompt_ids = encode(text)
    except config_lib.UserError as e:
      if not _is_conversation():
        raise
      print(f'error: {e}', file=sys.stderr)
      continue
    complete(prompt_ids, index)


def find_template(
  tokenizer: 'tokenizer_lib.Tokenizer', model: 'model_config.ModelConfig'
) -> str:
  """The template of the flag, or the one that suits the model.

  Raises:
    UserError: There is none of that name, or none that suits.
  """
  from r1jax.data import chat_templates
  from r1jax.recipe import origin

  try:
    if _TEMPLATE.value == 'auto':
      return origin.find_template(_WORKDIR.value, model, tokenizer)
    chat_templates.find(_TEMPLATE.value)
  except ValueError as e:
    raise config_lib.UserError(f'--template: {e}') from e
  return _TEMPLATE.value


def encode_prompt(
  text: str,
  tokenizer: 'tokenizer_lib.Tokenizer',
  template: str,
  context: int,
) -> list[int]:
  """Returns the tokens after which the model answers.

  Raises:
    UserError: No text, or it leaves no room in the context of so many tokens.
  """
  from r1jax.data import chat, chat_tokens

  text = text.replace('\\n', '\n')
  if template == 'plain' and _ADD_NEWLINE.value and not text.endswith('\n'):
    text += '\n'
  messages = [chat.Message('user', text)]
  if _SYSTEM.value:
    messages.insert(0, chat.Message('system', _SYSTEM.value))
  switches = {}
  if not _THINK.value:
    switches = {
      'deepseek': {'open_think': False},
      'deepseek_v3_1': {'thinking': False},
      'qwen3': {'thinking': False},
    }.get(template, {})
  try:
    ids = chat_tokens.encode_prompt(
      messages, tokenizer, template=template, **switches
    )
  except UnicodeEncodeError as e:
    raise config_lib.UserError('the prompt is not UTF-8 text') from e
  except ValueError as e:
    raise config_lib.UserError(str(e)) from e
  if len(ids) >= context:
    raise config_lib.UserError(
      f'the prompt has {len(ids)} tokens, model.max_length={context} must '
      'hold it and a completion'
    )
  return ids


def _make_complete(model, tokenizer, config: 'stream_lib.StreamConfig'):
  """Loads the model; returns complete(prompt_ids, index), which prints."""
  app.set_up_jax(default_host_devices=1)
  import jax
  import rich.console

  from r1jax.evaluate import transcript
  from r1jax.parallel import mesh as mesh_lib
  from r1jax.recipe import origin
  from r1jax.sampling import stream

  # One row has no use for a second device.
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:1])
  model = origin.for_mesh(model, _WORKDIR.value, mesh)
  variables, step = origin.load_variables(
    _WORKDIR.value, model, mesh, say=_note
  )
  _note(f'step {step} of {_WORKDIR.value}')
  sample = stream.Stream(
    model,
    variables,
    sampling=config.sampling,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
  )
  console = rich.console.Console()
  key = jax.random.key(config.seed)

  def complete(prompt_ids: list[int], index: int) -> None:
    limit = config.max_new_tokens or model.max_length
    is_open = tokenizer.decode(prompt_ids[-4:]).rstrip().endswith('<think>')
    writer = transcript.Writer(tokenizer, console, is_thinking=is_open)
    token, count = None, 0
    if index:
      console.out()
    try:
      for token in sample(
        prompt_ids, jax.random.fold_in(key, index), max_new_tokens=limit
      ):
        if token not in tokenizer.stop_ids:
          writer.write(token)
        count += 1
    finally:
      writer.close()
    if token not in tokenizer.stop_ids:
      reason = 'max_new_tokens' if count == limit else 'the context is full'
      _note(f'stopped after {count} tokens: {reason}')

  return complete


def _prompts() -> Iterator[str]:
  """The prompt of the flag, or the lines of the standard input."""
  if _PROMPT.value is not None:
    yield _PROMPT.value
    return
  if not _is_conversation():
    sys.stdin.reconfigure(errors='surrogateescape')
    for line in sys.stdin:
      if line.strip():
        yield line.rstrip('\n')
    return
  import readline  # noqa: F401  Arrow keys and history for input().

  _note('a prompt a line; Ctrl-D ends')
  while True:
    try:
      line = input('> ')
    except EOFError:
      print()
      return
    if line.strip():
      yield line


def _is_conversation() -> bool:
  return _PROMPT.value is None and sys.stdin.isatty()


def _note(line: str) -> None:
  """Not on stdout, which holds the completion alone."""
  print(line, file=sys.stderr, flush=True)


if __name__ == '__main__':
  app.run(main, config_file='configs/generate.py')
