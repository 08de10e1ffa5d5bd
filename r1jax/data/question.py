"""A question with a known answer, whatever task it comes from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Question:
  """What reinforcement learning and evaluation ask.

  Attributes:
    prompt: Text before the completion.
    answer: The right answer, written as a completion should write it.
    operation: Group it is reported in.
    language: Language of the prompt, likewise.
  """

  prompt: str
  answer: str
  operation: str
  language: str
