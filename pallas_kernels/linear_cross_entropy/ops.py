"""Log-probabilities under a linear head, its logits never in memory."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.linear_cross_entropy import blocks as blocks_lib
from pallas_kernels.linear_cross_entropy import kernel, reference

IMPLEMENTATIONS = ('pallas', 'reference')

Exchange = Callable[[jax.Array], jax.Array]


def _same(x: jax.Array) -> jax.Array:
  return x


def linear_cross_entropy(
  x_mD: jax.Array,
  w_DV: jax.Array,
  target_m: jax.Array,
  *,
  temperature: float = 1.0,
  implementation: str,
  first: int | jax.Array = 0,
  spread: Exchange = _same,
  total: Exchange = _same,
  largest: Exchange = _same,
  blocks: blocks_lib.BlockSizes | None = None,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of its distribution.

  logp = z_y/τ - log Σ_v exp(z_v/τ),  z = x · w, accumulated in float32

  Columns may be spread over devices, each of which scores the tokens of all:
  then x and target are everyone's, results each device's own tokens', and the
  last three arguments exchange [m] numbers. On one device they do nothing.

  Args:
    x_mD: [m, D] hidden states.
    w_DV: [D, V], cast to the dtype of x.
    target_m: int32 [m], column of each token.
    temperature: τ > 0.
    implementation: 'pallas' (a kernel for TPUs) or 'reference' (all logits;
      for one device).
    first: Number of this device's first column.
    spread: From own tokens' to all devices' tokens'.
    total: Sums over devices, from all tokens' to own tokens'.
    largest: The largest over devices, of all tokens.
    blocks: Tiles.
    interpret: Run the kernel on a CPU.

  Returns:
    logp [m] (nats, float32) and entropy [m] (nats, no gradient).

  Raises:
    ValueError: Widths that do not fit, or an unknown implementation.
  """
  if x_mD.shape[1] != w_DV.shape[0]:
    raise ValueError(
      f'D={x_mD.shape[1]} of the hidden states is not D={w_DV.shape[0]} of the '
      'head'
    )
  match implementation:
    case 'pallas':
      how = _How(
        temperature,
        spread,
        total,
        largest,
        blocks or blocks_lib.default(w_DV.shape[1]),
        interpret,
      )
      local_m = (target_m - first).astype(jnp.int32)
      return _run(x_mD, w_DV.astype(x_mD.dtype), local_m, how)
    case 'reference':
      return reference.linear_cross_entropy(x_mD, w_DV, target_m, temperature)
  raise ValueError(
    f'implementation={implementation!r}, it must be one of '
    f'{", ".join(IMPLEMENTATIONS)}'
  )


class _How:
  """What does not change with the values."""

  def __init__(self, temperature, spread, total, largest, blocks, interpret):
    self.spread, self.total, self.largest = spread, total, largest
    self.options = {
      'temperature': temperature,
      'blocks': blocks,
      'interpret': interpret,
    }

  def padded(self, x_mD, w_DV, *rows_m):
    """Whole tiles; a token beyond has the target -1 and no gradient."""
    blocks = self.options['blocks']
    tokens, columns = -len(x_mD) % blocks.tokens, -w_DV.shape[1]
    columns %= blocks.columns
    pad = lambda x, value: jnp.pad(x, (0, tokens), constant_values=value)
    return (
      jnp.pad(x_mD, ((0, tokens), (0, 0))),
      jnp.pad(w_DV, ((0, 0), (0, columns))),
      *(pad(x, v)[:, None] for x, v in zip(rows_m, (-1, 0, 0))),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _run(x_mD, w_DV, target_m, how):
  return _forward(x_mD, w_DV, target_m, how)[0]


def _forward(x_mD, w_DV, target_m, how):
  m = len(x_mD)
  sums = kernel.forward(
    *how.padded(x_mD, w_DV, target_m),
    num_columns=w_DV.shape[1],
    **how.options,
  )
  top_m, sum_m, weighted_m, hit_m = (x[:m, 0] for x in sums)
  # Relative to the largest of all devices' columns.
  all_m = how.largest(top_m)
  moved_m = top_m - all_m
  shrink_m = jnp.exp(moved_m)
  # A target is one device's column, its score there alone.
  hit = how.total(jnp.where(_is_here(target_m, w_DV), hit_m - all_m, 0.0))
  total = how.total(shrink_m * sum_m)
  weighted = how.total(shrink_m * (weighted_m + moved_m * sum_m))
  log_total = jnp.log(total)
  out = hit - log_total, log_total - weighted / total
  lse_m = all_m + how.spread(log_total)
  return out, (x_mD, w_DV, target_m, lse_m)


def _backward(how, saved, pulls):
  x_mD, w_DV, target_m, lse_m = saved
  grad_m = how.spread(pulls[0])  # The entropy has none.
  grad_x, grad_w = kernel.backward(
    *how.padded(x_mD, w_DV, target_m, lse_m, grad_m),
    num_columns=w_DV.shape[1],
    **how.options,
  )
  return grad_x[: len(x_mD)], grad_w[:, : w_DV.shape[1]], None


_run.defvjp(_forward, _backward)


def _is_here(target_m, w_DV):
  return (target_m >= 0) & (target_m < w_DV.shape[1])
