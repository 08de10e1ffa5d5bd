"""Scores of sampled completions, on the device where the rule reads tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from r1jax import config as config_lib
from r1jax import types
from r1jax.data import question as question_lib
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.rl.reward import grading, rule, strings

# Characters of the longest answer, its sign included.
_ANSWER_WIDTH = 16

Score = Callable[
  [types.Rollout, Sequence[question_lib.Question]], dict[str, Any]
]


def make_score(tokenizer: tokenizer_lib.Tokenizer, rule_name: str) -> Score:
  """Builds (rollout, its P questions) -> scores by a rule of `grading.RULES`.

  Returns a function to a dict of float32 [P, G]: 'accuracy' and 'format',
  arrays on the device if the rule reads tokens.

  Raises:
    UserError: The tokenizer cannot tell what the rule asks for.
  """
  try:
    if rule_name == 'tokens':
      return _make_device_score(tokenizer)
    return _make_host_score(tokenizer, rule_name)
  except ValueError as e:
    raise config_lib.UserError(f'rollout.rule: {e}') from e


def _make_device_score(tokenizer):
  grading.check_tags(tokenizer)
  vocabulary = rule.make_vocabulary(tokenizer)

  @jax.jit
  def score(rollout, answer_PA):
    shape = (answer_PA.shape[0], -1, rollout.tokens_BT.shape[-1])
    tokens_PGT = rollout.tokens_BT.reshape(shape)
    mask_PGT = rollout.mask_BT.reshape(shape)
    return {
      'accuracy': rule.accuracy_reward(
        tokens_PGT, mask_PGT, answer_PA[:, None], vocabulary
      ),
      'format': rule.format_reward(tokens_PGT, mask_PGT, vocabulary),
    }

  def score_questions(rollout, questions):
    answers = [q.answer for q in questions]
    return score(rollout, strings.answer_ids(answers, width=_ANSWER_WIDTH))

  return score_questions


def _make_host_score(tokenizer, rule_name):
  grade = grading.make_grader(rule_name, tokenizer)

  def score(rollout, questions):
    tokens_BT, first_B, end_B = jax.device_get(
      (rollout.tokens_BT, rollout.prompt_length_B, rollout.length_B)
    )
    group = len(tokens_BT) // len(questions)
    grades = [
      grade(row_T[first:end].tolist(), questions[i // group].answer)
      for i, (row_T, first, end) in enumerate(
        zip(tokens_BT, first_B, end_B, strict=True)
      )
    ]
    shaped = lambda values: np.reshape(values, (-1, group)).astype(np.float32)
    return {
      'accuracy': shaped([g.correct for g in grades]),
      'format': shaped([g.format for g in grades]),
    }

  return score
