"""Tasks as reinforcement learning and evaluation see them."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from r1jax import config as config_lib
from r1jax.data import chat, chat_templates, chat_tokens, corpus
from r1jax.data import question as question_lib
from r1jax.data.tasks import arithmetic, question_file

TaskConfig = arithmetic.ArithmeticConfig | question_file.QuestionFileConfig


@dataclasses.dataclass(frozen=True)
class Task:
  """Questions.

  Attributes:
    training: Question by index, an endless sequence.
    held_out: (how many, seed) to so many distinct questions. Of files all are
      taken if there are fewer, of a task that is generated UserError is raised.
  """

  training: Callable[[int], question_lib.Question]
  held_out: Callable[[int, int], list[question_lib.Question]]


@dataclasses.dataclass(frozen=True)
class PromptLimit:
  """How long the prompts of files may be; longer ones are left out.

  Attributes:
    tokenizer: Counts.
    max_tokens: Longest prompt, bos included.
  """

  tokenizer: chat_tokens.Tokenizer
  max_tokens: int


def make_task(
  config: TaskConfig,
  *,
  seed: int,
  render: Callable[[str], str],
  limit: PromptLimit,
  say: Callable[[str], None],
) -> Task:
  """Builds a task.

  Args:
    config: Where the questions come from.
    seed: Of the order of the training questions.
    render: Makes the text before a completion out of a question.
    limit: Of the length of prompts.
    say: Takes remarks: how many questions are left out, or are missing.
  """
  match config:
    case arithmetic.ArithmeticConfig():
      problems = corpus.PromptSource(config, seed=seed)
      return Task(
        training=lambda index: to_question(problems[index], render),
        held_out=lambda count, seed: [
          to_question(problem, render)
          for problem in arithmetic.evaluation_problems(config, count, seed)
        ],
      )
    case question_file.QuestionFileConfig():
      return _make_file_task(config, seed, render, limit, say)


def renderer(template: str) -> Callable[[str], str]:
  """Writes a question as a chat template does, up to where the answer begins.

  Raises:
    UserError: There is no such template.
  """
  try:
    chat_templates.find(template)
  except ValueError as e:
    raise config_lib.UserError(str(e)) from e
  return lambda question: chat.render(
    [chat.Message('user', question)], template=template
  )


def to_question(
  problem: arithmetic.Problem, render: Callable[[str], str] = str
) -> question_lib.Question:
  """An arithmetic problem as it is asked."""
  return question_lib.Question(
    prompt=render(arithmetic.prompt(problem)),
    answer=arithmetic.answer(problem),
    operation=problem.operation,
    language=problem.language,
  )


def _make_file_task(config, seed, render, limit, say) -> Task:
  below = f'\n{config.instruction}' if config.instruction else ''
  train, held_out = (
    [dataclasses.replace(q, prompt=render(q.prompt + below)) for q in questions]
    for questions in question_file.load(config)
  )

  @functools.cache  # Who only evaluates need not hear of training questions.
  def train_that_fit() -> list[question_lib.Question]:
    if not train:
      raise config_lib.UserError('task.paths=() names no training questions')
    return _that_fit(train, limit, 'training', say)

  @functools.lru_cache(maxsize=2)
  def order_of(epoch: int) -> np.ndarray:
    count = len(train_that_fit())
    return np.random.default_rng((seed, epoch)).permutation(count)

  def training(index: int) -> question_lib.Question:
    questions = train_that_fit()
    epoch, place = divmod(index, len(questions))
    return questions[order_of(epoch)[place]]

  def choose(count: int, seed: int) -> list[question_lib.Question]:
    questions = _that_fit(held_out, limit, 'held-out', say)
    if count > len(questions):
      say(
        f'{count} held-out questions are asked for, there are '
        f'{len(questions)}: all are taken'
      )
    order = np.random.default_rng(seed).permutation(len(questions))
    return [questions[i] for i in order[:count]]

  return Task(training, choose)


def _that_fit(
  questions: list[question_lib.Question],
  limit: PromptLimit,
  name: str,
  say: Callable[[str], None],
) -> list[question_lib.Question]:
  """Questions whose prompts are not too long.

  Raises:
    UserError: There is none.
  """
  encoded = limit.tokenizer.encode_batch([q.prompt for q in questions])
  lengths = [len(chat_tokens.with_bos(i, limit.tokenizer)) for i in encoded]
  fits = [length <= limit.max_tokens for length in lengths]
  kept = [q for q, is_kept in zip(questions, fits, strict=True) if is_kept]
  if not kept:
    raise config_lib.UserError(
      f'max_prompt_tokens={limit.max_tokens} must be at least {min(lengths)}, '
      f'the shortest of {len(questions)} {name} prompts'
    )
  if len(kept) < len(questions):
    say(
      f'{len(questions) - len(kept)} of {len(questions)} {name} prompts are '
      f'longer than max_prompt_tokens={limit.max_tokens}: left out'
    )
  return kept
