"""What goes in comes out."""

import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.train import source_state


def test_round_trip():
  rng = np.random.default_rng(0)
  state = {
    'bits': rng.bit_generator.state,  # Has integers of 128 bits.
    'batches': [{'tokens_BT': np.arange(6, dtype=np.int32).reshape(2, 3)}],
    'empty': {'dict': {}, 'list': [], 'array': np.zeros((0, 4), bool)},
    'scalar': np.float32(0.1),
    'on_device': jnp.ones((2,), jnp.uint32),
    'values': [None, True, -1, 0.1, 'é数'],
  }
  got = source_state.unpack(source_state.pack(state))
  assert got['bits'] == state['bits']
  assert got['values'] == state['values']
  assert got['empty']['dict'] == {} and got['empty']['list'] == []
  for a, b in [
    (got['batches'][0]['tokens_BT'], state['batches'][0]['tokens_BT']),
    (got['empty']['array'], state['empty']['array']),
    (got['scalar'], state['scalar']),
    (got['on_device'], state['on_device']),
  ]:
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


@pytest.mark.parametrize(
  'bad, name',
  [
    ({'a': {'b': object()}}, '/a/b is a object'),
    ({'a': [1, b'x']}, '/a/1 is a bytes'),
    ({'a': {1: 2}}, 'keys of /a'),
    ({'a': np.array(['x'])}, '/a is an array of <U1'),
    ({'a': jnp.ones(2, jnp.bfloat16)}, '/a is an array of bfloat16'),
  ],
)
def test_what_could_not_come_back_is_refused(bad, name):
  with pytest.raises(TypeError, match=name):
    source_state.pack(bad)


def test_damage_is_found():
  data = bytearray(source_state.pack({'a': np.arange(1000)}))
  data[len(data) // 2] ^= 1
  with pytest.raises(Exception, match='CRC'):
    source_state.unpack(bytes(data))
