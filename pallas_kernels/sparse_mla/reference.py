"""The obvious sparse attention: all logits, a sort, and rows gathered."""

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST


def index_logits(
  q_BTJI: jax.Array,
  k_BSI: jax.Array,
  weight_BTJ: jax.Array,
  scale_BS: jax.Array,
  start_BT: jax.Array,
  end_BT: jax.Array,
) -> jax.Array:
  """See ops.index_logits; float32, whatever the inputs are."""
  score_BTJS = jnp.einsum(
    'BTJI,BSI->BTJS',
    q_BTJI.astype(jnp.float32),
    k_BSI.astype(jnp.float32) * scale_BS[..., None],
    precision=_HIGHEST,
  )
  logits_BTS = jnp.einsum(
    'BTJS,BTJ->BTS',
    jax.nn.relu(score_BTJS),
    weight_BTJ,
    precision=_HIGHEST,
  )
  return jnp.where(
    allowed(start_BT, end_BT, k_BSI.shape[1]), logits_BTS, -jnp.inf
  )


def allowed(start_BT: jax.Array, end_BT: jax.Array, num_keys: int) -> jax.Array:
  """[B, T, S]: whether a query may see a key."""
  key_S = jnp.arange(num_keys)
  return (key_S >= start_BT[..., None]) & (key_S < end_BT[..., None])


def top_k(logits_BTS: jax.Array, k: int) -> jax.Array:
  """See ops.top_k: a stable sort."""
  order_BTS = jnp.argsort(-logits_BTS, axis=-1, stable=True)
  best_BTK = order_BTS[..., :k].astype(jnp.int32)
  value_BTK = jnp.take_along_axis(logits_BTS, best_BTK, axis=-1)
  best_BTK = jnp.where(value_BTK > -jnp.inf, best_BTK, -1)
  missing = k - best_BTK.shape[-1]
  return jnp.pad(
    best_BTK, ((0, 0), (0, 0), (0, max(missing, 0))), constant_values=-1
  )


def sparse_mla(
  q_BTHC: jax.Array,
  x_NC: jax.Array,
  row_BTK: jax.Array,
  *,
  value_dim: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  """See ops.sparse_mla; rows are of one pool of them, -1 for none.

  Args:
    q_BTHC: Queries as wide as the rows.
    x_NC: Rows.
    row_BTK: int32, negative for none.
    value_dim: Channels of a row that are the value.
    scale: Of the scores.
  """
  is_key_BTK = row_BTK >= 0
  x_BTKC = x_NC[jnp.maximum(row_BTK, 0)].astype(jnp.float32)
  # Whatever is stored there, 0 times it must be 0.
  x_BTKC = jnp.where(is_key_BTK[..., None], x_BTKC, 0)
  score_BTHK = scale * jnp.einsum(
    'BTHC,BTKC->BTHK',
    q_BTHC.astype(jnp.float32),
    x_BTKC,
    precision=_HIGHEST,
  )
  score_BTHK = jnp.where(is_key_BTK[:, :, None], score_BTHK, -jnp.inf)
  lse_BTH = jax.nn.logsumexp(score_BTHK, axis=-1)
  lse_BTH = jnp.where(is_key_BTK.any(-1)[..., None], lse_BTH, jnp.inf)
  out_BTHU = jnp.einsum(
    'BTHK,BTKU->BTHU',
    jnp.exp(score_BTHK - lse_BTH[..., None]),
    x_BTKC[..., :value_dim],
    precision=_HIGHEST,
  )
  return out_BTHU.astype(q_BTHC.dtype), lse_BTH
