"""Spans of rows between devices, from everything that everyone has."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def ragged_exchange(
  arrays: Sequence[jax.Array],
  num_out: int,
  spans: Sequence[jax.Array],
  axis_name: str,
) -> list[jax.Array]:
  """See ops.ragged_exchange; the destination reads each source's rows."""
  first_R, count_R, place_R, *_ = spans
  me = jax.lax.axis_index(axis_name)
  everyone = lambda x: jax.lax.all_gather(x, axis_name)
  # [source, destination].
  first_RR, count_RR, place_RR = map(everyone, (first_R, count_R, place_R))
  row_n = jnp.arange(num_out)
  results = []
  for rows_nD in arrays:
    rows_RnD = everyone(rows_nD)
    out_nD = jnp.zeros((num_out, rows_nD.shape[1]), rows_nD.dtype)
    for source in range(len(rows_RnD)):
      k_n = row_n - place_RR[source, me]
      is_sent_n = (k_n >= 0) & (k_n < count_RR[source, me])
      sent_n = jnp.clip(first_RR[source, me] + k_n, 0, len(rows_nD) - 1)
      out_nD = jnp.where(is_sent_n[:, None], rows_RnD[source, sent_n], out_nD)
    results.append(out_nD)
  return results
