"""Rotary position embedding and YaRN."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.model import config as model_config


def frequencies(rope: model_config.RopeConfig, dim: int) -> np.ndarray:
  """Angular frequency of each rotated pair, radians per token, [dim / 2].

  f_i = θ^(-2i/dim). YaRN divides the low ones by s along a linear ramp:
  corr(n) = dim ln(L / 2πn) / (2 ln θ), from floor(corr(β_fast)) to
  ceil(corr(β_slow)).

  Source: YaRN, arXiv:2309.00071, §3.2; DeepSeek-V3, arXiv:2412.19437, §4.3.
  """
  index = np.arange(dim // 2, dtype=np.float64)
  base = rope.theta ** (-2 * index / dim)
  yarn = rope.yarn
  if yarn is None:
    return base.astype(np.float32)

  def correction(num_rotations: float) -> float:
    length = yarn.original_length / (num_rotations * 2 * math.pi)
    return dim * math.log(length) / (2 * math.log(rope.theta))

  low = max(math.floor(correction(yarn.beta_fast)), 0)
  high = min(math.ceil(correction(yarn.beta_slow)), dim - 1)
  if low == high:
    high += 0.001
  ramp = np.clip((index - low) / (high - low), 0, 1)
  return (base / yarn.factor * ramp + base * (1 - ramp)).astype(np.float32)


def cos_sin(
  position_BT: jax.Array, rope: model_config.RopeConfig, dim: int
) -> tuple[jax.Array, jax.Array]:
  """cos and sin of position · frequency, float32 [B, T, dim / 2] each."""
  angle = position_BT[..., None].astype(jnp.float32) * frequencies(rope, dim)
  factor = 1.0
  if rope.yarn is not None:
    yarn = rope.yarn
    factor = model_config.yarn_mscale(yarn.factor, yarn.mscale)
    factor /= model_config.yarn_mscale(yarn.factor, yarn.mscale_all_dim)
  return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
  x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool
) -> jax.Array:
  """Rotates the pairs of the last axis, computing in float32.

  Args:
    x: [..., dim].
    cos: [..., dim / 2], broadcast against x's leading axes.
    sin: Likewise.
    interleaved: Pairs (0, 1), (2, 3), … (DeepSeek's MLA) or (i, i + dim/2)
      (Qwen, Llama, V3.2's indexer).
  """
  x32 = x.astype(jnp.float32)
  if interleaved:
    pair = x32.reshape(*x.shape[:-1], -1, 2)
    a, b = pair[..., 0], pair[..., 1]
    out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return out.reshape(x.shape).astype(x.dtype)
  a, b = jnp.split(x32, 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)
