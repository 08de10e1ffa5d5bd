import io

import rich.console

from r1jax.data import tokenizer as tokenizer_lib
from r1jax.evaluate import transcript

_TOKENIZER = tokenizer_lib.default()


def _write(text, *, terminal=False):
  out = io.StringIO()
  console = rich.console.Console(
    file=out,
    force_terminal=terminal,
    color_system='standard' if terminal else None,
    width=40,
  )
  writer = transcript.Writer(_TOKENIZER, console)
  seen = []
  for token in [*_TOKENIZER.encode(text), _TOKENIZER.eos_id]:
    writer.write(token)
    seen.append(out.getvalue())
  writer.close()
  return out.getvalue(), seen


def test_thinking_stands_apart_from_the_answer():
  text, _ = _write('<think>7+5=12\n1+3=4</think><answer>82</answer>')
  assert text == 'thinking:\n7+5=12\n1+3=4\nanswer:\n82\n'


def test_terminal_has_dim_thinking_and_bold_answer():
  text, _ = _write('<think>7</think><answer>8</answer>', terminal=True)
  assert '\x1b[2mthinking:' in text and '\x1b[1manswer:' in text
  assert '\x1b[1m8' in text


def test_tags_out_of_place_and_text_outside_stay_visible():
  text, _ = _write('so </think><answer>8<answer>9')
  assert text == 'so </think>\nanswer:\n8<answer>9\n'


def test_empty_sections_are_named():
  assert _write('<think></think><answer></answer>')[0] == 'thinking:\nanswer:\n'


def test_characters_come_whole():
  _, seen = _write('<think>你🎉é</think>')
  assert len(seen) > 10  # Byte pieces.
  assert all('\ufffd' not in text for text in seen)
  assert seen[-1] == 'thinking:\n你🎉é\n'


def test_half_a_character_at_the_end_shows_as_such():
  out = io.StringIO()
  writer = transcript.Writer(_TOKENIZER, rich.console.Console(file=out))
  writer.write(_TOKENIZER.encode('🎉')[0])
  assert out.getvalue() == ''
  writer.close()
  assert out.getvalue() == '\ufffd\n'


def test_control_characters_cannot_steer_the_terminal():
  text, _ = _write('<answer>a\x1b[2Jb\r\u202e</answer>')
  assert text == 'answer:\na\\x1b[2Jb\\r\\u202e\n'


def test_long_lines_are_not_wrapped():
  text, _ = _write(f'<think>{"12+" * 40}</think>')
  assert text == f'thinking:\n{"12+" * 40}\n'


def test_show_says_right_or_wrong():
  out = io.StringIO()
  row = {
    'prompt': 'What is 3+4?\n',
    'completion': '<think>a\nb</think><answer>7</answer>',
    'gold': '7',
  }
  console = rich.console.Console(file=out)
  transcript.show(console, 'base', row)
  transcript.show(console, 'base', row | {'gold': '8'})
  assert out.getvalue() == (
    '  base: What is 3+4?  (right)\n'
    '    thinking a\n             b\n'
    '    answer   7\n'
    '  base: What is 3+4?  (wrong, the answer is 8)\n'
    '    thinking a\n             b\n'
    '    answer   7\n'
  )
