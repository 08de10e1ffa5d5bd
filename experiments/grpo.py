"""Trains a policy by GRPO from a base model: R1-Zero.

  python -m experiments.grpo --config=configs/r1_zero.py \
      --config.init_from=BASE --workdir=DIR
"""

from absl import flags

from experiments import app

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the run keeps everything.', required=True
)
_PROFILE_STEPS = flags.DEFINE_integer(
  'profile_steps', 0, 'Trace so many steps into WORKDIR/profile.', 0
)
_DRY_RUN = flags.DEFINE_bool(
  'dry_run', False, 'Build and compile, print sizes, stop.'
)


def main() -> None:
  from r1jax.recipe import grpo, reporting

  config = app.load(grpo.GrpoConfig)
  app.set_up_jax()
  result = grpo.run(
    config,
    _WORKDIR.value,
    profile_steps=_PROFILE_STEPS.value,
    dry_run=_DRY_RUN.value,
  )
  if _DRY_RUN.value:
    app.print_sizes(result)
  else:
    print(f'report: {reporting.write_workdir_report(_WORKDIR.value)}')


if __name__ == '__main__':
  app.run(main, config_file='configs/r1_zero.py')
