"""A workdir whose model answers in the right format, without any training."""

import dataclasses
import os

import jax.numpy as jnp

from r1jax.train import checkpoint, workdir
from r1jax.train import state as state_lib
from tests.recipe import micro


def make(folder: os.PathLike[str]) -> None:
  """Saves the policy by hand as step 7 of a run."""
  workdir.prepare(folder, {'model': dataclasses.asdict(micro.model())})
  state = state_lib.State(
    step=jnp.asarray(7),
    variables=micro.policy(),
    opt_state={},
    reference=None,
  )
  with checkpoint.Checkpoints(
    os.path.join(folder, 'checkpoints'), max_to_keep=1
  ) as checkpoints:
    checkpoints.save(7, state, {})
