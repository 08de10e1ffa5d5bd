"""Compiles one program of a run for a topology; JSON in and out.

  python -m experiments.compile_worker < JOB.json

`experiments.compile_for_tpu` runs it in a process of its own, because the
compiler may abort it. The last line on stdout is the report, or what is wrong
with the job with exit code 2.
"""

import json
import sys
import time
from typing import Any

from experiments import tpu_compiler

tpu_compiler.set_up()

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from experiments import compile_kinds  # noqa: E402
from r1jax import config as config_lib  # noqa: E402
from r1jax.model import config as model_config  # noqa: E402
from r1jax.parallel import chips, flops, hlo, roofline  # noqa: E402
from r1jax.recipe import programs  # noqa: E402


def main() -> int:
  job = json.load(sys.stdin)
  try:
    report = compile_program(job)
  except config_lib.UserError as e:
    print(json.dumps({'mistake': str(e)}))
    return 2
  print(json.dumps(report))
  return 0


def compile_program(job: dict[str, Any]) -> dict[str, Any]:
  """Compiles it and says what it takes.

  Args:
    job: 'kind' and 'config' of the run, 'model' or None, 'topology',
      'num_slices', 'program', and 'hlo', a file to write the HLO to or ''.

  Raises:
    UserError: The job is impossible.
  """
  config = config_lib.from_dict(
    compile_kinds.KINDS[job['kind']], job['config'], ''
  )
  model = job['model'] and config_lib.from_dict(
    model_config.ModelConfig, job['model'], 'model'
  )
  devices = find_devices(job['topology'], job['num_slices'])
  start = time.perf_counter()
  program = programs.build(job['program'], config, devices, model=model)
  traced = program.trace()
  lowered = traced.lower()
  middle = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  text = compiled.as_text()
  if job['hlo']:
    with open(job['hlo'], 'w') as f:
      f.write(text)
  return {
    **describe(program, traced, compiled, text, job['topology']),
    'compile_seconds': end - middle,
    'trace_seconds': middle - start,
    'mesh': {a: n for a, n in program.mesh.shape.items() if n > 1},
    'shapes': program.shapes,
  }


def find_devices(topology: str, num_slices: int) -> list[jax.Device]:
  """The devices of a topology that need not be there.

  Raises:
    UserError: The compiler does not know it.
  """
  more = {'num_slices': num_slices} if num_slices > 1 else {}
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **more
    ).devices
  except Exception as e:
    raise config_lib.UserError(
      f'topology={topology!r} with {num_slices} slices is unknown to the '
      f'compiler: {str(e).splitlines()[0]}'
    ) from e


def describe(
  program: programs.Program,
  traced: jax.stages.Traced,
  compiled: jax.stages.Compiled,
  text: str,
  topology: str,
) -> dict[str, Any]:
  """Memory, FLOPs, collectives and roofline of one device."""
  mesh = program.mesh
  memory = compiled.memory_analysis()
  hbm = {
    'arguments': memory.argument_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    # Without what takes the place of an argument.
    'outputs': memory.output_size_in_bytes - memory.alias_size_in_bytes,
  }
  module = hlo.parse(text)
  found = hlo.collectives(module, mesh.shape)
  places = [
    roofline.Place(getattr(d, 'slice_index', 0), tuple(d.coords))
    for d in mesh.devices.flat
  ]
  count = flops.per_device(
    traced.jaxpr, mesh.size, num_rows=program.num_choices
  )
  chip = chips.find(topology)[0].per_device()
  return {
    'hbm_bytes': {
      **hbm,
      'total': sum(hbm.values()),
      'peak': memory.peak_memory_in_bytes,  # In use at once.
    },
    'flops': count,
    'collectives': roofline.by_axis(found, places),
    'roofline_seconds': roofline.bounds(
      count, hlo.traffic_bytes(module), found, places, chip
    ),
  }


if __name__ == '__main__':
  sys.exit(main())
