"""Finetunes a model on conversations.

  python -m experiments.sft --config=configs/sft.py \
      --config.init_from=DIR --config.data.paths="('chats.jsonl',)" \
      --workdir=DIR
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
  from r1jax.recipe import reporting, sft

  config = app.load(sft.SftConfig)
  app.set_up_jax()
  result = sft.run(
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
  app.run(main, config_file='configs/sft.py')
