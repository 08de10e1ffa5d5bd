"""RMSNorm, LayerNorm and SwiGLU."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.linear_fp8 import ops as linear_fp8_ops
from r1jax import fp8
from r1jax.parallel import sharding


class RmsNorm(nn.Module):
  """x / rms(x) · scale, in float32 inside.

  Source: Zhang & Sennrich, arXiv:1910.07467.

  Attributes:
    eps: Added to the mean square.
    dtype: Of the result.
    fanned_out: x is another one on each device of the mesh axis `tensor`.
  """

  eps: float
  dtype: jnp.dtype
  fanned_out: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale_D = sharding.param(self, 'scale', x.shape[-1:], (None,), std=None)
    if self.fanned_out:
      scale_D = sharding.fan_out(scale_D)
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(
      jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps
    )
    return (x32 * inverse * scale_D).astype(self.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std · scale + bias, in float32 inside.

  Source: Ba et al., arXiv:1607.06450.
  """

  eps: float
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    param = functools.partial(sharding.param, self)
    scale_D = param('scale', x.shape[-1:], (None,), std=None)
    bias_D = param('bias', x.shape[-1:], (None,), std=0.0)
    x32 = x.astype(jnp.float32)
    x32 -= jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(
      jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps
    )
    return (x32 * inverse * scale_D + bias_D).astype(self.dtype)


class SwiGlu(nn.Module):
  """Gated feed-forward: down(silu(gate(x)) · up(x)).

  Source: Shazeer, arXiv:2002.05202.
  """

  hidden_dim: int
  init_std: float
  dtype: jnp.dtype
  recipe: fp8.Recipe | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    D, F = x_BTD.shape[-1], self.hidden_dim
    param = functools.partial(
      sharding.param,
      self,
      std=self.init_std,
      dtype=fp8.weight_dtype(self.dtype, self.recipe),
    )
    gate_DF = param('gate', (D, F), ('embed', 'mlp'))
    up_DF = param('up', (D, F), ('embed', 'mlp'))
    down_FD = param('down', (F, D), ('mlp', 'embed'))
    x_BTD = sharding.fan_out(x_BTD.astype(self.dtype))
    weights = gate_DF, up_DF, down_FD
    if self.recipe is None:
      return sharding.fan_in(_swiglu(x_BTD, *weights))
    out_mD = linear_fp8_ops.swiglu(
      x_BTD.reshape(-1, D), *weights, recipe=self.recipe
    )
    return sharding.fan_in(out_mD).reshape(x_BTD.shape)


@jax.custom_vjp
def _swiglu(x_BTD, gate_DF, up_DF, down_FD):
  """Keeps what enters the activation; the activation is computed again."""
  return _swiglu_fwd(x_BTD, gate_DF, up_DF, down_FD)[0]


def _swiglu_fwd(x_BTD, gate_DF, up_DF, down_FD):
  gate_BTF = jnp.einsum('BTD,DF->BTF', x_BTD, gate_DF)
  up_BTF = jnp.einsum('BTD,DF->BTF', x_BTD, up_DF)
  h_BTF = _gate(gate_BTF, up_BTF)
  y_BTD = jnp.einsum('BTF,FD->BTD', h_BTF, down_FD)
  return y_BTD, (x_BTD, gate_DF, up_DF, down_FD, gate_BTF, up_BTF)


def _swiglu_bwd(saved, pull_BTD):
  x_BTD, gate_DF, up_DF, down_FD, gate_BTF, up_BTF = saved
  h_BTF, vjp = jax.vjp(_gate, gate_BTF, up_BTF)
  grad_gate_BTF, grad_up_BTF = vjp(jnp.einsum('BTD,FD->BTF', pull_BTD, down_FD))
  grad_x_BTD = jnp.einsum('BTF,DF->BTD', grad_gate_BTF, gate_DF)
  grad_x_BTD += jnp.einsum('BTF,DF->BTD', grad_up_BTF, up_DF)
  # What was just computed comes second: a CPU transposes the first operand,
  # and would compute an activation's gradient in that order, column by column.
  return (
    grad_x_BTD,
    jnp.einsum('BTD,BTF->DF', x_BTD, grad_gate_BTF),
    jnp.einsum('BTD,BTF->DF', x_BTD, grad_up_BTF),
    jnp.einsum('BTD,BTF->DF', pull_BTD, h_BTF).T,
  )


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _gate(gate, up):
  return nn.silu(gate) * up
