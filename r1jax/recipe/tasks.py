"""Tasks as reinforcement learning and evaluation see them."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from r1jax import config as config_lib
from r1jax.data import chat, chat_templates, corpus
from r1jax.data import question as question_lib
from r1jax.data.tasks import arithmetic, question_file

TaskConfig = arithmetic.ArithmeticConfig | question_file.QuestionFileConfig


@dataclasses.dataclass(frozen=True)
class Task:
  """Questions.

  Attributes:
    training: Question by index, an endless sequence.
    held_out: (how many, seed) to so many distinct questions; raises UserError
      if there are fewer.
  """

  training: Callable[[int], question_lib.Question]
  held_out: Callable[[int, int], list[question_lib.Question]]


def make_task(
  config: TaskConfig, *, seed: int, render: Callable[[str], str]
) -> Task:
  """Builds a task.

  Args:
    config: Where the questions come from.
    seed: Of the order of the training questions.
    render: Makes the text before a completion out of a question.
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
      return _make_file_task(config, seed, render)


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


def _make_file_task(config, seed, render) -> Task:
  below = f'\n{config.instruction}' if config.instruction else ''
  train, held_out = (
    [dataclasses.replace(q, prompt=render(q.prompt + below)) for q in questions]
    for questions in question_file.load(config)
  )

  @functools.lru_cache(maxsize=2)
  def order_of(epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(len(train))

  def training(index: int) -> question_lib.Question:
    if not train:
      raise config_lib.UserError('task.paths=() names no training questions')
    epoch, place = divmod(index, len(train))
    return train[order_of(epoch)[place]]

  def choose(count: int, seed: int) -> list[question_lib.Question]:
    if count > len(held_out):
      raise config_lib.UserError(
        f'{count} held-out questions are asked for, there are {len(held_out)}'
      )
    order = np.random.default_rng(seed).permutation(len(held_out))
    return [held_out[i] for i in order[:count]]

  return Task(training, choose)
