"""Rewards on text: formats, the last answer, and equal numbers."""

import pytest

from r1jax.rl.reward import text


@pytest.mark.parametrize(
  ('answer', 'gold', 'same'),
  [
    ('42', '42', True),
    (' 42 ', '42', True),
    ('1,200', '1200', True),
    ('$1,200.00', '1200', True),
    ('12%', '12', True),
    ('7.', '7', True),
    ('-3', '-3', True),
    ('.5', '0.5', True),
    ('1e3', '1000', True),
    ('x  + 1', 'x + 1', True),
    ('42', '43', False),
    ('4 2', '42', False),
    ('', '0', False),
    ('42 apples', '42', False),
    ('1,2', '12', True),
    ('--3', '-3', False),
  ],
)
def test_answers_are_compared_as_text_and_as_numbers(answer, gold, same):
  assert text.is_same(answer, gold) == same


@pytest.mark.parametrize(
  ('completion', 'answer'),
  [
    (r'\boxed{42}', '42'),
    (r'\boxed{1} then \boxed{2}', '2'),
    (r'\boxed{\frac{1}{2}}', r'\frac{1}{2}'),
    (r'\boxed{7} and \boxed{8', '7'),
    ('42', None),
  ],
)
def test_the_last_closed_box_counts(completion, answer):
  assert text.last_boxed(completion) == answer


_TAGS = '<think>a</think><answer>42</answer>'
_BOXED = r'a b</think> It is \boxed{42}.'


def _grade(completion, name, finished=True):
  return text.grade(completion, '42', format_name=name, finished=finished)


@pytest.mark.parametrize(
  ('completion', 'name', 'correct', 'format'),
  [
    (_TAGS, 'tags', True, True),
    (f' {_TAGS}\n', 'tags', True, True),
    (_TAGS.replace('</think>', '</think>\n'), 'tags', True, True),
    (_TAGS.replace('42', '43'), 'tags', False, True),
    (f'{_TAGS} more', 'tags', True, False),
    (f'so {_TAGS}', 'tags', True, False),
    (_TAGS.replace('>a<', '><think><'), 'tags', True, False),
    (_TAGS.replace('42', ' '), 'tags', False, False),
    ('<answer>42</answer>', 'tags', True, False),
    (f'{_TAGS}<answer>9</answer>', 'tags', False, False),
    ('42', 'tags', False, False),
    (_BOXED, 'boxed', True, True),
    (f'<think>\n{_BOXED}', 'boxed', True, True),
    (f'{_BOXED}</think>', 'boxed', False, False),
    (r'\boxed{42} a</think> It is 42.', 'boxed', False, False),
    (r'It is \boxed{42}.', 'boxed', True, False),
    (r'</think> It is \boxed{42}.', 'boxed', True, False),
  ],
)
def test_format_and_accuracy(completion, name, correct, format):
  grade = _grade(completion, name)
  assert (grade.correct, grade.format) == (correct, format)


@pytest.mark.parametrize(
  ('completion', 'name'), [(_TAGS, 'tags'), (_BOXED, 'boxed')]
)
def test_what_was_cut_off_has_no_format(completion, name):
  grade = _grade(completion, name, finished=False)
  assert grade.correct and not grade.format and grade.answer == '42'
