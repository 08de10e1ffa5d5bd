"""The obvious grouped matmul: every group times every row, then a choice."""

import jax
import jax.numpy as jnp


def grouped_matmul(
  x_mk: jax.Array, w_gkn: jax.Array, group_of_block: jax.Array
) -> jax.Array:
  """See ops.grouped_matmul; costs g times the needed work."""
  m = x_mk.shape[0]
  block = m // group_of_block.shape[0]
  group_m = jnp.repeat(group_of_block, block)
  all_gmn = jnp.einsum(
    'mk,gkn->gmn', x_mk, w_gkn, preferred_element_type=jnp.float32
  )
  return all_gmn[group_m, jnp.arange(m)].astype(x_mk.dtype)
