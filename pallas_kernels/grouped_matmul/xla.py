"""Grouped matmul in plain XLA: one batched product over aligned row blocks.

It gathers the weights of every block, so it is for small models: a block of
b rows reads k*n weights for 2*b*k*n operations.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(
  x_mk: jax.Array, w_gkn: jax.Array, group_of_block: jax.Array
) -> jax.Array:
  """See ops.grouped_matmul; static shapes, exactly m rows of work."""
  num_blocks = group_of_block.shape[0]
  m, k = x_mk.shape
  x_bik = x_mk.reshape(num_blocks, m // num_blocks, k)
  w_bkn = w_gkn[group_of_block]
  out_bin = jnp.einsum(
    'bik,bkn->bin', x_bik, w_bkn, preferred_element_type=jnp.float32
  )
  return out_bin.reshape(m, -1).astype(x_mk.dtype)
