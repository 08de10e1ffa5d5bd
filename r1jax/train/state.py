"""What a run learns and carries from step to step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from r1jax.parallel import sharding

Variables = dict[str, Any]  # {'params': tree of arrays, 'router': tree}.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """A pytree of arrays, no functions stored.

  Attributes:
    step: int32 scalar, number of finished train steps.
    variables: {'params': …, 'router': …}; only 'params' sees gradients.
    opt_state: The optimizer's state for variables['params'].
    reference: Variables of the reference policy, or None if unused.
  """

  step: jax.Array
  variables: Variables
  opt_state: Any
  reference: Variables | None


def init_state(
  init_variables: Callable[[], Variables],
  optimizer: optax.GradientTransformation,
  shardings: Variables | None = None,
  *,
  with_reference: bool = False,
) -> State:
  """Builds a new state, each array born where it will live.

  Args:
    init_variables: Draws {'params': …, 'router': …}; traced, called once.
    optimizer: Sees variables['params'] only.
    shardings: One `NamedSharding` per array of the variables; None leaves
      everything on the default device. The moments of a parameter are sharded
      as it is, scalars are replicated.
    with_reference: Whether to keep a second copy of the variables.
  """
  init = _initializer(init_variables, optimizer, with_reference)
  if shardings is None:
    return jax.jit(init)()
  out = _state_shardings(init, optimizer, shardings)
  is_cpu = jax.tree.leaves(shardings)[0].mesh.devices.flat[0].platform == 'cpu'
  # It runs once: compiled with care it takes 33 s for two devices, not 8.
  options = {'xla_backend_optimization_level': 0} if is_cpu else None
  return jax.jit(init, out_shardings=out, compiler_options=options)()


def abstract_state(
  init_variables: Callable[[], Variables],
  optimizer: optax.GradientTransformation,
  shardings: Variables | None = None,
  *,
  with_reference: bool = False,
) -> State:
  """Returns the state's `ShapeDtypeStruct`s without computing anything.

  The arguments are those of `init_state`; this is what a checkpoint is
  restored onto. Without `shardings` the leaves name the default device.
  """
  init = _initializer(init_variables, optimizer, with_reference)
  shapes = jax.eval_shape(init)
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    out = jax.tree.map(lambda _: device, shapes)
  else:
    out = _state_shardings(init, optimizer, shardings)
  return jax.tree.map(
    lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
    shapes,
    out,
  )


def with_variables(state: State, variables: Variables) -> State:
  """Returns the state with other variables: `init_from` another run.

  The reference, if there is one, becomes a copy of them: the train step
  donates its state, so no two fields may share a buffer.
  """
  reference = state.reference
  if reference is not None:
    reference = jax.tree.map(jnp.copy, variables)
  return dataclasses.replace(state, variables=variables, reference=reference)


def _initializer(
  init_variables: Callable[[], Variables],
  optimizer: optax.GradientTransformation,
  with_reference: bool,
) -> Callable[[], State]:
  def init() -> State:
    variables = init_variables()
    return State(
      step=jnp.zeros((), jnp.int32),
      variables=variables,
      opt_state=optimizer.init(variables['params']),
      reference=variables if with_reference else None,
    )

  return init


def _state_shardings(
  init: Callable[[], State],
  optimizer: optax.GradientTransformation,
  shardings: Variables,
) -> State:
  """Extends shardings of the variables to the whole state."""
  shapes = jax.eval_shape(init)
  mesh = jax.tree.leaves(shardings)[0].mesh
  replicated = sharding.replicated(mesh)
  is_left_out = lambda x: isinstance(x, optax.MaskedNode)
  opt_state = optax.tree_utils.tree_map_params(
    optimizer,
    # An optimizer of some parameters keeps nothing for the others.
    lambda kept, sharding: kept if is_left_out(kept) else sharding,
    shapes.opt_state,
    shardings['params'],
    transform_non_params=lambda _: replicated,
    is_leaf=is_left_out,
  )
  return State(
    step=replicated,
    variables=shardings,
    opt_state=opt_state,
    reference=None if shapes.reference is None else shardings,
  )
