"""Stages of a pipeline: which layers they have, whole runs, and mistakes."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import pipelined, pretrain
from r1jax.train import metrics
from tests.recipe import micro


@pytest.mark.parametrize(
  ('layers', 'dense', 'stages'), [(61, 3, 16), (61, 3, 8), (5, 3, 4), (2, 0, 2)]
)
def test_layers_stay_in_order_and_ends_have_least(layers, dense, stages):
  model = dataclasses.replace(
    micro.model(), num_layers=layers, num_dense_layers=dense
  )
  counts = pipelined.split_layers(model, stages)
  sizes = np.sum(list(counts.values()), axis=0)
  assert sizes.sum() == layers and max(sizes) - min(sizes) <= 1
  assert sizes[-1] == min(sizes) and sizes[0] <= max(sizes[1:])
  assert sum(counts.get('dense', ())) == dense
  # No layer of experts before the last dense one.
  order = itertools.chain.from_iterable(
    'd' * d + 'm' * (size - d)
    for d, size in zip(counts.get('dense', [0] * stages), sizes, strict=True)
  )
  assert ''.join(order) == 'd' * dense + 'm' * (layers - dense)


def test_671b_on_16_stages():
  model = dataclasses.replace(micro.model(), num_layers=61, num_dense_layers=3)
  assert pipelined.split_layers(model, 16) == {
    'dense': (3, *[0] * 15),
    'moe': (0, *[4] * 13, 3, 3),
  }


def test_a_stack_that_no_stage_has_is_left_out():
  model = dataclasses.replace(micro.model(), num_dense_layers=0)
  assert list(pipelined.split_layers(model, 2)) == ['moe']


def _run(workdir, mesh, pipeline, **changes):
  values = micro.pretrain_dict(
    train__num_microbatches=4, mesh__pipeline=pipeline, **changes
  )
  config = config_lib.from_dict(pretrain.PretrainConfig, values)
  with micro.on(mesh):
    pretrain.run(config, str(workdir))
  return [
    {k: v for k, v in row.items() if not k.startswith('perf/')}
    for row in metrics.read(workdir)
    if 'train/loss' in row
  ]


@pytest.mark.slow
def test_a_run_in_a_pipeline_goes_on_without_one(tmp_path):
  schedule = dataclasses.asdict(mesh_lib.MeshConfig().pipeline)
  schedule |= {'schedule': 'dualpipe', 'keep': 'layers'}
  sizes = mesh_lib.MeshConfig(data=1, pipe=2, expert=2)
  mesh = mesh_lib.make_mesh(sizes, jax.devices()[:4])
  one = _run(tmp_path / 'one', micro.one_device(), schedule)
  _run(tmp_path / 'pipe', mesh, schedule, train__num_steps=2)
  rows = _run(tmp_path / 'pipe', micro.one_device(), schedule)
  for row, expected in zip(rows, one, strict=True):
    for name in ('moe/overflow_tokens', 'train/skipped'):
      assert row.pop(name, 0) == 0
    assert row.keys() == expected.keys()
    for name, value in expected.items():
      np.testing.assert_allclose(
        row[name], value, rtol=2e-4, atol=2e-6, err_msg=name
      )


def test_a_schedule_that_is_none_lists_those_that_are():
  with pytest.raises(ValueError, match="schedule='2f2b': one of gpipe, 1f1b"):
    dataclasses.replace(mesh_lib.MeshConfig().pipeline, schedule='2f2b')
  with pytest.raises(ValueError, match='latency=3: 1 or 2'):
    dataclasses.replace(mesh_lib.MeshConfig().pipeline, latency=3)
