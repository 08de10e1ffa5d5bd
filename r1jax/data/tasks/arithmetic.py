"""Bilingual integer arithmetic with random access and a fixed held-out split.

A key is (operation, a, b), whatever the language, with a <= b where the
operation commutes. A fifth of each operation's keys is held out by a hash of
the key alone: neither a seed nor the maximum can mix the splits. A problem is
(key, language); another bit of its hash decides which operand comes first.
"""

import dataclasses
import functools
import random
from collections.abc import Sequence

import numpy as np

from r1jax import config as config_lib
from r1jax.data.tasks import arithmetic_solution

OPERATIONS = ('add', 'subtract', 'multiply', 'divide')
LANGUAGES = ('en', 'zh')
SYMBOLS = {'add': '+', 'subtract': '-', 'multiply': '×', 'divide': '÷'}
_COMMUTES = ('add', 'multiply')
_PROMPTS = {'en': 'What is {}{}{}?\n', 'zh': '{}{}{}等于多少？\n'}

_HELD_OUT_PARTS = 5
_OPERAND_BITS = 28
_MASK64 = (1 << 64) - 1

Key = tuple[str, int, int]


@dataclasses.dataclass(frozen=True)
class ArithmeticConfig:
  """Which problems there are and how they are worked out.

  Attributes:
    maximum: Operands and results lie in [0, maximum].
    languages: Languages of the prompts, from LANGUAGES.
    good_guess: Probability that a worked division tries the right digit
      first; else one that is at most two off.
  """

  maximum: int
  languages: tuple[str, ...] = LANGUAGES
  good_guess: float = 0.7

  def __post_init__(self):
    # Below, some held-out part is empty; above, the tables of keys get large.
    if not 10 <= self.maximum <= 2000:
      raise ValueError(f'maximum={self.maximum}, it must be in [10, 2000]')
    if not self.languages or set(self.languages) - set(LANGUAGES):
      raise ValueError(
        f'languages={self.languages}, they must be from {LANGUAGES}'
      )
    if len(set(self.languages)) < len(self.languages):
      raise ValueError(f'languages={self.languages} repeats one')
    if not 0.0 <= self.good_guess <= 1.0:
      raise ValueError(f'good_guess={self.good_guess}, it must be in [0, 1]')


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
  """One fixed prompt: `a operation b` as shown, asked in `language`.

  The task's divisions come out even; `draw_uneven` makes others, whose result
  is the quotient.
  """

  operation: str
  a: int
  b: int
  result: int
  language: str


def key(problem: Problem) -> Key:
  """Returns the problem's key: the same for a+b and b+a, in any language."""
  a, b = problem.a, problem.b
  if problem.operation in _COMMUTES and a > b:
    a, b = b, a
  return problem.operation, a, b


def is_held_out(key: Key) -> bool:
  """Says whether a key belongs to the held-out fifth of its operation."""
  return bool(_hash_key(*key) % _HELD_OUT_PARTS == 0)


@functools.lru_cache(maxsize=16)
def keys(
  operation: str, maximum: int, held_out: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns all keys of one operation and split as (a_N, b_N), int32."""
  size_N = np.arange(maximum + 1, dtype=np.int32)
  a_NN, b_NN = size_N[:, None], size_N[None, :]
  if operation == 'add':
    valid_NN = (a_NN <= b_NN) & (a_NN + b_NN <= maximum)
  elif operation == 'subtract':
    valid_NN = np.broadcast_to(a_NN >= b_NN, (maximum + 1,) * 2)
  elif operation == 'multiply':
    valid_NN = (a_NN <= b_NN) & (a_NN * b_NN <= maximum)
  else:
    valid_NN = (b_NN > 0) & (a_NN % np.maximum(b_NN, 1) == 0)
  a_N, b_N = (i_N.astype(np.uint64) for i_N in np.nonzero(valid_NN))
  split_N = _hash_key(operation, a_N, b_N) % _HELD_OUT_PARTS == 0
  keep_N = split_N if held_out else ~split_N
  return a_N[keep_N].astype(np.int32), b_N[keep_N].astype(np.int32)


def draw(
  config: ArithmeticConfig, rng: random.Random, *, held_out: bool
) -> Problem:
  """Draws an operation, then one of its keys, then a language, uniformly."""
  return _pick(config, rng.random(), rng.random(), rng.random(), held_out)


def draw_uneven(config: ArithmeticConfig, rng: random.Random) -> Problem:
  """Draws a division that leaves a remainder: no problem of the task.

  Its quotient and divisor are those of any key, held out or not. Were they of
  training keys only, a held-out 28÷7 would be the one place where 4 is right
  for a 7, and a model would learn that it never is.
  """
  sides = [
    keys('divide', config.maximum, held_out) for held_out in (False, True)
  ]
  sizes = [len(a_N) for a_N, _ in sides]
  while True:
    index = rng.randrange(sum(sizes))
    a_N, b_N = sides[index >= sizes[0]]
    index -= sizes[0] * (index >= sizes[0])
    a, b = a_N.item(index), b_N.item(index)
    if b > 1 and a < config.maximum:
      a += rng.randrange(1, min(b, config.maximum - a + 1))
      return Problem('divide', a, b, a // b, rng.choice(config.languages))


def is_even(problem: Problem) -> bool:
  """Says whether a problem is one of the task's: no remainder."""
  return problem.operation != 'divide' or problem.a % problem.b == 0


def problem_at(
  config: ArithmeticConfig, seed: int, index: int, *, held_out: bool
) -> Problem:
  """Returns problem `index` of the endless sequence of `seed`."""
  state = random_bits(seed, index)
  u = []
  for _ in range(3):
    state = _mix(state)
    u.append((state >> 11) / (1 << 53))
  return _pick(config, *u, held_out)


def evaluation_problems(
  config: ArithmeticConfig, num_problems: int, seed: int
) -> list[Problem]:
  """Returns distinct held-out problems, balanced over operation and language.

  They come round robin; an operation that runs out leaves its share to the
  others.

  Raises:
    UserError: There are fewer held-out problems than asked for.
  """
  columns = []
  for operation in OPERATIONS:
    a_N, b_N = keys(operation, config.maximum, True)
    for language in config.languages:
      salt = random_bits(seed, LANGUAGES.index(language))
      hash_N = _hash_key(
        operation, a_N.astype(np.uint64), b_N.astype(np.uint64)
      )
      order_N = np.argsort(_mix(hash_N ^ salt), kind='stable')[:num_problems]
      columns.append((operation, language, a_N[order_N], b_N[order_N]))
  total = sum(
    len(keys(operation, config.maximum, True)[0]) * len(config.languages)
    for operation in OPERATIONS
  )
  if num_problems > total:
    raise config_lib.UserError(
      f'num_problems={num_problems}, but maximum={config.maximum} has only'
      f' {total} held-out problems'
    )
  problems, turn = [], 0
  while len(problems) < num_problems:
    for operation, language, a_N, b_N in columns:
      if turn < len(a_N) and len(problems) < num_problems:
        a, b = a_N.item(turn), b_N.item(turn)
        problems.append(_show(operation, a, b, language))
    turn += 1
  return problems


def prompt(problem: Problem) -> str:
  """Returns the question, with its newline."""
  symbol = SYMBOLS[problem.operation]
  return _PROMPTS[problem.language].format(problem.a, symbol, problem.b)


def answer(problem: Problem) -> str:
  """Returns the right answer in digits; '7×12+3' where a remainder is left."""
  if not is_even(problem):
    return f'{problem.b}×{problem.result}+{problem.a % problem.b}'
  return str(problem.result)


def solution(
  problem: Problem,
  rng: random.Random,
  *,
  languages: Sequence[str] | None = None,
  good_guess: float = 0.7,
) -> str:
  """Returns the worked steps, right to the end, without tags.

  Args:
    problem: What to work out.
    rng: Draws division's first guesses, and labels if there are several.
    languages: Of the labels, drawn anew at each step if there are several;
      None for the prompt's.
    good_guess: Probability that division tries the right digit first.
  """
  text, _, _ = arithmetic_solution.solve(
    SYMBOLS[problem.operation],
    problem.a,
    problem.b,
    rng=rng,
    languages=languages or (problem.language,),
    good_guess=good_guess,
  )
  return text


def wrong_solution(
  problem: Problem, rng: random.Random, *, good_guess: float = 0.7
) -> tuple[str, str]:
  """Returns steps with one slip, in the prompt's language, and their answer."""
  text, value = arithmetic_solution.solve_with_slip(
    SYMBOLS[problem.operation],
    problem.a,
    problem.b,
    rng=rng,
    languages=(problem.language,),
    good_guess=good_guess,
  )
  return text, str(value)


def random_bits(seed: int, index: int) -> int:
  """Hashes (seed, index) to 64 bits: the start of whatever is drawn there."""
  return _mix(_mix(seed & _MASK64) ^ (index & _MASK64))


def _pick(
  config: ArithmeticConfig, u: float, v: float, w: float, held_out: bool
) -> Problem:
  """Turns three uniform draws from [0, 1) into a problem."""
  operation = OPERATIONS[int(u * len(OPERATIONS))]
  a_N, b_N = keys(operation, config.maximum, held_out)
  index = int(v * len(a_N))
  language = config.languages[int(w * len(config.languages))]
  return _show(operation, a_N.item(index), b_N.item(index), language)


def _show(operation: str, a: int, b: int, language: str) -> Problem:
  """Turns a key and a language into their one problem."""
  if operation == 'add':
    result = a + b
  elif operation == 'subtract':
    result = a - b
  elif operation == 'multiply':
    result = a * b
  else:
    result = a // b
  if operation in _COMMUTES:
    salt = 1 + LANGUAGES.index(language)
    if _mix(_hash_key(operation, a, b) ^ salt) & 1:
      a, b = b, a
  return Problem(operation, a, b, result, language)


def _hash_key(operation: str, a: int | np.ndarray, b: int | np.ndarray):
  """Hashes keys to 64 bits; ints give an int, uint64 arrays an array."""
  number = 1 + OPERATIONS.index(operation)
  return _mix((number << 2 * _OPERAND_BITS) + (a << _OPERAND_BITS) + b)


def _mix(x):
  """Scrambles 64 bits (int, or uint64 array of any shape): splitmix64.

  Source: Steele, Lea, Flood, 'Fast splittable pseudorandom number
  generators', OOPSLA 2014.
  """
  x = (x + 0x9E3779B97F4A7C15) & _MASK64
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
  return x ^ (x >> 31)
