"""Compiles a run's programs for a TPU pod, on a machine that has none.

  python -m experiments.compile_for_tpu --config=configs/pretrain_671b.py \
      --topology=v5p:8x8x16 [--num_slices=4] [--programs=train] [--json=FILE]

Says of each program whether it fits, what it computes and what it sends, and
how long that takes at least. Nothing is allocated. Needs libtpu (make
setup-tpu). Exit code 1 if a program did not compile.

With --fit=3 it looks for the mesh, recomputation and microbatches of the train
step instead: all are estimated, the three most promising compiled, and the
flags of the fastest that fits printed.
"""

import copy
import importlib.util
import json
import pathlib
import sys
import time
from typing import Any

from absl import flags

from experiments import app, config_flag, json_flag, tpu_compiler, tpu_flags
from r1jax import config

_NUM_SLICES = flags.DEFINE_integer(
  'num_slices', None, 'So many of them; default mesh.num_slices.', 1
)
_PROGRAMS = flags.DEFINE_list(
  'programs', None, 'Of train, logprob, prefill, decode, reshard; default all.'
)
_MODEL = flags.DEFINE_string(
  'model', '', "File of a model's config, in place of that of init_from."
)
flags.adopt_module_key_flags(json_flag)
_FIT = flags.DEFINE_integer(
  'fit', None, 'Compile so many placements of the train step, say the best.', 1
)
_HLO = flags.DEFINE_string('hlo', None, 'Folder to write the HLO texts to.')
flags.adopt_module_key_flags(tpu_flags)

_TIMEOUT = 3600  # Seconds for a program.

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def main() -> None:
  tpu_compiler.set_up()
  jobs = make_jobs()
  if importlib.util.find_spec('libtpu') is None:
    raise config.UserError('libtpu is not installed: make setup-tpu does so')
  if _FIT.value:
    fit(jobs[0])
    return
  reports = {}
  for job in jobs:
    name = job['program']
    print(f'{name}: compiling for {job["topology"]} …', flush=True)
    reports[name] = compile_one(
      job, timeout=tpu_flags.TIMEOUT.value or _TIMEOUT
    )
    print(show(reports[name], job['topology']), flush=True)
  _write(reports)
  if any('error' in report for report in reports.values()):
    sys.exit(1)


def _write(reports: dict[str, dict[str, Any]]) -> None:
  """Writes reports to the file of --json, if there is one."""
  if json_flag.FILE.value:
    text = json.dumps({'programs': reports}, indent=2) + '\n'
    pathlib.Path(json_flag.FILE.value).write_text(text)


def fit(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
  """Estimates placements of a train step, and compiles the most promising.

  Returns:
    Reports by the flags that make the config such.

  Raises:
    UserError: No placement may fit, or none of the compiled ones does.
  """
  found = find_placements(job)
  print(f'{len(found)} placements may fit; by estimate the first are')
  reports, fitting = {}, {}
  chosen = found[: _FIT.value]
  for candidate, line in chosen:
    parts = ', '.join(f'{k} {v:.3g}' for k, v in candidate.seconds.items())
    print(
      f'  {candidate.hbm_bytes / 2**30:5.1f} GiB, seconds: {parts}\n    {line}'
    )
  for candidate, line in chosen:
    print(f'{line}\n  compiling for {job["topology"]} …', flush=True)
    report = compile_one(
      placed(job, candidate), timeout=tpu_flags.TIMEOUT.value or _TIMEOUT
    )
    reports[line] = report
    print(show(report, job['topology']), flush=True)
    if 'error' not in report and does_fit(report, job['topology']):
      fitting[line] = report['roofline_seconds']['bound']
  _write(reports)  # Those of what does not fit as well.
  if not fitting:
    raise config.UserError(
      f'none of these {len(chosen)} fits as compiled; try a larger --fit'
    )
  best = min(fitting, key=fitting.get)
  print(f'use {best}')
  return reports


def find_placements(job: dict[str, Any]) -> list[tuple[Any, str]]:
  """Placements of a job's train step by estimate, with their flags."""
  from experiments import compile_kinds
  from r1jax.model import config as model_config
  from r1jax.parallel import chips
  from r1jax.recipe import fit as fit_lib
  from r1jax.recipe import programs

  if job['program'] != 'train':
    raise config.UserError('--fit is for the program train')
  if job['config']['mesh']['pipe'] != 1:
    raise config.UserError('--fit knows no pipelines: set mesh.pipe=1')
  run_config = config.from_dict(
    compile_kinds.KINDS[job['kind']], job['config'], ''
  )
  model = job['model'] and config.from_dict(
    model_config.ModelConfig, job['model'], 'model'
  )
  chip, count = chips.find(job['topology'])
  own = getattr(run_config, 'model', None) is not None
  found = fit_lib.candidates(
    programs.to_fit(run_config, model),
    chip.per_device(),
    count * chip.num_devices * job['num_slices'],
    remats=(False, True) if own else (True,),
  )
  key = 'model' if own else None
  varied = fit_lib.of_different_meshes(found)
  return [(candidate, candidate.flags(key)) for candidate in varied]


def placed(job: dict[str, Any], candidate: Any) -> dict[str, Any]:
  """The job with a candidate's placement."""
  values = copy.deepcopy(job['config'])
  values['mesh'].update(candidate.mesh)
  values['train']['num_microbatches'] = candidate.num_microbatches
  if values.get('model'):
    values['model']['remat'] = candidate.remat
  return {**job, 'config': values}


def does_fit(report: dict[str, Any], topology: str) -> bool:
  """Whether what is in use at once fits; a compiler refuses what does not.

  The total of what it calls arguments, temporaries and outputs is more: with a
  limit of 28.0 GiB it accepted a program of 31.9 (experiments/results/pods.md).
  """
  from r1jax.parallel import chips

  chip = chips.find(topology)[0].per_device()
  return report['hbm_bytes']['peak'] <= chip.hbm_bytes


def make_jobs() -> list[dict[str, Any]]:
  """One job for each program, from the flags.

  Raises:
    UserError: An unknown topology or program, or an impossible config.
  """
  from experiments import compile_kinds
  from r1jax.parallel import chips
  from r1jax.recipe import programs

  try:
    chips.find(tpu_flags.TOPOLOGY.value)
  except ValueError as e:
    raise config.UserError(str(e)) from e
  kind = compile_kinds.find(flags.FLAGS.config)
  run = app.load(compile_kinds.KINDS[kind])
  known = programs.names(run)
  names = _PROGRAMS.value or known
  for name in names:
    if name not in known:
      raise config.UserError(
        f'program {name!r}: {kind} runs have {", ".join(known)}'
      )
  values = config.to_dict(run)
  num_slices = _NUM_SLICES.value or run.mesh.num_slices
  values['mesh']['num_slices'] = num_slices
  if _HLO.value:
    pathlib.Path(_HLO.value).mkdir(parents=True, exist_ok=True)
  return [
    {
      'kind': kind,
      'config': values,
      'model': _load_model(_MODEL.value),
      'topology': tpu_flags.TOPOLOGY.value,
      'num_slices': num_slices,
      'program': name,
      'hlo': _HLO.value and str(pathlib.Path(_HLO.value) / f'{name}.txt'),
    }
    for name in names
  ]


def _load_model(spec: str) -> dict[str, Any] | None:
  return config_flag.load(spec).to_dict() if spec else None


def compile_one(job: dict[str, Any], *, timeout: float) -> dict[str, Any]:
  """The report of `compile_worker`, or {'error', 'returncode'}.

  Raises:
    UserError: The job is impossible.
  """
  start = time.monotonic()
  run = tpu_compiler.run(
    ['-m', 'experiments.compile_worker'],
    given=json.dumps(job),
    timeout=timeout,
  )
  if run.code is None:
    return {'error': f'not compiled in {timeout:g} s', 'returncode': None}
  if run.code == 2 and run.lines:
    raise config.UserError(json.loads(run.lines[-1])['mistake'])
  if run.code or not run.lines:
    seconds = time.monotonic() - start
    return {
      'error': f'{run.reason} (after {seconds:.0f} s)',
      'returncode': run.code,
    }
  return json.loads(run.lines[-1])


def show(report: dict[str, Any], topology: str) -> str:
  """A report as text."""
  from r1jax.parallel import chips

  if 'error' in report:
    return f'  FAILED, return code {report["returncode"]}: {report["error"]}'
  chip = chips.find(topology)[0].per_device()
  hbm, roofline = report['hbm_bytes'], report['roofline_seconds']
  gib = lambda n: f'{n / 2**30:,.2f}'
  fits = 'fits' if does_fit(report, topology) else 'DOES NOT FIT'
  lines = [
    'mesh '
    + (' x '.join(f'{a}={n}' for a, n in report['mesh'].items()) or 'of one'),
    ', '.join(f'{k} {v}' for k, v in report['shapes'].items()),
    f'HBM per device, GiB: arguments {gib(hbm["arguments"])}, temporaries '
    f'{gib(hbm["temporaries"])}, new outputs {gib(hbm["outputs"])}, total '
    f'{gib(hbm["total"])}; in use at once {gib(hbm["peak"])} of '
    f'{gib(chip.hbm_bytes)}: {fits}',
    f'FLOPs per device: {report["flops"]:.3e}',
  ]
  for axes, kinds in sorted(report['collectives'].items()):
    for kind, c in sorted(kinds.items()):
      lines.append(
        f'{axes:<24} {kind:<20} {c["link"]:>4} {c["bytes"] / 2**20:>12,.1f} '
        f'MiB sent, {c["sites"]:>4} sites, {c["beside_products"]} beside '
        'products'
      )
  parts = [f'{k.upper()} {v:.3g}' for k, v in roofline.items() if k != 'bound']
  lines.append(
    f'at least {roofline["bound"]:.3g} s a call ({", ".join(parts)})'
  )
  lines.append(f'compiled in {report["compile_seconds"]:.0f} s')
  return '\n'.join(f'  {line}' for line in lines)


if __name__ == '__main__':
  app.run(main, config_file='')
