"""Floating-point operations of a traced program, loops by their trip counts.

Counted in the jaxpr, what the program asks for: recomputation included, as the
jaxpr of a gradient shows it, whatever a compiler makes of it not.
"""

import math
from typing import Any

from jax.extend import core

# Primitives whose jaxprs run a known number of times, or once.
_SUBSIDIARY = ('jvp_jaxpr_fun', 'fwd_jaxpr_thunk', 'bwd')


def per_device(
  program: core.ClosedJaxpr, num_devices: int, *, num_rows: int | None = None
) -> float:
  """Multiplications and additions of matrix products, on one device.

  What is written for one device (`shard_map`) counts as it is; the rest, such
  as an optimizer's update, is taken to be spread evenly. Kernels count what
  they estimate, or their products times their grid. Of branches the dearest
  counts, of a loop with an unknown end one turn.

  Args:
    program: The jaxpr of the whole.
    num_devices: How many run it.
    num_rows: Rows that grouped matmuls find, whose kernels end where the rows
      do; None for all that there is room for.
  """
  return _count(program.jaxpr, 1 / num_devices, num_rows)


def _count(jaxpr: core.Jaxpr, share: float, num_rows: int | None) -> float:
  return sum(_of_equation(eqn, share, num_rows) for eqn in jaxpr.eqns)


def _of_equation(
  eqn: core.JaxprEqn, share: float, num_rows: int | None
) -> float:
  params = eqn.params
  count = lambda jaxpr: _count(jaxpr, share, num_rows)
  match eqn.primitive.name:
    case 'dot_general':
      (contracted, _), _ = params['dimension_numbers']
      lhs = eqn.invars[0].aval.shape
      inner = math.prod(lhs[i] for i in contracted)
      return 2 * share * math.prod(eqn.outvars[0].aval.shape) * inner
    case 'ragged_dot' | 'ragged_dot_general':
      # Each row meets the matrix of its own group only.
      lhs, rhs = (x.aval.shape for x in eqn.invars[:2])
      return 2 * share * math.prod(lhs) * rhs[-1]
    case 'scan':
      return params['length'] * count(params['jaxpr'].jaxpr)
    case 'while':
      return count(params['body_jaxpr'].jaxpr)
    case 'cond':
      return max(count(branch.jaxpr) for branch in params['branches'])
    case 'shard_map':
      return _count(params['jaxpr'], 1.0, num_rows)
    case 'pallas_call':
      return share * _of_kernel(eqn, num_rows)
  return sum(count(jaxpr) for jaxpr in _inner(params))


def _of_kernel(eqn: core.JaxprEqn, num_rows: int | None) -> float:
  params = eqn.params
  grid = params['grid_mapping'].grid
  known = [n for n in grid if isinstance(n, int)]
  estimate = params.get('cost_estimate')
  if estimate is None or not estimate.flops:
    return math.prod(known) * _count(params['jaxpr'], 1.0, None)
  name = str(params.get('name') or params.get('name_and_src_info'))
  ends_with_rows = len(known) < len(grid) or name.startswith('grouped_')
  if num_rows is None or not ends_with_rows:
    return estimate.flops
  room = next(x.aval.shape[0] for x in eqn.invars if x.aval.ndim == 2)
  return estimate.flops * min(num_rows / room, 1.0)


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
  found = []
  for name, value in params.items():
    if name in _SUBSIDIARY:
      continue
    for x in value if isinstance(value, tuple | list) else (value,):
      if isinstance(x, core.ClosedJaxpr):
        found.append(x.jaxpr)
      elif isinstance(x, core.Jaxpr):
        found.append(x)
  return found
