"""Token log-probabilities by log_softmax and loops, chunked and not."""

import functools

import jax
import numpy as np
import pytest

from r1jax.losses import token

_B, _T, _D, _V = 2, 5, 6, 11


def _inputs():
  rng = np.random.default_rng(0)
  hidden_BTD = rng.normal(size=(_B, _T, _D)).astype(np.float32)
  head_DV = 2 * rng.normal(size=(_D, _V)).astype(np.float32)
  targets_BT = rng.integers(0, _V, (_B, _T)).astype(np.int32)
  return hidden_BTD, head_DV, targets_BT


def _oracle(temperature):
  """log softmax(z / τ) in float64."""
  hidden_BTD, head_DV, targets_BT = _inputs()
  logits_BTV = hidden_BTD.astype(np.float64) @ head_DV / temperature
  total_BT1 = np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
  logp_BTV = logits_BTV - total_BT1
  taken_BT = np.take_along_axis(logp_BTV, targets_BT[..., None], -1)[..., 0]
  return taken_BT, -(np.exp(logp_BTV) * logp_BTV).sum(-1)


@functools.partial(jax.jit, static_argnames=('temperature', 'chunk'))
def _score(hidden_BTD, head_DV, targets_BT, pull_BT, *, temperature, chunk):
  """logp, entropy, and the gradients of Σ pull · (logp + entropy)."""

  def objective(hidden_BTD, head_DV):
    logp_BT, entropy_BT = token.token_logp(
      hidden_BTD,
      token.Head(head_DV),
      targets_BT,
      temperature=temperature,
      chunk=chunk,
    )
    total = (pull_BT * (logp_BT + entropy_BT)).sum()
    return total, (logp_BT, entropy_BT)

  return jax.grad(objective, argnums=(0, 1), has_aux=True)(hidden_BTD, head_DV)


# 10 tokens in chunks of 4 leave 2: the last chunk is padded.
@pytest.mark.parametrize(
  ('temperature', 'chunk'), [(1.0, 100), (1.0, 4), (0.7, 10), (0.7, 3)]
)
def test_logp_entropy_and_gradients(temperature, chunk):
  hidden_BTD, head_DV, targets_BT = _inputs()
  pull_BT = np.random.default_rng(1).normal(size=(_B, _T)).astype(np.float32)
  (grad_BTD, grad_DV), (logp_BT, entropy_BT) = _score(
    hidden_BTD,
    head_DV,
    targets_BT,
    pull_BT,
    temperature=temperature,
    chunk=chunk,
  )
  expected_BT, expected_entropy_BT = _oracle(temperature)
  np.testing.assert_allclose(logp_BT, expected_BT, atol=2e-6)
  np.testing.assert_allclose(entropy_BT, expected_entropy_BT, atol=2e-6)
  # ∂logp/∂z = (1[v = y] - p) / τ; the entropy has no gradient.
  logits_BTV = hidden_BTD.astype(np.float64) @ head_DV / temperature
  p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(-1, keepdims=True)
  pulled_BTV = (np.eye(_V)[targets_BT] - p_BTV) / temperature
  pulled_BTV *= pull_BT[..., None]
  np.testing.assert_allclose(grad_BTD, pulled_BTV @ head_DV.T, atol=1e-5)
  expected_DV = np.einsum('BTD,BTV->DV', hidden_BTD, pulled_BTV)
  np.testing.assert_allclose(grad_DV, expected_DV, atol=1e-5)


def test_large_logits_stay_finite():
  hidden_BTD, head_DV, targets_BT = _inputs()
  (grad_BTD, _), (logp_BT, entropy_BT) = _score(
    1e4 * hidden_BTD,
    head_DV,
    targets_BT,
    np.ones((_B, _T), np.float32),
    temperature=1.0,
    chunk=4,
  )
  for x in (grad_BTD, logp_BT, entropy_BT):
    assert np.isfinite(x).all()


def test_bfloat16_hidden_states_give_float32_log_probabilities():
  hidden_BTD, head_DV, targets_BT = _inputs()
  low_BTD = jax.ShapeDtypeStruct(hidden_BTD.shape, jax.numpy.bfloat16)
  logp_BT, entropy_BT = jax.eval_shape(
    lambda hidden_BTD: token.token_logp(
      hidden_BTD, token.Head(head_DV), targets_BT
    ),
    low_BTD,
  )
  assert logp_BT.dtype == entropy_BT.dtype == np.float32


def test_next_token_logp_stands_at_the_predicted_token():
  hidden_BTD, head_DV, tokens_BT = _inputs()
  logp_BT, entropy_BT = jax.jit(
    lambda hidden_BTD: token.next_token_logp(
      hidden_BTD, token.Head(head_DV), tokens_BT
    )
  )(hidden_BTD)
  assert not np.asarray(logp_BT)[:, 0].any()
  assert not np.asarray(entropy_BT)[:, 0].any()
  logits_BTV = hidden_BTD.astype(np.float64) @ head_DV
  logp_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
  for b in range(_B):
    for t in range(1, _T):
      expected = logp_BTV[b, t - 1, tokens_BT[b, t]]
      np.testing.assert_allclose(logp_BT[b, t], expected, atol=2e-6)


def test_cross_entropy_divides_by_the_global_count():
  logp_BT = np.float32([[-1, -2], [-4, -8]])
  mask_BT = np.float32([[1, 0], [1, 1]])
  assert float(token.cross_entropy(logp_BT, mask_BT, 26.0)) == 0.5


def test_shifted():
  tokens_BT = np.array([[1, 2, 3, 4]])
  for depth, expected in ((1, [2, 3, 4, 0]), (3, [4, 0, 0, 0])):
    actual_BT = token.shifted(tokens_BT, depth)
    np.testing.assert_array_equal(actual_BT, [expected])


@pytest.mark.parametrize('depth', [1, 2])
def test_mtp_mask_by_loops(depth):
  """i drafts token i + depth + 1 if it is weighed and in i's document."""
  segment_BT = np.array([[1, 1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 3, 3, 3]])
  # Two first tokens are weighed, to tell documents by segment alone.
  mask_BT = np.float32([[0, 1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1, 1, 1]])
  actual_BT = jax.jit(token.mtp_mask, static_argnums=2)(
    mask_BT, segment_BT, depth
  )
  for b in range(2):
    for i in range(8):
      target, expected = i + depth + 1, 0.0
      if segment_BT[b, i] and target < 8:
        if segment_BT[b, target] == segment_BT[b, i]:
          expected = mask_BT[b, target]
      assert actual_BT[b, i] == expected, (b, i)
