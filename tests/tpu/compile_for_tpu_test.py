"""The demo's own programs, compiled for a v5p as a user's are."""

import importlib.util
import json
import math
import subprocess
import sys

import pytest

_ADAM = ('--config.optim.kind=adamw', '--config.model.moe.block=128')
_PRETRAIN = (
  '--config=configs/pretrain.py',
  '--config.model.moe.implementation=grouped',
  '--config.model.num_layers=2',
  '--config.model.mtp_depth=0',
  '--config.mtp_coef=0',
  *_ADAM,
)


def _run(*flags):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed: make test-tpu installs it')
  return subprocess.run(
    [sys.executable, '-m', 'experiments.compile_for_tpu', *flags],
    capture_output=True,
    text=True,
    timeout=900,
  )


def _reports(path, *flags):
  result = _run('--topology=v5p:2x2x1', f'--json={path}', *flags)
  assert result.returncode == 0, result.stdout + result.stderr
  return json.loads(path.read_text())['programs'], result.stdout


def _check(report):
  hbm = report['hbm_bytes']
  parts = (hbm[k] for k in ('arguments', 'temporaries', 'outputs'))
  assert sum(parts) == hbm['total'] < 95 << 30
  assert 0 < hbm['peak'] < 95 << 30
  times = dict(report['roofline_seconds'])
  bound = times.pop('bound')
  assert set(times) == {'mxu', 'hbm', 'ici'}
  assert 0 < bound == max(times.values()) < 1
  assert report['flops'] > 0 and report['compile_seconds'] > 0
  for kinds in report['collectives'].values():
    for entry in kinds.values():
      assert entry['bytes'] > 0 and entry['sites'] > 0
      assert entry['link'] == 'ICI'


@pytest.mark.tpu_smoke
def test_the_train_step_of_a_sharded_pretraining(tmp_path):
  reports, said = _reports(
    tmp_path / 'out.json',
    *_PRETRAIN,
    '--config.mesh.fsdp=2',
    '--config.mesh.expert=2',
    '--config.model.moe.exchange.kind=ragged',
    '--config.model.moe.exchange.tokens_at_once=176',
  )
  report = reports['train']
  _check(report)
  assert report['mesh'] == {'fsdp': 2, 'expert': 2}
  # A state that is donated is no new output: metrics are.
  assert report['hbm_bytes']['outputs'] < report['hbm_bytes']['arguments'] / 10
  gathered = report['collectives']['fsdp']
  assert {'all-gather', 'reduce-scatter'} <= set(gathered)
  # One half of the tokens travels while the other's experts are at work.
  sent = report['collectives']['expert']['ragged-all-to-all']
  assert 0 < sent['beside_products'] <= sent['sites']
  # 8 rows of 176 tokens on 4 devices; about 0.5 M parameters of them active.
  tokens = 8 * 176 / 4
  assert math.log10(report['flops'] / (6 * 0.4e6 * tokens)) < 0.5
  assert 'fits' in said and 'rows x tokens 8 x 176' in said


@pytest.mark.tpu_smoke
def test_a_mesh_that_does_not_fit_is_a_mistake():
  result = _run('--topology=v5p:2x2x1', *_PRETRAIN, '--config.mesh.fsdp=3')
  assert result.returncode == 2
  assert result.stderr.count('\n') == 1
  assert 'needs 3 devices, there are 4' in result.stderr


@pytest.mark.tpu
def test_all_programs_of_grpo(tmp_path):
  reports, _ = _reports(
    tmp_path / 'out.json',
    '--config=configs/r1_zero.py',
    '--config.init_from=nowhere',
    '--model=configs/model/tiny.py',
    '--config.mesh.fsdp=2',
    '--config.rollout.max_prompt_tokens=128',
    '--config.rollout.row_length=256',
    '--config.rollout.max_new_tokens=128',
  )
  assert list(reports) == ['train', 'logprob', 'prefill', 'decode', 'reshard']
  for name in ('train', 'logprob', 'prefill', 'decode'):
    _check(reports[name])
  assert all('fsdp' in axes for axes in reports['reshard']['collectives'])
  # A step of decoding does the work of one token of 384.
  assert reports['decode']['flops'] < reports['prefill']['flops'] / 50


@pytest.mark.tpu_smoke
def test_a_placement_is_found_for_the_demo(tmp_path):
  reports, said = _reports(tmp_path / 'out.json', '--fit=1', *_PRETRAIN)
  [(line, report)] = reports.items()
  _check(report)
  assert said.splitlines()[-1] == f'use {line}'
  assert '--config.mesh.' in line
