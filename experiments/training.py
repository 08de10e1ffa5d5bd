"""What the programs that train share: their flags, and what they show."""

from collections.abc import Callable
from typing import Any

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


def run_stage(config_class: type, run: Callable[..., Any]) -> None:
  """Runs a stage of the recipe and prints its report's path, or its sizes.

  Args:
    config_class: Of the stage.
    run: Takes (config, workdir) and the two keywords of the flags.
  """
  from r1jax.recipe import reporting

  config = app.load(config_class)
  app.set_up_jax()
  result = run(
    config,
    _WORKDIR.value,
    profile_steps=_PROFILE_STEPS.value,
    dry_run=_DRY_RUN.value,
  )
  if _DRY_RUN.value:
    app.print_sizes(result)
  else:
    print(f'report: {reporting.write_workdir_report(_WORKDIR.value)}')
