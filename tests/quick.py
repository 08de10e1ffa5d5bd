"""XLA compiles several times faster, to slower code.

Set by conftest.py for this process and the programs that it starts.
"""

XLA_FLAGS = (
  '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false '
  '--xla_llvm_disable_expensive_passes=true'
)
