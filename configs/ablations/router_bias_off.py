"""The demo's base without the auxiliary-loss-free bias: γ = 0.

  python -m experiments.pretrain --config=configs/ablations/router_bias_off.py \
      --workdir=runs/router_bias_off

Compare moe/max_vio with configs/pretrain.py, whose γ is V3's 0.001.
"""

import ml_collections

from configs import pretrain


def get_config() -> ml_collections.ConfigDict:
  config = pretrain.get_config()
  config.train.bias_update_speed = 0.0  # γ
  return config
