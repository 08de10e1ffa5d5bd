"""Converting and checking models, as a user types it."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from r1jax.interop import export, huggingface
from tests import known_answers

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_QWEN3 = known_answers.DATA / 'hf_models' / 'qwen3'


def _run(program, *arguments):
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{program}', *map(str, arguments)],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )


@pytest.mark.slow
def test_there_and_back_and_checked(tmp_path):
  run, out = tmp_path / 'run', tmp_path / 'out'
  done = _run('convert', f'--from_hf={_QWEN3}', f'--workdir={run}')
  assert done.stdout == f'{_QWEN3} is now step 0 of {run}\n', done.stderr
  done = _run(
    'convert', f'--workdir={run}', f'--to_hf={out}', '--dtype=float32'
  )
  assert done.stdout == f'{run} is now in {out}, float32\n', done.stderr
  for folder, atol, verdict, code in (
    (out, 2e-5, 'within 2e-05', 0),
    (run, 1e-9, 'BEYOND 1e-09', 1),
  ):
    done = _run(
      'check_logits',
      f'--from_hf={folder}',
      f'--reference={_QWEN3 / "io.npz"}',
      f'--atol={atol}',
    )
    assert re.fullmatch(
      rf'24 tokens: largest difference \S+ \({verdict}\), mean KL \S+ nats\n',
      done.stdout,
    )
    assert done.returncode == code


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (('--to_hf=x',), 'give two of --from_hf, --workdir and --to_hf: '),
    (('--from_hf=x', '--workdir=y', '--to_hf=z'), 'give two of --from_hf'),
    (('--from_hf=', '--to_hf=z'), 'give two of --from_hf'),
  ],
)
def test_where_from_and_where_to(arguments, message):
  done = _run('convert', *arguments)
  assert done.stderr.startswith(f'error: {message}')
  assert done.returncode == 2


@pytest.mark.parametrize(
  ('target', 'flag', 'message'),
  [
    (
      'workdir',
      'dtype=bfloat16',
      'the dtype of a workdir is that of --param_dt',
    ),
    ('workdir', 'shard_gib=1', 'it is of files that --to_hf writes'),
    (
      'to_hf',
      'param_dtype=float32',
      'the dtype of an export is that of --dtype',
    ),
  ],
)
def test_a_flag_that_does_nothing_is_refused(tmp_path, target, flag, message):
  done = _run(
    'convert',
    f'--from_hf={_QWEN3}',
    f'--{target}={tmp_path / "x"}',
    f'--{flag}',
  )
  name = flag.split('=')[0]
  assert done.stderr.startswith(f'error: --{name} does nothing here: {message}')
  assert done.returncode == 2 and not list(tmp_path.iterdir())


def test_a_foreign_model_type_lists_ours(tmp_path):
  folder = tmp_path / 'hf'
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
  done = _run('convert', f'--from_hf={folder}', f'--workdir={tmp_path / "run"}')
  assert done.stderr.splitlines()[-1].startswith(
    "error: model_type='gpt2' is not supported; supported are deepseek_v3, "
  )
  assert done.returncode == 2
  assert [p.name for p in tmp_path.iterdir()] == ['hf']


def _cut(folder, keep):
  """Keeps so many bytes of a file of a folder; less than 0: all but those."""
  path = sorted(folder.glob('*.safetensors'))[-1]
  data = path.read_bytes()
  path.write_bytes(data[:keep])
  return path.name


def _contradict(folder, key):
  path = folder / 'config.json'
  values = json.loads(path.read_text())
  path.write_text(json.dumps(values | {key: 2 * values[key]}))


def _lose(folder):
  path = sorted(folder.glob('*.safetensors'))[1]
  path.unlink()
  return path.name


_DAMAGES = {
  'truncated': (
    lambda folder: _cut(folder, -100),
    r'/{0} is cut short: \d+ bytes, tensor ',
  ),
  'header': (
    lambda folder: _cut(folder, 20),
    r'/{0} is cut short or no safetensors file: ',
  ),
  'missing': (
    _lose,
    r'/model.safetensors.index.json names {0}, which does not exist',
  ),
  'width': (
    lambda folder: _contradict(folder, 'hidden_size'),
    r'tensor \S+ of \S+ is \[.*\], by config.json it must be \[.*\]',
  ),
  'layers': (
    lambda folder: _contradict(folder, 'num_hidden_layers'),
    r'\S+ lacks the tensor model\.layers\.\d+\.',
  ),
}


@pytest.mark.parametrize(
  ('damage', 'target'),
  [
    *((damage, 'workdir') for damage in _DAMAGES),
    *((damage, 'to_hf') for damage in ('truncated', 'width')),
  ],
)
def test_a_broken_folder_is_one_line_and_leaves_nothing(
  tmp_path, folder_of_files, damage, target
):
  folder = tmp_path / 'hf'
  shutil.copytree(folder_of_files, folder)
  apply, message = _DAMAGES[damage]
  name = apply(folder)
  done = _run(
    'convert', f'--from_hf={folder}', f'--{target}={tmp_path / "out"}'
  )
  *notes, error = done.stderr.splitlines()
  assert re.match(rf'error: \S*{message.format(name)}', error), error
  assert all(note.startswith('jax ') for note in notes), notes
  assert done.returncode == 2 and done.stdout == ''
  assert [p.name for p in tmp_path.iterdir()] == ['hf']


@pytest.fixture(scope='module')
def folder_of_files(tmp_path_factory):
  """A Hugging Face folder of several files with an index."""
  folder = tmp_path_factory.mktemp('whole') / 'hf'
  export.save(folder, *huggingface.load(_QWEN3), shard_bytes=5_000)
  return folder
