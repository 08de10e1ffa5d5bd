"""Worked solutions of + - × ÷, digit by digit, in English or Chinese.

Every step is one that a tiny model can do in a single leap: one-digit sums,
one-digit products, copies and comparisons of two numbers that stand side by
side. Division tries a digit, checks it and goes up or down by one until it
fits. A *slip* makes one step wrong; the work after it follows from the wrong
value.
"""

import random
from collections.abc import Sequence

from r1jax.data.tasks import arithmetic_labels


class _Stray(Exception):
  """A slip led the trial division outside the digits 1 to 9."""


class _Pen:
  """Picks the labels of each step and makes step `slip_at` wrong.

  Attributes:
    num_steps: Step results written so far.
  """

  def __init__(
    self,
    labels: Sequence[arithmetic_labels.Labels],
    rng: random.Random,
    slip_at: int,
  ):
    self._labels = labels
    self._mixed = len(labels) > 1
    self._slip_at = slip_at
    self.rng = rng
    self.num_steps = 0

  def labels(self) -> arithmetic_labels.Labels:
    return self.rng.choice(self._labels) if self._mixed else self._labels[0]

  def result(self, value: int) -> int:
    """Returns the value, or on the slip's turn one with a wrong last digit."""
    self.num_steps += 1
    if self.num_steps != self._slip_at:
      return value
    last = value % 10
    return value - last + (last + self.rng.randrange(1, 10)) % 10


def solve(
  operation: str,
  a: int,
  b: int,
  *,
  rng: random.Random,
  languages: Sequence[str],
  good_guess: float,
  slip_at: int = 0,
) -> tuple[str, int, int]:
  """Works out `a operation b` and returns (text, value, number of steps).

  Args:
    operation: '+', '-', '×' or '÷'.
    a: First operand.
    b: Second operand.
    rng: Draws division's first guesses, mixed labels and slips.
    languages: One name from arithmetic_labels.LABELS, or several to draw from
      at each step.
    good_guess: Probability that division tries the right digit first.
    slip_at: The step, from 1, whose result is wrong; 0 for none.
  """
  pen = _Pen(
    [arithmetic_labels.LABELS[name] for name in languages], rng, slip_at
  )
  if operation == '+':
    text, value = _add(pen, a, b)
    label = pen.labels()
    text += f'{label.comma}{label.so}{value}'
  elif operation == '-':
    text, value = _subtract(pen, a, b)
    label = pen.labels()
    text += f'{label.comma}{label.so}{value}'
  elif operation == '×':
    text, value = _multiply(pen, a, b)
  else:
    text, value = _divide(pen, a, b, good_guess)
  return text, value, pen.num_steps


def solve_with_slip(
  operation: str,
  a: int,
  b: int,
  *,
  rng: random.Random,
  languages: Sequence[str],
  good_guess: float,
) -> tuple[str, int]:
  """Works out `a operation b` with one wrong step and a wrong value.

  Returns:
    The text and its final value, which is never the right one: where no slip
    got through to the end, only the last number is wrong.
  """
  options = {'rng': rng, 'languages': languages, 'good_guess': good_guess}
  text, right, num_steps = solve(operation, a, b, **options)
  for _ in range(4 if num_steps else 0):
    slip_at = rng.randrange(1, num_steps + 1)
    try:
      slipped, value, _ = solve(operation, a, b, slip_at=slip_at, **options)
    except _Stray:
      continue
    if value != right:
      return slipped, value
  wrong = right - right % 10 + (right + rng.randrange(1, 10)) % 10
  return f'{text[: -len(str(right))]}{wrong}', wrong


def _add(pen: _Pen, a: int, b: int) -> tuple[str, int]:
  """Adds by columns: 'ones: 7+5=12, tens: 4+8+1=13'."""
  text, total, carry, scale = '', 0, 0, 1
  for column in range(len(str(max(a, b)))):
    label = pen.labels()
    x, y = a // scale % 10, b // scale % 10
    value = pen.result(x + y + carry)
    name = f'{label.columns[column]}{label.colon}'
    if column:
      text += f'{label.comma}{name}{x}+{y}+{carry}={value}'
    else:
      text = f'{name}{x}+{y}={value}'
    carry = value // 10
    total += value % 10 * scale
    scale *= 10
  return text, total + carry * scale


def _subtract(pen: _Pen, a: int, b: int) -> tuple[str, int]:
  """Subtracts by columns: 'ones: 7-5=2, tens: 14-8-0=6, hundreds: 3-2-1=0'."""
  text, total, borrow, scale = '', 0, 0, 1
  for column in range(len(str(a))):
    label = pen.labels()
    x, y = a // scale % 10, b // scale % 10
    borrowed = int(x < y + borrow)
    x += 10 * borrowed
    value = pen.result(x - y - borrow)
    name = f'{label.columns[column]}{label.colon}'
    if column:
      text += f'{label.comma}{name}{x}-{y}-{borrow}={value}'
    else:
      text = f'{name}{x}-{y}={value}'
    borrow = borrowed
    total += value * scale
    scale *= 10
  return text, total


def _times_digit(pen: _Pen, n: int, digit: int) -> tuple[str, int]:
  """Multiplies by one digit: '7×4=28, 3×4=12+2=14'."""
  text, total, carry, scale = '', 0, 0, 1
  for column in range(len(str(n))):
    x = n // scale % 10
    value = pen.result(x * digit)
    if column:
      product, value = value, pen.result(value + carry)
      text += f'{pen.labels().comma}{x}×{digit}={product}+{carry}={value}'
    else:
      text = f'{x}×{digit}={value}'
    carry = value // 10
    total += value % 10 * scale
    scale *= 10
  return text, total + carry * scale


def _multiply(pen: _Pen, a: int, b: int) -> tuple[str, int]:
  """Multiplies by each digit of the shorter operand, adding as it goes."""
  short = min(a, b)  # Of as many digits, or fewer.
  long = a + b - short
  if short == 0:
    label = pen.labels()
    return f'{long}×0{label.colon}{label.so}0', 0
  places = [p for p in range(len(str(short))) if short // 10**p % 10]
  text, total = '', 0
  for place in places:
    digit = short // 10**place % 10
    label = pen.labels()
    steps, partial = _times_digit(pen, long, digit)
    partial *= 10**place
    shifted = digit * 10**place
    first, last = place == places[0], place == places[-1]
    so = label.so if first and last else ''
    semicolon = '' if first else label.semicolon
    text += f'{semicolon}{long}×{shifted}{label.colon}{steps}{label.comma}'
    text += f'{so}{partial}'
    if not first:
      label = pen.labels()
      steps, value = _add(pen, total, partial)
      so = label.so if last else ''
      text += f'{label.semicolon}{total}+{partial}{label.colon}{steps}'
      text += f'{label.comma}{so}{value}'
      partial = value
    total = partial
  return text, total


def _divide(pen: _Pen, a: int, b: int, good_guess: float) -> tuple[str, int]:
  """Divides by long division, writing the quotient so far after each digit.

  What leaves a remainder ends in '7×12+3'; a slip in what does not, does not.
  """
  label = pen.labels()
  text = f'{a}÷{b}{label.colon}'
  if a == 0:
    return f'{text}{label.so}0', 0
  digits = str(a)
  rest, quotient, used = int(digits[0]), 0, 1
  while True:
    if rest < b:
      text += f'{rest}÷{b}{pen.labels().colon}0'
      if quotient:  # A leading zero is no digit of the quotient.
        quotient *= 10
        text += f'{pen.labels().comma}{quotient}'
    else:
      steps, digit, rest = _divide_digit(pen, rest, b, good_guess)
      quotient = quotient * 10 + digit
      text += f'{steps}{quotient}'
    label = pen.labels()
    text += label.semicolon
    if used == len(digits):
      end = f'{b}×{quotient}+{rest}' if a % b else f'{quotient}'
      return f'{text}{label.so}{end}', quotient
    rest = rest * 10 + int(digits[used])
    used += 1


def _divide_digit(
  pen: _Pen, rest: int, b: int, good_guess: float
) -> tuple[str, int, int]:
  """Tries digits until the remainder fits: (text, digit, remainder)."""
  digit = rest // b
  if pen.rng.random() >= good_guess:
    # Off by two as well: what to try next then has to be worked out from what
    # was tried, where recalling the right digit would do otherwise.
    digit = min(9, max(1, digit + pen.rng.choice((-2, -1, 1, 2))))
  text = f'{rest}÷{b}'
  while True:
    label = pen.labels()
    comma = label.comma
    steps, product = _times_digit(pen, b, digit)
    text += f'{comma}{label.attempt}{digit}{label.colon}{steps}'
    if b >= 10:  # Below, the only step has just stated the product.
      text += f'{comma}{product}'
    if product > rest:
      text += f'{comma}{rest}<{product}{comma}{label.too_big}'
      digit -= 1
    elif product == rest:
      return f'{text}{comma}{rest}={product}{comma}{label.accept}', digit, 0
    else:
      steps, remainder = _take_away(pen, rest, product, label)
      steps += f'{comma}{remainder}÷{b}{comma}'
      if remainder < b:
        return f'{text}{steps}{label.accept}', digit, remainder
      text, digit = f'{text}{steps}{label.too_small}', digit + 1
    if not 1 <= digit <= 9:
      raise _Stray


def _take_away(
  pen: _Pen, rest: int, product: int, label: arithmetic_labels.Labels
) -> tuple[str, int]:
  """Writes the remainder, by columns from two digits on: (text, remainder)."""
  if rest < 10:
    value = pen.result(rest - product)
    return f'{label.comma}{rest}-{product}={value}', value
  steps, value = _subtract(pen, rest, product)
  text = f'{label.comma}{rest}-{product}{label.colon}{steps}'
  return f'{text}{label.comma}{value}', value
