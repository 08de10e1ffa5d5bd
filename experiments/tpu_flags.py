"""Flags of the programs that compile for TPUs: a flag can be defined once."""

from absl import flags

TOPOLOGY = flags.DEFINE_string(
  'topology',
  None,
  'Chips and their torus: v5p:8x8x16; for kernels v5e, v5p, v6e or tpu7x.',
  required=True,
)
TIMEOUT = flags.DEFINE_float(
  'timeout', None, 'Seconds for a program; default 3600, for a kernel 180.', 1
)
# They belong to the programs that adopt them.
flags.disclaim_key_flags()
