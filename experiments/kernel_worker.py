"""Compiles one kernel for one TPU and reads its schedule; JSON in and out.

  python -m experiments.kernel_worker < JOB.json

`experiments.bench_kernels` runs it in a process of its own, because the
compiler may abort it and takes the folder of its dumps when it is loaded. The
last line on stdout is the report.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import tpu_compiler

tpu_compiler.set_up()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, SingleDeviceSharding  # noqa: E402

from experiments import kernel_peers, kernel_schedule  # noqa: E402
from pallas_kernels import common  # noqa: E402
from pallas_kernels.grouped_matmul import cases as grouped_matmul  # noqa: E402
from pallas_kernels.grouped_matmul_fp8 import (  # noqa: E402
  cases as grouped_matmul_fp8,
)
from pallas_kernels.linear_cross_entropy import (  # noqa: E402
  cases as linear_cross_entropy,
)
from pallas_kernels.matmul_fp8 import cases as matmul_fp8  # noqa: E402
from pallas_kernels.mla_attention import cases as mla_attention  # noqa: E402
from pallas_kernels.mla_decode import cases as mla_decode  # noqa: E402
from pallas_kernels.quantize_fp8 import cases as quantize_fp8  # noqa: E402
from pallas_kernels.sparse_mla import cases as sparse_mla  # noqa: E402
from r1jax.parallel import hlo  # noqa: E402

# Modules with a function cases().
MODULES = (
  *(grouped_matmul, grouped_matmul_fp8, matmul_fp8, quantize_fp8),
  *(mla_attention, mla_decode, sparse_mla, linear_cross_entropy),
  kernel_peers,
)
# Of programs below this share of all cycles, little need be known.
_GLUE = 0.01


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A case, and the module that it is from."""

  case: common.Case
  module: types.ModuleType

  @property
  def key(self) -> tuple[str, str, str]:
    return self.case.kernel, self.case.name, self.case.implementation


def find(
  generation: str, modules: Sequence[types.ModuleType] = MODULES
) -> list[Kernel]:
  """All cases that are for a generation, peers beside ours.

  Raises:
    ValueError: Two cases have the same names.
  """
  found = [
    Kernel(case, module)
    for module in modules
    for case in module.cases()
    if generation in (case.generations or (generation,))
  ]
  if len({kernel.key for kernel in found}) < len(found):
    raise ValueError('two cases have the same names')
  # By kernel and shape, in the order of their first case.
  places: dict[tuple[str, str], int] = {}
  for kernel in found:
    places.setdefault(kernel.key[:2], len(places))
  return sorted(found, key=lambda kernel: places[kernel.key[:2]])


def main() -> int:
  job = json.load(sys.stdin)
  modules = [m for m in MODULES if m.__name__ == job['module']]
  kernels = find(job['generation'], modules)
  [kernel] = [k for k in kernels if k.key == tuple(job['key'])]
  report = measure(kernel.case, job['generation'], job['dump'])
  print(json.dumps(report))
  return 0


def measure(case: common.Case, generation: str, dump: str) -> dict[str, Any]:
  """Compiles a case and says what its schedule takes.

  Args:
    case: Of the kernel.
    generation: Of kernel_schedule.GENERATIONS.
    dump: An empty folder for the compiler's files.

  Raises:
    RuntimeError: The schedule cannot be read.
  """
  compiled = compile_case(case, generation, dump)
  scalars = case.scalars() if callable(case.scalars) else case.scalars
  total = add_up(list(read_dump(dump, generation, scalars)))
  total['dma_bytes'] += prefetched_bytes(compiled.as_text())
  mxu = kernel_schedule.mxu_cycles(generation, case.flops, case.dtype)
  hbm, dma = (
    kernel_schedule.hbm_cycles(generation, n)
    for n in (case.hbm_bytes, total['dma_bytes'])
  )
  return {
    **total,
    'mxu_ideal': round(mxu),
    'hbm_ideal': round(hbm),
    'dma_cycles': round(dma),
    'dma_least': int(case.hbm_bytes),
    'hbm_temp_bytes': compiled.memory_analysis().temp_size_in_bytes,
    'ratio': float(max(mxu, hbm) / max(total['static_cycles'], dma)),
  }


def compile_case(
  case: common.Case, generation: str, dump: str
) -> jax.stages.Compiled:
  """Compiles for one device; the compiler must not have been used before."""
  os.environ['LIBTPU_INIT_ARGS'] = (
    f'--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true '
    '--xla_jf_dump_llo_pass_label_regex=original|packed-bundles-post-ra'
  )
  device = topologies.get_topology_desc(
    platform='tpu',
    topology_name=kernel_schedule.GENERATIONS[generation].topology,
  ).devices[0]
  here = SingleDeviceSharding(device)
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), case.args
  )
  # Kernels that ask for the chip's sizes find them by the mesh.
  with jax.set_mesh(Mesh(np.array([device]), ('device',))):
    step = jax.jit(case.function, donate_argnums=case.donate)
    return step.lower(*args).compile()


@dataclasses.dataclass(frozen=True)
class Program:
  """A program, and what it did on each of the cores that run it."""

  name: str
  vmem_bytes: int
  cores: list[kernel_schedule.Counts]
  matmul_flops: int
  is_in_loop: bool = False

  @property
  def cycles(self) -> int:
    return max(counts.cycles for counts in self.cores)


_FILE = re.compile(r'(\d+-(.*))-\d+-packed-bundles-post-ra\.txt')
# What calls the programs, and what stands before and behind them.
_CALLER, _FRAME = 'TLP', '<'
# A line of the caller's that is inside of a loop: 0x3c7 : > { … }
_CALL_IN_LOOP = re.compile(
  r'^ *\w+ +(?:[A-Z]{2})?: >+ \{.*\binlined_call\b.*?/\* %([\w.-]+) = ', re.M
)


def read_dump(
  dump: str, generation: str, scalars: Mapping[str, Mapping[int, Any]]
) -> Iterator[Program]:
  """Runs each program of a dump.

  Raises:
    RuntimeError: A program does not end.
  """
  folder = pathlib.Path(dump)
  names = sorted(path.name for path in folder.iterdir())
  schedules = list(filter(None, map(_FILE.fullmatch, names)))
  read = lambda name: (folder / name).read_text(errors='replace')
  in_loop = set()
  for found in schedules:
    if found[2] == _CALLER:
      in_loop.update(_CALL_IN_LOOP.findall(read(found[0])))
  for found in schedules:
    stem, name = found.groups()
    if name.startswith((_CALLER, _FRAME)):
      continue
    is_original = re.compile(rf'{re.escape(stem)}-\d+-original\.txt').fullmatch
    [original] = filter(is_original, names)
    program = kernel_schedule.parse(read(found[0]), read(original))
    values = next((v for k, v in scalars.items() if re.search(k, name)), {})
    num_cores = kernel_schedule.GENERATIONS[generation].num_cores
    cores = [
      kernel_schedule.run(program, generation, values, core)
      for core in range(num_cores if program.is_split else 1)
    ]
    flops = sum(
      kernel_schedule.matmul_flops(generation, counts.matmuls)
      for counts in cores
    )
    yield Program(name, program.vmem_bytes, cores, flops, name in in_loop)


def prefetched_bytes(text: str) -> int:
  """What XLA itself moves between HBM and VMEM, from the text of the HLO."""
  module = hlo.parse(text)
  return sum(
    sum(hlo.array_bytes(instruction.type, space=0))
    for instruction in module.computations[module.entry]
    if instruction.op == 'copy-start'
  )


def add_up(programs: list[Program]) -> dict[str, Any]:
  """Figures of programs that run one after the other, once each.

  Raises:
    RuntimeError: There are none, or XLA runs one of them in a loop.
  """
  cycles = sum(program.cycles for program in programs)
  if not cycles:
    raise RuntimeError('the compiler dumped no schedule')
  for program in programs:
    if program.is_in_loop and program.cycles >= _GLUE * cycles:
      raise RuntimeError(f'{program.name} runs in a loop of unknown length')
  all_counts = [counts for program in programs for counts in program.cores]
  return {
    'static_cycles': cycles,
    'dma_bytes': sum(
      n
      for counts in all_counts
      for kind, n in counts.dma_bytes.items()
      if 'hbm' in kind or kind == 'general'
    ),
    'vmem_bytes': max((p.vmem_bytes for p in programs), default=0),
    'spills_per_cycle': sum(counts.spills for counts in all_counts)
    / max(1, sum(counts.cycles for counts in all_counts)),
    'mxu_flops': sum(program.matmul_flops for program in programs),
    'unknown': sum(
      len(counts.unknown)
      for program in programs
      for counts in program.cores
      if counts.cycles >= _GLUE * cycles
    ),
  }


if __name__ == '__main__':
  sys.exit(main())
