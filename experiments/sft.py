"""Finetunes a model on conversations.

  python -m experiments.sft --config=configs/sft.py \
      --config.init_from=DIR --config.data.paths="('chats.jsonl',)" \
      --workdir=DIR
"""

from experiments import app, training


def main() -> None:
  from r1jax.recipe import sft

  training.run_stage(sft.SftConfig, sft.run)


if __name__ == '__main__':
  app.run(main, config_file='configs/sft.py')
