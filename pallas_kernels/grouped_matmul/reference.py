"""The obvious grouped matmul: every group times every row, then a choice."""

import jax
import jax.numpy as jnp


def grouped_matmul(
  x_mk: jax.Array, w_gkn: jax.Array, size_g: jax.Array
) -> jax.Array:
  """See ops.grouped_matmul; costs g times the needed work."""
  row_m = jnp.arange(x_mk.shape[0])
  passed_mg = row_m[:, None] >= jnp.cumsum(size_g)
  all_gmn = jnp.einsum(
    'mk,gkn->gmn', x_mk, w_gkn, preferred_element_type=jnp.float32
  )
  # Past the last group there is no group, a row of zeros.
  out_mn = all_gmn.at[passed_mg.sum(1), row_m].get(mode='fill', fill_value=0)
  return out_mn.astype(x_mk.dtype)


def grouped_matmul_masked(
  x_gmk: jax.Array, w_gkn: jax.Array, size_g: jax.Array
) -> jax.Array:
  """See ops.grouped_matmul_masked; rows past a group's size are zero."""
  out_gmn = jnp.einsum(
    'gmk,gkn->gmn', x_gmk, w_gkn, preferred_element_type=jnp.float32
  )
  is_row_gm1 = (jnp.arange(x_gmk.shape[1]) < size_g[:, None])[..., None]
  return jnp.where(is_row_gm1, out_gmn, 0).astype(x_gmk.dtype)
