"""How long a program takes at least, by what it computes and moves."""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from r1jax.parallel import chips, hlo

_EXCHANGES = ('all-to-all', 'ragged-all-to-all')


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a device of the mesh is: its slice, and its chip in the torus."""

  slice_index: int
  coords: tuple[int, ...]


def link_of(members: Sequence[int], places: Sequence[Place]) -> str:
  """'DCN' if devices of several slices exchange, else 'ICI'."""
  slices = {places[i].slice_index for i in members}
  return 'DCN' if len(slices) > 1 else 'ICI'


def seconds(
  collective: hlo.Collective, places: Sequence[Place], chip: chips.Chip
) -> float:
  """Time of a collective, all its turns, with the links to itself.

  Its devices span k dimensions of the torus, of n₁ … n_k chips. Rings go both
  ways round each: wire bytes / (2 k w), w a link's one-way rate. An exchange
  of all with all travels n / 4 links of a ring on average: wire bytes · n /
  (8 w) of the longest one. A permutation takes one link.

  Args:
    collective: See `hlo.collectives`.
    places: Of the devices, in the mesh's order.
    chip: What one device has.
  """
  total = collective.wire_bytes * collective.times
  if link_of(collective.members, places) == 'DCN':
    return total / chip.dcn_bytes_per_second
  coords = np.array([places[i].coords for i in collective.members])
  spans = [len(np.unique(column)) for column in coords.T]
  spans = [n for n in spans if n > 1] or [2]
  rate = chip.link_bytes_per_second
  if collective.kind == 'collective-permute':
    return total / rate
  if collective.kind in _EXCHANGES:
    return total * max(max(spans), 4) / (8 * rate)
  return total / (2 * len(spans) * rate)


def by_axis(
  found: Sequence[hlo.Collective], places: Sequence[Place]
) -> dict[str, dict[str, dict[str, object]]]:
  """Sums {axes: {kind: {'bytes', 'sites', 'beside_products', 'link'}}}.

  Bytes are those of one device; 'beside_products' counts the sites that are
  under way while products run.
  """
  out = collections.defaultdict(dict)
  for c in found:
    axes = '+'.join(c.axes) or 'none'
    entry = out[axes].setdefault(
      c.kind,
      {
        'bytes': 0.0,
        'sites': 0,
        'beside_products': 0,
        'link': link_of(c.members, places),
      },
    )
    entry['bytes'] += c.wire_bytes * c.times
    entry['sites'] += 1
    entry['beside_products'] += c.beside_products
  return dict(out)


def bounds(
  flops: float,
  hbm_bytes: float,
  found: Sequence[hlo.Collective],
  places: Sequence[Place],
  chip: chips.Chip,
) -> dict[str, float]:
  """Seconds by resource, 'bound' the largest: what overlaps perfectly.

  Args:
    flops: Of one device.
    hbm_bytes: Read and written by one device.
    found: Its collectives.
    places: Of the devices, in the mesh's order.
    chip: What one device has.

  Returns:
    'mxu', 'hbm', 'ici', with several slices 'dcn', and 'bound'.
  """
  spent = {
    'mxu': flops / chip.bf16_flops,
    'hbm': hbm_bytes / chip.hbm_bytes_per_second,
    'ici': 0.0,
  }
  if len({p.slice_index for p in places}) > 1:
    spent['dcn'] = 0.0
  for c in found:
    spent[link_of(c.members, places).lower()] += seconds(c, places, chip)
  return spent | {'bound': max(spent.values())}
