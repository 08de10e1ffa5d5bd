"""Kinds of runs that can be compiled, told apart by the fields they have."""

from collections.abc import Collection

from r1jax import config
from r1jax.recipe import grpo, pretrain, sft

KINDS: dict[str, type] = {
  'grpo': grpo.GrpoConfig,
  'pretrain': pretrain.PretrainConfig,
  'sft': sft.SftConfig,
}
_OWN_KEYS = {'grpo': 'rollout', 'pretrain': 'mtp_coef', 'sft': 'row_length'}


def find(keys: Collection[str]) -> str:
  """Says of which kind a config with such keys is.

  Raises:
    UserError: Of none.
  """
  for kind, key in _OWN_KEYS.items():
    if key in keys:
      return kind
  raise config.UserError(
    '--config is of no run that trains: it has none of '
    f'{", ".join(_OWN_KEYS.values())}'
  )
