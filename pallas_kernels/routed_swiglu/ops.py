"""The routed experts of a layer: from tokens to their weighted sums."""

import jax

from pallas_kernels.linear_fp8 import ops as linear_fp8_ops
from pallas_kernels.quantize_fp8 import ops as quantize_fp8_ops
from pallas_kernels.routed_swiglu import grouped, reference, xla

IMPLEMENTATIONS = ('xla', 'grouped', 'pallas', 'megablox', 'reference')


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
  recipe: linear_fp8_ops.Recipe | None = None,
  mean_choices: int | None = None,
  max_choices: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Sends each token through its experts: dropless, exact at any skew.

  out[t] = Σ_k weight[t, k] · down_e(silu(gate_e(x[t])) · up_e(x[t])),
  e = expert[t, k]

  Args:
    x_TD: [T, D] tokens.
    expert_TK: int32 [T, K], values in [0, E), different ones for a token; E
      for a choice that counts for nothing.
    weight_TK: [T, K].
    gate_EDF: [E, D, F].
    up_EDF: [E, D, F].
    down_EFD: [E, F, D].
    block: Rows that are worked off together; cost only.
    implementation: 'xla' (for a CPU), 'grouped' (contiguous layout through
      grouped_matmul in XLA, for small models on accelerators), 'pallas' and
      'megablox' (the same through our kernel for TPUs, for blocks of a few
      rows, or JAX's, 512 rows a block to be bound by arithmetic) or
      'reference'.
    recipe: For products of FP8 operands; needs 'grouped' and
      whole 128 rows a block.
    mean_choices: How many choices below E to expect; cost only. T · K if None.
    max_choices: How many there may be; T · K if None. Those beyond may be left
      out, the busiest experts' last ones.
    interpret: Run kernels on a CPU.

  Returns:
    [T, D] in the dtype of x.

  Raises:
    ValueError: An unknown implementation, one without FP8, or a block that does
      not do.
  """
  if block < 1:
    raise ValueError(f'block={block} must be at least 1')
  if recipe is not None and (
    implementation != 'grouped' or block % quantize_fp8_ops.SIZE
  ):
    raise ValueError(
      f'implementation={implementation!r}, block={block}: FP8 needs grouped '
      f'and a block that is a multiple of {quantize_fp8_ops.SIZE}'
    )
  args = (x_TD, expert_TK, weight_TK, gate_EDF, up_EDF, down_EFD)
  mean_choices = mean_choices or expert_TK.size
  max_choices = max_choices or expert_TK.size
  match implementation:
    case 'xla':
      return xla.routed_swiglu(
        *args,
        block=block,
        mean_choices=mean_choices,
        max_choices=max_choices,
      )
    case 'grouped':
      # Few rows of an expert do not fill a large block.
      mean_rows = max(mean_choices // len(gate_EDF), 1)
      return grouped.routed_swiglu(
        *args,
        block=min(block, mean_rows) if recipe is None else block,
        max_choices=max_choices,
        matmul='xla',
        interpret=False,
        recipe=recipe,
      )
    case 'pallas' | 'megablox':
      return grouped.routed_swiglu(
        *args,
        block=block,
        max_choices=max_choices,
        matmul=implementation,
        interpret=interpret,
        recipe=None,
      )
    case 'reference':
      return reference.routed_swiglu(*args).astype(x_TD.dtype)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )
