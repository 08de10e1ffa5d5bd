"""What one config alone cannot know: sizes that must fit each other."""

import jax

from r1jax import config as config_lib
from r1jax.model import config as model_config
from r1jax.parallel import sharding


def check_rows(
  name: str, rows: int, mesh: jax.sharding.Mesh, *, num_microbatches: int = 1
) -> None:
  """Rows must divide over microbatches and the devices that share a batch.

  A microbatch goes through a whole pipeline; other programs share all rows
  among its devices as well.

  Raises:
    UserError: They do not.
  """
  if rows % num_microbatches:
    raise config_lib.UserError(
      f'{name}={rows} must be a multiple of train.num_microbatches='
      f'{num_microbatches}'
    )
  shards = sharding.num_batch_shards(mesh)
  for count, parts in (
    (1, shards),
    (num_microbatches, shards // mesh.shape['pipe']),
  ):
    if rows % (count * parts):
      each = f' in {count} microbatches' * (count > 1)
      raise config_lib.UserError(
        f'{name}={rows}{each} does not divide over {parts} devices; on a CPU '
        '--host_devices=1 makes it one device'
      )


def check_length(
  name: str, tokens: int, model: model_config.ModelConfig
) -> None:
  """Sequences must fit the model's context.

  Raises:
    UserError: They do not.
  """
  if tokens > model.max_length:
    raise config_lib.UserError(
      f'{name} = {tokens} tokens exceeds model.max_length={model.max_length}'
    )


def check_context(name: str, tokens: int, mesh: jax.sharding.Mesh) -> None:
  """Rows must divide over the devices that share their length.

  Raises:
    UserError: They do not.
  """
  parts = mesh.shape['context']
  if tokens % parts:
    raise config_lib.UserError(
      f'{name}={tokens} must be a multiple of mesh.context={parts}'
    )
