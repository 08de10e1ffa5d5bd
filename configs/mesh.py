"""How a run is spread over devices; by default each has rows of its own."""

import ml_collections


def get_config(**sizes: int) -> ml_collections.ConfigDict:
  """Sizes of the mesh axes; -1 for what devices are left."""
  config = ml_collections.ConfigDict(
    {
      'pipe': 1,
      'data': -1,
      'fsdp': 1,
      'context': 1,
      'expert': 1,
      'tensor': 1,
      'num_slices': 1,
      'pipeline': {  # Where pipe > 1; parallel/pipeline.py.
        'schedule': '1f1b',
        'keep': 'input',
        'unit': False,
        'latency': 1,
        'fused': False,
        'masked': False,
      },
    }
  )
  config.update(sizes)
  return config


def get_exchange(**changes: str | float) -> ml_collections.ConfigDict:
  """How tokens travel where experts are on several devices."""
  config = ml_collections.ConfigDict(
    {
      'kind': 'padded',  # TPU: 'ragged', 'dma'.
      'receive_factor': 'worst',  # Pods: 2.0.
      'on_overflow': 'stop',
      'fp8': False,
      'tokens_at_once': 0,  # All. Pods: 1024.
    },
    type_safe=False,  # receive_factor is a word or a number.
  )
  config.update(changes)
  return config
