"""Options of XLA for TPUs that let exchanges run beside matrix products.

Without them a TPU waits for each all-gather and each exchange of tokens.
Source: the flags that MaxText sets for v5p
(https://github.com/AI-Hypercomputer/maxtext), and names in libtpu 0.0.42; what
they do to our programs stands in experiments/results/pods.md.
"""

import jax

_TPU = (
  'xla_enable_async_all_gather',
  'xla_tpu_enable_async_collective_fusion',
  'xla_tpu_enable_async_collective_fusion_fuse_all_gather',
  'xla_tpu_enable_async_collective_fusion_multiple_steps',
  'xla_tpu_enable_async_ragged_all_to_all',
  'xla_tpu_overlap_compute_collective_tc',
)


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool] | None:
  """What `jax.jit` is told on this mesh; None where there is nothing to say."""
  if mesh.size == 1 or mesh.devices.flat[0].platform != 'tpu':
    return None
  return dict.fromkeys(_TPU, True)
