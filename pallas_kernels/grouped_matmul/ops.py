"""Grouped matmul on the contiguous layout (DeepGEMM's).

The rows of all groups stand one group after the other, each group padded to
whole blocks, so that one block has one group.
"""

import jax

from pallas_kernels.grouped_matmul import megablox, reference, xla

IMPLEMENTATIONS = ('xla', 'megablox', 'reference')


def grouped_matmul(
  x_mk: jax.Array,
  w_gkn: jax.Array,
  size_g: jax.Array,
  *,
  block: int,
  implementation: str,
  interpret: bool = False,
) -> jax.Array:
  """Multiplies the rows of each group by its matrix.

  out[i] = x[i] · w[g] for the rows i of group g, which begin where those of
  group g - 1 end.

  Args:
    x_mk: [m, k] rows in contiguous layout; padding rows inside of a group may
      hold anything finite, those past the last group anything.
    w_gkn: [g, k, n] one matrix per group.
    size_g: int32 [g] rows of each group, whole blocks, at most m together.
    block: Rows a block.
    implementation: 'xla' (gathers a matrix for each block: small models),
      'megablox' (JAX's kernel for TPUs) or 'reference'.
    interpret: Run the kernel on a CPU.

  Returns:
    [m, n] in the dtype of x, accumulated in float32. Rows past the last group
    are undefined, but for the last row of all, which is finite.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.
  """
  if x_mk.shape[0] % block:
    raise ValueError(
      f'{x_mk.shape[0]} rows are no whole number of blocks of {block}'
    )
  if x_mk.shape[1] != w_gkn.shape[1]:
    raise ValueError(
      f'k={x_mk.shape[1]} of the rows is not k={w_gkn.shape[1]} of the weights'
    )
  match implementation:
    case 'xla':
      return xla.grouped_matmul(x_mk, w_gkn, size_g, block)
    case 'megablox':
      return megablox.grouped_matmul(x_mk, w_gkn, size_g, block, interpret)
    case 'reference':
      return reference.grouped_matmul(x_mk, w_gkn, size_g)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )
