"""Placements by estimate: what is exact is exact, the rest is in proportion."""

import dataclasses
import math

import jax
import pytest

from configs.model import deepseek_v3_671b
from r1jax import config as config_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import chips, sharding
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import config_check, fit
from r1jax.train import optimizer
from r1jax.train import state as state_lib
from tests.model import tiny

_V5P = chips.CHIPS['v5p']
_OPTIM = optimizer.OptimConfig(
  peak_lr=1e-3,
  warmup_steps=0,
  schedule='constant',
  final_lr_ratio=1.0,
  weight_decay=0.1,
)
_RUN = fit.Run(tiny.config(), _OPTIM, rows=16, length=256)


@pytest.fixture(scope='module')
def found():
  return fit.candidates(_RUN, _V5P, 8)


def _pick(found, remat=True, num_microbatches=1, **mesh):
  [one] = [
    c
    for c in found
    if (c.remat, c.num_microbatches) == (remat, num_microbatches)
    and all(c.mesh[axis] == mesh.get(axis, 1) for axis in mesh_lib.AXES)
  ]
  return one


def test_every_candidate_is_a_mesh_that_the_run_accepts(found):
  assert len({str(c.mesh) for c in found}) >= 7
  boxed = transformer.abstract(_RUN.model)
  for c in found:
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**c.mesh))
    sharding.tree_shardings(mesh, boxed)
    config_check.check_rows(
      'rows', _RUN.rows, mesh, num_microbatches=c.num_microbatches
    )
    config_check.check_context('length', _RUN.length, mesh)


def test_they_come_by_time(found):
  ranks = [c.rank for c in found]
  assert ranks == sorted(ranks)
  for c in found:
    times = dict(c.seconds)
    assert times.pop('bound') == max(times.values())
  meshes = [str(c.mesh) for c in fit.of_different_meshes(found)]
  assert len(meshes) == len(set(meshes))
  assert meshes[0] == str(found[0].mesh)


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'expert': 4, 'tensor': 2}])
def test_the_state_is_what_a_run_allocates(sizes):
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=1, **sizes))
  boxed = transformer.abstract(_RUN.model)
  state = state_lib.abstract_state(
    lambda: sharding.unbox(transformer.init(_RUN.model, jax.random.key(0))),
    optimizer.make_optimizer(_OPTIM, 1),
    sharding.tree_shardings(mesh, boxed),
  )
  allocated = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves((state.variables['params'], state.opt_state))
    if x.ndim
  )
  weights = fit._weights(boxed, dict(mesh.shape))
  assert allocated == 4 * weights.own * (1 + fit._moments(_OPTIM))


def test_memory_and_time_move_as_they_must(found):
  plain = _pick(found, fsdp=8)
  stored = _pick(found, fsdp=8, remat=False)
  assert stored.hbm_bytes > plain.hbm_bytes
  assert stored.seconds['mxu'] < plain.seconds['mxu']
  parts = _pick(found, fsdp=8, num_microbatches=2)
  assert parts.seconds['ici'] > plain.seconds['ici']
  assert parts.seconds['mxu'] == plain.seconds['mxu']
  split = _pick(found, fsdp=4, tensor=2)
  assert split.seconds['mxu'] == plain.seconds['mxu']


def test_a_reference_and_slices_are_counted(found):
  plain = _pick(found, fsdp=8)
  copy = dataclasses.replace(_RUN, copies=1)
  with_copy = _pick(fit.candidates(copy, _V5P, 8), fsdp=8)
  boxed = transformer.abstract(_RUN.model)
  own = fit._weights(boxed, plain.mesh).own
  assert with_copy.hbm_bytes - plain.hbm_bytes == pytest.approx(4 * own)
  slices = dataclasses.replace(_RUN, num_slices=2)
  two = fit.candidates(slices, _V5P, 8)
  copied, shared = (_pick(two, data=n, fsdp=8 // n) for n in (2, 1))
  assert all(c.seconds['dcn'] > 0 for c in two)
  assert shared.hbm_bytes < copied.hbm_bytes
  often = _pick(two, data=1, fsdp=8, num_microbatches=2)
  assert often.seconds['dcn'] > shared.seconds['dcn']


def test_37_billion_of_671_are_active():
  model = config_lib.from_dict(
    model_config.ModelConfig, deepseek_v3_671b.get_config().to_dict()
  )
  model = dataclasses.replace(model, mtp_depth=0)
  active = fit._active(model, transformer.abstract(model))
  # Without the embedding, 0.93 billion, of which a token meets a row.
  assert 36.5e9 < active + 0.93e9 < 37.8e9


@pytest.mark.parametrize(
  ('run', 'chip', 'message'),
  [
    (
      _RUN,
      dataclasses.replace(_V5P, hbm_bytes=1 << 10),
      r'nothing fits: .* about 0.* GiB a device, it has 9.5e-07 \(--config',
    ),
    (
      dataclasses.replace(_RUN, rows=3),
      _V5P,
      'no mesh of 8 devices divides 3 rows of 256 tokens',
    ),
  ],
)
def test_what_cannot_be_is_the_users_error(run, chip, message):
  with pytest.raises(config_lib.UserError, match=message):
    fit.candidates(run, chip, 8)


def test_flags_make_the_config(found):
  one = _pick(found, fsdp=4, expert=2)
  flags = one.flags()
  assert '--config.mesh.fsdp=4' in flags and '--config.mesh.expert=2' in flags
  assert '--config.model.remat=true' in flags
  assert '--config.train.num_microbatches=1' in flags
  assert 'remat' not in one.flags(None)
