"""Tests spend their time compiling: faster, to slower code, and not twice.

Used by conftest.py, for this process and (the flags) the programs it starts.
"""

import functools

XLA_FLAGS = (
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
  '--xla_llvm_disable_expensive_passes=true'
)


def cache_programs_of_one_device() -> None:
  """Keeps those of several devices out of the cache of compiled programs.

  XLA's CPU programs come out of it without the order of their collectives, see
  `experiments.app.set_up_jax`.
  """
  from jax._src import compilation_cache

  put = compilation_cache.put_executable_and_time

  @functools.wraps(put)
  def put_if_of_one_device(cache_key, module_name, executable, *args):
    if len(executable.local_devices()) == 1:
      put(cache_key, module_name, executable, *args)

  compilation_cache.put_executable_and_time = put_if_of_one_device
