"""metrics.jsonl survives kills and resumes; events can be read."""

import json
import math

import numpy as np
import tensorboardX.proto.event_pb2 as event_pb2
import tensorboardX.record_writer as record_writer
from etils import epath

from r1jax.train import metrics


def _losses(workdir):
  return [(r['step'], r['train/loss']) for r in metrics.read(workdir)]


def test_lines_are_there_as_soon_as_they_are_written(tmp_path):
  writer = metrics.MetricWriter(tmp_path)
  writer.write(1, {'train/loss': np.float32(0.5), 'moe/counts': np.ones(3)})
  assert metrics.read(tmp_path) == [{'step': 1, 'train/loss': 0.5}]
  writer.checkpoint()
  writer.write(2, {'train/loss': 0.25})
  assert _losses(tmp_path) == [(1, 0.5), (2, 0.25)]
  writer.close()
  assert _losses(tmp_path) == [(1, 0.5), (2, 0.25)]


def test_a_resumed_run_drops_what_is_past_its_step(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, {'train/loss': float(step)})
    writer.write(3, {'eval/loss': 9.0})
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 6, "train/lo')  # Cut short by a kill.
  with metrics.MetricWriter(tmp_path, start_step=3) as writer:
    writer.write(4, {'train/loss': 40.0})
  records = metrics.read(tmp_path)
  assert [r['step'] for r in records] == [1, 2, 3, 3, 4]
  assert records[3] == {'step': 3, 'eval/loss': 9.0}
  assert records[4]['train/loss'] == 40.0
  with metrics.MetricWriter(tmp_path):
    pass  # A new run in the same place starts from nothing.
  assert metrics.read(tmp_path) == []


def test_a_number_that_is_not_finite_is_null(tmp_path):
  with metrics.MetricWriter(tmp_path) as writer:
    writer.write(1, {'train/loss': math.nan, 'a': math.inf, 'b': 1})
  text = (tmp_path / 'metrics.jsonl').read_text()
  strict = json.loads(text, parse_constant=lambda name: 1 / 0)
  assert strict == {'step': 1, 'train/loss': None, 'a': None, 'b': 1.0}


def test_no_metrics_yet(tmp_path):
  assert metrics.read(tmp_path / 'nothing') == []


def test_without_append_lines_wait_for_a_checkpoint(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.workdir_lib, 'is_local', lambda path: False)
  writer = metrics.MetricWriter(epath.Path(tmp_path))
  writer.write(1, {'train/loss': 0.5})
  assert metrics.read(tmp_path) == []
  writer.checkpoint()
  assert _losses(tmp_path) == [(1, 0.5)]
  writer.close()
  assert [p for p in tmp_path.iterdir() if 'tfevents' in p.name]


def _events(path):
  """Reads TensorBoard's record format: length, crc, data, crc."""
  data, at = path.read_bytes(), 0
  while at < len(data):
    size = int.from_bytes(data[at : at + 8], 'little')
    head = data[at : at + 8]
    crc = int.from_bytes(data[at + 8 : at + 12], 'little')
    assert crc == record_writer.masked_crc32c(head)
    yield event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
    at += 12 + size + 4


def test_tensorboard_events_hold_the_scalars_and_the_purge(tmp_path):
  with metrics.MetricWriter(tmp_path, start_step=6) as writer:
    writer.write(7, {'train/loss': 0.5})
  (path,) = (p for p in tmp_path.iterdir() if 'tfevents' in p.name)
  events = list(_events(path))
  values = [(e.step, v.tag, v.simple_value) for e in events
            for v in e.summary.value]  # fmt: skip
  assert values == [(7, 'train/loss', 0.5)]
  start = event_pb2.SessionLog.START
  assert [e.step for e in events if e.session_log.status == start] == [7]
