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


# What a kernel for TPUs does, and what does it on any device.
_ON_TPU_ONLY = {
  'attention_implementation': (('pallas', 'splash'), "'naive' or 'chunked'"),
  'decode_implementation': (('pallas',), "'xla'"),
  'head_implementation': (('pallas',), "'chunked'"),
  'fp8_implementation': (('pallas',), "'xla'"),
  'moe.implementation': (('pallas', 'megablox'), "'xla' or 'grouped'"),
  'moe.exchange.kind': (('dma',), "'padded'"),
}


def check_kernels(
  model: model_config.ModelConfig, mesh: jax.sharding.Mesh
) -> None:
  """Kernels for TPUs need TPUs.

  Raises:
    UserError: The devices are others.
  """
  platform = mesh.devices.flat[0].platform
  if platform == 'tpu':
    return
  for name, (kernels, would_do) in _ON_TPU_ONLY.items():
    value = model
    for part in name.split('.'):
      value = getattr(value, part, None)
    if value in kernels:
      raise config_lib.UserError(
        f'model.{name}={value!r} is a kernel for TPUs, and these devices are '
        f'{platform}: {would_do} would do'
      )
