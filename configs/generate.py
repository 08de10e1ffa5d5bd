"""One completion after another, streamed.

  python -m experiments.generate --config=configs/generate.py \
      --workdir=runs/r1_zero --prompt='What is 37+45?'

R1 is to be sampled at 0.6 with top_p 0.95 (its README); R1-Zero was trained
at 1, which is the default here.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'max_new_tokens': 0,  # What the context holds.
      'sampling': {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0},
    }
  )
