"""Muon for the matrices inside the blocks, as Moonlight and Kimi K2 use it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from r1jax.parallel import sharding

# Input and output axes, counted from the end; what stands before them, layers
# and experts, stacks matrices. A name not here is [..., in, out].
_MATRICES = {
  'q_up': ((-3,), (-2, -1)),  # [A, H, N + R]
  'k_up': ((-3,), (-2, -1)),  # [C, H, N]
  'v_up': ((-3,), (-2, -1)),  # [C, H, U]
  'q_proj': ((-3,), (-2, -1)),  # [D, H, Q]
  'k_proj': ((-3,), (-2, -1)),  # [D, G, Q]
  'v_proj': ((-3,), (-2, -1)),  # [D, G, Q]
  'out': ((-2, -1), (-3,)),  # [D, H, U]
}
# Lookups, choices and vectors stay with Adam.
_ADAM = ('embedding', 'head', 'router', 'scale', 'bias')
# Root mean square of AdamW's updates: its learning rates carry over.
_UPDATE_RMS = 0.2


def scale_by_muon_or(
  adam: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Orthogonalises the momentum of matrices; the rest goes to `adam`.

  u = 0.2 √max(in, out) · NewtonSchulz₅(β m + (1-β) g),  m = β m + (1-β) g

  with bias correction and β = 0.95, so that a matrix moves as far as it would
  by AdamW, but in all its directions alike.

  Source: Liu et al., 'Muon is scalable for LLM training', arXiv:2502.16982,
  §2.2.
  """
  muon = optax.chain(
    optax.stateless(lambda updates, _: jax.tree.map_with_path(_share, updates)),
    contrib.scale_by_muon(weight_dimension_numbers=_dimension_numbers),
    optax.stateless(
      lambda updates, _: jax.tree.map_with_path(_rescale, updates)
    ),
  )
  return optax.partition({'muon': muon, 'adam': adam}, labels)


def labels(params: Any) -> Any:
  """'muon' or 'adam' for each parameter, by its name."""
  return jax.tree.map_with_path(
    lambda path, _: 'adam' if _name(path).endswith(_ADAM) else 'muon', params
  )


def matrix_axes(name: str, ndim: int) -> tuple[tuple[int, ...], ...]:
  """Input and output axes of a parameter that Muon updates."""
  axes = _MATRICES.get(name, ((-2,), (-1,)))
  return tuple(tuple(ndim + axis for axis in group) for group in axes)


def _dimension_numbers(updates: Any) -> Any:
  return jax.tree.map_with_path(
    lambda path, x: contrib.MuonDimensionNumbers(
      *matrix_axes(_name(path), x.ndim)
    ),
    updates,
  )


def _share(path: Any, update: jax.Array) -> jax.Array:
  """Devices with the same gradients orthogonalise some of a stack each."""
  inside = sum(matrix_axes(_name(path), update.ndim), ())
  return update if 0 in inside else sharding.share_copies(update)


def _rescale(path: Any, update: jax.Array) -> jax.Array:
  """An orthogonal matrix has a root mean square of 1 / √max(in, out)."""
  sizes = (
    math.prod(update.shape[axis] for axis in axes)
    for axes in matrix_axes(_name(path), update.ndim)
  )
  return update * (_UPDATE_RMS * jnp.sqrt(max(sizes)))


def _name(path: Any) -> str:
  return jax.tree_util.keystr((path[-1],), simple=True)
