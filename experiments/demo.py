"""R1-Zero in miniature, from nothing to a report.

  python -m experiments.demo --config=configs/demo.py --workdir=runs/demo

The stages of a seed live in WORKDIR/seed_<seed>; run it again and it goes on
where it was. WORKDIR/summary.json and report.html are the latest run's.
"""

import dataclasses

from absl import flags

from experiments import app

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where the runs keep everything.', required=True
)
_SEED = flags.DEFINE_integer(
  'seed', None, 'Of both stages; default: config.base.seed.', 0
)


def main() -> None:
  import rich.console

  from r1jax.recipe import demo

  config = app.load(demo.DemoConfig)
  if _SEED.value is not None:
    base = dataclasses.replace(config.base, seed=_SEED.value)
    config = dataclasses.replace(config, base=base)
  app.set_up_jax()
  demo.run(config, _WORKDIR.value, rich.console.Console())


if __name__ == '__main__':
  app.run(main, config_file='configs/demo.py')
