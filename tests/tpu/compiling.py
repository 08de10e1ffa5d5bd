"""Compiles in worker processes, which a compiler may abort, and keeps reports.

python -m tests.tpu.compiling      # the table of what `make test-tpu` compiled
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib

from experiments import bench_kernels, kernel_peers, tpu_compiler

_FOLDER = pathlib.Path(__file__).parent
_ROOT = _FOLDER.parents[1]
_KEPT = _ROOT / '.cache' / 'tpu'
# What a report depends on.
_SOURCES = 'configs', 'pallas_kernels', 'r1jax', 'tests/tpu/real_shapes.py'
# A worker that neither ends nor aborts, in seconds.
_TIMEOUT = 3600

# 32 devices of each generation, 64 where they have little memory.
TOPOLOGIES = ('v5e:8x8', 'v5p:2x4x4', 'v6e:4x8', 'tpu7x:2x2x4')
REAL_SHAPES = ('decode_step', 'train_step')
_KERNEL_TIMEOUT = 300  # Seconds.


@dataclasses.dataclass(frozen=True)
class Run:
  """What became of a worker.

  Attributes:
    reports: By name, of the programs that were compiled.
    code: Its exit status, or a sentence.
    worker: What else is known of it.
  """

  reports: dict[str, dict]
  code: int | str
  worker: tpu_compiler.Run

  @property
  def why(self) -> str:
    return f'return code {self.code}: {self.worker.reason[:300]}'


def run_worker(topology: str, names: list[str], *, timeout: float) -> Run:
  """Compiles programs in turn; the first one missing is to blame."""
  run = tpu_compiler.run(
    [str(_FOLDER / 'worker.py'), topology, *names], timeout=timeout
  )
  reports = [json.loads(line) for line in run.lines]
  code = f'none after {timeout} s' if run.code is None else run.code
  return Run({r['program']: r for r in reports}, code, run)


def compile_each(topology: str, names: list[str]) -> dict[str, dict]:
  """Reports by name; of a program that does not compile, {'error': a line}.

  One worker compiles all, and another one goes on behind a program that ended
  it. Reports are kept by the hash of the sources.
  """
  module = 'real_shapes'
  found = {name: _read(topology, name) for name in names}
  left = [name for name in names if found[name] is None]
  while left:
    targets = [f'{module}:{name}' for name in left]
    run = run_worker(topology, targets, timeout=_TIMEOUT)
    for name, target in zip(left, targets, strict=True):
      if target not in run.reports:
        found[name] = {'error': run.why}
        _write(topology, name, found[name])
        break
      found[name] = run.reports[target]
      _write(topology, name, found[name])
    left = [name for name in names if found[name] is None]
  return found


def compile_kernels(generation: str) -> dict[tuple[str, str], dict]:
  """What bench_kernels reports of our kernels' cases, by kernel and name."""
  kernels = [
    kernel
    for kernel in bench_kernels.find(generation, None)
    if kernel.module is not kernel_peers
  ]
  reports = bench_kernels.measure(kernels, generation, timeout=_KERNEL_TIMEOUT)
  return {(r['kernel'], r['case']): r for r in reports}


def _path(topology: str, name: str) -> pathlib.Path:
  digest = hashlib.sha256(f'{topology} {name}'.encode())
  for package in ('jax', 'jaxlib', 'libtpu'):
    digest.update(importlib.metadata.version(package).encode())
  for source in map(_ROOT.joinpath, _SOURCES):
    for path in [source] if source.is_file() else sorted(source.rglob('*.py')):
      digest.update(path.read_bytes())
  return _KEPT / f'{digest.hexdigest()[:32]}.json'


def _read(topology: str, name: str) -> dict | None:
  path = _path(topology, name)
  return json.loads(path.read_text()) if path.exists() else None


def _write(topology: str, name: str, report: dict) -> None:
  _KEPT.mkdir(parents=True, exist_ok=True)
  _path(topology, name).write_text(json.dumps(report))


def table() -> str:
  """What is kept, as Markdown."""
  versions = ', '.join(
    f'{p} {importlib.metadata.version(p)}' for p in ('jax', 'libtpu')
  )
  lines = [
    "# DeepSeek-V3's shapes, compiled for TPUs that were not there",
    '',
    '`make test-tpu` writes this. What each program is stands in',
    f'`tests/tpu/real_shapes.py`; {versions}.',
    'GiB of one device as the compiler adds them up, arguments + temporaries;',
    'then the seconds that it took.',
    '',
    '| | ' + ' | '.join(TOPOLOGIES) + ' |',
    '|---' * (len(TOPOLOGIES) + 1) + '|',
  ]
  for name in REAL_SHAPES:
    cells = [_cell(_read(topology, name)) for topology in TOPOLOGIES]
    lines.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
  lines += [
    '',
    'Kernels, one chip: MiB of VMEM + of temporaries in HBM; how good their',
    'schedules are is told by `experiments/results/kernels.md`.',
    '',
    '| | ' + ' | '.join(bench_kernels.TOPOLOGIES) + ' |',
    '|---' * (len(bench_kernels.TOPOLOGIES) + 1) + '|',
  ]
  columns = [compile_kernels(g) for g in bench_kernels.TOPOLOGIES]
  for kernel, case in dict.fromkeys(key for found in columns for key in found):
    cells = [_kernel_cell(found.get((kernel, case))) for found in columns]
    lines.append(f'| `{kernel}` {case} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines) + '\n'


def _cell(report: dict | None) -> str:
  if report is None:
    return 'not compiled'
  if 'error' in report:
    return report['error'].split('Error: ')[-1].replace('|', '/')
  sizes = (report[k] / 2**30 for k in ('argument_bytes', 'temp_bytes'))
  return '{:.2f} + {:.2f}; {:.0f} s'.format(*sizes, report['compile_seconds'])


def _kernel_cell(report: dict | None) -> str:
  if report is None or 'error' in report:
    return _cell(report)
  sizes = (report[k] / 2**20 for k in ('vmem_bytes', 'hbm_temp_bytes'))
  return '{:.1f} + {:.1f}'.format(*sizes)


if __name__ == '__main__':
  print(table(), end='')
