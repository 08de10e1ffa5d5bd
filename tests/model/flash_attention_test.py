"""Attention by blocks gives the model that attention at once gives."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from pallas_kernels.flash_attention import ops
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from tests.model import tiny

_B, _T = 2, 12
_ATOL = 1e-5


def _config(kind):
  """One dense layer: attention is what is tested."""
  c = tiny.config(num_layers=1, moe=None)
  if kind == 'mla':
    return c
  gqa = model_config.GqaConfig(4, 2, 8, c.attention.rope)
  return dataclasses.replace(c, attention=gqa)


def _rows():
  """Two documents and padding; one document and more padding."""
  rng = np.random.default_rng(0)
  tokens_BT = rng.integers(0, tiny.V, (_B, _T)).astype(np.int32)
  segment_BT, position_BT = np.zeros((2, _B, _T), np.int32)
  for b, start, end, segment in ((0, 0, 5, 1), (0, 5, 9, 2), (1, 0, 7, 1)):
    segment_BT[b, start:end] = segment
    position_BT[b, start:end] = np.arange(end - start)
  target_BTD = rng.normal(size=(_B, _T, 32)).astype(np.float32)
  target_BTD *= segment_BT[..., None] > 0
  return tokens_BT, segment_BT, position_BT, target_BTD


@pytest.mark.parametrize('kind', ['mla', 'gqa'])
def test_chunked_is_naive_with_its_gradients(kind):
  c = _config(kind)
  chunked = dataclasses.replace(c, attention_implementation='chunked')
  rows = _rows()
  hidden_BTD, grads = tiny.pull(chunked, tiny.variables(c), *rows)
  expected_BTD, expected = tiny.pull(c, tiny.variables(c), *rows)
  keep_BT = rows[1] > 0
  np.testing.assert_allclose(
    hidden_BTD[keep_BT], expected_BTD[keep_BT], atol=_ATOL
  )
  tiny.assert_trees_close(grads, expected, atol=_ATOL)


def test_splash_is_naive_with_its_gradients(monkeypatch):
  c = _config('mla')
  splash = dataclasses.replace(c, attention_implementation='splash')
  # The same documents in rows of 128 tokens.
  tokens_BT, segment_BT, position_BT, target_BTD = _rows()
  wide = lambda x: np.pad(x, [(0, 0), (0, 128 - _T)] + [(0, 0)] * (x.ndim - 2))
  rows = tuple(map(wide, (tokens_BT, segment_BT, position_BT, target_BTD)))
  variables = tiny.variables(c)
  interpreted = functools.partial(ops.flash_attention, interpret=True)
  monkeypatch.setattr(ops, 'flash_attention', interpreted)
  hidden_BTD, grads = tiny.pull(splash, variables, *rows)
  expected_BTD, expected = tiny.pull(c, variables, *rows)
  keep_BT = rows[1] > 0
  np.testing.assert_allclose(
    hidden_BTD[keep_BT], expected_BTD[keep_BT], atol=_ATOL
  )
  tiny.assert_trees_close(grads, expected, atol=_ATOL)


@pytest.mark.parametrize('kind', ['mla', 'gqa'])
def test_devices_with_a_part_of_each_row_give_the_same(kind):
  c = _config(kind)
  chunked = dataclasses.replace(c, attention_implementation='chunked')
  mesh = mesh_lib.make_mesh(
    mesh_lib.MeshConfig(data=1, context=2), jax.devices()[:2]
  )
  tokens_BT, segment_BT, position_BT, _ = _rows()

  def run(variables, tokens_BT, segment_BT, position_BT):
    out = transformer.Transformer(chunked).apply(
      variables, tokens_BT, segment_BT=segment_BT, position_BT=position_BT
    )
    return sharding.join_length(out.hidden_BTD)

  program = sharding.per_device(
    run, mesh, ('whole', 'rows', 'rows', 'rows'), 'rows'
  )
  variables = tiny.variables(c)
  hidden_BTD = jax.jit(program)(variables, tokens_BT, segment_BT, position_BT)
  expected_BTD = tiny.apply(
    c, variables, tokens_BT, segment_BT, position_BT
  ).hidden_BTD
  keep_BT = segment_BT > 0
  np.testing.assert_allclose(
    hidden_BTD[keep_BT], expected_BTD[keep_BT], atol=_ATOL
  )


@pytest.mark.parametrize('implementation', ['naive', 'chunked'])
def test_only_naive_has_a_matrix_of_scores(implementation):
  c = dataclasses.replace(
    _config('mla'), attention_implementation=implementation
  )
  shapes = jax.eval_shape(functools.partial(tiny.variables, c))
  tokens_BT = jax.ShapeDtypeStruct((1, 1024), np.int32)
  lowered = jax.jit(transformer.Transformer(c).apply).lower(shapes, tokens_BT)
  assert ('1024x1024' in lowered.as_text()) == (implementation == 'naive')


def test_decoding_does_not_depend_on_it():
  c = _config('mla')
  chunked = dataclasses.replace(c, attention_implementation='chunked')
  rows = _rows()[:3]
  hidden = []
  for config in (c, chunked):
    cache = transformer.make_cache(config, batch=_B, length=_T + 3)
    out = tiny.apply(config, tiny.variables(c), *rows, cache=cache, decode=True)
    hidden.append(out.hidden_BTD)
  np.testing.assert_array_equal(*hidden)
