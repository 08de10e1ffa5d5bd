"""The program that compiles for pods: its mistakes, failures and words."""

import json
import subprocess
import sys

import pytest
from absl import flags

from configs import pretrain as pretrain_config
from experiments import compile_for_tpu, compile_kinds
from r1jax import config as config_lib
from r1jax.parallel import chips

_REPORT = {
  'hbm_bytes': {
    'arguments': 60 << 30,
    'temporaries': 30 << 30,
    'outputs': 1 << 30,
    'total': 91 << 30,
    'peak': 77 << 30,
  },
  'flops': 459e12,
  'collectives': {
    'fsdp': {
      'all-gather': {
        'bytes': 2**30,
        'sites': 3,
        'beside_products': 2,
        'link': 'ICI',
      }
    }
  },
  'roofline_seconds': {'mxu': 1.0, 'hbm': 0.5, 'ici': 2.0, 'bound': 2.0},
  'compile_seconds': 12.3,
  'mesh': {'fsdp': 4},
  'shapes': {'rows x tokens': '4 x 176'},
}


def _run(*flags):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.compile_for_tpu', *flags],
    capture_output=True,
    text=True,
    timeout=120,
  )


_MISTAKES = (
  (['--topology=v5p:2x2'], ['v5p:2x2', 'v5e:4x4', 'v5p:4x4x4']),
  (['--topology=v9:2x2x1'], ['v9:2x2x1', 'tpu7x:4x4x4']),
  ([], ['--topology is required']),
  (
    ['--topology=v5p:2x2x1', '--programs=train,decode'],
    ["'decode'", 'pretrain runs have train'],
  ),
  (
    ['--topology=v5p:2x2x1', '--model=configs/none.py'],
    ['there is no file configs/none.py'],
  ),
)


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    _MISTAKES[0],
    *(pytest.param(*m, marks=pytest.mark.slow) for m in _MISTAKES[1:]),
  ],
)
def test_mistakes_end_in_one_line(flags, words):
  result = _run('--config=configs/pretrain.py', *flags)
  assert result.returncode == 2
  assert result.stderr.count('\n') == 1
  assert all(word in result.stderr for word in words), result.stderr


@pytest.mark.slow
def test_a_config_of_no_training_run_is_a_mistake():
  result = _run('--config=configs/evaluate.py', '--topology=v5p:2x2x1')
  assert result.returncode == 2
  assert 'of no run that trains' in result.stderr


def test_kinds_are_told_apart_by_their_keys():
  assert compile_kinds.find({'seed', 'rollout'}) == 'grpo'
  assert compile_kinds.find({'mtp_coef', 'row_length'}) == 'pretrain'
  assert compile_kinds.find({'row_length', 'data'}) == 'sft'


def _worker(monkeypatch, result):
  def run(*args, **kwargs):
    if isinstance(result, Exception):
      raise result
    return subprocess.CompletedProcess(args, *result)

  monkeypatch.setattr(subprocess, 'run', run)
  return compile_for_tpu.compile_one({'program': 'train'}, timeout=5)


def test_an_abort_of_the_compiler_is_a_result(monkeypatch):
  stderr = 'noise\nLLVM ERROR: Not enough space for TILESPMEM spill\n*** dump'
  report = _worker(monkeypatch, (-6, '', stderr))
  assert report['returncode'] == -6
  assert report['error'].startswith('LLVM ERROR: Not enough space')
  assert 'return code -6' in compile_for_tpu.show(report, 'v5p:2x2x1')


def test_a_timeout_is_a_result(monkeypatch):
  report = _worker(monkeypatch, subprocess.TimeoutExpired('x', 5))
  assert report == {'error': 'not compiled in 5 s', 'returncode': None}


def test_what_the_worker_calls_a_mistake_is_the_users(monkeypatch):
  said = json.dumps({'mistake': 'mesh fsdp=3 needs 3 devices'})
  with pytest.raises(config_lib.UserError, match='needs 3 devices'):
    _worker(monkeypatch, (2, said + '\n', ''))


def test_a_report_says_whether_it_fits():
  text = compile_for_tpu.show(_REPORT, 'v5p:2x2x1')
  assert 'total 91.00; in use at once 77.00 of 95.00: fits' in text
  assert 'fsdp' in text and '1,024.0 MiB sent' in text
  assert '3 sites, 2 beside products' in text
  assert 'at least 2 s a call' in text
  assert 'DOES NOT FIT' in compile_for_tpu.show(_REPORT, 'v6e:2x2')


def test_chips_are_those_of_their_makers_tables():
  chip, count = chips.find('v5p:8x8x16')
  assert (chip.bf16_flops, count) == (459e12, 1024)
  chip, count = chips.find('tpu7x:2x2x1')
  assert (chip.num_devices, count) == (2, 4)
  half = chip.per_device()
  assert half.hbm_bytes == 96 << 30
  assert half.bf16_flops == 2307e12 / 2


def _job(**mesh):
  values = pretrain_config.get_config().to_dict()
  values['mesh'] |= mesh
  return {
    'kind': 'pretrain',
    'config': values,
    'model': None,
    'topology': 'v5p:2x2x1',
    'num_slices': 1,
    'program': 'train',
    'hlo': None,
  }


def _compiled(monkeypatch, *, peaks, bounds):
  """Lets the compiler report these, one placement after the other."""
  jobs, figures = [], iter(zip(peaks, bounds, strict=True))

  def compile_one(job, *, timeout):
    del timeout
    jobs.append(job)
    peak, bound = next(figures)
    return {
      **_REPORT,
      'hbm_bytes': _REPORT['hbm_bytes'] | {'peak': peak},
      'roofline_seconds': _REPORT['roofline_seconds'] | {'bound': bound},
    }

  monkeypatch.setattr(compile_for_tpu, 'compile_one', compile_one)
  flags.FLAGS.mark_as_parsed()
  monkeypatch.setattr(flags.FLAGS['fit'], 'value', 3)
  monkeypatch.setattr(flags.FLAGS['fit'], 'present', 1)
  return jobs


def test_of_the_most_promising_the_fastest_that_fits_is_named(
  monkeypatch, capsys
):
  jobs = _compiled(
    monkeypatch, peaks=(96 << 30, 9 << 30, 9 << 30), bounds=(1.0, 3.0, 2.0)
  )
  reports = compile_for_tpu.fit(_job())
  assert len(reports) == 3
  said = capsys.readouterr().out
  *_, last = said.splitlines()
  # The first is the fastest, and does not fit.
  assert last == f'use {list(reports)[2]}'
  sizes = jobs[2]['config']['mesh']
  assert f'--config.mesh.fsdp={sizes["fsdp"]} ' in last
  remat = jobs[2]['config']['model']['remat']
  assert f'--config.model.remat={str(remat).lower()} ' in last
  assert len({str(job['config']['mesh']) for job in jobs}) == 3


def test_nothing_that_fits_is_said_and_what_was_compiled_kept(
  monkeypatch, tmp_path
):
  _compiled(monkeypatch, peaks=[96 << 30] * 3, bounds=[1.0] * 3)
  path = tmp_path / 'out.json'
  monkeypatch.setattr(flags.FLAGS['json'], 'value', str(path))
  with pytest.raises(config_lib.UserError, match='none of these 3 fits'):
    compile_for_tpu.fit(_job())
  assert len(json.loads(path.read_text())['programs']) == 3
  with pytest.raises(config_lib.UserError, match='knows no pipelines'):
    compile_for_tpu.fit(_job(pipe=2))
