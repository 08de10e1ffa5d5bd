"""Completions as HTML: thinking apart from the answer, right or wrong."""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from r1jax.evaluate import charts, markup, table
from r1jax.evaluate import runs as runs_lib

_TAG = re.compile(r'(</?(?:think|answer)>)')
_ANSWER = re.compile(r'<answer>([^<]*)</answer>')
_MAX_CHARACTERS = 3000
_MAX_COMPARISONS = 24
_MAX_STEPS = 8
_MAX_PER_STEP = 4


def split(completion: str) -> list[tuple[str, str]]:
  """Splits a completion into ('think' | 'answer' | 'text' | 'tag', text).

  'tag' is a tag where it does not belong, such as a second <think>. If the
  first tag is </think>, the thinking began in the prompt.
  """
  pieces = _TAG.split(completion)
  mode = 'think' if len(pieces) > 1 and pieces[1] == '</think>' else 'text'
  segments = []
  for i, piece in enumerate(pieces):
    if i % 2 == 0:
      if piece.strip() or (mode == 'answer' and piece):
        segments.append((mode, piece))
      continue
    name = piece.strip('</>')
    if piece.startswith('</') and mode == name:
      mode = 'text'
    elif not piece.startswith('</') and mode == 'text':
      mode = name
    else:
      segments.append(('tag', piece))
  return segments


def answer(completion: str) -> str | None:
  """The last answer in tags, stripped, as the rule reward reads it; or None."""
  found = _ANSWER.findall(completion)
  return found[-1].strip() if found else None


def comparisons_section(
  comparisons: Sequence[Mapping[str, Any]], titles: Sequence[str]
) -> markup.Html | None:
  """Shows the same prompts before and after training, side by side.

  Args:
    comparisons: Each 'prompt', 'before', 'after' and, where known, 'gold',
      'before_correct', 'after_correct'. Without the latter a completion is
      right if its answer is the gold text.
    titles: What before and after are called.
  """
  if not comparisons:
    return None
  blocks = []
  for item in comparisons[:_MAX_COMPARISONS]:
    gold = item.get('gold')
    sides = [
      _card(title, item.get(side), gold, item.get(f'{side}_correct'))
      for title, side in zip(titles, ('before', 'after'))
    ]
    blocks.append(
      markup.tag(
        'article',
        _prompt(item.get('prompt', ''), gold),
        markup.tag('div', sides, class_='pair'),
      )
    )
  return markup.tag(
    'section',
    markup.tag('h2', 'The same prompts, before and after'),
    blocks,
    id='completions',
  )


def samples_section(runs: Sequence[runs_lib.Run]) -> markup.Html | None:
  """Shows what each run sampled at a few steps from its first to its last."""
  blocks = []
  for run in runs:
    by_step = collections.defaultdict(list)
    for i, row in enumerate(run.samples):
      step = row.get('step', i)
      by_step[step if table.is_number(step) else i].append(row)
    if by_step:
      blocks.append(markup.tag('h3', run.name))
      blocks += _steps(by_step)
  if not blocks:
    return None
  return markup.tag(
    'section',
    markup.tag('h2', 'Samples during training'),
    blocks,
    id='samples',
  )


def _steps(by_step: Mapping[float, Sequence[Mapping[str, Any]]]) -> list[str]:
  """One folded block for each of some evenly chosen steps."""
  steps = sorted(by_step)
  pick = np.linspace(0, len(steps) - 1, min(_MAX_STEPS, len(steps)))
  blocks = []
  for i in sorted({round(p) for p in pick}):
    rows = by_step[steps[i]]
    cards = []
    for row in rows[:_MAX_PER_STEP]:
      gold, reward = row.get('gold'), row.get('reward')
      title = f'reward {reward:.3g}' if table.is_number(reward) else 'sample'
      card = _card(title, row.get('completion'), gold, row.get('correct'))
      cards.append(
        markup.tag('div', _prompt(row.get('prompt', ''), gold), card)
      )
    blocks.append(
      markup.tag(
        'details',
        markup.tag('summary', f'Step {steps[i]:,g}'),
        markup.tag('div', cards, class_='pair'),
        open=i in (0, len(steps) - 1),
      )
    )
  return blocks


def _prompt(prompt: str, gold: str | None) -> markup.Html:
  return markup.tag(
    'p',
    markup.tag('span', _cut(str(prompt).strip()), class_='prompt'),
    markup.tag('span', 'answer ', markup.tag('b', gold), class_='gold')
    if gold is not None
    else None,
    class_='question',
  )


def _card(
  title: str, completion: Any, gold: Any, correct: bool | None
) -> markup.Html:
  """One completion with its verdict, where it can be known."""
  if completion is None:
    body = [markup.tag('p', 'not sampled', class_='absent')]
    return markup.tag('div', _head(title, None), body, class_='completion')
  completion = str(completion)
  segments = split(completion)
  if correct is None and gold is not None:
    correct = answer(completion) == str(gold).strip()
  body = [_segment(kind, piece) for kind, piece in segments]
  if answer(completion) is None:
    body.append(markup.tag('p', 'no complete answer', class_='absent'))
  return markup.tag('div', _head(title, correct), body, class_='completion')


def _head(title: str, correct: bool | None) -> markup.Html:
  verdict = None
  if correct is not None:
    verdict = markup.tag(
      'span',
      '✓ right' if correct else '✗ wrong',
      class_='verdict good' if correct else 'verdict bad',
    )
  return markup.tag('h4', title, verdict)


def _segment(kind: str, piece: str) -> markup.Html:
  if kind == 'tag':
    return markup.tag('code', piece, class_='stray', title='tag out of place')
  label = {'think': 'thinking', 'answer': 'answer'}.get(kind)
  return markup.tag(
    'div',
    markup.tag('span', label, class_='kind') if label else None,
    markup.tag('div', _cut(piece.strip('\n')), class_='body'),
    class_=f'segment {kind}',
  )


def _cut(content: str) -> str:
  more = len(content) - _MAX_CHARACTERS
  if more <= 0:
    return content
  return (
    f'{content[:_MAX_CHARACTERS]} … ({charts.number(more)} more characters)'
  )
