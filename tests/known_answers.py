"""Vectors computed by other people's code: tests/data/known_answers.json."""

import functools
import json
import pathlib
from typing import Any

DATA = pathlib.Path(__file__).parent / 'data'


@functools.cache
def _all() -> dict[str, Any]:
  return json.loads((DATA / 'known_answers.json').read_text())


def load(group: str) -> dict[str, Any]:
  return _all()[group]
