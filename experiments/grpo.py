"""Trains a policy by GRPO from a base model: R1-Zero.

  python -m experiments.grpo --config=configs/r1_zero.py \
      --config.init_from=BASE --workdir=DIR
"""

from experiments import app, training


def main() -> None:
  from r1jax.recipe import grpo

  training.run_stage(grpo.GrpoConfig, grpo.run)


if __name__ == '__main__':
  app.run(main, config_file='configs/r1_zero.py')
