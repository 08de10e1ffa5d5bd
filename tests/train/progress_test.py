"""What a user sees while a run goes on."""

import io

from rich import console as rich_console

from r1jax.train import progress


def _console(*, is_terminal):
  return rich_console.Console(
    file=io.StringIO(), force_terminal=is_terminal, width=140
  )


def test_a_file_gets_plain_lines_and_always_the_last():
  console = _console(is_terminal=False)
  shown = ['train/loss', 'rl/accuracy', 'eval/loss']
  with progress.Progress(
    200, title='grpo', shown=shown, every_seconds=3600, console=console
  ) as bar:
    for step in range(1, 201):
      bar.update(
        step,
        {
          'train/loss': step / 100,
          'rl/accuracy': 0.5,
          'perf/tokens_per_second': 12345.0,
          'rl/kl': 1.0,
        },
      )
      if step == 100:
        bar.update(step, {'eval/loss': 3.25})
    bar.say('done [here]')
  lines = console.file.getvalue().splitlines()
  assert len(lines) == 3
  assert lines[0].startswith('grpo 1/200  loss 0.01  accuracy 0.5')
  assert lines[1] == (
    'grpo 200/200  loss 2  accuracy 0.5  eval loss 3.25  12.3k tokens/s'
    '  0:00:00 left'
  )
  assert lines[2] == 'done [here]'


def test_plain_lines_keep_their_distance():
  console = _console(is_terminal=False)
  bar = progress.Progress(5, every_seconds=0, console=console)
  for step in range(1, 6):
    bar.update(step, {'train/loss': 1.0})
  assert len(console.file.getvalue().splitlines()) == 5


def test_a_terminal_gets_one_line_that_shows_the_last_values():
  console = _console(is_terminal=True)
  with progress.Progress(20, start_step=10, console=console) as bar:
    for step in range(11, 21):
      bar.update(step, {'train/loss': 2.5, 'perf/tokens_per_second': 900.0})
    bar.say('a line above')
  text = console.file.getvalue()
  assert '20/20' in text and 'loss 2.5  900 tokens/s' in text
  assert 'a line above' in text


def test_durations():
  assert progress.duration(3725.2) == '1:02:05'
