"""A linear regression small enough to test the training machinery with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.train import optimizer
from r1jax.train import state as state_lib
from r1jax.train import step as step_lib

NUM_FEATURES = 600  # More than the 1 KiB that checkpoints keep inline.
NUM_ROWS = 8
NUM_EXPERTS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  x_BD: jax.Array
  y_B: jax.Array
  num_tokens: jax.Array


class Source:
  """Random rows; its state is a counter and the random bits."""

  def __init__(self, seed: int, *, bad_step: int | None = None):
    self._rng = np.random.default_rng(seed)
    self._step = 0
    self._bad_step = bad_step

  def next(self, state) -> Batch:
    del state
    self._step += 1
    x_BD = self._rng.normal(size=(NUM_ROWS, NUM_FEATURES)).astype(np.float32)
    y_B = x_BD @ np.linspace(0, 0.1, NUM_FEATURES, dtype=np.float32)
    if self._step == self._bad_step:
      y_B[0] = np.nan
    return Batch(x_BD, y_B, np.float32(NUM_ROWS))

  def get_state(self):
    return {'step': self._step, 'bits': self._rng.bit_generator.state}

  def set_state(self, state):
    self._step = state['step']
    self._rng.bit_generator.state = state['bits']


def init_variables(seed: int = 0):
  return {
    'params': {
      'w_D': jnp.sin(seed + jnp.arange(NUM_FEATURES, dtype=jnp.float32)),
      'scale': jnp.ones(()),
    },
    'router': {'bias_E': jnp.zeros((NUM_EXPERTS,))},
  }


def loss_fn(variables, batch):
  """Mean squared error, written as a sum over a global normaliser."""
  params = variables['params']
  error_B = params['scale'] * (batch.x_BD @ params['w_D']) - batch.y_B
  expert_B = jnp.argmax(batch.x_BD[:, :NUM_EXPERTS], axis=-1)
  metrics = {
    'error': jnp.abs(error_B).sum() / batch.num_tokens,
    'error_max': -jnp.abs(error_B).min(),  # Negative: 0 must not win.
    'moe/counts': jax.nn.one_hot(expert_B, NUM_EXPERTS).sum(0)[None],
  }
  return (error_B**2).sum() / batch.num_tokens, metrics


def update_router(router, counts_LE):
  sign_E = jnp.sign(counts_LE[0].mean() - counts_LE[0])
  return {'bias_E': router['bias_E'] + 0.001 * sign_E}


def make_optimizer():
  config = optimizer.OptimConfig(
    peak_lr=0.05, warmup_steps=0, schedule='constant', final_lr_ratio=1.0
  )
  return optimizer.make_optimizer(config, 100)


@functools.cache
def _initial(with_reference: bool) -> state_lib.State:
  state = state_lib.init_state(
    init_variables, make_optimizer(), with_reference=with_reference
  )
  return jax.tree.map(np.array, state)


def make_state(*, with_reference: bool = False) -> state_lib.State:
  """A new state, compiled once, so that tests may donate it."""
  return jax.tree.map(jnp.array, _initial(with_reference))


def abstract_state(shardings=None, **options) -> state_lib.State:
  return state_lib.abstract_state(
    init_variables, make_optimizer(), shardings, **options
  )


@functools.cache
def make_step(
  loss_fn=loss_fn, num_microbatches=1, **options
) -> step_lib.TrainStep:
  step = step_lib.make_train_step(
    step_lib.make_gradient(loss_fn, num_microbatches=num_microbatches),
    make_optimizer(),
    update_router=update_router,
    **options,
  )
  return jax.jit(step, donate_argnums=0)
