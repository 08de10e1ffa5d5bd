"""Sparse attention in plain XLA: some queries at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.sparse_mla import reference

_LOGITS_QUERIES = 64  # Of whose scores there is an array at a time.
_ATTEND_ROWS = 128  # Whose rows are gathered at a time.


def index_logits(
  q_BTJI: jax.Array,
  k_BSI: jax.Array,
  weight_BTJ: jax.Array,
  scale_BS: jax.Array,
  start_BT: jax.Array,
  end_BT: jax.Array,
) -> jax.Array:
  """See ops.index_logits."""
  exact = jax.lax.Precision.HIGHEST if q_BTJI.dtype == jnp.float32 else None

  def some(inputs):
    q_BTJI, weight_BTJ = inputs
    score_BTJS = jnp.einsum(
      'BTJI,BSI->BTJS',
      q_BTJI,
      k_BSI,
      precision=exact,
      preferred_element_type=jnp.float32,
    )
    return (jax.nn.relu(score_BTJS) * weight_BTJ[..., None]).sum(2)

  logits_BTS = _by_queries(some, _LOGITS_QUERIES, q_BTJI, weight_BTJ)
  seen_BTS = reference.allowed(start_BT, end_BT, k_BSI.shape[1])
  return jnp.where(seen_BTS, logits_BTS * scale_BS[:, None], -jnp.inf)


def top_k(logits_BTS: jax.Array, k: int) -> jax.Array:
  """See ops.top_k."""
  num_keys = logits_BTS.shape[-1]
  value_BTK, best_BTK = jax.lax.top_k(logits_BTS, min(k, num_keys))
  best_BTK = jnp.where(value_BTK > -jnp.inf, best_BTK, -1)
  return jnp.pad(
    best_BTK, ((0, 0), (0, 0), (0, max(k - num_keys, 0))), constant_values=-1
  )


def sparse_mla(
  q_BTHC: jax.Array,
  rows: Callable[[jax.Array], jax.Array],
  row_BTK: jax.Array,
  *,
  value_dim: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """See ops.sparse_mla; `rows` takes numbers of rows [...] to [..., C]."""
  B, T, H, C = q_BTHC.shape
  some = functools.partial(_attend, rows=rows, value_dim=value_dim, scale=scale)
  # Each query has keys of its own, so each is a row of its own.
  out_1RHU, lse_1RH = _by_queries(
    lambda inputs: some(*inputs),
    _ATTEND_ROWS,
    q_BTHC.reshape(1, B * T, H, C),
    row_BTK.reshape(1, B * T, -1),
  )
  return out_1RHU.reshape(B, T, H, -1), lse_1RH.reshape(B, T, H)


def _attend(q_BTHC, row_BTK, *, rows, value_dim, scale):
  is_key_BTK = row_BTK >= 0
  x_BTKC = rows(jnp.maximum(row_BTK, 0))
  x_BTKC = jnp.where(is_key_BTK[..., None], x_BTKC, 0)
  score_BTHK = scale * jnp.einsum(
    'BTHC,BTKC->BTHK', q_BTHC, x_BTKC, preferred_element_type=jnp.float32
  )
  score_BTHK = jnp.where(is_key_BTK[:, :, None], score_BTHK, -jnp.inf)
  # Finite, so that queries without keys are not nan.
  m_BTH = jnp.maximum(score_BTHK.max(-1), jnp.finfo(jnp.float32).min)
  p_BTHK = jnp.exp(score_BTHK - m_BTH[..., None])
  l_BTH = p_BTHK.sum(-1)
  out_BTHU = jnp.einsum(
    'BTHK,BTKU->BTHU',
    p_BTHK.astype(x_BTKC.dtype),
    x_BTKC[..., :value_dim],
    preferred_element_type=jnp.float32,
  )
  is_empty_BTH = l_BTH == 0
  lse_BTH = jnp.where(is_empty_BTH, jnp.inf, m_BTH + jnp.log(l_BTH))
  out_BTHU /= jnp.where(is_empty_BTH, 1, l_BTH)[..., None]
  return out_BTHU.astype(q_BTHC.dtype), lse_BTH


def _by_queries(function, size, *args):
  """A function of [B, T, ...] arrays, of at most `size` of T at a time."""
  B, T = args[0].shape[:2]
  size = min(size, T)
  num = -(-T // size)

  def cut(x):
    x = jnp.pad(x, ((0, 0), (0, num * size - T)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, num, size, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(B, num * size, *x.shape[3:])[:, :T]

  return jax.tree.map(join, jax.lax.map(function, tuple(map(cut, args))))
