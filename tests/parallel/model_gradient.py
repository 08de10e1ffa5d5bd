"""The gradient of pretraining's loss on any mesh, in a pipeline or not."""

import dataclasses
import functools
import math

import jax
import numpy as np

from r1jax import types
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.recipe import pipelined, pretrain
from r1jax.train import step
from tests.model import tiny

_B, _T = 8, 8
CONFIG = dataclasses.replace(tiny.config(), num_layers=2, mtp_depth=1)


def batch():
  """Rows of two packed documents and padding, other lengths in each row."""
  rng = np.random.default_rng(0)
  segment_BT, position_BT = np.zeros((2, _B, _T), np.int32)
  for b in range(_B):
    first, end = b % 3 + 2, _T - b % 2
    segment_BT[b, :end] = [1] * first + [2] * (end - first)
    position_BT[b, :end] = [*range(first), *range(end - first)]
  mask_BT = ((position_BT > 0) & (segment_BT > 0)).astype(np.float32)
  return types.Batch(
    tokens_BT=rng.integers(0, tiny.V, (_B, _T)).astype(np.int32),
    mask_BT=mask_BT,
    segment_BT=segment_BT,
    position_BT=position_BT,
    num_tokens=mask_BT.sum(),
    num_sequences=np.float32(2 * _B),
  )


_SPARSE = dataclasses.replace(
  CONFIG,
  num_dense_layers=2,
  moe=None,
  mtp_depth=0,
  attention=dataclasses.replace(
    CONFIG.attention,
    indexer=model_config.IndexerConfig(num_heads=2, head_dim=16, top_k=4),
  ),
)
_GQA = dataclasses.replace(
  CONFIG,
  mtp_depth=0,
  tie_embeddings=True,
  attention=model_config.GqaConfig(
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=model_config.RopeConfig(theta=10000.0, interleaved=False),
    qkv_bias=True,
    qk_norm=True,
  ),
)
_ONE_LAYER = dataclasses.replace(
  CONFIG, num_layers=1, num_dense_layers=0, mtp_depth=0
)
# Attention a piece at a time, and tokens to their experts.
_CHUNKED = dataclasses.replace(
  CONFIG,
  attention_implementation='chunked',
  moe=dataclasses.replace(
    CONFIG.moe, exchange=model_config.ExchangeConfig(tokens_at_once=4)
  ),
)
_DEEP = dataclasses.replace(CONFIG, num_layers=5, mtp_depth=0)
CONFIGS = {
  'deep': _DEEP,
  'mla': CONFIG,
  'one_layer': _ONE_LAYER,
  'sparse': _SPARSE,
  'gqa': _GQA,
  'chunked': _CHUNKED,
}


def program(name, num_microbatches=1, schedule=None, **mesh):
  """The gradient of a loss with MTP and balance terms, and its arguments."""
  config = CONFIGS[name]
  mesh = {'data': 1, **mesh}
  devices = jax.devices()[: math.prod(mesh.values())]
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(**mesh), devices)
  shardings = transformer.shardings(config, mesh)
  variables = jax.device_put(tiny.variables(config), shardings)
  loss = pretrain.make_loss(config, mtp_coef=0.3, balance_coef=0.1)
  options = {'num_microbatches': num_microbatches}
  if schedule is None:
    gradient = step.make_gradient(
      loss, mesh=mesh, shardings=shardings, **options
    )
  else:
    gradient = pipelined.make_gradient(
      loss, schedule, mesh, shardings, **options
    )
  return jax.jit(gradient), variables, sharding.put_batch(mesh, batch())


@functools.cache
def loss_and_gradients(name, **options):
  gradient, *args = program(name, **options)
  return jax.device_get(gradient(*args))
