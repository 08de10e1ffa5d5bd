"""Which rules grade a completion, by name.

'tokens' reads tags that are single tokens, on the device when sampling and by
its string twin elsewhere; 'tags' and 'boxed' read text (see `text`).
"""

from collections.abc import Callable, Sequence

from r1jax.rl.reward import strings, text

RULES = ('tokens', *text.FORMATS)

Grader = Callable[[Sequence[int], str], text.Grade]


def make_grader(rule: str, tokenizer) -> Grader:
  """Builds grade(completion ids, gold answer).

  Args:
    rule: One of RULES.
    tokenizer: Decodes; 'tokens' needs its tags.

  Raises:
    ValueError: The tokenizer has no single tokens for the tags.
  """
  if rule == 'tokens':
    check_tags(tokenizer)

    def grade(completion_ids: Sequence[int], gold: str) -> text.Grade:
      answer = strings.extract_answer(completion_ids, tokenizer)
      return text.Grade(
        answer=answer,
        correct=answer == gold,
        format=strings.format_reward(completion_ids, tokenizer) == 1.0,
      )

    return grade

  def grade_text(completion_ids: Sequence[int], gold: str) -> text.Grade:
    finished = is_finished(completion_ids, tokenizer.stop_ids)
    return text.grade(
      tokenizer.decode(completion_ids),
      gold,
      format_name=rule,
      finished=finished,
    )

  return grade_text


def is_finished(completion_ids: Sequence[int], stop_ids: Sequence[int]) -> bool:
  """Says whether a completion ends with a stop token."""
  return bool(completion_ids) and completion_ids[-1] in stop_ids


def check_tags(tokenizer) -> None:
  """Raises ValueError unless all four tags are single tokens."""
  ids = (
    tokenizer.think_id,
    tokenizer.end_think_id,
    tokenizer.answer_id,
    tokenizer.end_answer_id,
  )
  if None in ids:
    raise ValueError(
      "rule='tokens' needs a tokenizer with <think>, </think>, <answer> and "
      "</answer> as single tokens; use 'tags' or 'boxed'"
    )
