"""Checkpoints of state and source: async, keep-N, good after any kill."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from r1jax import config
from r1jax.train import integrity, interrupt, workdir
from r1jax.train import source_state as source_state_lib
from r1jax.train import state as state_lib

# Chunks and files are held in memory while they are written: the larger they
# are, the more. By default a chunk is a whole array.
_CHUNK_BYTES = 4 << 20
_FILE_BYTES = 16 << 20


class Checkpoints:
  """The checkpoints of one run, `directory/<step>`.

  Use it as a context manager: leaving it, also by an exception or Ctrl-C,
  waits for the save in flight. A step counts only once it is whole, so a kill
  during a save leaves the one before.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    *,
    max_to_keep: int,
    say: Callable[[str], None] = print,
  ):
    """Opens or creates `directory`; leftovers of killed saves are removed.

    Args:
      directory: Any path etils.epath knows.
      max_to_keep: Older checkpoints are deleted after a newer one is whole.
      say: Takes one line about a damaged checkpoint.
    """
    if max_to_keep < 1:
      raise ValueError(f'max_to_keep={max_to_keep} must be positive')
    self._directory = workdir.absolute(directory)
    self._say = say
    self._saving: int | None = None
    self._manager = _make_manager(
      self._directory, max_to_keep=max_to_keep, cleanup_tmp_directories=True
    )

  def save(
    self, step: int, state: state_lib.State, source_state: dict[str, Any]
  ) -> None:
    """Copies the state and writes it in the background.

    Waits for the save before, if that still runs. The next train step may
    donate `state`.

    Raises:
      UserError: This save or the one before failed, as on a full disk.
    """
    packed = source_state_lib.pack(source_state)
    tree = _to_tree(state)
    meta = {'checksums': integrity.checksums(tree)}
    self.wait()
    with interrupt.put_off(), integrity.quiet(), self._explained(step):
      if step in self._manager.all_steps():
        self._manager.delete(step)  # Damaged: `restore_latest` passed it over.
      self._saving = step
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=_save_args(tree),
          source=source_state_lib.Save(packed),
          meta=ocp.args.JsonSave(meta),
        ),
        force=True,
      )

  def restore_latest(
    self, abstract_state: state_lib.State
  ) -> tuple[state_lib.State, dict[str, Any], int] | None:
    """Returns (state, source state, step) of the newest good checkpoint.

    Damaged ones are passed over with a line to `say` and renamed, never
    deleted, to `damaged_<step>`. None if there is no checkpoint.

    Args:
      abstract_state: `ShapeDtypeStruct`s with shardings, of any mesh.

    Raises:
      UserError: All are damaged, or hold another model.
    """
    self.wait()  # A save in flight is listed, too.
    wanted = _to_tree(abstract_state)
    failed = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        tree, source_state = self._restore(step, wanted)
      except integrity.RestoreError as e:
        failed[step] = str(e)
        continue
      for bad, reason in failed.items():
        name = self._set_aside(bad)
        self._say(
          f'checkpoint {self._directory / str(bad)} is damaged ({reason}): '
          f'kept as {name}, going on from step {step}'
        )
      return _from_tree(tree), source_state, step
    if failed:
      raise config.UserError(
        f'no checkpoint in {self._directory} can be read: '
        + '; '.join(f'step {s}: {reason}' for s, reason in failed.items())
      )
    return None

  def wait(self) -> None:
    """Returns when the save in flight is whole.

    Raises:
      UserError: It failed.
    """
    with integrity.quiet(), self._explained(self._saving):
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits and lets go of the directory."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if error is None:
      self.close()
      return
    try:
      self.close()
    except config.UserError as e:
      self._say(str(e))  # The first error goes on.

  def _restore(self, step: int, wanted: dict[str, Any]) -> tuple[Any, Any]:
    def read() -> tuple[Any, Any]:
      _check_variables(self._manager, self._directory, step, wanted)
      args = {'source': source_state_lib.Restore(), **_restore_args(wanted)}
      out = self._manager.restore(step, args=ocp.args.Composite(**args))
      integrity.check_sums(out['state'], out['meta']['checksums'])
      return out['state'], out['source']

    return integrity.attempt(read)

  def _set_aside(self, step: int) -> str:
    """Renames a damaged checkpoint so that its step can be saved again."""
    path, names = self._directory / str(step), _damaged_names(step)
    target = next(t for n in names if not (t := self._directory / n).exists())
    try:
      if jax.process_index() == 0:
        path.rename(target)
    except OSError:
      return path.name  # `save` replaces it.
    self._manager.reload()
    return target.name

  @contextlib.contextmanager
  def _explained(self, step: int | None) -> Iterator[None]:
    """Turns what a save raises into one line."""
    try:
      yield
    except Exception as e:
      self._saving = None
      self._manager.reload()
      latest, reason = self._manager.latest_step(), integrity.one_line(e)
      kept = 'there is none yet' if latest is None else f'is step {latest}'
      raise config.UserError(
        f'could not save step {step} in {self._directory}: {reason}; '
        f'the last good checkpoint {kept}'
      ) from e


def restore_variables(
  directory: epath.PathLike,
  abstract_variables: state_lib.Variables,
  *,
  say: Callable[[str], None] = print,
) -> tuple[state_lib.Variables, int]:
  """Reads the variables alone from a run's checkpoints; changes nothing there.

  They come back in the dtype that they were saved in.

  Args:
    directory: The run's `checkpoints` directory.
    abstract_variables: `ShapeDtypeStruct`s with shardings, of any mesh; their
      dtypes do not count.
    say: Takes one line about a damaged checkpoint.

  Returns:
    The variables and their step, from the newest checkpoint that is good.

  Raises:
    UserError: There is none, or it holds another model.
  """
  directory = workdir.absolute(directory)
  if not directory.is_dir():
    raise config.UserError(f'{directory} is not a directory of checkpoints')
  wanted = {'variables': abstract_variables}
  with integrity.quiet():
    manager = _make_manager(directory, read_only=True, create=False)

  def read(step: int) -> state_lib.Variables:
    _check_variables(manager, directory, step, wanted)
    there = _with_dtypes_of(manager.item_metadata(step)['state'], wanted)
    args = _restore_args(there, is_part=True)
    out = manager.restore(step, args=ocp.args.Composite(**args))
    integrity.check_sums(out['state'], out['meta']['checksums'])
    return out['state']['variables']

  with manager:
    for step in sorted(manager.all_steps(), reverse=True):
      try:
        return integrity.attempt(functools.partial(read, step)), step
      except integrity.RestoreError as e:
        say(f'checkpoint {directory / str(step)} is damaged ({e}): passed over')
  raise config.UserError(f'{directory} holds no checkpoint that can be read')


def _make_manager(
  directory: epath.Path, **options: Any
) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(**options),
    item_handlers={
      # Compression would cost a CPU more time than the writing.
      'state': ocp.PyTreeCheckpointHandler(use_compression=False),
      'source': source_state_lib.Handler(),
      'meta': ocp.JsonCheckpointHandler(),
    },
  )


def _damaged_names(step: int) -> Iterator[str]:
  yield f'damaged_{step}'
  for i in range(2, 1000):
    yield f'damaged_{step}_{i}'


def _to_tree(state: state_lib.State) -> dict[str, Any]:
  tree = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  return {k: v for k, v in tree.items() if v is not None}


def _from_tree(tree: dict[str, Any]) -> state_lib.State:
  return state_lib.State(**{'reference': None, **tree})


def _save_args(tree: dict[str, Any]) -> ocp.args.PyTreeSave:
  chunk = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
  return ocp.args.PyTreeSave(
    tree,
    save_args=jax.tree.map(lambda _: chunk, tree),
    ocdbt_target_data_file_size=_FILE_BYTES,
  )


def _restore_args(
  wanted: dict[str, Any], *, is_part: bool = False
) -> dict[str, Any]:
  state = ocp.args.PyTreeRestore(
    wanted,
    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    partial_restore=is_part,
  )
  return {'state': state, 'meta': ocp.args.JsonRestore()}


def _with_dtypes_of(metadata: Any, wanted: dict[str, Any]) -> dict[str, Any]:
  """The variables that are wanted, in the dtypes of a checkpoint."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(metadata['variables'])
  dtypes = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in leaves}
  variables = jax.tree_util.tree_map_with_path(
    lambda path, x: jax.ShapeDtypeStruct(
      x.shape, dtypes[jax.tree_util.keystr(path)], sharding=x.sharding
    ),
    wanted['variables'],
  )
  return {'variables': variables}


def _check_variables(
  manager: ocp.CheckpointManager,
  directory: epath.Path,
  step: int,
  wanted: dict[str, Any],
) -> None:
  """Raises UserError if the checkpoint holds variables of other shapes."""
  metadata = manager.item_metadata(step)['state']
  if metadata is None:
    raise ValueError('its metadata is missing')
  here, there = (
    integrity.shapes(wanted['variables']),
    integrity.shapes(metadata['variables']),
  )
  for name in sorted(here.keys() | there.keys()):
    if here.get(name) != there.get(name):
      raise config.UserError(
        f'{directory / str(step)} holds another model: {name} is '
        f'{there.get(name, "absent")} there, {here.get(name, "absent")} here'
      )
