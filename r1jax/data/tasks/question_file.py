"""Questions with gold answers from files, such as GSM8K's."""

import dataclasses
import re

from r1jax import config as config_lib
from r1jax.data import question as question_lib
from r1jax.data import records, text


@dataclasses.dataclass(frozen=True)
class QuestionFileConfig:
  """Which files, and where in a record question and answer stand.

  Attributes:
    paths: Files or globs of training questions; () if none are trained on.
    eval_paths: Of held-out questions; () keeps a share of the others.
    question: Field of the question.
    answer: Field of the answer.
    gold: Pattern whose last match in the answer has the gold answer as its
      group 1, such as GSM8K's '#### (.+)'; '' for the whole field.
    instruction: Put below every question; '' for nothing. Models differ in
      what they were trained to be asked.
    language: Language it is reported under.
    held_out_fraction: Share, in [0, 1), that is held out, chosen by a hash of
      the question alone; only without `eval_paths`.
    format: As `records.FORMATS`.
  """

  paths: tuple[str, ...]
  eval_paths: tuple[str, ...] = ()
  question: str = 'question'
  answer: str = 'answer'
  gold: str = ''
  instruction: str = ''
  language: str = 'en'
  held_out_fraction: float = 0.0
  format: str = 'auto'

  def __post_init__(self):
    if not self.paths and not self.eval_paths:
      raise ValueError('paths=() must name at least one file')
    if self.format not in records.FORMATS:
      raise ValueError(
        f'format={self.format!r} must be one of {", ".join(records.FORMATS)}'
      )
    try:
      groups = re.compile(self.gold).groups
    except re.error as e:
      raise ValueError(f'gold={self.gold!r} is no pattern: {e}') from e
    if self.gold and groups != 1:
      raise ValueError(f'gold={self.gold!r} must have one group, has {groups}')
    if bool(self.eval_paths) == (self.held_out_fraction > 0):
      raise ValueError(
        f'held_out_fraction={self.held_out_fraction} and eval_paths='
        f'{self.eval_paths}: give one of them'
      )
    if not 0 <= self.held_out_fraction < 1:
      raise ValueError(
        f'held_out_fraction={self.held_out_fraction} must be in [0, 1)'
      )


def load(
  config: QuestionFileConfig,
) -> tuple[list[question_lib.Question], list[question_lib.Question]]:
  """Training and held-out questions, in the order of the files.

  Instructions are left to who asks.

  Raises:
    UserError: As `records.read`; an answer without a gold answer; or no
      question on one of the sides, though files are named.
  """
  found = _read(config, config.paths)
  if config.eval_paths:
    train, held_out = found, _read(config, config.eval_paths)
  else:
    share = config.held_out_fraction
    is_out = [text.is_held_out(q.prompt, share) for q in found]
    train = [q for q, out in zip(found, is_out, strict=True) if not out]
    held_out = [q for q, out in zip(found, is_out, strict=True) if out]
  for name, questions in (('training', train), ('held-out', held_out)):
    if not questions and (config.paths or name == 'held-out'):
      raise config_lib.UserError(
        f'there is no {name} question in {", ".join(config.paths)}, '
        f'held_out_fraction={config.held_out_fraction}'
      )
  return train, held_out


def _read(
  config: QuestionFileConfig, paths: tuple[str, ...]
) -> list[question_lib.Question]:
  return [
    question_lib.Question(
      prompt=records.text_of(record, config.question, where),
      answer=_gold(
        records.text_of(record, config.answer, where), config, where
      ),
      operation='all',
      language=config.language,
    )
    for path in records.expand(paths)
    for where, record in records.read(
      path, config.format, fields=(config.question, config.answer)
    )
  ]


def _gold(answer: str, config: QuestionFileConfig, where: str) -> str:
  if not config.gold:
    return answer.strip()
  matches = re.findall(config.gold, answer)
  if not matches:
    raise config_lib.UserError(
      f'{where}: no gold answer, the pattern {config.gold!r} is nowhere in '
      f'{answer[-60:]!r}'
    )
  return matches[-1].strip()
