"""Sample completions of a run, as samples.jsonl in its workdir."""

import json
from typing import Any

from etils import epath

from r1jax.train import workdir as workdir_lib


class SampleWriter:
  """Keeps what was sampled; a resumed run drops what lies past its step.

  The file is small and is rewritten whole each time, which also works where
  nothing can be appended to.
  """

  def __init__(self, workdir: epath.Path):
    self._path = workdir / 'samples.jsonl'
    self._rows: list[dict[str, Any]] | None = None

  def write(self, step: int, rows: list[dict[str, Any]]) -> None:
    """Adds the samples that were drawn for a step."""
    if self._rows is None:
      self._rows = [r for r in self._read() if r['step'] < step]
    self._rows += [{'step': step, **row} for row in rows]
    lines = [json.dumps(r, ensure_ascii=False) + '\n' for r in self._rows]
    workdir_lib.write_text(self._path, ''.join(lines))

  def _read(self) -> list[dict[str, Any]]:
    if not self._path.exists():
      return []
    return [json.loads(line) for line in self._path.read_text().splitlines()]
