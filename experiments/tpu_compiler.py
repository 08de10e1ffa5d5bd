"""libtpu as a compiler, on a machine whose devices are its CPU."""

import os


def set_up() -> None:
  """Prepares the environment; call it before jax is imported."""
  os.environ.update(
    JAX_PLATFORMS='cpu',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_ACCELERATOR_TYPE='v5litepod-4',
    TPU_MIN_LOG_LEVEL='3',
    TPU_SKIP_MDS_QUERY='1',
    TPU_STDERR_LOG_LEVEL='3',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_WORKER_ID='0',
  )
  # Compiled for a topology, a program is written to the cache but never read.
  os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)
