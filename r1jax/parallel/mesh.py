"""The device mesh: one axis per kind of parallelism, slowest link first."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np

AXES = ('pipe', 'data', 'fsdp', 'context', 'expert', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; one of them may be -1: what devices are left.

  Only `data` and `fsdp` may exceed 1 so far.
  """

  data: int = -1
  fsdp: int = 1

  def __post_init__(self):
    sizes = (self.data, self.fsdp)
    if any(s == 0 or s < -1 for s in sizes):
      raise ValueError(
        f'data={self.data}, fsdp={self.fsdp}: sizes are >= 1, or -1 for '
        'what is left'
      )
    if sizes.count(-1) > 1:
      raise ValueError('data=-1, fsdp=-1: at most one axis may be -1')


def make_mesh(
  config: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """Lays the devices out on the mesh axes.

  Raises:
    ValueError: The product of the sizes is not the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {'data': config.data, 'fsdp': config.fsdp}
  known = math.prod(s for s in sizes.values() if s != -1)
  for axis, size in sizes.items():
    if size == -1:
      sizes[axis] = max(len(devices) // known, 1)
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f'mesh data={sizes["data"]} x fsdp={sizes["fsdp"]} needs '
      f'{math.prod(sizes.values())} devices, there are {len(devices)}; '
      f'mesh.data=-1 mesh.fsdp=1 would do'
    )
  shape = [sizes.get(axis, 1) for axis in AXES]
  return jax.sharding.Mesh(np.asarray(devices).reshape(shape), AXES)
