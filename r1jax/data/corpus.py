"""The pretraining corpus of arithmetic documents, with random access.

As real corpora are, it is a mixture: good worked solutions, wrong ones, ones
without tags or without reasoning, ones that reason in another language.
"""

import dataclasses
import itertools
import random

import numpy as np

from r1jax import config as config_lib
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.data.tasks import arithmetic

KINDS = (
  'clean',
  'wrong',
  'missing_tags',
  'no_reasoning',
  'other_language',
  'mixed_language',
)
_OTHER = {'en': 'zh', 'zh': 'en'}
# Rows that are filled together.
_GROUP = 16


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
  """The task and the share of each kind of document; shares sum to 1.

  Attributes:
    arithmetic: The task.
    clean: Right, worked in the prompt's language, with all tags.
    wrong: As clean, but one step slips, so that the answer is wrong.
    missing_tags: Right, with some or all of the tags left out.
    no_reasoning: The right answer alone, in its tags.
    other_language: Right, worked in the other language.
    mixed_language: Right, worked in a language drawn for each step.
    uneven: Share of documents, of whatever kind, about a division that leaves
      a remainder. The task has none, but few enough divisions to know them
      all by heart; these are the practice that makes division a skill.
  """

  arithmetic: arithmetic.ArithmeticConfig
  clean: float = 0.30
  wrong: float = 0.15
  missing_tags: float = 0.15
  no_reasoning: float = 0.30
  other_language: float = 0.05
  mixed_language: float = 0.05
  uneven: float = 0.0

  def __post_init__(self):
    shares = {kind: getattr(self, kind) for kind in KINDS}
    for kind, share in shares.items():
      if share < 0.0:
        raise ValueError(f'{kind}={share}, a share is at least 0')
    if not 0.0 <= self.uneven < 1.0:
      raise ValueError(f'uneven={self.uneven}, it must lie in [0, 1)')
    total = sum(shares.values())
    if abs(total - 1.0) > 1e-6:
      raise ValueError(f'shares sum to {total:.6g}, not to 1: {shares}')


def document(
  config: CorpusConfig, seed: int, index: int
) -> tuple[str, str, str]:
  """Returns document `index` of `seed`: (prompt, completion, kind).

  Only training keys are drawn.
  """
  rng = random.Random(arithmetic.random_bits(seed, index))
  return _draw(config, _thresholds(config), rng, held_out=False)


def completion(
  config: CorpusConfig,
  problem: arithmetic.Problem,
  kind: str,
  rng: random.Random,
) -> str:
  """Writes the completion of one problem as a document of this kind."""
  guess = config.arithmetic.good_guess
  result = arithmetic.answer(problem)
  if kind == 'no_reasoning':
    return f'<answer>{result}</answer>'
  if kind == 'wrong':
    steps, result = arithmetic.wrong_solution(problem, rng, good_guess=guess)
  else:
    languages = None
    if kind == 'other_language':
      languages = (_OTHER[problem.language],)
    elif kind == 'mixed_language':
      languages = arithmetic.LANGUAGES
    steps = arithmetic.solution(
      problem, rng, languages=languages, good_guess=guess
    )
  if kind == 'missing_tags':
    return _lose_tags(steps, result, rng)
  return f'<think>{steps}</think><answer>{result}</answer>'


class ArithmeticCorpus:
  """Packed rows of documents, a random access source for grain.

  Row i is a function of (config, seed, i). Rows are filled in groups of
  neighbours: each document goes into the first row of the group that has room,
  until one finds none. A document longer than a whole row is passed over.
  """

  def __init__(
    self,
    config: CorpusConfig,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    seed: int,
    row_length: int,
    num_rows: int = 2**31 - 1,
    held_out: bool = False,
  ):
    """Describes the rows.

    Args:
      config: The mixture.
      tokenizer: Its bos and eos stand around every document.
      seed: Of the whole corpus.
      row_length: In tokens.
      num_rows: What len() says.
      held_out: Draw held-out keys instead of training ones.
    """
    self._config = config
    self._tokenizer = tokenizer
    self._seed = seed
    self._row_length = row_length
    self._num_rows = num_rows
    self._held_out = held_out
    self._thresholds = _thresholds(config)
    self._last_group: tuple[int, list[list[list[int]]]] = -1, []

  def __len__(self) -> int:
    return self._num_rows

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns one row: tokens, mask, segment and position, each [T].

    mask is 1 on every token but bos, so on prompts too.

    Raises:
      UserError: No document fits a row.
    """
    if not 0 <= index < self._num_rows:
      raise IndexError(index)
    T = self._row_length
    documents = self._group(index // _GROUP)[index % _GROUP]
    N = sum(map(len, documents))
    lengths_D = np.array([len(ids) for ids in documents])
    starts_D = np.cumsum(lengths_D) - lengths_D
    row = {
      'tokens': np.full(T, self._tokenizer.pad_id, np.int32),
      'mask': np.zeros(T, np.float32),
      'segment': np.zeros(T, np.int32),
      'position': np.zeros(T, np.int32),
    }
    row['tokens'][:N] = np.concatenate(documents)
    row['segment'][:N] = np.repeat(np.arange(len(documents)) + 1, lengths_D)
    row['position'][:N] = np.arange(N) - np.repeat(starts_D, lengths_D)
    row['mask'][:N] = row['position'][:N] > 0
    return row

  def __repr__(self) -> str:
    """Names the content, since grain keeps it in its checkpoints."""
    return (
      f'ArithmeticCorpus({self._config}, seed={self._seed},'
      f' row_length={self._row_length}, num_rows={self._num_rows},'
      f' held_out={self._held_out})'
    )

  def _group(self, number: int) -> list[list[list[int]]]:
    """The documents of each row of a group; rows are mostly read in order."""
    last, rows = self._last_group
    if last == number:
      return rows
    rows, room = [[] for _ in range(_GROUP)], [self._row_length] * _GROUP
    for ids in self._documents(number):
      place = next((i for i in range(_GROUP) if len(ids) <= room[i]), None)
      if place is None:
        break
      rows[place].append(ids)
      room[place] -= len(ids)
    self._last_group = number, rows
    return rows

  def _documents(self, number: int):
    """Yields the ids of a group's documents, bos to eos, without end."""
    bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
    rng = random.Random(arithmetic.random_bits(self._seed, number))
    num_unfit = 0
    while True:
      prompt, text, _ = _draw(
        self._config, self._thresholds, rng, held_out=self._held_out
      )
      ids = [bos, *self._tokenizer.encode(prompt + text), eos]
      if len(ids) <= self._row_length:
        yield ids
        continue
      num_unfit += 1
      if num_unfit == 1000:
        raise config_lib.UserError(
          f'row_length={self._row_length} tokens is shorter than documents'
          f' of maximum={self._config.arithmetic.maximum}'
        )


class PromptSource:
  """Training problems by index, for reinforcement learning."""

  def __init__(
    self,
    config: arithmetic.ArithmeticConfig,
    *,
    seed: int,
    num_problems: int = 2**31 - 1,
  ):
    self._config = config
    self._seed = seed
    self._num_problems = num_problems

  def __len__(self) -> int:
    return self._num_problems

  def __getitem__(self, index: int) -> arithmetic.Problem:
    if not 0 <= index < self._num_problems:
      raise IndexError(index)
    return arithmetic.problem_at(
      self._config, self._seed, index, held_out=False
    )

  def __repr__(self) -> str:
    """Names the content, since grain keeps it in its checkpoints."""
    return (
      f'PromptSource({self._config}, seed={self._seed},'
      f' num_problems={self._num_problems})'
    )


def _thresholds(config: CorpusConfig) -> tuple[tuple[float, str], ...]:
  """Cumulative shares with their kinds, the empty ones left out."""
  kinds = [kind for kind in KINDS if getattr(config, kind) > 0.0]
  sums = list(itertools.accumulate(getattr(config, kind) for kind in kinds))
  # Rounding must not leave a gap below 1.
  return tuple(zip([*sums[:-1], 1.0], kinds, strict=True))


def _draw(
  config: CorpusConfig,
  thresholds: tuple[tuple[float, str], ...],
  rng: random.Random,
  *,
  held_out: bool,
) -> tuple[str, str, str]:
  """Draws one document: (prompt, completion, kind)."""
  if config.uneven and rng.random() < config.uneven:
    problem = arithmetic.draw_uneven(config.arithmetic, rng)
  else:
    problem = arithmetic.draw(config.arithmetic, rng, held_out=held_out)
  u = rng.random()
  kind = next(kind for limit, kind in thresholds if u < limit)
  if kind == 'wrong' and not arithmetic.is_even(problem):
    kind = 'clean'  # A slip ends in one number, which would be a quotient.
  text = completion(config, problem, kind, rng)
  return arithmetic.prompt(problem), text, kind


def _lose_tags(steps: str, result: str, rng: random.Random) -> str:
  """Leaves out the tags: half the time all with the answer, else some."""
  if rng.random() < 0.5:
    return steps
  kept = rng.randrange(15)  # 15 would be all four.
  tags = [
    tag if kept >> i & 1 else '' for i, tag in enumerate(tokenizer_lib.TAGS)
  ]
  # The last step ends in digits too.
  between = f'{tags[1]}{tags[2]}' or '\n'
  return f'{tags[0]}{steps}{between}{result}{tags[3]}'
