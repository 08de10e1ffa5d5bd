"""The GRPO loss against the papers' sums, written as loops."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from r1jax import types
from r1jax.rl import grpo
from tests import known_answers

# Tokens of the completions in each packed row.
_ROWS = ((3, 1, 4), (8,), (2, 5))
_T = 9


def _batch():
  """Ragged packed rows; junk stands wherever the mask is 0."""
  rng = np.random.default_rng(0)
  shape = (len(_ROWS), _T)
  logp = lambda: rng.uniform(-3, -0.1, shape).astype(np.float32)
  mask_BT = np.zeros(shape, np.float32)
  length_BT, adv_BT = np.ones(shape, np.float32), np.zeros(shape, np.float32)
  for b, lengths in enumerate(_ROWS):
    start = 0
    for n in lengths:
      mask_BT[b, start : start + n] = 1
      length_BT[b, start : start + n] = n
      adv_BT[b, start : start + n] = rng.normal()
      start += n
  old_BT, ref_BT = logp(), logp()
  old_BT[mask_BT == 0], ref_BT[mask_BT == 0] = -1e30, 1e30
  batch = types.PolicyBatch(
    tokens_BT=np.zeros(shape, np.int32),
    mask_BT=mask_BT,
    segment_BT=mask_BT.astype(np.int32),
    position_BT=np.zeros(shape, np.int32),
    num_tokens=mask_BT.sum(),
    num_sequences=np.float32(sum(map(len, _ROWS))),
    old_logp_BT=old_BT,
    ref_logp_BT=ref_BT,
    adv_BT=adv_BT,
    length_BT=length_BT,
  )
  return logp(), batch


@functools.partial(jax.jit, static_argnames=('reduction', 'low', 'high'))
def _loss(logp_BT, batch, *, reduction, low, high, beta):
  def objective(logp_BT):
    loss_BT, terms = grpo.grpo_terms(
      logp_BT,
      batch.old_logp_BT,
      batch.ref_logp_BT,
      batch.adv_BT,
      batch.mask_BT,
      clip_low=low,
      clip_high=high,
      kl_coef=beta,
    )
    return getattr(grpo, reduction)(loss_BT, batch), terms

  (loss, terms), grad_BT = jax.value_and_grad(objective, has_aux=True)(logp_BT)
  return loss, terms, grad_BT


def _by_loops(logp_BT, batch, reduction, low, high, beta):
  per_completion = []
  for b, lengths in enumerate(_ROWS):
    start = 0
    for n in lengths:
      losses = []
      for t in range(start, start + n):
        logp, adv = float(logp_BT[b, t]), float(batch.adv_BT[b, t])
        rho = math.exp(logp - float(batch.old_logp_BT[b, t]))
        clipped = min(max(rho, 1 - low), 1 + high)
        r = math.exp(float(batch.ref_logp_BT[b, t]) - logp)
        kl = r - math.log(r) - 1
        losses.append(beta * kl - min(rho * adv, clipped * adv))
      per_completion.append(losses)
      start += n
  if reduction == 'sequence_mean':
    return np.mean([np.mean(losses) for losses in per_completion])
  return np.mean([x for losses in per_completion for x in losses])


@pytest.mark.parametrize('reduction', ['sequence_mean', 'token_mean'])
@pytest.mark.parametrize(('low', 'high'), [(0.2, 0.28), (0.2, 10.0)])
def test_loss_is_the_papers_sum(reduction, low, high):
  logp_BT, batch = _batch()
  args = {'reduction': reduction, 'low': low, 'high': high, 'beta': 0.04}
  loss, _, grad_BT = _loss(logp_BT, batch, **args)
  expected = _by_loops(logp_BT, batch, *args.values())
  np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
  assert np.isfinite(grad_BT).all()
  assert not np.asarray(grad_BT)[batch.mask_BT == 0].any()


def test_microbatches_add_up():
  logp_BT, batch = _batch()
  for reduction in ('sequence_mean', 'token_mean'):
    reduce = jax.jit(getattr(grpo, reduction))
    rows = lambda b: dataclasses.replace(
      batch,
      mask_BT=np.where(np.arange(3)[:, None] == b, batch.mask_BT, 0),
    )
    parts = sum(float(reduce(logp_BT, rows(b))) for b in range(3))
    np.testing.assert_allclose(parts, float(reduce(logp_BT, batch)), rtol=1e-5)


def test_on_policy_gradient_is_adv_plus_beta_times_r_minus_1():
  """-∂loss/∂logp = (A + β (π_ref/π - 1)) / |oᵢ| / N when π = π_old."""
  logp_BT, batch = _batch()
  batch = dataclasses.replace(batch, old_logp_BT=logp_BT)
  beta = 0.5
  _, terms, grad_BT = _loss(
    logp_BT, batch, reduction='sequence_mean', low=0.2, high=0.2, beta=beta
  )
  kept = batch.mask_BT > 0
  r = np.exp(batch.ref_logp_BT[kept].astype(np.float64) - logp_BT[kept])
  coefficient = batch.adv_BT[kept] + beta * (r - 1)
  expected = coefficient / batch.length_BT[kept] / float(batch.num_sequences)
  np.testing.assert_allclose(-grad_BT[kept], expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(terms['ratio'], 1.0)
  assert not np.asarray(terms['clipped']).any()


def test_known_clipped_gains():
  known = known_answers.load('clip')
  gain = grpo.clipped_gain(
    np.float32(known['ratio']),
    np.float32(known['A']),
    clip_low=known['eps'],
    clip_high=known['eps'],
  )
  np.testing.assert_allclose(gain, known['obj'], atol=1e-6)


def test_clipped_marks_where_the_clip_binds_and_there_the_gradient_is_0():
  """(A, ρ): only gains past the edge bind; losses past it do not."""
  known = known_answers.load('clip')
  shape = (1, 4)
  ratio_BT = np.reshape(np.float32(known['ratio']), shape)
  logp_BT = np.log(ratio_BT)
  zeros = np.zeros(shape, np.float32)
  batch = types.PolicyBatch(
    *[None] * 1,
    mask_BT=np.ones(shape, np.float32),
    segment_BT=None,
    position_BT=None,
    num_tokens=np.float32(4),
    num_sequences=np.float32(4),
    old_logp_BT=zeros,
    ref_logp_BT=logp_BT,
    adv_BT=np.reshape(np.float32(known['A']), shape),
    length_BT=np.ones(shape, np.float32),
  )
  _, terms, grad_BT = _loss(
    logp_BT, batch, reduction='token_mean', low=0.2, high=0.2, beta=0.0
  )
  np.testing.assert_array_equal(terms['clipped'][0], [1, 0, 0, 1])
  np.testing.assert_array_equal(np.asarray(grad_BT)[0] == 0, [1, 0, 0, 1])


def test_known_k3():
  known = known_answers.load('kl')
  kl = grpo.k3(np.float32(known['logp_theta']), np.float32(known['logp_ref']))
  np.testing.assert_allclose(kl, known['k3'], atol=1e-6)
