"""The rotary embedding of a config.json, read and written.

Source: transformers 5.23, modeling_rope_utils.py.
"""

from collections.abc import Mapping
from typing import Any

from r1jax import config as config_lib
from r1jax.model import config as model_config

Values = Mapping[str, Any]


def read(values: Values, *, interleaved: bool) -> dict[str, Any]:
  """The fields of a RopeConfig.

  rope_scaling takes the place of all of rope_parameters. What it holds wins
  over rope_theta and partial_rotary_factor beside it, but the original length
  beside it wins over the one it holds.

  Args:
    values: Contents of config.json, with a rope_theta.
    interleaved: How the family pairs what it rotates.

  Raises:
    UserError: A kind of scaling, or a value, that is not supported.
    KeyError: The scaling lacks a key.
  """
  where = 'rope_scaling' if values.get('rope_scaling') else 'rope_parameters'
  inside = values.get(where) or {}
  if not isinstance(inside, Mapping):
    raise config_lib.UserError(f'{where}={inside!r} must be an object')
  nested = [name for name in inside if isinstance(inside[name], Mapping)]
  if nested:
    raise config_lib.UserError(
      f'{where} with one each for {", ".join(nested)} is not supported, only '
      'one for all layers is'
    )
  names = ('rope_theta', 'partial_rotary_factor')
  rope = {name: values[name] for name in names if name in values} | inside
  if rope.get('partial_rotary_factor') not in (None, 1):
    raise config_lib.UserError(
      f'partial_rotary_factor={rope["partial_rotary_factor"]!r} is not '
      'supported, only 1 is'
    )
  kind = rope.get('rope_type', rope.get('type', 'default'))
  match kind:
    case 'default':
      scaling = None
    case 'yarn':
      scaling = _read_yarn(values, rope)
    case 'llama3':
      scaling = {
        'factor': _number(rope, 'factor'),
        'low_freq_factor': _number(rope, 'low_freq_factor'),
        'high_freq_factor': _number(rope, 'high_freq_factor'),
        'original_length': _original_length(values, rope),
      }
    case _:
      raise config_lib.UserError(
        f'rope type {kind!r} is not supported; supported are default, yarn, '
        'llama3'
      )
  return {
    'theta': _number(rope, 'rope_theta'),
    'interleaved': interleaved,
    'scaling': scaling,
  }


def write(rope: model_config.RopeConfig) -> dict[str, Any]:
  """rope_theta and rope_scaling: every reader knows them."""
  scaling = rope.scaling
  match scaling:
    case None:
      written = None
    case model_config.YarnConfig():
      written = {
        'type': 'yarn',  # DeepSeek's own code reads only this.
        'rope_type': 'yarn',
        'factor': scaling.factor,
        'original_max_position_embeddings': scaling.original_length,
        'beta_fast': scaling.beta_fast,
        'beta_slow': scaling.beta_slow,
      }
      # 0 means another thing to DeepSeek's code than to transformers, no key
      # means the same.
      for name in ('mscale', 'mscale_all_dim'):
        if getattr(scaling, name):
          written[name] = getattr(scaling, name)
      if scaling.attention_factor is not None:
        written['attention_factor'] = scaling.attention_factor
      if not scaling.truncate:
        written['truncate'] = False
    case model_config.Llama3RopeConfig():
      written = {
        'rope_type': 'llama3',
        'factor': scaling.factor,
        'low_freq_factor': scaling.low_freq_factor,
        'high_freq_factor': scaling.high_freq_factor,
        'original_max_position_embeddings': scaling.original_length,
      }
  return {'rope_theta': rope.theta, 'rope_scaling': written}


def _read_yarn(values: Values, rope: Values) -> dict[str, Any]:
  original = _original_length(values, rope)
  if rope['factor'] is None:
    rope = rope | {'factor': values['max_position_embeddings'] / original}
  given = rope.get('attention_factor') is not None
  return {
    'factor': _number(rope, 'factor'),
    'original_length': original,
    'beta_fast': _number(rope, 'beta_fast', 32),
    'beta_slow': _number(rope, 'beta_slow', 1),
    'mscale': _number(rope, 'mscale', 0),
    'mscale_all_dim': _number(rope, 'mscale_all_dim', 0),
    'attention_factor': _number(rope, 'attention_factor') if given else None,
    'truncate': bool(rope.get('truncate', True)),  # null is false, as there.
  }


def _original_length(values: Values, rope: Values) -> int:
  name = 'original_max_position_embeddings'
  length = rope.get(name, values['max_position_embeddings'])
  length = values.get(name, length)
  if not isinstance(length, int) or length < 1:
    raise config_lib.UserError(
      f'{name}={length!r} must be an integer, at least 1'
    )
  return length


def _number(rope: Values, name: str, default: float | None = None) -> float:
  """With a default, null and 0 are as good as absent."""
  value = rope[name] if default is None else rope.get(name) or default
  if isinstance(value, bool) or not isinstance(value, int | float):
    raise config_lib.UserError(f'{name}={value!r} must be a number')
  return float(value)
