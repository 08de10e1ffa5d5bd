"""jax.jit for tests: XLA compiles five times faster, to slower code."""

import functools

import jax

OPTIONS = {
  'xla_backend_optimization_level': 0,
  'xla_cpu_use_fusion_emitters': False,
  'xla_llvm_disable_expensive_passes': True,
}

jit = functools.partial(jax.jit, compiler_options=OPTIONS)
