"""Grouped matmul in plain XLA: one batched product over aligned row blocks.

It gathers the weights of every block, so it is for small models: a block of
b rows reads k*n weights for 2*b*k*n operations.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(
  x_mk: jax.Array, w_gkn: jax.Array, size_g: jax.Array, block: int
) -> jax.Array:
  """See ops.grouped_matmul; static shapes, exactly m rows of work."""
  first_b = jnp.arange(0, x_mk.shape[0], block)
  # Blocks past the last group's hold padding only; any group will do.
  passed_bg = first_b[:, None] >= jnp.cumsum(size_g)[:-1]
  return _multiply(x_mk, w_gkn, jnp.sum(passed_bg, axis=1, dtype=jnp.int32))


@jax.custom_vjp
def _multiply(x_mk, w_gkn, group_of_block):
  out_bin = jnp.einsum(
    'bik,bkn->bin',
    _blocks(x_mk, group_of_block),
    w_gkn[group_of_block],
    preferred_element_type=jnp.float32,
  )
  return out_bin.reshape(x_mk.shape[0], -1).astype(x_mk.dtype)


def _forward(x_mk, w_gkn, group_of_block):
  out_mn = _multiply(x_mk, w_gkn, group_of_block)
  return out_mn, (x_mk, w_gkn, group_of_block)


def _backward(saved, grad_mn):
  x_mk, w_gkn, group_of_block = saved
  grad_bin = _blocks(grad_mn, group_of_block)
  grad_bik = jnp.einsum(
    'bin,bkn->bik',
    grad_bin,
    w_gkn[group_of_block],
    preferred_element_type=jnp.float32,
  )
  grad_bkn = jnp.einsum(
    'bik,bin->bkn',
    _blocks(x_mk, group_of_block),
    grad_bin,
    preferred_element_type=jnp.float32,
  )
  # A product, not the scatter-add that autodiff would make of the gather.
  one_hot_bg = jax.nn.one_hot(group_of_block, w_gkn.shape[0])
  grad_gkn = jnp.einsum('bg,bkn->gkn', one_hot_bg, grad_bkn)
  return (
    grad_bik.reshape(x_mk.shape).astype(x_mk.dtype),
    grad_gkn.astype(w_gkn.dtype),
    None,
  )


_multiply.defvjp(_forward, _backward)


def _blocks(x_mk: jax.Array, group_of_block: jax.Array) -> jax.Array:
  """Cuts rows into blocks, [b, m / b, k]."""
  num_blocks = group_of_block.shape[0]
  m, k = x_mk.shape
  return x_mk.reshape(num_blocks, m // num_blocks, k)
