"""Compiles programs for a TPU topology without a TPU; JSON on stdout.

  python worker.py v5p:2x2x1 programs:matmul …

Prints one line per program as soon as it is compiled, so that the next one is
to blame when the compiler aborts the process, which it may.
"""

import collections
import importlib
import itertools
import json
import sys
import time

from experiments import tpu_compiler

tpu_compiler.set_up()

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from r1jax.parallel import hlo  # noqa: E402


def main(topology: str, names: list[str]) -> None:
  """Compiles each `module:function` for every device of the topology."""
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=topology
  ).devices
  for name in names:
    module, function = name.split(':')
    make = getattr(importlib.import_module(module), function)
    start = time.monotonic()
    lowered = make(devices)
    traced = time.monotonic()
    compiled = lowered.compile()
    report = {
      'program': name,
      'device_kind': devices[0].device_kind,
      'num_devices': len(devices),
      'trace_seconds': round(traced - start, 2),
      'compile_seconds': round(time.monotonic() - traced, 2),
      **_describe(compiled),
    }
    print(json.dumps(report), flush=True)


def _describe(compiled: jax.stages.Compiled) -> dict[str, object]:
  """Returns per-device memory, FLOPs (a scan's body once) and collectives."""
  memory = compiled.memory_analysis()
  module = hlo.parse(compiled.as_text())
  instructions = itertools.chain.from_iterable(module.computations.values())
  sites = collections.Counter(i.kind for i in instructions if i.kind)
  return {
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
    'flops': compiled.cost_analysis().get('flops'),
    'collectives': dict(sites),
  }


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2:])
