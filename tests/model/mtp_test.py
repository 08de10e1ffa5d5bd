"""Multi-token prediction: what a draft sees, and which drafts count."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.losses import token
from r1jax.model import transformer
from tests.model import tiny

_B, _T, _M = 2, 10, 2
_CONFIG = dataclasses.replace(tiny.config(), num_layers=2, mtp_depth=_M)


def _tokens():
  order = np.random.default_rng(4).permutation(tiny.V)[: _B * _T]
  return order.reshape(_B, _T).astype(np.int32)


@functools.partial(jax.jit, static_argnames=('config',))
def _drafts(config, variables, tokens_BT, segment_BT, position_BT, mask_MBT):
  """Drafts' log-probabilities, hidden states, and gradients of Σ mask · logp.

  The objective scores each draft on a fixed token, so that targets cannot
  hide what the drafts themselves depend on.
  """

  def objective(variables):
    out = transformer.Transformer(config).apply(
      variables,
      tokens_BT,
      segment_BT=segment_BT,
      position_BT=position_BT,
      mtp=True,
    )
    head = transformer.head(variables['params'], config)
    logp_MBT = jnp.stack(
      [
        token.token_logp(h_BTD, head, jnp.full((_B, _T), 7))[0]
        for h_BTD in out.mtp_hidden
      ]
    )
    return jnp.sum(logp_MBT * mask_MBT), (logp_MBT, out)

  grads, (logp_MBT, out) = jax.grad(objective, has_aux=True)(variables)
  return logp_MBT, out, grads


def _one_document():
  position_BT = np.broadcast_to(np.arange(_T, dtype=np.int32), (_B, _T))
  return np.ones((_B, _T), np.int32), position_BT


def _run(tokens_BT, segment_BT, position_BT, mask_MBT):
  return _drafts(
    _CONFIG,
    tiny.variables(_CONFIG),
    tokens_BT,
    segment_BT,
    position_BT,
    np.float32(mask_MBT),
  )


def test_shapes_at_depth_two():
  mask_MBT = np.ones((_M, _B, _T))
  _, out, _ = _run(_tokens(), *_one_document(), mask_MBT)
  assert [h.shape for h in out.mtp_hidden] == [(_B, _T, 32)] * _M
  # One MoE layer of the main model, then one in each MTP module.
  assert out.moe.counts_E.shape == (1 + _M, 8)
  np.testing.assert_array_equal(out.moe.counts_E.sum(1), [_B * _T * 2] * 3)


@pytest.mark.parametrize('depth', [0, 1])
def test_shapes_at_other_depths_and_without_asking(depth):
  c = dataclasses.replace(_CONFIG, mtp_depth=depth)
  run = lambda mtp: jax.eval_shape(
    functools.partial(transformer.Transformer(c).apply, mtp=mtp),
    tiny.variables(c),
    _tokens(),
  )
  assert [h.shape for h in run(True).mtp_hidden] == [(_B, _T, 32)] * depth
  assert run(True).moe.counts_BE.shape == (1 + depth, _B, 8)
  assert run(False).mtp_hidden == ()
  assert run(False).moe.counts_BE.shape == (1, _B, 8)


@pytest.mark.parametrize('depth', [1, 2])
def test_draft_of_depth_k_sees_tokens_up_to_i_plus_k(depth):
  tokens_BT, i = _tokens(), 4
  mask_MBT = np.zeros((_M, _B, _T))
  mask_MBT[depth - 1, 0, i] = 1
  _, _, grads = _run(tokens_BT, *_one_document(), mask_MBT)
  reached_V = np.asarray(grads['params']['embedding']).any(axis=1)
  expected_T = np.arange(_T) <= i + depth
  np.testing.assert_array_equal(reached_V[tokens_BT[0]], expected_T)
  assert not reached_V[tokens_BT[1]].any()


def test_packed_documents_draft_as_if_alone():
  """Where mtp_mask counts a draft, logp and gradients know no neighbour."""
  tokens_BT = _tokens()
  first, second = tokens_BT[0, :5], tokens_BT[1, :4]
  packed_BT, alone_BT = _tokens()[:, ::-1].copy(), _tokens()[::-1].copy()
  packed_BT[0, :5], packed_BT[0, 5:9] = first, second
  alone_BT[0, :5], alone_BT[1, :4] = first, second
  packed_segment, alone_segment = np.zeros((2, _B, _T), np.int32)
  packed_segment[0] = [1] * 5 + [2] * 4 + [0]
  alone_segment[0, :5] = alone_segment[1, :4] = 1
  packed_position = np.zeros((_B, _T), np.int32)
  packed_position[0, :9] = [*range(5), *range(4)]
  alone_position = _one_document()[1]

  def masks(segment_BT):
    mask_BT = (segment_BT > 0).astype(np.float32)
    return np.stack(
      [token.mtp_mask(mask_BT, segment_BT, k + 1) for k in range(_M)]
    )

  packed_mask, alone_mask = masks(packed_segment), masks(alone_segment)
  # Depth k cannot draft for the last k + 1 places of a document.
  np.testing.assert_array_equal(packed_mask.sum((1, 2)), [3 + 2, 2 + 1])
  packed_logp, _, packed_grads = _run(
    packed_BT, packed_segment, packed_position, packed_mask
  )
  alone_logp, _, alone_grads = _run(
    alone_BT, alone_segment, alone_position, alone_mask
  )
  np.testing.assert_allclose(
    packed_logp[packed_mask > 0],
    np.concatenate(
      [
        np.concatenate(
          [alone_logp[k, 0, : 4 - k - 1], alone_logp[k, 1, : 3 - k - 1]]
        )
        for k in range(_M)
      ]
    ),
    atol=2e-5,
  )
  tiny.assert_trees_close(packed_grads, alone_grads, atol=2e-5)


def test_hidden_state_may_be_taken_before_or_after_the_final_norm():
  args = (_tokens(), *_one_document())
  before, after = (
    tiny.apply(
      dataclasses.replace(_CONFIG, mtp_depth=1, mtp_after_norm=flag),
      tiny.variables(dataclasses.replace(_CONFIG, mtp_depth=1)),
      *args,
      mtp=True,
    )
    for flag in (False, True)
  )
  np.testing.assert_allclose(before.hidden_BTD, after.hidden_BTD, atol=1e-6)
  gap = np.abs(before.mtp_hidden[0] - after.mtp_hidden[0]).max()
  assert gap > 1e-2
