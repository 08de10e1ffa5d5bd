import pytest

from r1jax.evaluate import completions

_CLEAN = '<think>3+4=7</think><answer>7</answer>'


@pytest.mark.parametrize(
  'completion, expected',
  [
    (_CLEAN, [('think', '3+4=7'), ('answer', '7')]),
    ('7', [('text', '7')]),
    ('', []),
    ('<think>a', [('think', 'a')]),
    ('a</think>b', [('think', 'a'), ('text', 'b')]),
    (
      '<think>a<think>b</think></think>',
      [('think', 'a'), ('tag', '<think>'), ('think', 'b'), ('tag', '</think>')],
    ),
    (
      '<answer>1</answer> so <answer>2',
      [('answer', '1'), ('text', ' so '), ('answer', '2')],
    ),
  ],
)
def test_split(completion, expected):
  assert completions.split(completion) == expected


@pytest.mark.parametrize(
  'completion, expected',
  [
    (_CLEAN, '7'),
    ('<answer> 7 \n</answer>', '7'),
    ('<answer>1</answer><answer>2</answer>', '2'),
    ('<answer>7', None),
    ('7', None),
    ('<answer></answer>', ''),
  ],
)
def test_answer(completion, expected):
  assert completions.answer(completion) == expected


def _verdicts(**item):
  section = completions.comparisons_section([item], ('base', 'after'))
  return section.count('✓ right'), section.count('✗ wrong')


def test_verdicts_compare_with_gold_unless_told():
  wrong = '<answer>8</answer>'
  item = {'prompt': '3+4', 'before': wrong, 'after': _CLEAN}
  assert _verdicts(**item, gold='7') == (1, 1)
  assert _verdicts(**item) == (0, 0)
  assert _verdicts(**item, gold='7', before_correct=True) == (2, 0)
  assert _verdicts(prompt='3+4', gold='7', before='7', after=None) == (0, 1)


def test_thinking_and_answer_stand_apart():
  item = {'prompt': 'p', 'gold': '7', 'before': _CLEAN, 'after': 'x' * 9999}
  section = completions.comparisons_section([item], ('base', 'after'))
  assert '<div class="segment think">' in section
  assert '<div class="segment answer">' in section
  assert section.count('x') < 4000 and 'more characters' in section
