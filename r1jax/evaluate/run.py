"""Samples held-out questions and grades what comes back."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from r1jax import types
from r1jax.data import question as question_lib
from r1jax.evaluate import scores
from r1jax.parallel import sharding
from r1jax.rl.reward import grading

Generate = Callable[..., types.Rollout]


def sample(
  generate: Generate,
  variables: Any,
  mesh: jax.sharding.Mesh,
  prompt_BT: np.ndarray,
  length_B: np.ndarray,
  *,
  batch_size: int,
  key: jax.Array,
) -> list[list[int]]:
  """Completions (token ids, stop token included) of any number of prompts.

  Args:
    generate: From `sampling.generate.make_generate`.
    variables: Of the model.
    mesh: Where it lives.
    prompt_BT: Right-padded prompts.
    length_B: Tokens of each.
    batch_size: Rows a call; the last call is filled up with repeats.
    key: Random key.
  """
  completions = []
  for start in range(0, len(prompt_BT), batch_size):
    rows = np.arange(start, start + batch_size) % len(prompt_BT)
    batch = sharding.put_batch(mesh, (prompt_BT[rows], length_B[rows]))
    rollout = generate(variables, *batch, jax.random.fold_in(key, start))
    tokens_BT, first_B, end_B = jax.device_get(
      (rollout.tokens_BT, rollout.prompt_length_B, rollout.length_B)
    )
    for i in range(min(batch_size, len(prompt_BT) - start)):
      completions.append(tokens_BT[i, first_B[i] : end_B[i]].tolist())
  return completions


def _graded(
  completion_ids: list[int],
  question: question_lib.Question,
  grade: grading.Grader,
  stop_ids: Sequence[int],
) -> scores.Completion:
  found = grade(completion_ids, question.answer)
  return scores.Completion(
    answer=found.answer,
    correct=found.correct,
    format=found.format,
    length=len(completion_ids),
    finished=grading.is_finished(completion_ids, stop_ids),
  )


def evaluate(
  questions: Sequence[question_lib.Question],
  prompt_PT: np.ndarray,
  length_P: np.ndarray,
  *,
  sampled: Generate,
  greedy: Generate,
  variables: Any,
  mesh: jax.sharding.Mesh,
  grade: grading.Grader,
  stop_ids: Sequence[int],
  num_samples: int,
  batch_size: int,
  key: jax.Array,
) -> tuple[list[scores.Samples], list[list[int]]]:
  """Samples each question num_samples times and once greedily.

  Questions of one operation are sampled together: their completions are of
  similar length, so that a batch is done sooner.

  Returns:
    One `Samples` per question, in order, and the greedy completions' ids.
  """
  order = sorted(range(len(questions)), key=lambda p: questions[p].operation)
  order_B = np.repeat(order, num_samples)
  drawn = sample(
    sampled,
    variables,
    mesh,
    prompt_PT[order_B],
    length_P[order_B],
    batch_size=batch_size,
    key=key,
  )
  best = sample(
    greedy,
    variables,
    mesh,
    prompt_PT[order],
    length_P[order],
    batch_size=batch_size,
    key=key,
  )
  graded = lambda ids, q: _graded(ids, q, grade, stop_ids)
  results, greedy_ids = [None] * len(questions), [None] * len(questions)
  for rank, p in enumerate(order):
    q = questions[p]
    mine = drawn[rank * num_samples : (rank + 1) * num_samples]
    results[p] = scores.Samples(
      prompt=q.prompt,
      gold=q.answer,
      operation=q.operation,
      language=q.language,
      completions=tuple(graded(ids, q) for ids in mine),
      greedy=graded(best[rank], q),
    )
    greedy_ids[p] = best[rank]
  return results, greedy_ids
