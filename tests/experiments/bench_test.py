"""The benchmark's arithmetic, and whole runs beside peers that are stubs."""

import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import bench, bench_worker
from r1jax import config as config_lib
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from tests.recipe import micro

_ROOT = pathlib.Path(__file__).resolve().parents[2]

_TRANSFORMERS = """versions 2.13.0 5.23.0 import_s 3.1
params 4613120 attn sdpa
forward 9876 tok/s
train step 412 ms  2485 tok/s loss 7.632->6.012
generate B=8 P=32 N=64: 2.10s 244 tok/s (8, 96)
"""
_TRL = """params 4613120 vocab tok 258
total 14.2
sec/GRPO step (1 prompt x 8, compl 64): [2.5, 2.1, 2.2, 2.4, 9.0]
"""


def _num_parameters(config) -> int:
  shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  sizes = (math.prod(x.shape) for x in jax.tree.leaves(sharding.unbox(shapes)))
  return sum(sizes)


def test_the_model_is_the_peers():
  # 4,613,120 as their scripts print, and 3 x 8 router biases.
  assert _num_parameters(bench_worker.model_config()) == 4613120 + 24


def test_the_dense_twin_has_the_same_active_widths():
  config = bench_worker.model_config()
  twin = bench_worker.dense_twin(config)
  assert twin.moe is None
  # One layer of 512, three of (2 routed + 1 shared) x 128.
  assert twin.dense_dim * twin.num_layers == 512 + 3 * 3 * 128
  # All but the router of 3 layers and the idle 6 experts of 8.
  idle = 3 * 6 * 3 * 256 * 128
  router = 3 * (256 * 8 + 8)
  assert _num_parameters(twin) == _num_parameters(config) - idle - router


def test_reads_what_the_peers_print():
  assert bench.parse_transformers(_TRANSFORMERS) == {
    'transformers train': [2485.0],
    'transformers decode': [244.0],
  }
  assert bench.parse_trl(_TRL) == 2.4


@pytest.mark.parametrize('parse', [bench.parse_transformers, bench.parse_trl])
def test_a_peer_that_prints_something_else_is_an_error(parse):
  with pytest.raises(config_lib.UserError):
    parse('Traceback\n')


def _series():
  series = {name: {} for name in bench.FIGURES}
  for train, dense, decode in ((3000, 3200, 900), (3600, 4000, 1000)):
    bench.add(
      series,
      '1 device',
      {
        'train': [train, train + 30],
        'dense': [dense, dense + 30],
        'decode': [decode],
        'grpo': [0.5, 0.4],
      },
    )
  for train, dense in ((3100, 2000), (3400, 2500)):
    bench.add(
      series,
      '2 devices',
      {
        'train': [train, train],
        'dense': [dense, dense],
        'decode': [2.0],
        'grpo': [0.8, 0.7],
      },
    )
  for way, train, seconds in (('1 thread', 2000, 2.0), ('2 threads', 2500, 1)):
    for _ in range(2):
      bench.add(
        series,
        way,
        {
          'transformers train': [train],
          'transformers decode': [500],
          'trl grpo': [seconds],
        },
      )
  return series


def test_the_better_way_counts():
  series = _series()
  assert bench.best_way(series, 'train') == '1 device'  # 3315 against 3250.
  assert bench.best_way(series, 'transformers train') == '2 threads'
  assert bench.best_way(series, 'grpo') == '1 device'
  assert bench.best_way(series, 'trl grpo') == '2 threads'


def test_ratios_are_taken_in_each_round():
  ratios = {r.title: bench.ratio(_series(), r) for r in bench.RATIOS}
  assert ratios['train step / transformers'] == [3015 / 2500, 3615 / 2500]
  assert ratios['decode / transformers'] == [900 / 500, 1000 / 500]
  assert ratios['GRPO step / TRL'] == [0.45, 0.45]
  # Both are ours and alternate: one ratio for each repeat.
  assert len(ratios['train step / our dense model']) == 4
  assert ratios['train step / our dense model'][0] == 3000 / 3200


def test_the_table_says_whether_each_aim_is_met():
  lines = bench.table(_series()).splitlines()
  verdict = {
    r.title: next(line for line in lines if line.startswith(r.title))
    for r in bench.RATIOS
  }
  assert verdict['train step / transformers'].endswith('>= 1.2: met')
  assert verdict['decode / transformers'].endswith('>= 2: MISSED')
  assert verdict['GRPO step / TRL'].endswith('<= 0.5: met')
  (row,) = [
    line for line in lines if line.startswith('TRL') and '2 threads' in line
  ]
  assert row.endswith('1 (1-1) s  *')


def test_without_peers_their_rows_are_left_out():
  series = _series()
  for name in ('transformers train', 'transformers decode', 'trl grpo'):
    series[name] = {}
  text = bench.table(series)
  assert 'our dense model' in text
  assert 'transformers' not in text and 'TRL' not in text


_PROGRAM = """
import sys
from experiments import app, bench
bench.run_ours = lambda ways, repeats: {
  devices: {
    'train': [3000.0 * devices] * repeats,
    'dense': [3000.0] * repeats,
    'decode': [500.0] * repeats,
    'grpo': [1.0 / devices] * repeats,
  }
  for devices in ways
}
app.run(bench.main)
"""


def _bench(*arguments) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-c', _PROGRAM, *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_runs_the_peers_in_turn_and_keeps_all_figures(tmp_path):
  stub = (
    'import os\n'
    'assert os.environ["MODEL"] == "dsv3"\n'
    'assert not os.environ["GLIBC_TUNABLES"]\n'
    'print({!r})\n'
  )
  (tmp_path / 'transformers_deepseek_v3.py').write_text(
    stub.format(_TRANSFORMERS)
  )
  (tmp_path / 'trl_grpo.py').write_text(stub.format(_TRL))
  path = tmp_path / 'figures.json'
  done = _bench(
    f'--peers={tmp_path}',
    f'--peers_python={sys.executable}',
    '--rounds=2',
    '--devices=1,2',
    f'--json={path}',
  )
  assert done.returncode == 0, done.stderr
  assert 'round 2 of 2' in done.stdout
  kept = json.loads(path.read_text())
  assert kept['series']['trl grpo'] == {
    '1 thread': [[2.4], [2.4]],
    '2 threads': [[2.4], [2.4]],
  }
  assert kept['ratios']['train step / transformers']['rounds'] == (
    [6000 / 2485] * 2
  )
  assert len(kept['load']) == 2


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--peers=nowhere'], 'nowhere/transformers_deepseek_v3.py'),
    (['--peers=HERE', '--peers_python=no_py'], 'no_py: there is no such'),
    (['--devices=3'], '--devices=3: each is 1, 2, 4 or 8'),
  ],
)
def test_what_cannot_be_is_the_users_error(arguments, message, tmp_path):
  for name in ('transformers_deepseek_v3.py', 'trl_grpo.py'):
    (tmp_path / name).touch()
  done = _bench(*(a.replace('HERE', str(tmp_path)) for a in arguments))
  assert done.returncode == 2
  assert message in done.stderr


def test_a_peer_that_fails_is_named(tmp_path):
  for name in ('transformers_deepseek_v3.py', 'trl_grpo.py'):
    (tmp_path / name).write_text('import no_such_module')
  done = _bench(f'--peers={tmp_path}', f'--peers_python={sys.executable}')
  assert done.returncode == 2
  assert 'transformers_deepseek_v3.py failed with code 1' in done.stderr
  assert "No module named 'no_such_module'" in done.stderr


@pytest.mark.slow
def test_every_figure_is_taken_on_a_small_model():
  config = micro.model(mtp_depth=0, max_length=128)
  make = lambda n: mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[:n])
  figures = bench_worker.measure({'1': make(1), '2': make(2)}, config, 2)
  assert list(figures) == ['1', '2']
  for of_way in figures.values():
    assert set(of_way) == {'train', 'dense', 'decode', 'grpo'}
    for values in of_way.values():
      assert len(values) == 2 and min(values) > 0
