"""Rotary position embedding, YaRN and Llama 3's extension."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.model import config as model_config


def frequencies(rope: model_config.RopeConfig, dim: int) -> np.ndarray:
  """Angular frequency of each rotated pair, radians per token, [dim / 2].

  f_i = θ^(-2i/dim), then what the context's extension makes of it.
  """
  exponent = (np.arange(0, dim, 2, dtype=np.float32) / dim).astype(np.float64)
  # Float32 from here on, in transformers' order: a tiny Llama's logits differ
  # from its by 3e-5 at 2,048 tokens, by 3e-4 if only the result is rounded.
  inverse = (rope.theta**exponent).astype(np.float32)
  match rope.scaling:
    case model_config.YarnConfig():
      return _yarn(inverse, rope.scaling, rope.theta, dim)
    case model_config.Llama3RopeConfig():
      return _llama3(1 / inverse, rope.scaling)
  return 1 / inverse


def _yarn(
  inverse: np.ndarray, yarn: model_config.YarnConfig, theta: float, dim: int
) -> np.ndarray:
  """Divides the low frequencies by s along a linear ramp.

  corr(n) = dim ln(L / 2πn) / (2 ln θ), from corr(β_fast) rounded down to
  corr(β_slow) rounded up, or unrounded without truncate.

  Source: YaRN, arXiv:2309.00071, §3.2; DeepSeek-V3, arXiv:2412.19437, §4.3.
  """

  def correction(num_rotations: float) -> float:
    length = yarn.original_length / (num_rotations * 2 * math.pi)
    return dim * math.log(length) / (2 * math.log(theta))

  low, high = correction(yarn.beta_fast), correction(yarn.beta_slow)
  if yarn.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, dim - 1)
  if low == high:
    high += 0.001
  index = np.arange(dim // 2, dtype=np.float32)
  kept = 1 - np.clip((index - low) / (high - low), 0, 1)
  return 1 / (yarn.factor * inverse) * (1 - kept) + 1 / inverse * kept


def _llama3(
  base: np.ndarray, scaling: model_config.Llama3RopeConfig
) -> np.ndarray:
  """Divides by the factor what turns less than low_freq_factor times over L.

  Source: Llama 3.1's released code; smooth between the two factors.
  """
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  num_rotations = scaling.original_length * base / (2 * math.pi)
  kept = np.clip((num_rotations - low) / (high - low), 0, 1)
  return (1 - kept) * base / scaling.factor + kept * base


def cos_sin(
  position_BT: jax.Array, rope: model_config.RopeConfig, dim: int
) -> tuple[jax.Array, jax.Array]:
  """cos and sin of position · frequency, float32 [B, T, dim / 2] each."""
  angle = position_BT[..., None].astype(jnp.float32) * frequencies(rope, dim)
  factor = 1.0
  if isinstance(rope.scaling, model_config.YarnConfig):
    factor = rope.scaling.rotation_factor
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
