"""Grouped matmul on the contiguous layout (DeepGEMM's).

The rows of all groups stand one group after the other, each group padded to
whole blocks, so that one block has one group.
"""

import jax

from pallas_kernels.grouped_matmul import reference, xla

_IMPLEMENTATIONS = {
  'reference': reference.grouped_matmul,
  'xla': xla.grouped_matmul,
}


def grouped_matmul(
  x_mk: jax.Array,
  w_gkn: jax.Array,
  group_of_block: jax.Array,
  *,
  implementation: str = 'xla',
) -> jax.Array:
  """Multiplies each block of rows by its group's matrix.

  out[i] = x[i] · w[group_of_block[i // block]]

  with block = m / len(group_of_block).

  Args:
    x_mk: [m, k] rows in contiguous layout; padding rows may hold anything
      finite.
    w_gkn: [g, k, n] one matrix per group.
    group_of_block: int32 [m / block], values in [0, g).
    implementation: 'xla' or 'reference'.

  Returns:
    [m, n] in the dtype of x, accumulated in float32.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.
  """
  if implementation not in _IMPLEMENTATIONS:
    raise ValueError(
      f'implementation={implementation!r}, it must be one of '
      f'{", ".join(_IMPLEMENTATIONS)}'
    )
  if x_mk.shape[0] % group_of_block.shape[0]:
    raise ValueError(
      f'{x_mk.shape[0]} rows are no whole number of rows for '
      f'{group_of_block.shape[0]} blocks'
    )
  if x_mk.shape[1] != w_gkn.shape[1]:
    raise ValueError(
      f'k={x_mk.shape[1]} of the rows is not k={w_gkn.shape[1]} of the weights'
    )
  return _IMPLEMENTATIONS[implementation](x_mk, w_gkn, group_of_block)
