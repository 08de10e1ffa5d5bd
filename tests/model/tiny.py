"""A tiny model with every part of V3, and its programs, compiled once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import sharding

V = 64


@functools.cache
def config(**changes) -> model_config.ModelConfig:
  """1 dense and 2 MoE layers; the router has groups and a bias, as V3's."""
  whole = model_config.ModelConfig(
    vocab_size=V,
    embed_dim=32,
    num_layers=3,
    num_dense_layers=1,
    dense_dim=48,
    attention=model_config.MlaConfig(
      num_heads=2,
      q_lora_rank=16,
      kv_lora_rank=16,
      nope_head_dim=8,
      rope_head_dim=8,
      v_head_dim=12,
      rope=model_config.RopeConfig(theta=10000.0, interleaved=True),
    ),
    moe=model_config.MoeConfig(
      num_experts=8,
      top_k=2,
      expert_dim=16,
      num_shared=1,
      num_groups=4,
      top_groups=2,
      scale=2.5,
      block=8,
    ),
  )
  return dataclasses.replace(whole, **changes)


@functools.cache
def variables(config: model_config.ModelConfig, seed: int = 0):
  """Random values everywhere, in norms and router biases too; no compile."""
  rng = np.random.default_rng(seed)
  key = jax.random.key(0)
  shapes = sharding.unbox(jax.eval_shape(lambda: transformer.init(config, key)))

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    if 'scale' in name:
      return 1 + np.float32(0.2) * noise
    if 'bias' in name:
      return np.float32(0.1) * noise
    return np.float32(0.2) * noise

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnames=('config', 'decode', 'mtp'))
def apply(
  config,
  variables,
  tokens_BT,
  segment_BT,
  position_BT,
  cache=None,
  decode=False,
  mtp=False,
) -> transformer.Output:
  return transformer.Transformer(config).apply(
    variables,
    tokens_BT,
    segment_BT=segment_BT,
    position_BT=position_BT,
    cache=cache,
    decode=decode,
    mtp=mtp,
  )


@functools.partial(jax.jit, static_argnames=('config',))
def pull(config, variables, tokens_BT, segment_BT, position_BT, target_BTD):
  """Hidden states and the gradient of Σ target · hidden by all variables."""

  def objective(variables):
    out = transformer.Transformer(config).apply(
      variables, tokens_BT, segment_BT=segment_BT, position_BT=position_BT
    )
    return jnp.sum(out.hidden_BTD * target_BTD), out.hidden_BTD

  grads, hidden_BTD = jax.grad(objective, has_aux=True)(variables)
  return hidden_BTD, grads


def assert_trees_close(actual, expected, *, atol: float) -> None:
  """Every leaf within atol of the other tree's, relative to its largest."""

  def check(path, a, b):
    size = max(float(jnp.abs(b).max()), 1e-3)
    np.testing.assert_allclose(
      np.asarray(a) / size,
      np.asarray(b) / size,
      rtol=0,
      atol=atol,
      err_msg=jax.tree_util.keystr(path),
    )

  jax.tree_util.tree_map_with_path(check, actual, expected)
