"""What TPU chips can do at best, by the names of their topologies.

Sources: https://docs.cloud.google.com/tpu/docs/v5e and /v5p, which give ICI per
chip in both directions (v5p: 1,200 GB/s over 6 links, so 100 GB/s each way)
and the data centre network per host or chip (v5p: 50 Gbps a chip). Of v6e, ICI
and network follow from its 3,200 Gbps a chip and 25.6 Tbps a pod; of tpu7x
both are assumed to be v5p's and v6e's: no source was found.
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of chip; rates are peaks.

  Attributes:
    bf16_flops: Per second.
    fp8_flops: Per second; as bf16 where FP8 has no faster unit.
    hbm_bytes: Of memory.
    hbm_bytes_per_second: To and from it.
    link_bytes_per_second: Of one ICI link, in one direction.
    torus_dims: Dimensions of the torus, two links each.
    dcn_bytes_per_second: Between slices, in one direction.
    num_devices: Devices that jax sees on one chip.
  """

  bf16_flops: float
  fp8_flops: float
  hbm_bytes: int
  hbm_bytes_per_second: float
  link_bytes_per_second: float
  torus_dims: int
  dcn_bytes_per_second: float
  num_devices: int = 1

  def per_device(self) -> 'Chip':
    """The share of one of its devices, which have the links in common."""
    n = self.num_devices
    return dataclasses.replace(
      self,
      bf16_flops=self.bf16_flops / n,
      fp8_flops=self.fp8_flops / n,
      hbm_bytes=self.hbm_bytes // n,
      hbm_bytes_per_second=self.hbm_bytes_per_second / n,
      link_bytes_per_second=self.link_bytes_per_second / n,
      dcn_bytes_per_second=self.dcn_bytes_per_second / n,
      num_devices=1,
    )


CHIPS = {
  'v5e': Chip(197e12, 197e12, 16 << 30, 819e9, 50e9, 2, 3.1e9),
  'v5p': Chip(459e12, 459e12, 95 << 30, 2765e9, 100e9, 3, 6.25e9),
  'v6e': Chip(918e12, 918e12, 32 << 30, 1638e9, 100e9, 2, 12.5e9),
  'tpu7x': Chip(2307e12, 4614e12, 192 << 30, 7380e9, 100e9, 3, 12.5e9, 2),
}


def find(topology: str) -> tuple[Chip, int]:
  """The chip of a topology such as v5p:4x4x4, and how many of them.

  Raises:
    ValueError: There is no such topology; the message names some.
  """
  name, _, shape = topology.partition(':')
  chip = CHIPS.get(name)
  good = re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', shape) is not None
  sizes = [int(n) for n in shape.split('x')] if good else []
  if chip is None or len(sizes) != chip.torus_dims:
    known = ', '.join(
      f'{k}:{"x".join("4" * c.torus_dims)}' for k, c in CHIPS.items()
    )
    raise ValueError(
      f'topology={topology!r}: it must be a chip and its torus, such as {known}'
    )
  return chip, math.prod(sizes)
