"""Pretrains a base model.

python -m experiments.pretrain --config=configs/pretrain.py --workdir=DIR
"""

from experiments import app, training


def main() -> None:
  from r1jax.recipe import pretrain

  training.run_stage(pretrain.PretrainConfig, pretrain.run)


if __name__ == '__main__':
  app.run(main, config_file='configs/pretrain.py')
