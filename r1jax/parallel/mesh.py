"""The device mesh: one axis per kind of parallelism, slowest link first."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from r1jax.parallel import pipeline as pipeline_lib

AXES = ('pipe', 'data', 'fsdp', 'context', 'expert', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1: what devices are left.

  Attributes:
    data: Copies of the model, each with rows of its own.
    fsdp: Devices that share parameters and optimizer state, with rows of
      their own.
    pipe: Stages of a pipeline.
    context: Parts of a sequence.
    expert: Devices that share the experts, with rows of their own.
    tensor: Devices that share heads and feed-forward widths.
    num_slices: Groups of devices with a fast network inside (ICI) and a slow
      one between them (DCN). `data` crosses it as far as its size goes, then
      `pipe`, then `fsdp`, of which the slow link bears the outer part.
  """

  data: int = -1
  fsdp: int = 1
  pipe: int = 1
  context: int = 1
  expert: int = 1
  tensor: int = 1
  num_slices: int = 1
  pipeline: pipeline_lib.PipelineConfig = pipeline_lib.PipelineConfig()

  def __post_init__(self):
    sizes = self.sizes
    wrong = [a for a, s in sizes.items() if s == 0 or s < -1]
    if wrong:
      raise ValueError(
        f'{wrong[0]}={sizes[wrong[0]]}: sizes are >= 1, or -1 for what is left'
      )
    rest = [a for a, s in sizes.items() if s == -1]
    if len(rest) > 1:
      raise ValueError(f'{"=-1, ".join(rest)}=-1: at most one axis may be -1')
    if self.num_slices < 1:
      raise ValueError(f'num_slices={self.num_slices} must be at least 1')

  @property
  def sizes(self) -> dict[str, int]:
    return {axis: getattr(self, axis) for axis in AXES}


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Lays the devices out on the mesh axes.

  Raises:
    ValueError: The product of the sizes is not the number of devices, or
      `data`, `pipe` and `fsdp` together do not cross the slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = config.sizes
  known = math.prod(s for s in sizes.values() if s != -1)
  for axis, size in sizes.items():
    if size == -1:
      sizes[axis] = max(len(devices) // known, 1)
  if math.prod(sizes.values()) != len(devices):
    shown = ' x '.join(
      f'{a}={s}' for a, s in sizes.items() if s > 1 or a in ('data', 'fsdp')
    )
    rest = math.prod(sizes.values()) // sizes['data']
    good = f'data={len(devices) // rest}'
    if len(devices) % rest:
      good = f'data={len(devices)} and 1 for all others'
    raise ValueError(
      f'mesh {shown} needs {math.prod(sizes.values())} devices, there are '
      f'{len(devices)}; {good} would do'
    )
  across = across_slices(sizes, config.num_slices)
  return jax.sharding.Mesh(_lay_out(sizes, across, devices), AXES)


def across_slices(sizes: Mapping[str, int], num_slices: int) -> dict[str, int]:
  """The part of each mesh axis that crosses slices; their product is all.

  Raises:
    ValueError: Other axes than `data`, `pipe` and `fsdp` would have to.
  """
  across, left = dict.fromkeys(sizes, 1), num_slices
  for axis in ('data', 'pipe', 'fsdp'):
    across[axis] = math.gcd(sizes[axis], left)
    left //= across[axis]
  if left > 1:
    shown = ' x '.join(f'{a}={sizes[a]}' for a in ('data', 'pipe', 'fsdp'))
    raise ValueError(
      f'mesh {shown} must be a multiple of num_slices={num_slices}; '
      f'data={num_slices} or fsdp={num_slices} would do'
    )
  return across


def _lay_out(sizes, across, devices):
  """Devices by axis, neighbours on the innermost axes near each other."""
  shape = tuple(sizes.values())
  if devices[0].platform != 'tpu':
    return np.asarray(devices).reshape(shape)
  if math.prod(across.values()) == 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  inside = {axis: size // across[axis] for axis, size in sizes.items()}
  return mesh_utils.create_hybrid_device_mesh(
    tuple(inside.values()),
    tuple(across.values()),
    devices,
    allow_split_physical_axes=True,
  )
