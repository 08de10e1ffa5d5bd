"""Round trips, keep-N, other meshes, damaged files and full disks."""

import os
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import config
from r1jax.train import checkpoint
from r1jax.train import state as state_lib
from tests.train import toy

_SOURCE = {'key': np.arange(3, dtype=np.uint32), 'place': {'step': 7}}


@pytest.fixture(scope='module')
def states():
  """States after 0 to 4 steps, as numpy."""
  source, step = toy.Source(0), toy.make_step()
  state, out = toy.make_state(with_reference=True), []
  for _ in range(5):
    out.append(jax.tree.map(np.array, state))
    state, _ = step(state, source.next(None))
  return out


@pytest.fixture(scope='module')
def saved(states, tmp_path_factory):
  """Checkpoints of steps 1 and 2; tests copy it before they damage it."""
  path = tmp_path_factory.mktemp('saved')
  with checkpoint.Checkpoints(path, max_to_keep=3) as checkpoints:
    for i in (1, 2):
      checkpoints.save(i, _on_device(states[i]), _SOURCE)
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'checkpoints'))


def _on_device(state):
  return jax.tree.map(jnp.array, state)


def _abstract():
  return toy.abstract_state(with_reference=True)


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def _steps(path):
  return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit())


def _restore(path, said=None):
  say = (lambda line: None) if said is None else said.append
  with checkpoint.Checkpoints(path, max_to_keep=3, say=say) as checkpoints:
    return checkpoints.restore_latest(_abstract())


def _largest(path):
  """The file of a step that holds the arrays."""
  files = (path / 'state' / 'ocdbt.process_0' / 'd').iterdir()
  return max(files, key=lambda p: p.stat().st_size)


def test_round_trip_of_state_and_source(saved, states):
  state, source_state, step = _restore(saved)
  assert step == 2
  assert jax.tree.structure(state) == jax.tree.structure(_abstract())
  _assert_equal(state, states[2])
  _assert_equal(source_state, _SOURCE)


def test_a_path_may_be_relative(states, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with checkpoint.Checkpoints('run/checkpoints', max_to_keep=1) as checkpoints:
    checkpoints.save(1, _on_device(states[1]), _SOURCE)
  state, _, step = _restore('run/checkpoints')
  assert step == 1
  _assert_equal(state, states[1])
  variables, step = checkpoint.restore_variables(
    'run/checkpoints', _abstract().variables
  )
  assert step == 1
  _assert_equal(variables, states[1].variables)


def test_an_empty_directory_restores_nothing(tmp_path):
  assert _restore(tmp_path / 'new') is None


def test_the_next_step_may_donate_what_is_being_saved(tmp_path):
  """A save in flight must hold a copy, not the buffers that are reused."""
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  state = {'variables': {'params': {'w': jnp.zeros((512, 512))}}}
  wrap = lambda tree: checkpoint.state_lib.State(
    jnp.zeros((), jnp.int32), tree['variables'], (), None
  )
  with checkpoint.Checkpoints(tmp_path, max_to_keep=9) as checkpoints:
    for i in range(3):
      checkpoints.save(i, wrap(state), {})
      for _ in range(10):
        state = step(state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      wrap(state),
    )
    restored, _, _ = checkpoints.restore_latest(abstract)
  assert np.unique(restored.variables['params']['w']).tolist() == [20.0]


def test_only_the_newest_are_kept(states, tmp_path):
  with checkpoint.Checkpoints(tmp_path, max_to_keep=2) as checkpoints:
    for i in range(4):
      checkpoints.save(10 * i, _on_device(states[i]), {})
  assert _steps(tmp_path) == [20, 30]


def test_restores_onto_another_mesh(saved, states):
  mesh = jax.make_mesh(
    (2, 3), ('data', 'fsdp'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  at = lambda *axes: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*axes)
  )
  shardings = {
    'params': {'w_D': at('fsdp'), 'scale': at()},
    'router': {'bias_E': at('data')},
  }
  abstract = toy.abstract_state(shardings, with_reference=True)
  with checkpoint.Checkpoints(saved, max_to_keep=3) as checkpoints:
    state, _, _ = checkpoints.restore_latest(abstract)
  _assert_equal(state, states[2])
  jax.tree.map(lambda x, a: _assert_same_sharding(x, a), state, abstract)
  variables, step = checkpoint.restore_variables(saved, abstract.variables)
  assert step == 2
  _assert_equal(variables, states[2].variables)
  jax.tree.map(_assert_same_sharding, variables, abstract.variables)


def _assert_same_sharding(x, abstract):
  assert x.sharding.is_equivalent_to(abstract.sharding, x.ndim)


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


@pytest.mark.parametrize(
  'damage, find',
  [
    (_truncate, _largest),
    (_flip_a_bit, _largest),
    (os.remove, _largest),
    (_truncate, lambda path: path / 'state' / 'manifest.ocdbt'),
    (_truncate, lambda path: path / 'state' / '_METADATA'),
    (_truncate, lambda path: path / 'source' / 'process_0_of_1.npz'),
    (_flip_a_bit, lambda path: path / 'source' / 'process_0_of_1.npz'),
    (os.remove, lambda path: path / 'source' / 'process_0_of_1.npz'),
    (_truncate, lambda path: next((path / 'meta').glob('meta*'))),
    (shutil.rmtree, lambda path: path / 'state'),
  ],
)
def test_a_damaged_checkpoint_is_passed_over(copy, states, capfd, damage, find):
  damage(find(copy / '2'))
  said = []
  state, _, step = _restore(copy, said)
  assert step == 1
  _assert_equal(state, states[1])
  assert len(said) == 1 and '\n' not in said[0]
  assert str(copy / '2') in said[0] and 'from step 1' in said[0]
  assert capfd.readouterr() == ('', '')  # No tracebacks of the libraries.
  assert (copy / 'damaged_2').is_dir()


def test_a_damaged_step_can_be_saved_again(copy, states):
  _truncate(_largest(copy / '2'))
  with checkpoint.Checkpoints(
    copy, max_to_keep=3, say=lambda line: None
  ) as checkpoints:
    checkpoints.restore_latest(_abstract())
    checkpoints.save(2, _on_device(states[3]), _SOURCE)
  state, _, step = _restore(copy)
  assert step == 2
  _assert_equal(state, states[3])
  # Once more: the name damaged_2 is taken.
  _truncate(_largest(copy / '2'))
  assert _restore(copy)[2] == 1
  assert (copy / 'damaged_2_2').is_dir()


def test_all_damaged_is_an_error_that_moves_nothing(copy):
  for step in (1, 2):
    _truncate(_largest(copy / str(step)))
  with pytest.raises(config.UserError) as e:
    _restore(copy)
  assert str(copy) in str(e.value) and '\n' not in str(e.value)
  assert _steps(copy) == [1, 2]


def test_variables_alone_come_from_the_newest_good_one(copy, states, capfd):
  shutil.rmtree(copy / '2' / 'state' / 'ocdbt.process_0')
  said = []
  variables, step = checkpoint.restore_variables(
    copy, _abstract().variables, say=said.append
  )
  assert step == 1 and len(said) == 1
  assert capfd.readouterr() == ('', '')
  _assert_equal(variables, states[1].variables)
  assert _steps(copy) == [1, 2]  # Another run's directory stays as it is.


def test_another_model_is_named(saved, tmp_path):
  abstract = _abstract()
  w_D = abstract.variables['params']['w_D']
  abstract.variables['params']['w_D'] = jax.ShapeDtypeStruct(
    (9,), w_D.dtype, sharding=w_D.sharding
  )
  expected = r'params/w_D is \[600\] there, \[9\] here'
  with pytest.raises(config.UserError, match=expected):
    checkpoint.restore_variables(saved, abstract.variables)
  del abstract.variables['params']['w_D']
  with pytest.raises(
    config.UserError, match=r'params/w_D is \[600\] .* absent'
  ):
    checkpoint.restore_variables(saved, abstract.variables)
  with pytest.raises(config.UserError, match='not a directory'):
    checkpoint.restore_variables(tmp_path / 'none', abstract.variables)
  with pytest.raises(config.UserError, match='no checkpoint'):
    checkpoint.restore_variables(tmp_path, abstract.variables)


def test_a_failed_save_is_one_line_and_keeps_the_last(copy, states):
  """A limit on the size of a file stands for a full disk."""
  rng = np.random.default_rng(0)
  big = checkpoint.state_lib.State(
    jnp.zeros((), jnp.int32), {'w': jnp.array(rng.normal(size=9999))}, (), None
  )
  checkpoints = checkpoint.Checkpoints(copy, max_to_keep=3)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
  try:
    with pytest.raises(config.UserError) as e:
      checkpoints.save(3, big, {})
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert str(e.value) == (
    f'could not save step 3 in {copy}: File too large; '
    'the last good checkpoint is step 2'
  )
  checkpoints.save(4, _on_device(states[4]), _SOURCE)  # There is room again.
  checkpoints.close()
  assert _restore(copy)[2] == 4
  assert _steps(copy) == [1, 2, 4]


def test_leaving_by_an_error_finishes_the_save(states, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with checkpoint.Checkpoints(tmp_path, max_to_keep=3) as checkpoints:
      checkpoints.save(1, _on_device(states[1]), _SOURCE)
      raise KeyboardInterrupt
  assert _restore(tmp_path)[2] == 1


def test_large_arrays_are_written_in_pieces(tmp_path):
  mib = 1 << 20
  variables = {'params': jnp.arange(12 * mib, dtype=jnp.float32), 'router': {}}
  large = state_lib.State(jnp.zeros((), jnp.int32), variables, None, None)
  with checkpoint.Checkpoints(tmp_path, max_to_keep=1) as checkpoints:
    checkpoints.save(0, large, {})
  sizes = [p.stat().st_size for p in tmp_path.rglob('*') if p.is_file()]
  assert sum(sizes) >= 48 * mib
  assert max(sizes) <= 24 * mib
