"""Evaluates a workdir's newest checkpoint on held-out questions.

python -m experiments.evaluate --config=configs/evaluate.py --workdir=DIR
"""

import pathlib

from absl import flags

from experiments import app

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The run to evaluate.', required=True
)


def main() -> None:
  import rich.console

  from r1jax.evaluate import table
  from r1jax.recipe import evaluation, reporting

  config = app.load(evaluation.EvaluateConfig)
  app.set_up_jax()
  summary = evaluation.run(config, _WORKDIR.value, print)
  title = pathlib.PurePath(_WORKDIR.value).name
  table.show_single(rich.console.Console(), summary, title)
  print(f'report: {reporting.write_workdir_report(_WORKDIR.value)}')


if __name__ == '__main__':
  app.run(main, config_file='configs/evaluate.py')
