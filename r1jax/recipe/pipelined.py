"""A stage's gradient in a pipeline: the model cut into stages over `pipe`.

The state stays as it is without a pipeline: parameters, optimizer and
checkpoints know nothing of stages, and `pipe` shares them as `fsdp` does. Each
step moves the layers to their stages and the gradients back.
"""

from collections.abc import Callable
from typing import Any

import jax

from r1jax.model import attention, transformer
from r1jax.model import block as block_lib
from r1jax.model import config as model_config
from r1jax.parallel import executor, pipeline, sharding
from r1jax.recipe import objective as objective_lib
from r1jax.train import step as step_lib

_STACKS = ('dense', 'moe')


def split_layers(
  model: model_config.ModelConfig, num_stages: int
) -> dict[str, tuple[int, ...]]:
  """Consecutive layers for each stage: how many dense, how many of experts.

  As many for each as can be; the last stage, with the head, and the first,
  with the embedding, are the first to have one less.

  Raises:
    ValueError: There are fewer layers than stages.
  """
  total = model.num_layers
  if total < num_stages:
    raise ValueError(
      f'{num_stages} stages for {total} layers: a pipeline of at most {total} '
      'stages would do'
    )
  least, more = divmod(total, num_stages)
  by_load = [*range(1, num_stages - 1), 0, num_stages - 1]
  sizes = [least] * num_stages
  for stage in by_load[:more]:
    sizes[stage] += 1
  counts, first = {name: [] for name in _STACKS}, 0
  for size in sizes:
    dense = min(max(model.num_dense_layers - first, 0), size)
    counts['dense'].append(dense)
    counts['moe'].append(size - dense)
    first += size
  return {n: tuple(c) for n, c in counts.items() if any(c)}


def make_gradient(
  objective: objective_lib.Objective,
  config: pipeline.PipelineConfig,
  mesh: jax.sharding.Mesh,
  shardings: Any,
  *,
  num_microbatches: int,
) -> Callable[[Any, Any], Any]:
  """Returns (variables, batch) -> ((loss, metrics), grads of 'params').

  As `step.make_gradient`, of which it is the equal to rounding.

  Args:
    objective: What is trained.
    config: Schedule and what it keeps.
    mesh: With an axis `pipe` of more than one device.
    shardings: Of the variables, as the state has them.
    num_microbatches: That travel through the pipeline in a step.

  Raises:
    ValueError: A schedule, model or objective that does not fit.
  """
  if objective.is_warm_up:
    raise ValueError(
      'the dense warm-up of indexers has no pipeline; mesh.pipe=1 would do'
    )
  made = config.make_table(mesh.shape[executor.AXIS], num_microbatches)
  schedule = made.schedule
  num_layers = split_layers(objective.model, schedule.num_stages)
  ends = _ends_of(shardings)
  stacks = {n: shardings['params'][n] for n in num_layers}
  of_stages = {
    'ends': jax.tree.map(lambda s: sharding.without(s, (executor.AXIS,)), ends),
    'stacks': jax.tree.map(sharding.of_stages, stacks),
  }
  run = pipeline.make_gradient(
    make_functions(objective, num_layers),
    made,
    mesh,
    config,
    batch_axes=sharding.ROW_AXES,
    sum_axes=('context',),
    shardings=of_stages,
  )

  def to_stages(tree: Any) -> dict[str, Any]:
    return {
      n: pipeline.to_stages(tree.get(n, {}), counts, schedule.stage_order)
      for n, counts in num_layers.items()
    }

  def from_stages(tree: Any) -> dict[str, Any]:
    return {
      n: pipeline.from_stages(tree[n], counts, schedule.stage_order)
      for n, counts in num_layers.items()
    }

  # Programs for one device, with its part of everything.
  def place(variables: Any) -> Any:
    joined = jax.tree.map(sharding.join_pipe, _ends_of(variables), ends)
    spread = jax.tree.map(
      sharding.spread_stages, to_stages(variables['params']), stacks
    )
    return {'ends': joined, 'stacks': spread}

  def put_back(grads: Any) -> Any:
    own = jax.tree.map(sharding.share_pipe, grads['ends'], ends)
    collected = jax.tree.map(sharding.collect_stages, grads['stacks'], stacks)
    return own['params'] | from_stages(collected)

  place = sharding.per_device(place, mesh, (shardings,), of_stages)
  put_back = sharding.per_device(
    put_back, mesh, (of_stages,), shardings['params']
  )

  def gradient(variables: Any, batch: Any) -> Any:
    (loss, metrics), grads = run(
      place(variables), to_stages(variables['router']), batch
    )
    of_layers = from_stages(metrics['stacks']).values()
    sums = objective_lib.concatenate([*of_layers, *metrics['head']['layers']])
    own = metrics['head']['own']
    return (loss, own | objective.layer_metrics(sums)), put_back(grads)

  return gradient


def _ends_of(variables: Any) -> Any:
  """What is in no stack of layers: embedding, head, MTP."""
  return {
    kind: {n: v for n, v in variables[kind].items() if n not in _STACKS}
    for kind in ('params', 'router')
  }


def make_functions(
  objective: objective_lib.Objective, num_layers: dict[str, tuple[int, ...]]
) -> executor.Functions:
  """What the stages compute."""
  c = objective.model
  model = transformer.Transformer(c)

  def mode() -> attention.Mode:
    return transformer.make_mode(c, indexer_loss=objective.indexer is not None)

  def context_of(batch: Any) -> attention.Context:
    return transformer.make_context(
      c, batch.segment_BT, batch.position_BT, None, mode()
    )

  def make_layer(is_moe):
    def layer(params, frozen, x_BTD, context):
      of_attention, batch = context
      x_BTD, _, metrics = block_lib.Block(c, is_moe, mode()).apply(
        {'params': params, 'router': frozen}, x_BTD, of_attention, None, 0
      )
      sums = objective.layer_sums(metrics, batch)
      return x_BTD, objective.of_layers(sums), sums

    return layer

  def head(ends, x_BTD, batch):
    hidden_BTD, mtp_hidden, of_mtp = model.apply(
      ends,
      x_BTD,
      ends['params']['embedding'],
      batch.tokens_BT,
      context_of(batch),
      mode(),
      mtp=objective.mtp,
      method='finish',
    )
    loss, metrics = objective.of_hidden(
      transformer.head(ends['params'], c), hidden_BTD, mtp_hidden, batch
    )
    sums = [objective.layer_sums(m, batch) for m in of_mtp]
    loss += sum(objective.of_layers(s) for s in sums)
    return loss, {'own': metrics, 'layers': sums}

  return executor.Functions(
    embed=lambda ends, batch: transformer.embed(
      c, ends['params']['embedding'], batch.tokens_BT, mode()
    ),
    stacks={
      name: executor.Stack(make_layer(name == 'moe'), num_layers[name])
      for name in num_layers
    },
    head=head,
    context=lambda batch: (context_of(batch), batch),
    is_max=step_lib.is_max,
  )
