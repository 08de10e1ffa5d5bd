"""Where metrics go: metrics.jsonl and TensorBoard events."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
from etils import epath

from r1jax.train import workdir as workdir_lib

_FILE = 'metrics.jsonl'


class MetricWriter:
  """Writes scalars by step; arrays of rank 1 and more are left out.

  One line of metrics.jsonl is {"step": 7, "train/loss": 2.5, …}; a number
  that is not finite is written as null. A step may have several lines
  (training, evaluation). On a local file system lines are appended as they
  come; elsewhere they wait for the next `checkpoint`. Of several processes
  only the first writes.
  """

  def __init__(self, workdir: epath.PathLike, *, start_step: int = 0):
    """Opens the files; lines past `start_step`, the restored step, are dropped.

    Args:
      workdir: Any path etils.epath knows; created if it is not there.
      start_step: Step the run goes on from; 0 for a new run.
    """
    self._is_writer = jax.process_index() == 0
    if not self._is_writer:
      return
    self._workdir = epath.Path(workdir)
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._path = self._workdir / _FILE
    self._is_local = workdir_lib.is_local(self._workdir)
    kept = [r for r in read(self._workdir) if r['step'] <= start_step]
    self._lines = [json.dumps(record) + '\n' for record in kept]
    self._file = None
    self._events = (
      os.fspath(self._workdir) if self._is_local else tempfile.mkdtemp()
    )
    self._board = tensorboardX.SummaryWriter(
      self._events, purge_step=start_step + 1, write_to_disk=True
    )
    self.checkpoint()

  def write(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Adds the scalars of a step."""
    if not self._is_writer:
      return
    scalars = {k: float(v) for k, v in metrics.items() if np.ndim(v) == 0}
    record = {'step': step} | {
      k: v if math.isfinite(v) else None for k, v in scalars.items()
    }
    self._lines.append(json.dumps(record) + '\n')
    if self._file is not None:
      self._file.write(self._lines[-1])
      self._file.flush()
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def has(self, step: int, prefix: str) -> bool:
    """Says whether a metric so named was written for a step; the writer's."""
    return self._is_writer and any(
      record['step'] == step and any(k.startswith(prefix) for k in record)
      for record in map(json.loads, self._lines)
    )

  def checkpoint(self) -> None:
    """Rewrites metrics.jsonl whole; call it before a save of the same step."""
    if not self._is_writer:
      return
    if self._file is not None:
      self._file.close()
    workdir_lib.write_text(self._path, ''.join(self._lines))
    if self._is_local:
      self._file = open(self._path, 'a', encoding='utf-8')
    self._board.flush()
    if not self._is_local:
      for name in os.listdir(self._events):
        with open(os.path.join(self._events, name), 'rb') as f:
          (self._workdir / name).write_bytes(f.read())

  def close(self) -> None:
    """Writes what is left and closes the files."""
    if not self._is_writer:
      return
    self.checkpoint()
    if self._file is not None:
      self._file.close()
      self._file = None
    self._board.close()

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    self.close()


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the records of a workdir's metrics.jsonl, [] if there is none.

  A line cut short by a kill is left out.
  """
  path = epath.Path(workdir) / _FILE
  if not path.exists():
    return []
  records = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      continue
    if isinstance(record, dict) and 'step' in record:
      records.append(record)
  return records
