"""Attention in plain XLA, some keys at a time.

Forward an online softmax, backward from the log-sum of each query's scores,
as in FlashAttention-2: memory grows with B · H · T · block, not with T · S.

Source: Dao, arXiv:2307.08691, §3.1.
"""

import functools

import jax
import jax.numpy as jnp

_MASKED = -1e30  # Finite, so that a block without any key is no NaN.


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def flash_attention(
  q_BTHQ: jax.Array,
  k_BSGQ: jax.Array,
  v_BSGU: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  first_query: jax.Array,
  scale: float,
  block: int,
) -> jax.Array:
  """See ops.flash_attention."""
  return _forward(
    q_BTHQ, k_BSGQ, v_BSGU, segment_BT, segment_BS, first_query, scale, block
  )[0]


def _forward(
  q_BTHQ, k_BSGQ, v_BSGU, segment_BT, segment_BS, first_query, scale, block
):
  """The output, and what the backward pass needs."""
  B, T, H, _ = q_BTHQ.shape
  G, U = v_BSGU.shape[2:]
  q_BTGHQ = _by_group(q_BTHQ, G) * scale
  blocks = _Blocks(segment_BT, segment_BS, first_query, block)

  def add_keys(carry, xs):
    top_BGHT, total_BGHT, out_BTGHU = carry
    index, k_bsGQ, v_bsGU, segment_bs = xs
    score_BGHTs = _product('BTGHQ,BsGQ->BGHTs', q_BTGHQ, k_bsGQ)
    mask_BTs = blocks.mask(index, segment_bs)
    score_BGHTs = jnp.where(mask_BTs[:, None, None], score_BGHTs, _MASKED)
    new_top_BGHT = jnp.maximum(top_BGHT, score_BGHTs.max(-1))
    # What came before the first allowed key is forgotten here: exp(-1e30).
    shrink_BGHT = jnp.exp(top_BGHT - new_top_BGHT)
    weight_BGHTs = jnp.exp(score_BGHTs - new_top_BGHT[..., None])
    out_BTGHU *= _queries_first(shrink_BGHT)[..., None]
    out_BTGHU += _product(
      'BGHTs,BsGU->BTGHU', weight_BGHTs.astype(v_bsGU.dtype), v_bsGU
    )
    total_BGHT = total_BGHT * shrink_BGHT + weight_BGHTs.sum(-1)
    return (new_top_BGHT, total_BGHT, out_BTGHU), None

  shape = B, G, H // G, T
  (top_BGHT, total_BGHT, out_BTGHU), _ = jax.lax.scan(
    add_keys,
    (
      jnp.full(shape, _MASKED, jnp.float32),
      jnp.zeros(shape, jnp.float32),
      jnp.zeros((B, T, G, H // G, U), jnp.float32),
    ),
    blocks.of_keys(k_BSGQ, v_BSGU),
  )
  out_BTGHU /= _queries_first(total_BGHT)[..., None]
  out_BTHU = out_BTGHU.reshape(B, T, H, U).astype(v_BSGU.dtype)
  log_total_BGHT = top_BGHT + jnp.log(total_BGHT)
  args = q_BTHQ, k_BSGQ, v_BSGU, segment_BT, segment_BS, first_query
  return out_BTHU, (args, out_BTHU, log_total_BGHT)


def _backward(scale, block, saved, pull_BTHU):
  args, out_BTHU, log_total_BGHT = saved
  q_BTHQ, k_BSGQ, v_BSGU, segment_BT, segment_BS, first_query = args
  S, G = k_BSGQ.shape[1:3]
  q_BTGHQ = _by_group(q_BTHQ, G) * scale
  pull_BTGHU = _by_group(pull_BTHU, G)
  # Σ_s weight · pull of the weight, without the weights.
  mean_BTGH = (_by_group(out_BTHU, G).astype(jnp.float32) * pull_BTGHU).sum(-1)
  mean_BGHT = jnp.moveaxis(mean_BTGH, 1, -1)
  blocks = _Blocks(segment_BT, segment_BS, first_query, block)

  def add_keys(grad_BTGHQ, xs):
    index, k_bsGQ, v_bsGU, segment_bs = xs
    score_BGHTs = _product('BTGHQ,BsGQ->BGHTs', q_BTGHQ, k_bsGQ)
    mask_BTs = blocks.mask(index, segment_bs)
    weight_BGHTs = jnp.where(
      mask_BTs[:, None, None],
      jnp.exp(score_BGHTs - log_total_BGHT[..., None]),
      0.0,
    )
    pull_BGHTs = _product('BTGHU,BsGU->BGHTs', pull_BTGHU, v_bsGU)
    pull_BGHTs = weight_BGHTs * (pull_BGHTs - mean_BGHT[..., None])
    pull_BGHTs = pull_BGHTs.astype(k_bsGQ.dtype)
    grad_v_bsGU = _product(
      'BGHTs,BTGHU->BsGU', weight_BGHTs.astype(v_bsGU.dtype), pull_BTGHU
    )
    grad_k_bsGQ = _product('BGHTs,BTGHQ->BsGQ', pull_BGHTs, q_BTGHQ)
    grad_BTGHQ += _product('BGHTs,BsGQ->BTGHQ', pull_BGHTs, k_bsGQ)
    grads = grad_k_bsGQ.astype(k_bsGQ.dtype), grad_v_bsGU.astype(v_bsGU.dtype)
    return grad_BTGHQ, grads

  grad_BTGHQ, grads = jax.lax.scan(
    add_keys,
    jnp.zeros(q_BTGHQ.shape, jnp.float32),
    blocks.of_keys(k_BSGQ, v_BSGU),
  )
  grad_k_BSGQ, grad_v_BSGU = (_join(g)[:, :S] for g in grads)
  grad_BTHQ = (scale * grad_BTGHQ).reshape(q_BTHQ.shape).astype(q_BTHQ.dtype)
  return grad_BTHQ, grad_k_BSGQ, grad_v_BSGU, None, None, None


flash_attention.defvjp(_forward, _backward)


class _Blocks:
  """Keys cut into blocks, and which of a block each query may see."""

  def __init__(self, segment_BT, segment_BS, first_query, block):
    self._segment_BT, self._segment_BS = segment_BT, segment_BS
    self._block = block
    self._slot_T1 = (first_query + jnp.arange(segment_BT.shape[1]))[:, None]

  def of_keys(self, k_BSGQ, v_BSGU):
    """What scans run over."""
    arrays = k_BSGQ, v_BSGU, self._segment_BS
    cut = [_cut(x, self._block) for x in arrays]
    return jnp.arange(len(cut[0])), *cut

  def mask(self, index, segment_bs):
    # Keys that fill up the last block come after every query.
    slot_s = index * self._block + jnp.arange(self._block)
    same_BTs = self._segment_BT[:, :, None] == segment_bs[:, None, :]
    return same_BTs & (slot_s <= self._slot_T1)


def _cut(x_BS, block):
  """[B, S, …] in blocks, [S / block, B, block, …]; zeros fill the last one."""
  B, S = x_BS.shape[:2]
  widths = [(0, 0)] * x_BS.ndim
  widths[1] = 0, -S % block
  x_BnS = jnp.pad(x_BS, widths).reshape(B, -1, block, *x_BS.shape[2:])
  return jnp.moveaxis(x_BnS, 1, 0)


def _join(x_nBS):
  x_BnS = jnp.moveaxis(x_nBS, 0, 1)
  return x_BnS.reshape(x_BnS.shape[0], -1, *x_BnS.shape[3:])


def _by_group(x_BTHQ, num_groups):
  """Head h reads key-value head h // (H / G): [B, T, G, H / G, Q]."""
  B, T, H, Q = x_BTHQ.shape
  return x_BTHQ.reshape(B, T, num_groups, H // num_groups, Q)


def _queries_first(x_BGHT):
  return jnp.moveaxis(x_BGHT, -1, 1)


def _product(einsum, x, y):
  return jnp.einsum(einsum, x, y, preferred_element_type=jnp.float32)
