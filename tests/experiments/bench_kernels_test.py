"""The benchmark of kernels: its table, its mistakes, and a real compile."""

import importlib.metadata
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from experiments import bench_kernels, kernel_peers

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_DATA = _ROOT / 'tests' / 'data' / 'kernel_schedule'
_PEERS = _ROOT / 'experiments' / 'kernel_peers.py'
_GOOD = {
  'kernel': 'grouped_matmul',
  'case': 'forward',
  'implementation': 'pallas',
  'static_cycles': 1_000_000,
  'mxu_ideal': 917504,
  'hbm_ideal': 699429,
  'dma_bytes': 1_476_000_000,
  'dma_least': 654_311_424,
  'dma_cycles': 800_000,
  'vmem_bytes': 10 << 20,
  'spills_per_cycle': 0.684,
  'hbm_temp_bytes': 1 << 19,
  'ratio': 0.9175,
  'unknown': 0,
}
_FAILED = {
  'kernel': 'mla_decode',
  'case': 'a_name_that_is_longer',
  'implementation': 'peer',
  'error': 'return code -6: LLVM ERROR: no space',
}


def _python(*args, **more):
  return subprocess.run(
    [sys.executable, *args],
    capture_output=True,
    text=True,
    timeout=300,
    cwd=_ROOT,
    **more,
  )


def test_the_table_has_a_line_for_each_case():
  unsure = {**_GOOD, 'implementation': 'unsure', 'unknown': 3}
  header, good, guess, failed, empty, *legend = bench_kernels.table(
    [_GOOD, unsure, _FAILED]
  )
  assert header.split('  ')[0] == 'kernel' and not empty and legend
  cells = re.split(r'  +', good)
  assert cells == [
    *('grouped_matmul', 'forward', 'pallas', '1,000,000', '917,504'),
    *('699,429', '1,476', '654', '10.0', '0.68', '0.5', '0.917'),
  ]
  assert guess.endswith(' ?0.917')
  assert failed.endswith('FAILED: return code -6: LLVM ERROR: no space')
  # Columns stand one below the other; an error does not widen them.
  assert good.index('pallas') == failed.index('peer')
  assert header.endswith('ratio') and len(header) == len(good) == len(guess)


def test_the_json_has_all_reports(tmp_path):
  path = tmp_path / 'out.json'
  bench_kernels.write(path, 'v6e', [_GOOD, _FAILED])
  found = json.loads(path.read_text())
  assert found == {'generation': 'v6e', 'kernels': [_GOOD, _FAILED]}


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--topology=v4'], '--topology=v4: it must be one of v5e, '),
    ([], '--topology is required'),
    (['--topology=v6e', '--kernel=a'], 'did you mean --kernels?'),
  ],
)
def test_a_wrong_flag_is_one_line(flags, said):
  result = _python('-m', 'experiments.bench_kernels', *flags)
  assert result.returncode == 2 and not result.stdout
  assert result.stderr.count('\n') == 1 and said in result.stderr


class _Unfound:
  """Stands for a kernel that the worker does not know."""

  key = 'nothing', 'of', 'this'
  module = kernel_peers


def test_a_worker_that_fails_is_a_result():
  report, is_final = bench_kernels.compile_one(_Unfound, 'v6e', timeout=100)
  assert 'return code 1: ValueError' in report['error'] and is_final


def test_a_worker_that_does_not_end_is_a_result_that_is_not_kept():
  report, is_final = bench_kernels.compile_one(_Unfound, 'v6e', timeout=0.1)
  assert report == {'error': 'not compiled in 0.1 s'} and not is_final


def test_a_kept_report_is_not_made_again(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_kernels, '_CACHE', tmp_path)
  # No libtpu is needed to compile nothing.
  monkeypatch.setattr(importlib.metadata, 'version', lambda package: '1.0')
  made = []

  def compile_one(kernel, generation, *, timeout):
    made.append(generation)
    return {'ratio': 1.0}, len(made) > 1

  monkeypatch.setattr(bench_kernels, 'compile_one', compile_one)
  measure = lambda generation: bench_kernels.measure_one(
    _Unfound, generation=generation, timeout=1
  )
  names = {'kernel': 'nothing', 'case': 'of', 'implementation': 'this'}
  for _ in range(3):  # The first is not kept.
    assert measure('v6e') == {**names, 'ratio': 1.0}
  assert made == ['v6e', 'v6e']
  measure('v5p')
  assert made[2:] == ['v5p']


def test_what_a_report_depends_on():
  kernels = _ROOT / 'pallas_kernels'
  peers = bench_kernels.own_sources(_PEERS)
  assert peers == sorted([_PEERS, kernels / 'common.py'])
  # Through its ops to what these import.
  ours = bench_kernels.own_sources(kernels / 'grouped_matmul' / 'ops.py')
  assert kernels / 'grouped_matmul' / 'reference.py' in ours
  assert _PEERS not in ours


_READ = """
import json, sys
from experiments import kernel_worker
scalars = {'some': {0: [1, 0, 2, 3]}}
programs = list(kernel_worker.read_dump(sys.argv[1], 'v5p', scalars))
print(json.dumps(kernel_worker.add_up(programs)))
"""
# A caller's line, alone and in a loop.
_CALL = '{} {{ %7 = inlined_call %s1_s0 /* %some_rows = custom-call(%x) */ }}'


def test_a_dump_is_added_up_unless_xla_loops_over_a_kernel(tmp_path):
  for kind, place in (('original', 0), ('packed-bundles-post-ra', 2)):
    text = (_DATA / f'some_rows_v5p-{kind}.txt').read_text()
    (tmp_path / f'17-some_rows-{place:02}-{kind}.txt').write_text(text)
  caller = tmp_path / '16-TLP-02-packed-bundles-post-ra.txt'
  caller.write_text(_CALL.format('  0x1   : '))
  result = _python('-c', _READ, str(tmp_path))
  report = json.loads(result.stdout)
  # Rows of three blocks are multiplied, on two cores; all blocks are read.
  assert report['mxu_flops'] == 3 * 2 * 16 * 128 * 128
  read = 64 * 128 * 2 + 2 * 128 * 128 * 2 + 2 * 512
  assert report['dma_bytes'] == read + 64 * 128 * 4
  assert report['static_cycles'] > 0 and not report['unknown']
  caller.write_text(_CALL.format('  0x1   : >'))
  result = _python('-c', _READ, str(tmp_path))
  assert 'some_rows runs in a loop of unknown length' in result.stderr


_TINY = """
import json, sys
from experiments import kernel_peers, kernel_worker
import jax, jax.numpy as jnp
from pallas_kernels import common
m, k, n = 512, 512, 768
matmul = lambda x, w: kernel_peers.example_matmul.matmul(
  x, w, block_shape=(256, 256), block_k=256)
struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
case = common.Case(
  kernel='matmul', name='tiny', implementation='example', function=matmul,
  args=(struct(m, k), struct(k, n)), flops=2 * m * k * n,
  hbm_bytes=2 * (m * k + k * n + m * n))
print(json.dumps(kernel_worker.measure(case, sys.argv[1], sys.argv[2])))
"""


@pytest.mark.tpu_smoke
@pytest.mark.parametrize('generation', ['v5p', 'tpu7x'])
def test_a_real_schedule_does_the_useful_work(tmp_path, generation):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: make test-tpu installs it')
  result = _python('-c', _TINY, generation, str(tmp_path))
  assert result.returncode == 0, result.stderr[-3000:]
  report = json.loads(result.stdout.splitlines()[-1])
  m, k, n = 512, 512, 768
  # Tiles of 256, the wider MXU's edge.
  assert report['mxu_flops'] == 2 * m * k * n
  least = 2 * (m * k + k * n + m * n)
  assert report['dma_least'] == least
  # Rows are read once for each of 3 columns of tiles, weights for 2 of rows,
  # unless XLA brings both into VMEM before.
  read_again = 2 * (3 * m * k + 2 * k * n + m * n)
  assert report['dma_bytes'] == {'v5p': read_again, 'tpu7x': least}[generation]
  assert not report['unknown'] and not report['hbm_temp_bytes']
  # Pipelined twice, and the accumulator.
  buffers = 2 * 3 * 256 * 256 * 2 + 256 * 256 * 4
  assert buffers <= report['vmem_bytes'] < buffers + (256 << 10)
  bound = max(report['mxu_ideal'], report['hbm_ideal'])
  slowest = max(report['static_cycles'], report['dma_cycles'])
  assert report['ratio'] == pytest.approx(bound / slowest, rel=0.02)
  assert 0 < report['ratio'] < 1
