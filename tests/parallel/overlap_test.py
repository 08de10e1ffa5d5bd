"""Options for the compiler: for several TPUs only."""

import types

import jax
import numpy as np

from r1jax.parallel import overlap


def _mesh(platform, size):
  devices = [types.SimpleNamespace(platform=platform)] * size
  return types.SimpleNamespace(size=size, devices=np.array(devices))


def test_only_a_mesh_of_tpus_has_options():
  assert overlap.compiler_options(_mesh('tpu', 4))
  assert overlap.compiler_options(_mesh('tpu', 1)) is None
  cpus = jax.sharding.Mesh(np.array(jax.devices()[:2]), ('data',))
  assert overlap.compiler_options(cpus) is None
