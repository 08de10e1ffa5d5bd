"""The gradient of a model in a pipeline, whatever the schedule.

A schedule (schedule.py) is laid out in ticks (table.py), and one program runs
any table on all ranks (executor.py).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from r1jax.parallel import executor
from r1jax.parallel import schedule as schedule_lib
from r1jax.parallel import table as table_lib
from r1jax.parallel.executor import AXIS

Tree = Any


@dataclasses.dataclass(frozen=True)
class PipelineConfig(executor.Options):
  """Which table is run, and how.

  Attributes:
    schedule: 'gpipe', '1f1b', 'zb1p', 'dualpipe' or 'dualpipe_v'.
    unit: See `table.place`.
    latency: See `table.place`.
  """

  schedule: str = '1f1b'
  unit: bool = False
  latency: int = 1

  def __post_init__(self):
    super().__post_init__()
    known = schedule_lib.SCHEDULES
    if self.schedule not in known:
      raise ValueError(f'schedule={self.schedule!r}: one of {", ".join(known)}')
    if self.latency not in (1, 2):
      raise ValueError(f'latency={self.latency}: 1 or 2')

  def make_table(
    self, num_ranks: int, num_microbatches: int
  ) -> table_lib.Table:
    """Lays the schedule out.

    Raises:
      ValueError: It does not exist for these sizes.
    """
    make = schedule_lib.SCHEDULES[self.schedule]
    return table_lib.make_table(
      make(num_ranks, num_microbatches),
      unit=self.unit,
      latency=self.latency,
      recompute=self.keep == 'input',
      split=self.masked,
    )


def make_gradient(
  functions: executor.Functions,
  table: table_lib.Table,
  mesh: jax.sharding.Mesh,
  options: executor.Options,
  *,
  batch_axes: Sequence[str] = (),
  sum_axes: Sequence[str] = (),
  shardings: Tree = None,
) -> Callable[[Tree, Tree, Tree], tuple[tuple[jax.Array, Tree], Tree]]:
  """Returns (params, frozen, batch) -> ((loss, metrics), grads).

  params = {'ends': …, 'stacks': {name: …}}: `ends` is what embedding and head
  share; a leaf of a stack is [stages, layers, …], the stages in the order of
  `table.schedule.stage_order`. `frozen` holds what layers read and nobody
  differentiates, {name: …} laid out as the stacks. Leaves of `batch` have
  rows first, or are scalars. Gradients (float32 at least) are those of the
  loss summed over all rows; metrics = {'head': …, 'stacks': {name: [stages,
  layers, …]}}, summed as well. Every rank holds `ends` and their gradient; of
  a mirrored schedule's layers also those of its mirror image.

  Args:
    functions: Of the stages.
    table: With recompute = (keep == 'input') and split = masked.
    mesh: Its axis `pipe` has as many devices as the table has ranks.
    options: How to run it.
    batch_axes: Mesh axes that share the rows of the batch.
    sum_axes: More axes whose devices have parts of a gradient, each of the
      whole loss.
    shardings: Of `params`, with the same structure; what they share comes back
      summed from the functions. None: all is on all devices but the stages,
      which are on their ranks.

  Raises:
    ValueError: The table, mesh or batch does not fit.
  """
  _check(functions, table, mesh, options)
  schedule = table.schedule
  rows = P(tuple(batch_axes)) if batch_axes else P()

  def gradient(params: Tree, frozen: Tree, batch: Tree) -> Any:
    pipe = lambda tree: jax.tree.map(lambda _: P(AXIS), tree)
    if shardings is None:
      specs = {
        'ends': jax.tree.map(lambda _: P(), params['ends']),
        'stacks': pipe(params['stacks']),
      }
    else:
      specs = jax.tree.map(lambda s: s.spec, shardings)
    in_specs = (
      specs,
      pipe(frozen),
      jax.tree.map(lambda x: rows if jnp.ndim(x) else P(), batch),
      P(AXIS),
      P(None, AXIS),
    )
    counts = {
      name: np.array(stack.num_layers, np.int32)[np.array(schedule.stages)]
      for name, stack in functions.stacks.items()
    }

    def body(params, frozen, batch, counts, rows) -> Any:
      counts = jax.tree.map(lambda c: c[0], counts)
      run = executor.Run(
        functions, table, options, params, frozen, counts, batch
      )
      state = run.scan(rows[:, 0])
      return run.collect(state, specs, tuple(batch_axes), tuple(sum_axes))

    run = jax.shard_map(
      body,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=(
        (P(), {'head': P(), 'stacks': P(AXIS)}),
        in_specs[0],
      ),
      # Checked, a gradient of something replicated would be summed over
      # `pipe` inside a loop that not every rank enters.
      check_vma=False,
    )
    return run(params, frozen, batch, counts, table.rows)

  return gradient


def to_stages(
  layers: Tree, num_layers: Sequence[int], stage_order: Sequence[int]
) -> Tree:
  """A model's stack as `make_gradient` wants it.

  [layers, …] -> [stages, max(num_layers), …], the stages in `stage_order`;
  the room that a stage does not use is zero.
  """
  count, order = np.array(num_layers), np.array(stage_order)
  layer = np.arange(count.max())
  is_used = (layer < count[:, None])[order]
  index = (layer + (np.cumsum(count) - count)[:, None])[order]
  index = np.where(is_used, index, 0)

  def one(x: jax.Array) -> jax.Array:
    mask = is_used.reshape(*is_used.shape, *(1,) * (x.ndim - 1))
    return jnp.where(mask, x[index], 0)

  return jax.tree.map(one, layers)


def from_stages(
  stages: Tree, num_layers: Sequence[int], stage_order: Sequence[int]
) -> Tree:
  """The inverse of `to_stages`, for parameters, gradients and metrics."""
  size = max(num_layers)
  index = [
    place * size + layer
    for place, count in zip(np.argsort(stage_order), num_layers, strict=True)
    for layer in range(count)
  ]
  return jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:])[np.array(index)], stages
  )


def _check(
  functions: executor.Functions,
  table: table_lib.Table,
  mesh: jax.sharding.Mesh,
  options: executor.Options,
) -> None:
  schedule = table.schedule
  if mesh.shape[AXIS] != schedule.num_ranks:
    raise ValueError(
      f'the table has {schedule.num_ranks} ranks, mesh axis {AXIS} has '
      f'{mesh.shape[AXIS]}'
    )
  if table.recompute != (options.keep == 'input'):
    raise ValueError(
      f'keep={options.keep!r} needs a table with '
      f'recompute={options.keep == "input"}'
    )
  if table.split != options.masked:
    raise ValueError(
      f'masked={options.masked} needs a table with split={options.masked}'
    )
  for name, stack in functions.stacks.items():
    if len(stack.num_layers) != schedule.num_stages:
      raise ValueError(
        f'stack {name!r} has num_layers of {len(stack.num_layers)} stages, '
        f'the table has {schedule.num_stages}'
      )
