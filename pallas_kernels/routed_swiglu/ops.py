"""The routed experts of a layer: from tokens to their weighted sums."""

import jax

from pallas_kernels.routed_swiglu import grouped, reference, xla

IMPLEMENTATIONS = ('xla', 'grouped', 'reference')


def routed_swiglu(
  x_TD: jax.Array,
  expert_TK: jax.Array,
  weight_TK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  *,
  block: int,
  implementation: str,
) -> jax.Array:
  """Sends each token through its experts: dropless, exact at any skew.

  out[t] = Σ_k weight[t, k] · down_e(silu(gate_e(x[t])) · up_e(x[t])),
  e = expert[t, k]

  Args:
    x_TD: [T, D] tokens.
    expert_TK: int32 [T, K], values in [0, E), K different ones a token.
    weight_TK: [T, K].
    gate_EDF: [E, D, F].
    up_EDF: [E, D, F].
    down_EFD: [E, F, D].
    block: Rows that are worked off together; cost only.
    implementation: 'xla' (for a CPU), 'grouped' (contiguous layout through
      grouped_matmul, for accelerators) or 'reference'.

  Returns:
    [T, D] in the dtype of x.

  Raises:
    ValueError: An unknown implementation, or no rows in a block.
  """
  if block < 1:
    raise ValueError(f'block={block} must be at least 1')
  args = (x_TD, expert_TK, weight_TK, gate_EDF, up_EDF, down_EFD)
  match implementation:
    case 'xla':
      return xla.routed_swiglu(*args, block=block)
    case 'grouped':
      return grouped.routed_swiglu(*args, block=block)
    case 'reference':
      return reference.routed_swiglu(*args).astype(x_TD.dtype)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )
