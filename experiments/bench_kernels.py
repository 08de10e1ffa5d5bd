"""How good the schedules of kernels are, on a machine that has no TPU.

  python -m experiments.bench_kernels --topology=v6e [--json=FILE] \
      [--kernels=grouped_matmul,mla_decode]

Compiles each case of our kernels and of other people's for one device of a
generation, and counts the cycles of what the compiler scheduled
(`experiments.kernel_schedule`) against what the MXUs and HBM need at least.
Needs libtpu (make setup-tpu). A case that does not compile is a result, too:
its line says why. Results are kept by the hash of their sources.
"""

import ast
import concurrent.futures
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags

from experiments import app, json_flag, tpu_compiler, tpu_flags
from r1jax import config

# kernel_schedule.GENERATIONS; that module is not loaded before flags are read.
TOPOLOGIES = ('v5e', 'v5p', 'v6e', 'tpu7x')

_KERNELS = flags.DEFINE_list('kernels', None, 'Of these ops; default all.')
flags.adopt_module_key_flags(json_flag)
flags.adopt_module_key_flags(tpu_flags)
_WORKERS = flags.DEFINE_integer(
  'workers', None, 'Compilers at a time; default one per core, 4 at most.', 1
)

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CACHE = _ROOT / '.cache' / 'tpu'
# What a report depends on besides the kernel's own sources.
_READER = ('kernel_schedule.py', 'kernel_worker.py')
_MOST_WORKERS = 4
_TIMEOUT = 180  # Seconds for a case.
_MOST_REASON = 300  # Characters.


def main() -> None:
  tpu_compiler.set_up()
  generation = tpu_flags.TOPOLOGY.value
  if generation not in TOPOLOGIES:
    raise config.UserError(
      f'--topology={generation}: it must be one of {", ".join(TOPOLOGIES)}'
    )
  if importlib.util.find_spec('libtpu') is None:
    raise config.UserError('libtpu is not installed: make setup-tpu does so')
  reports = measure(
    find(generation, _KERNELS.value),
    generation,
    timeout=tpu_flags.TIMEOUT.value or _TIMEOUT,
    num_workers=_WORKERS.value,
  )
  print('\n'.join(table(reports)))
  if json_flag.FILE.value:
    write(pathlib.Path(json_flag.FILE.value), generation, reports)


def write(
  path: pathlib.Path, generation: str, reports: Sequence[Mapping[str, Any]]
) -> None:
  """Writes all figures as JSON."""
  figures = {'generation': generation, 'kernels': reports}
  path.write_text(json.dumps(figures, indent=2) + '\n')


def find(generation: str, ops: Sequence[str] | None) -> list[Any]:
  """The kernels to compile, as kernel_worker.Kernel.

  Raises:
    UserError: There is no such op.
  """
  from experiments import kernel_worker

  kernels = kernel_worker.find(generation)
  known = sorted({kernel.case.kernel for kernel in kernels})
  for op in ops or ():
    if op not in known:
      raise config.UserError(f'kernel {op!r}: there are {", ".join(known)}')
  return [kernel for kernel in kernels if kernel.case.kernel in (ops or known)]


def measure(
  kernels: Sequence[Any],
  generation: str,
  *,
  timeout: float,
  num_workers: int | None = None,
) -> list[dict[str, Any]]:
  """The report of each kernel, in their order; says on stderr how far it is.

  Args:
    kernels: Of `find`.
    generation: One of TOPOLOGIES.
    timeout: Seconds for a kernel.
    num_workers: Compilers at a time; by default one for each core, 4 at most.
  """
  one = functools.partial(measure_one, generation=generation, timeout=timeout)
  for kernel in kernels:  # Python 3.11 fails where two threads parse at once.
    _sources_of(kernel)
  num_workers = num_workers or min(_MOST_WORKERS, len(os.sched_getaffinity(0)))
  reports = []
  with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
    for report in pool.map(one, kernels):
      reports.append(report)
      done = f'{len(reports)} of {len(kernels)}'
      print(f'{done}: {" ".join(_names(report))}', file=sys.stderr, flush=True)
  return reports


def measure_one(
  kernel: Any, *, generation: str, timeout: float
) -> dict[str, Any]:
  """The report of a kernel with its names, kept or new."""
  names = dict(zip(('kernel', 'case', 'implementation'), kernel.key))
  path = _CACHE / f'{_digest(kernel, generation)}.json'
  if path.exists():
    return {**names, **json.loads(path.read_text())}
  report, is_final = compile_one(kernel, generation, timeout=timeout)
  if is_final:
    _CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
  return {**names, **report}


def compile_one(
  kernel: Any, generation: str, *, timeout: float
) -> tuple[dict[str, Any], bool]:
  """Runs kernel_worker: (its report or {'error'}, whether to keep that)."""
  with tempfile.TemporaryDirectory(prefix='kernel-') as dump:
    job = {
      'generation': generation,
      'module': kernel.module.__name__,
      'key': kernel.key,
      'dump': dump,
    }
    run = tpu_compiler.run(
      ['-m', 'experiments.kernel_worker'],
      given=json.dumps(job),
      timeout=timeout,
    )
  if run.code is None:
    return {'error': f'not compiled in {timeout:g} s'}, False
  if run.code or not run.lines:
    error = f'return code {run.code}: {run.reason[:_MOST_REASON]}'
    # A process that was killed says nothing about the kernel.
    return {'error': error}, run.code not in (-9, -15)
  return json.loads(run.lines[-1]), True


def _digest(kernel: Any, generation: str) -> str:
  """Of all that a report depends on."""
  digest = hashlib.sha256(json.dumps([generation, *kernel.key]).encode())
  for package in ('jax', 'jaxlib', 'libtpu'):
    digest.update(importlib.metadata.version(package).encode())
  sources = [_ROOT / 'experiments' / name for name in _READER]
  sources.append(_ROOT / 'r1jax' / 'parallel' / 'chips.py')
  for path in [*sources, *_sources_of(kernel)]:
    digest.update(path.read_bytes())
  return f'kernel-{digest.hexdigest()[:32]}'


def _sources_of(kernel: Any) -> list[pathlib.Path]:
  return own_sources(pathlib.Path(kernel.module.__file__))


@functools.cache
def own_sources(file: pathlib.Path) -> list[pathlib.Path]:
  """A file, and all of pallas_kernels that it imports, directly or not."""
  found, left = set(), [file.resolve()]
  while left:
    path = left.pop()
    if path not in found and path.exists():
      found.add(path)
      left += _imported(path)
  return sorted(found)


def _imported(file: pathlib.Path) -> Iterable[pathlib.Path]:
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      # Of each, the package may hold a module of that name, or be a module.
      names = [f'{node.module}.{alias.name}' for alias in node.names]
      names.append(str(node.module))
    else:
      continue
    for name in names:
      if name.split('.')[0] == 'pallas_kernels':
        yield (_ROOT / name.replace('.', '/')).with_suffix('.py')


_HEADERS = (
  *('kernel', 'case', 'implementation', 'static', 'MXU', 'HBM', 'DMA MB'),
  *('least MB', 'VMEM MiB', 'spills/cycle', 'temp MiB', 'ratio'),
)
_NUM_NAMES = 3
_LEGEND = (
  'static: cycles that the compiler scheduled; MXU, HBM: cycles that these '
  'need at least;',
  'ratio: the greater of these two to the greater of static and the DMAs at '
  "HBM's peak;",
  '?: not all branches and DMAs are known: regions were taken to run, loops '
  'to run once.',
)


def table(reports: Sequence[Mapping[str, Any]]) -> list[str]:
  """Reports as lines of aligned columns."""
  rows = [_HEADERS, *map(_cells, reports)]
  full = [row for row in rows if len(row) == len(_HEADERS)]
  widths = [max(map(len, column)) for column in zip(*full)]
  for row in rows:  # An error does not widen a column, but names do.
    for i, cell in enumerate(row[:_NUM_NAMES]):
      widths[i] = max(widths[i], len(cell))
  lines = []
  for row in rows:
    aligned = [
      f'{cell:<{width}}' if i < _NUM_NAMES else f'{cell:>{width}}'
      for i, (cell, width) in enumerate(zip(row, widths))
    ]
    lines.append('  '.join(aligned).rstrip())
  return [*lines, '', *_LEGEND]


def _names(report: Mapping[str, Any]) -> tuple[str, str, str]:
  return report['kernel'], report['case'], report['implementation']


def _cells(report: Mapping[str, Any]) -> tuple[str, ...]:
  if 'error' in report:
    return *_names(report), f'FAILED: {report["error"]}'
  cycles = (report[k] for k in ('static_cycles', 'mxu_ideal', 'hbm_ideal'))
  mark = '?' if report.get('unknown') else ''
  return (
    *_names(report),
    *(f'{n:,}' for n in cycles),
    *(f'{report[k] / 1e6:,.0f}' for k in ('dma_bytes', 'dma_least')),
    f'{report["vmem_bytes"] / 2**20:.1f}',
    f'{report["spills_per_cycle"]:.2f}',
    f'{report["hbm_temp_bytes"] / 2**20:.1f}',
    f'{mark}{report["ratio"]:.3f}',
  )


if __name__ == '__main__':
  app.run(main, keeps_checkpoints=False)
