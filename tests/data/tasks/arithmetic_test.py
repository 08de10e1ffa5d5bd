"""Tests of arithmetic: the keys and splits, and every step of the work."""

import random
import re

import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.data.tasks import arithmetic

_NAMES = ('ones', 'tens', 'hundreds', 'thousands', 'ten thousands')
_TO_ENGLISH = (
  ('个位', 'ones'),
  ('十位', 'tens'),
  ('百位', 'hundreds'),
  ('千位', 'thousands'),
  ('：', ': '),
  ('，', ', '),
  ('；', '; '),
  ('得', 'so '),
  ('试', 'try '),
  ('太大', 'too big'),
  ('太小', 'too small'),
  ('可以', 'ok'),
)
_CLAIM = re.compile(r'(\d+(?:[+×-]\d+)+)=(\d+)(?:\+(\d+)=(\d+))?')


def _compute(operation: str, a: int, b: int) -> int:
  if operation == 'divide':
    assert a % b == 0
  return {
    'add': a + b,
    'subtract': a - b,
    'multiply': a * b,
    'divide': a // max(b, 1),
  }[operation]


def _all_keys(operation: str, maximum: int) -> set[tuple[str, int, int]]:
  """The keys as the task defines them, by brute force."""
  found = set()
  for a in range(maximum + 1):
    for b in range(maximum + 1):
      if operation in ('add', 'multiply') and a > b:
        continue
      if operation == 'divide' and (b == 0 or a % b):
        continue
      if 0 <= _compute(operation, a, b) <= maximum:
        found.add((operation, a, b))
  return found


def _columns(text: str, a: int, b: int, sign: str) -> int:
  """Reads 'ones: …, tens: …' and checks each column of a+b or a-b."""
  value, carry = 0, 0
  items = text.split(', ')
  assert len(items) == max(len(str(a)), len(str(b)))
  for place, item in enumerate(items):
    name, claim = item.split(': ')
    assert name == _NAMES[place]
    left, right = claim.split('=')
    terms = [int(term) for term in left.split(sign)]
    assert len(terms) == (2 if place == 0 else 3)
    carry_in = terms[2] if place else 0
    x, y, s = a // 10**place % 10, b // 10**place % 10, int(right)
    assert (terms[1], carry_in) == (y, carry)
    if sign == '+':
      assert terms[0] == x and s == x + y + carry
      carry = s // 10
      value += (s if place == len(items) - 1 else s % 10) * 10**place
    else:
      carry = int(x < y + carry)
      assert terms[0] == x + 10 * carry and s == terms[0] - y - carry_in
      value += s * 10**place
  return value


def _digit_product(text: str, n: int, digit: int) -> int:
  """Reads '7×4=28, 3×4=12+2=14' and checks each step of n × digit."""
  carry = 0
  items = text.split(', ')
  assert len(items) == len(str(n))
  for place, item in enumerate(items):
    x = n // 10**place % 10
    expected = f'{x}×{digit}={x * digit}'
    total = x * digit + carry
    assert item == (f'{expected}+{carry}={total}' if place else expected)
    carry = total // 10
  return n * digit


def _check_multiply(text: str, a: int, b: int) -> int:
  short, long = sorted((a, b))
  if short == 0:
    assert text == f'{long}×0: so 0'
    return 0
  total, factors = None, []
  parts = text.split('; ')
  for part in parts:
    head, rest = part.split(': ', 1)
    steps, stated = rest.rsplit(', ', 1)
    assert stated.startswith('so ') == (part is parts[-1])
    stated = int(stated.removeprefix('so '))
    if '×' in head:
      n, factor = map(int, head.split('×'))
      assert n == long
      factors.append(factor)
      digit = int(str(factor).rstrip('0'))
      partial = _digit_product(steps, n, digit) * (factor // digit)
      total = partial if total is None else total
      assert stated == partial
    else:
      assert head == f'{total}+{partial}'
      total = _columns(steps, total, partial, '+')
      assert stated == total
  assert sum(factors) == short
  return total


def _check_trial(text: str, rest: int, b: int, last: bool) -> int | None:
  """Checks 'try 3: …, 72, 88-72: …, 16, 16÷24, ok: 3'; the remainder or None.

  None if the digit was not accepted.
  """
  digit, steps = re.fullmatch(r'try (\d): (.*)', text).groups()
  digit, product = int(digit), int(digit) * b
  head, verdict = re.fullmatch(
    '(.*), (too big|too small|ok: [0-9]+)', steps
  ).groups()
  head, sign, work = re.fullmatch(f'(.*), {rest}([<=-])(.*)', head).groups()
  if b >= 10:
    head, stated = head.rsplit(', ', 1)
    assert int(stated) == product
  assert _digit_product(head, b, digit) == product
  if product > rest:
    assert (sign, work) == ('<', str(product))
    assert (verdict, last) == ('too big', False)
    return None
  if product == rest:
    assert (sign, work, last) == ('=', str(product), True)
    assert verdict.startswith('ok')
    return 0
  assert sign == '-'
  remainder = rest - product
  work, asked = work.rsplit(', ', 1)
  assert asked == f'{remainder}÷{b}'
  if rest < 10:
    assert work == f'{product}={remainder}'
  else:
    columns, stated = work.removeprefix(f'{product}: ').rsplit(', ', 1)
    assert _columns(columns, rest, product, '-') == remainder == int(stated)
  assert verdict.startswith('ok') == last == (remainder < b)
  return remainder if last else None


def _check_divide(text: str, a: int, b: int) -> int:
  head, text = text.split(': ', 1)
  assert head == f'{a}÷{b}'
  if a == 0:
    assert text == 'so 0'
    return 0
  *parts, end = text.split('; ')
  assert len(parts) == len(str(a))
  rest = quotient = 0
  for digit, part in zip(str(a), parts, strict=True):
    rest = rest * 10 + int(digit)
    if rest < b:
      shown = f', {quotient * 10}' if quotient else ''
      assert part == f'{rest}÷{b}: 0{shown}'
      quotient *= 10
      continue
    quotient = quotient * 10 + rest // b
    assert part.endswith(f': {quotient}')
    partial, *trials = re.split(r', (?=try )', part)
    assert partial == f'{rest}÷{b}'
    for trial in trials:
      remainder = _check_trial(trial, rest, b, trial is trials[-1])
    _check_correction([int(trial[4]) for trial in trials], rest // b)
    rest = remainder
  assert rest == a % b and quotient == a // b
  assert end == (f'so {b}×{quotient}+{rest}' if rest else f'so {quotient}')
  return quotient


def _check_correction(digits: list[int], right: int) -> None:
  """The first guess is at most 2 off, and each next one goes 1 nearer."""
  assert abs(digits[0] - right) <= 2 and digits[-1] == right
  step = 1 if digits[0] < right else -1
  assert digits == list(range(digits[0], right + step, step))


def _check(problem: arithmetic.Problem, text: str) -> None:
  """Reads the whole text, in either language, and checks every claim."""
  for chinese, english in _TO_ENGLISH:
    text = text.replace(chinese, english)
  a, b = problem.a, problem.b
  if problem.operation == 'multiply':
    value = _check_multiply(text, a, b)
  elif problem.operation == 'divide':
    value = _check_divide(text, a, b)
  else:
    sign = '+' if problem.operation == 'add' else '-'
    columns, end = text.rsplit(', so ', 1)
    value = _columns(columns, a, b, sign)
    assert int(end) == value
  assert value == problem.result
  if arithmetic.is_even(problem):
    assert value == _compute(problem.operation, a, b)
    assert arithmetic.answer(problem) == str(value)


def _num_false_claims(text: str) -> int:
  false = 0
  for left, right, carry, total in _CLAIM.findall(text):
    terms = re.split('([+×-])', left)
    value = int(terms[0])
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
      value = {
        '+': value + int(term),
        '-': value - int(term),
        '×': value * int(term),
      }[sign]
    false += value != int(right)
    false += bool(total) and int(right) + int(carry or 0) != int(total or 0)
  return false


@pytest.mark.parametrize('maximum', [100, 1000, 2000])
@pytest.mark.parametrize('languages', [None, ('en',), ('zh',), ('en', 'zh')])
def test_every_step_of_every_solution_is_right(maximum, languages):
  config = arithmetic.ArithmeticConfig(maximum=maximum)
  rng = random.Random(0)
  for index in range(1000):
    problem = arithmetic.problem_at(config, 7, index, held_out=index % 2 == 0)
    text = arithmetic.solution(
      problem, rng, languages=languages, good_guess=0.5
    )
    _check(problem, text)


@pytest.mark.parametrize('maximum', [10, 100, 1000])
def test_divisions_that_leave_a_remainder_are_no_keys_of_the_task(maximum):
  config = arithmetic.ArithmeticConfig(maximum=maximum)
  rng = random.Random(0)
  drawn = [arithmetic.draw_uneven(config, rng) for _ in range(1000)]
  for p in drawn:
    assert p.operation == 'divide' and 1 < p.b <= maximum
    assert 0 < p.a <= maximum and p.a % p.b and not arithmetic.is_even(p)
    _check(p, arithmetic.solution(p, rng, good_guess=0.5))
    product, rest = arithmetic.answer(p).split('+')
    b, quotient = product.split('×')
    assert int(b) == p.b and int(b) * int(quotient) + int(rest) == p.a
    assert 0 < int(rest) < p.b
  assert {p.language for p in drawn} == set(arithmetic.LANGUAGES)
  assert any(p.a > p.b for p in drawn) and len({p.b for p in drawn}) > 5


def test_quotients_of_held_out_keys_are_practised_on_other_dividends():
  config = arithmetic.ArithmeticConfig(maximum=100)
  rng = random.Random(0)
  drawn = [arithmetic.draw_uneven(config, rng) for _ in range(8000)]
  held_out = {
    (b, a // b)
    for a, b in zip(*arithmetic.keys('divide', 100, True), strict=True)
    if 1 < b < 10 and a < 100
  }
  assert len(held_out) > 30
  assert held_out <= {(p.b, p.result) for p in drawn}


def test_worked_examples_read_as_specified():
  def solve(operation, a, b, language, good_guess=1.0):
    result = _compute(operation, a, b)
    problem = arithmetic.Problem(operation, a, b, result, language)
    rng = random.Random(0)
    return arithmetic.solution(problem, rng, good_guess=good_guess)

  assert solve('add', 347, 285, 'en') == (
    'ones: 7+5=12, tens: 4+8+1=13, hundreds: 3+2+1=6, so 632'
  )
  assert solve('add', 347, 285, 'zh') == (
    '个位：7+5=12，十位：4+8+1=13，百位：3+2+1=6，得632'
  )
  assert solve('subtract', 347, 285, 'en') == (
    'ones: 7-5=2, tens: 14-8-0=6, hundreds: 3-2-1=0, so 62'
  )
  assert solve('multiply', 4, 37, 'en') == '37×4: 7×4=28, 3×4=12+2=14, so 148'
  assert solve('multiply', 37, 24, 'en') == (
    '37×4: 7×4=28, 3×4=12+2=14, 148; 37×20: 7×2=14, 3×2=6+1=7, 740; '
    '148+740: ones: 8+0=8, tens: 4+4+0=8, hundreds: 1+7+0=8, so 888'
  )
  assert solve('divide', 888, 24, 'en') == (
    '888÷24: 8÷24: 0; 88÷24, try 3: 4×3=12, 2×3=6+1=7, 72, 88-72: '
    'ones: 8-2=6, tens: 8-7-0=1, 16, 16÷24, ok: 3; '
    '168÷24, try 7: 4×7=28, 2×7=14+2=16, 168, 168=168, ok: 37; so 37'
  )
  assert solve('divide', 812, 4, 'zh') == (
    '812÷4：8÷4，试2：4×2=8，8=8，可以：2；1÷4：0，20；'
    '12÷4，试3：4×3=12，12=12，可以：203；得203'
  )


def test_division_guesses_right_as_often_as_asked():
  config = arithmetic.ArithmeticConfig(maximum=1000)
  rng = random.Random(0)
  num_digits, offsets = 0, {}
  for index in range(4000):
    problem = arithmetic.problem_at(config, 0, index, held_out=False)
    if problem.operation != 'divide':
      continue
    text = arithmetic.solution(problem, rng, languages=('en',), good_guess=0.7)
    for tries in re.findall(r'(?:try [^;]*)?ok: ', text):
      num_digits += 1
      wrong = tries.count('try ') - 1
      offsets[wrong] = offsets.get(wrong, 0) + 1
  # A guess off by some is clipped at 1 and 9, so fewer than 30% are wrong.
  assert 0.7 < offsets[0] / num_digits < 0.85
  # Off by two as well, so that the next try is seldom known beforehand.
  assert set(offsets) == {0, 1, 2} and offsets[2] > 0.25 * offsets[1]


def test_labels_are_drawn_per_step_when_mixed():
  problem = arithmetic.Problem('add', 347, 285, 632, 'en')
  texts = {
    arithmetic.solution(problem, random.Random(i), languages=('en', 'zh'))
    for i in range(200)
  }
  assert len(texts) == 2**4


@pytest.mark.parametrize('maximum', [100, 1000])
def test_slips_end_in_a_wrong_answer_after_one_wrong_step(maximum):
  config = arithmetic.ArithmeticConfig(maximum=maximum)
  rng = random.Random(0)
  counts = {operation: [0, 0] for operation in arithmetic.OPERATIONS}
  for index in range(1500):
    problem = arithmetic.problem_at(config, 3, index, held_out=False)
    text, answer = arithmetic.wrong_solution(problem, rng)
    assert answer != arithmetic.answer(problem)
    assert re.fullmatch(r'0|[1-9]\d*', answer)
    assert re.search(rf'(so |得){answer}$', text)
    # Without a step to get wrong, only the last number is.
    if arithmetic.solution(problem, rng).count('=') > 0:
      counts[problem.operation][_num_false_claims(text)] += 1
  for operation in ('add', 'subtract', 'multiply'):
    assert counts[operation][0] == 0 < counts[operation][1]
  # Division mends most of its slips.
  assert counts['divide'][1] > 0.1 * sum(counts['divide'])


@pytest.mark.parametrize('operation', arithmetic.OPERATIONS)
@pytest.mark.parametrize('maximum', [10, 47])
def test_keys_are_all_there_is_and_the_splits_part_them(operation, maximum):
  splits = []
  for held_out in (False, True):
    a_N, b_N = arithmetic.keys(operation, maximum, held_out)
    split = [
      (operation, a, b) for a, b in zip(a_N.tolist(), b_N.tolist(), strict=True)
    ]
    assert split and len(set(split)) == len(split)
    assert all(arithmetic.is_held_out(key) == held_out for key in split)
    splits.append(set(split))
  assert not splits[0] & splits[1]
  assert splits[0] | splits[1] == _all_keys(operation, maximum)


@pytest.mark.parametrize('maximum', [100, 1000])
@pytest.mark.parametrize('operation', arithmetic.OPERATIONS)
def test_a_fifth_of_the_keys_is_held_out(operation, maximum):
  train, held_out = (
    len(arithmetic.keys(operation, maximum, split)[0])
    for split in (False, True)
  )
  total = train + held_out
  four_sigma = 4 * np.sqrt(0.2 * 0.8 / total)
  assert abs(held_out / total - 0.2) < four_sigma


def test_the_split_hash_is_splitmix64():
  # The split must never change: models have been trained on one side of it.
  def splitmix(x):
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)

  # The first output for this seed, as published with the generator.
  assert splitmix(1234567) == 6457827717110365317
  assert arithmetic.random_bits(5, 9) == splitmix(splitmix(5) ^ 9)
  for number, operation in enumerate(arithmetic.OPERATIONS, 1):
    for a, b in ((0, 1), (3, 40), (500, 500), (1, 2000)):
      packed = number * 2**56 + a * 2**28 + b
      held_out = splitmix(packed) % 5 == 0
      assert arithmetic.is_held_out((operation, a, b)) == held_out


def test_problems_are_valid_fixed_prompts_of_their_split():
  config = arithmetic.ArithmeticConfig(maximum=30)
  shown = {}
  for held_out in (False, True):
    for index in range(4000):
      p = arithmetic.problem_at(config, 0, index, held_out=held_out)
      assert 0 <= p.a <= 30 and 0 <= p.b <= 30 and 0 <= p.result <= 30
      assert p.result == _compute(p.operation, p.a, p.b)
      key = arithmetic.key(p)
      assert key in _ALL_30
      assert arithmetic.is_held_out(key) == held_out
      assert shown.setdefault((key, p.language), p) == p
  orders = [
    p.a < p.b for p in shown.values() if p.operation == 'add' and p.a != p.b
  ]
  assert 0.4 < np.mean(orders) < 0.6
  languages = [
    shown[key, 'en'].a != shown[key, 'zh'].a
    for key, language in shown
    if language == 'en' and (key, 'zh') in shown and key[0] == 'add'
  ]
  assert 0.3 < np.mean(languages) < 0.7


_ALL_30 = set().union(*(_all_keys(o, 30) for o in arithmetic.OPERATIONS))


def test_keys_of_commutative_operations_ignore_order_and_language():
  for operation in arithmetic.OPERATIONS:
    keys = {
      arithmetic.key(arithmetic.Problem(operation, a, b, 0, language))
      for a, b in ((3, 8), (8, 3))
      for language in arithmetic.LANGUAGES
    }
    assert len(keys) == (1 if operation in ('add', 'multiply') else 2)


def test_draws_are_uniform_and_a_function_of_seed_and_index():
  config = arithmetic.ArithmeticConfig(maximum=100)
  draw = [
    arithmetic.problem_at(config, 1, i, held_out=False) for i in range(8000)
  ]
  again = arithmetic.problem_at(config, 1, 4321, held_out=False)
  other = arithmetic.problem_at(config, 2, 4321, held_out=False)
  assert again == draw[4321] != other
  for field, values in (
    ('operation', arithmetic.OPERATIONS),
    ('language', arithmetic.LANGUAGES),
  ):
    share = 1 / len(values)
    four_sigma = 4 * np.sqrt(share * (1 - share) / len(draw))
    for value in values:
      found = np.mean([getattr(p, field) == value for p in draw])
      assert abs(found - share) < four_sigma
  # Each of the 287 keys is met about 7 times, never 40.
  counts = {}
  for p in draw:
    if p.operation == 'multiply':
      counts[arithmetic.key(p)] = counts.get(arithmetic.key(p), 0) + 1
  num_keys = len(arithmetic.keys('multiply', 100, False)[0])
  assert len(counts) > 0.99 * num_keys and max(counts.values()) < 40


@pytest.mark.parametrize(('maximum', 'number'), [(100, 1000), (1000, 1200)])
def test_evaluation_problems_are_distinct_held_out_and_balanced(
  maximum, number
):
  config = arithmetic.ArithmeticConfig(maximum=maximum)
  problems = arithmetic.evaluation_problems(config, number, 0)
  assert len(set(problems)) == len(problems) == number
  assert all(arithmetic.is_held_out(arithmetic.key(p)) for p in problems)
  assert problems == arithmetic.evaluation_problems(config, number, 0)
  assert problems != arithmetic.evaluation_problems(config, number, 1)
  sizes = []
  for operation in arithmetic.OPERATIONS:
    for language in arithmetic.LANGUAGES:
      of_cell = [
        p
        for p in problems
        if (p.operation, p.language) == (operation, language)
      ]
      available = len(arithmetic.keys(operation, maximum, True)[0])
      sizes.append((len(of_cell), available))
  biggest = max(size for size, _ in sizes)
  # Only a cell that has run out may fall behind.
  assert all(
    size >= biggest - 1 or size == available for size, available in sizes
  )


def test_more_evaluation_problems_than_there_are_is_a_user_error():
  config = arithmetic.ArithmeticConfig(maximum=20)
  total = 2 * sum(
    len(arithmetic.keys(o, 20, True)[0]) for o in arithmetic.OPERATIONS
  )
  problems = arithmetic.evaluation_problems(config, total, 0)
  assert len(set(problems)) == total
  with pytest.raises(config_lib.UserError, match=f'only {total}'):
    arithmetic.evaluation_problems(config, total + 1, 0)


def test_prompts():
  problem = arithmetic.Problem('divide', 84, 7, 12, 'en')
  assert arithmetic.prompt(problem) == 'What is 84÷7?\n'
  problem = arithmetic.Problem('subtract', 84, 7, 77, 'zh')
  assert arithmetic.prompt(problem) == '84-7等于多少？\n'


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('maximum', 9),
    ('maximum', 2001),
    ('languages', ()),
    ('languages', ('en', 'fr')),
    ('languages', ('en', 'en')),
    ('good_guess', 1.5),
  ],
)
def test_impossible_configs_name_the_field(field, value):
  with pytest.raises(ValueError, match=field):
    arithmetic.ArithmeticConfig(**{'maximum': 100, field: value})


def test_one_language_alone():
  config = arithmetic.ArithmeticConfig(maximum=20, languages=('zh',))
  problems = arithmetic.evaluation_problems(config, 20, 0)
  drawn = arithmetic.problem_at(config, 0, 0, held_out=False)
  assert {p.language for p in [*problems, drawn]} == {'zh'}
