"""Strict building of frozen dataclasses from mappings."""

import dataclasses
import json

import ml_collections
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1jax import config


@dataclasses.dataclass(frozen=True)
class Dense:
  hidden_dim: int


@dataclasses.dataclass(frozen=True)
class Moe:
  hidden_dim: int
  num_experts: int
  top_k: int

  def __post_init__(self):
    if self.top_k > self.num_experts:
      raise ValueError(f'top_k={self.top_k} of {self.num_experts} experts')


@dataclasses.dataclass(frozen=True)
class Root:
  num_steps: int
  rate: float
  is_packed: bool
  name: str
  files: tuple[str, ...]
  feed_forward: Dense | Moe
  weights: dict[str, float]
  stop: int | None = None
  layers: tuple[Dense, ...] = ()


def _values(**changes):
  return {
    'num_steps': 3,
    'rate': 0.5,
    'is_packed': True,
    'name': 'x',
    'files': ('a', 'b'),
    'feed_forward': {'hidden_dim': 4},
    'weights': {'clean': 1},
    **changes,
  }


def _error(**changes):
  with pytest.raises(config.UserError) as error:
    config.from_dict(Root, _values(**changes))
  assert '\n' not in str(error.value)
  return str(error.value)


def test_builds_nested_values():
  moe = {'hidden_dim': 4, 'num_experts': 8, 'top_k': 2}
  values = _values(
    rate=1, files=['a'], feed_forward=moe, stop=7, layers=[{'hidden_dim': 2}]
  )
  root = config.from_dict(Root, values)
  assert root.feed_forward == Moe(4, 8, 2)
  assert isinstance(root.rate, float)
  assert root.files == ('a',)
  assert root.weights == {'clean': 1.0}
  assert root.stop == 7
  assert root.layers == (Dense(2),)


def test_a_config_dict_builds_the_same():
  values = ml_collections.ConfigDict(_values())
  built = config.from_dict(Root, values.to_dict())
  assert built == config.from_dict(Root, _values())


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'num_step': 3}, ["'num_step'", "'num_steps'", 'valid keys', 'rate']),
    ({'num_steps': 3.0}, ['num_steps=3.0', 'float', 'int']),
    ({'num_steps': True}, ['num_steps=True', 'bool', 'int']),
    ({'num_steps': None}, ['num_steps=None', 'int']),
    ({'rate': '1'}, ["rate='1'", 'str', 'float']),
    ({'rate': True}, ['rate=True', 'bool', 'float']),
    ({'is_packed': 1}, ['is_packed=1', 'int', 'bool']),
    ({'files': 'a'}, ["files='a'", 'str', 'tuple']),
    ({'files': ('a', 2)}, ['files[1]=2', 'int', 'str']),
    ({'stop': 'x'}, ["stop='x'", 'str', 'int']),
    ({'weights': {'clean': 'x'}}, ["weights.clean='x'", 'float']),
    ({'weights': 3}, ['weights=3', 'dict']),
    ({'layers': [{'width': 2}]}, ["'layers[0].width'", 'hidden_dim']),
    ({'feed_forward': 3}, ['feed_forward=3']),
    (
      {'feed_forward': {'hidden_dim': 4, 'top_k': 2}},
      ['feed_forward', 'Dense(hidden_dim)', 'num_experts'],
    ),
    (
      {'feed_forward': {'hidden_dim': 4, 'num_experts': 8, 'top_k': 9}},
      ['feed_forward: top_k=9 of 8 experts'],
    ),
  ],
)
def test_a_wrong_value_is_named_in_one_line(changes, words):
  message = _error(**changes)
  for word in words:
    assert word in message


def test_a_missing_key_is_named():
  values = _values()
  del values['rate']
  with pytest.raises(config.UserError, match="lacks 'rate'"):
    config.from_dict(Root, values)


_TEXT = st.text('aé中 "\\', max_size=3)
_FLOAT = st.floats(allow_nan=False)
_DENSE = st.builds(Dense, hidden_dim=st.integers())
_MOE = st.builds(
  Moe,
  hidden_dim=st.integers(),
  num_experts=st.integers(4, 8),
  top_k=st.integers(1, 4),
)


@settings(max_examples=50)
@given(
  st.builds(
    Root,
    num_steps=st.integers(),
    rate=_FLOAT,
    is_packed=st.booleans(),
    name=_TEXT,
    files=st.lists(_TEXT, max_size=3).map(tuple),
    feed_forward=_DENSE | _MOE,
    weights=st.dictionaries(_TEXT, _FLOAT, max_size=3),
    stop=st.none() | st.integers(),
    layers=st.lists(_DENSE, max_size=3).map(tuple),
  )
)
def test_json_round_trip(root):
  values = json.loads(json.dumps(config.to_dict(root)))
  assert config.from_dict(Root, values) == root


def test_what_is_replaced_is_checked_as_the_users():
  @dataclasses.dataclass(frozen=True)
  class Steps:
    count: int

    def __post_init__(self):
      config.check_at_least(self, 1, 'count')

  assert config.replace(Steps(1), count=2) == Steps(2)
  with pytest.raises(config.UserError, match='count=0 must be at least 1'):
    config.replace(Steps(1), count=0)
