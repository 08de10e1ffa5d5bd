"""A model whose attention and head are kernels, interpreted, is the model.

With experts, and trained: recipe/kernels_test.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from r1jax.losses import token
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.sampling import filters, generate
from tests.model import tiny

_PLAIN = dataclasses.replace(
  tiny.config(),
  num_layers=2,
  num_dense_layers=2,
  moe=None,
  attention=dataclasses.replace(tiny.config().attention, kv_lora_rank=128),
)
_KERNELS = dataclasses.replace(
  _PLAIN,
  attention_implementation='pallas',
  decode_implementation='pallas',
  head_implementation='pallas',
)
_B, _T, _NEW = 4, 12, 4


@functools.cache
def _gradient(config):
  """Two documents a row, and padding behind them."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, tiny.V, (_B, _T)).astype(np.int32)
  segment_BT = np.repeat([[1] * 5 + [2] * 4 + [0] * 3], _B, axis=0)

  def loss(variables):
    out = transformer.Transformer(config).apply(
      variables, tokens_BT, segment_BT=segment_BT
    )
    head = transformer.head(variables['params'], config)
    logp_BT, _ = token.next_token_logp(out.hidden_BTD, head, tokens_BT)
    return (logp_BT * (segment_BT > 0)).sum()

  with pltpu.force_tpu_interpret_mode():
    run = jax.jit(jax.value_and_grad(loss))
    return jax.device_get(run(tiny.variables(config)))


def test_the_loss_and_all_gradients():
  loss, grads = _gradient(_KERNELS)
  expected, expected_grads = _gradient(_PLAIN)
  assert loss == pytest.approx(expected, rel=1e-6)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      x, y, rtol=1e-4, atol=1e-5 * max(1, np.abs(y).max())
    ),
    grads,
    expected_grads,
  )


@functools.cache
def _rollout(config):
  """Ragged prompts, two rows of each; the cache ends in a second page."""
  rng = np.random.default_rng(0)
  prompt_PT = rng.integers(0, tiny.V, (_B // 2, 126)).astype(np.int32)
  run = functools.partial(
    generate.generate,
    config,
    max_new_tokens=_NEW,
    sampling=filters.SamplingConfig(temperature=0.8),
    stop_ids=(5,),
    pad_id=0,
  )
  with pltpu.force_tpu_interpret_mode():
    return jax.device_get(
      jax.jit(run)(
        tiny.variables(config),
        prompt_PT,
        jnp.int32([126, 3]),
        jnp.arange(_B, dtype=jnp.int32),
        jax.random.key(1),
      )
    )


def test_what_is_sampled():
  plain = dataclasses.replace(_PLAIN, num_layers=1, num_dense_layers=1)
  kernels = dataclasses.replace(plain, decode_implementation='pallas')
  rollout, expected = _rollout(kernels), _rollout(plain)
  np.testing.assert_array_equal(rollout.tokens_BT, expected.tokens_BT)
  np.testing.assert_allclose(rollout.logp_BT, expected.logp_BT, atol=1e-5)
  assert rollout.length_B.max() > 128


_GQA = model_config.GqaConfig(
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  rope=model_config.RopeConfig(theta=10000.0, interleaved=False),
)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'attention': _GQA, 'attention_implementation': 'pallas'}, 'is for MLA'),
    ({'attention': _GQA, 'decode_implementation': 'pallas'}, 'is for MLA'),
    ({'decode_implementation': 'pallas'}, 'multiple of 128, it is 16'),
    ({'decode_implementation': 'splash'}, 'must be one of'),
  ],
)
def test_kernels_that_are_not_for_a_model(changes, said):
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(tiny.config(), **changes)
