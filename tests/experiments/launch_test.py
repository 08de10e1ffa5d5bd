"""Kubernetes manifests: their fields fit each other and our flags."""

import math
import pathlib
import re

import pytest
import yaml

_FOLDER = pathlib.Path(__file__).parents[2] / 'experiments' / 'launch'
_ACCELERATORS = {'v5p': 'tpu-v5p-slice', 'v6e': 'tpu-v6e-slice'}
_CHIPS_A_MACHINE = 4
_FILES = sorted(p.name for p in _FOLDER.glob('*.yaml'))


def _read(name):
  manifest = yaml.safe_load((_FOLDER / name).read_text())
  (job,) = manifest['spec']['replicatedJobs']
  pod = job['template']['spec']['template']['spec']
  (container,) = pod['containers']
  return manifest, job, pod, container


def test_there_is_one_for_a_slice_and_one_for_several():
  replicas = {_read(name)[1]['replicas'] for name in _FILES}
  assert replicas == {1, 4}


@pytest.mark.parametrize('name', _FILES)
def test_machines_are_those_of_the_topology(name):
  manifest, job, pod, container = _read(name)
  assert manifest['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert manifest['kind'] == 'JobSet'
  selector = pod['nodeSelector']
  accelerator = selector['cloud.google.com/gke-tpu-accelerator']
  assert accelerator == _ACCELERATORS[name.split('_')[0]]
  topology = selector['cloud.google.com/gke-tpu-topology']
  chips = math.prod(map(int, topology.split('x')))
  spec = job['template']['spec']
  assert spec['completions'] == spec['parallelism'] == chips // _CHIPS_A_MACHINE
  assert spec['completionMode'] == 'Indexed'
  assert container['resources']['limits']['google.com/tpu'] == _CHIPS_A_MACHINE


@pytest.mark.parametrize('name', _FILES)
def test_a_machine_taken_away_has_time_to_save_and_is_started_again(name):
  manifest, job, pod, container = _read(name)
  assert pod['terminationGracePeriodSeconds'] >= 300
  assert pod['restartPolicy'] == 'Never'
  assert job['template']['spec']['backoffLimit'] == 0
  assert manifest['spec']['failurePolicy']['maxRestarts'] > 0
  flags = dict(_flags(container))
  # With 0 the job would count as done.
  assert int(flags['sigterm_exit_code']) != 0


def _flags(container):
  for argument in container['command'][3:]:
    name, _, value = argument.removeprefix('--').partition('=')
    yield name, value


@pytest.mark.parametrize('name', _FILES)
def test_the_command_is_one_of_ours(name):
  _, job, _, container = _read(name)
  python, m, program = container['command'][:3]
  assert (python, m) == ('python', '-m')
  path = _FOLDER.parents[1] / (program.replace('.', '/') + '.py')
  assert path.exists()
  flags = dict(_flags(container))
  assert (_FOLDER.parents[1] / flags['config']).exists()
  assert re.match(r'gs://', flags['workdir'])
  assert 'distributed' in flags
  slices = int(flags.get('config.mesh.num_slices', 1))
  assert slices == job['replicas']
