"""AdamW or Muon with the learning-rate schedules of the papers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from r1jax import config as config_lib
from r1jax.train import muon

# DeepSeek-V3's pre-training in trillions of tokens.
_V3_TOTAL = 14.8
_V3_DECAY_START = 10.0
_V3_DECAY_END = 14.3
_V3_LAST_START = _V3_TOTAL - 0.167
_V3_DECAY_RATIO = 0.1  # 2.2e-4 -> 2.2e-5.
_V3_LAST_RATIO = 7.3e-6 / 2.2e-4


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW or Muon, a global-norm clip and a schedule.

  Attributes:
    peak_lr: Learning rate after the warm-up.
    warmup_steps: Length of the linear warm-up, steps.
    schedule: What follows the warm-up: 'constant'; 'cosine' down to
      `final_lr_ratio` at the last step; 'v3', DeepSeek-V3's in fractions of
      the run (constant, cosine to 0.1, 0.1, then 0.033 of the peak).
    final_lr_ratio: Last learning rate of 'cosine' as a share of the peak.
    b1: Decay of Adam's first moment.
    b2: Decay of Adam's second moment.
    eps: Added to the root of the second moment.
    weight_decay: Decoupled, times the learning rate; see `is_decayed`. What a
      stage does not train does not decay.
    clip_norm: Largest global norm of the gradient.
    kind: 'adamw' (V3), or 'muon' for the matrices inside the blocks.
    trainable: Only parameters with this in their path are trained, such as
      'indexer' in the warm-up of sparse attention; '' for all.
  """

  peak_lr: float
  warmup_steps: int
  schedule: Literal['constant', 'cosine', 'v3']
  final_lr_ratio: float
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  kind: Literal['adamw', 'muon'] = 'adamw'
  trainable: str = ''

  def __post_init__(self):
    config_lib.check_positive(self, 'peak_lr', 'eps', 'clip_norm')
    config_lib.check_at_least(self, 0, 'warmup_steps', 'weight_decay')
    known = ('constant', 'cosine', 'v3')
    kinds = ('adamw', 'muon')
    _check(self, 'kind', self.kind in kinds, f'must be one of {kinds}')
    _check(self, 'schedule', self.schedule in known, f'must be one of {known}')
    ratio = self.final_lr_ratio
    _check(self, 'final_lr_ratio', 0 <= ratio <= 1, 'must lie in [0, 1]')
    _check(self, 'b1', 0 <= self.b1 < 1, 'must lie in [0, 1)')
    _check(self, 'b2', 0 <= self.b2 < 1, 'must lie in [0, 1)')


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
  """Returns count -> learning rate, count = updates done before this one.

  The warm-up gives peak · (count + 1) / warmup_steps, so the first update is
  not lost to a rate of 0.

  Source: DeepSeek-V3, arXiv:2412.19437, §4.2 ('v3').
  """
  shapes = {'constant': _constant, 'cosine': _cosine, 'v3': _v3}
  decay = shapes[config.schedule]

  def schedule(count: jax.Array | int) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    warmup = jnp.minimum((count + 1) / max(config.warmup_steps, 1), 1.0)
    return config.peak_lr * warmup * decay(config, num_steps, count)

  return schedule


def make_optimizer(
  config: OptimConfig, num_steps: int, *, untrained: Sequence[str] = ()
) -> optax.GradientTransformationExtraArgs:
  """Returns clip -> Adam or Muon -> weight decay -> schedule.

  `update` takes the gradient's global norm as `grad_norm`: the train step
  needs it for its metrics anyway, so it is computed once.

  Args:
    config: Of the optimizer.
    num_steps: Length of the run, for the schedule.
    untrained: Parameters with one of these in their path get no gradient, such
      as 'mtp_' where MTP is left out of the loss: they do not decay either.
  """
  is_decayed_here = functools.partial(_decay_mask, untrained=tuple(untrained))
  direction = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
  if config.kind == 'muon':
    direction = muon.scale_by_muon_or(direction)
  whole = optax.chain(
    _clip_by_known_norm(config.clip_norm),
    direction,
    optax.add_decayed_weights(config.weight_decay, mask=is_decayed_here),
    optax.scale_by_learning_rate(make_schedule(config, num_steps)),
  )
  if not config.trainable:
    return whole
  return optax.partition(
    {True: whole, False: optax.set_to_zero()},
    lambda params: jax.tree.map_with_path(
      lambda path, _: config.trainable in jax.tree_util.keystr(path), params
    ),
  )


def is_decayed(name: str) -> bool:
  """Says whether a parameter of this name is a matrix and hence decayed.

  Names, not ranks: layers are stacked, so the scale of a norm has rank 2.
  """
  return not name.endswith(('scale', 'bias'))


def _decay_mask(params: Any, untrained: tuple[str, ...]) -> Any:
  def is_in(path: Any, _: jax.Array) -> bool:
    whole = jax.tree_util.keystr(path)
    if any(part in whole for part in untrained):
      return False
    return is_decayed(jax.tree_util.keystr((path[-1],), simple=True))

  return jax.tree_util.tree_map_with_path(is_in, params)


def _clip_by_known_norm(
  clip_norm: float,
) -> optax.GradientTransformationExtraArgs:
  """Scales updates by min(1, clip_norm / grad_norm)."""

  def update(
    updates: Any,
    state: optax.EmptyState,
    params: Any = None,
    *,
    grad_norm: jax.Array,
    **unused: Any,
  ) -> tuple[Any, optax.EmptyState]:
    del params, unused
    factor = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-30))
    return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update
  )


def _constant(
  config: OptimConfig, num_steps: int, count: jax.Array
) -> jax.Array:
  del config, num_steps
  return jnp.ones_like(count)


def _cosine(config: OptimConfig, num_steps: int, count: jax.Array) -> jax.Array:
  span = max(num_steps - config.warmup_steps, 1)
  done = jnp.clip((count - config.warmup_steps) / span, 0.0, 1.0)
  return _half_cosine(done, config.final_lr_ratio)


def _v3(config: OptimConfig, num_steps: int, count: jax.Array) -> jax.Array:
  del config
  seen = count / num_steps * _V3_TOTAL
  done = (seen - _V3_DECAY_START) / (_V3_DECAY_END - _V3_DECAY_START)
  ratio = _half_cosine(jnp.clip(done, 0.0, 1.0), _V3_DECAY_RATIO)
  return jnp.where(seen >= _V3_LAST_START, _V3_LAST_RATIO, ratio)


def _half_cosine(done: jax.Array, final: float) -> jax.Array:
  return final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done))


def _check(config: OptimConfig, name: str, is_good: bool, rule: str) -> None:
  if not is_good:
    raise ValueError(f'{name}={getattr(config, name)!r} {rule}')
