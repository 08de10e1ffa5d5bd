"""--json of the programs that report figures: a flag can be defined once."""

from absl import flags

FILE = flags.DEFINE_string('json', None, 'File to write all figures to.')
# It belongs to the programs that adopt it.
flags.disclaim_key_flags()
