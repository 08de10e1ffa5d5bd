"""FLOPs of a jaxpr against sums by hand and against XLA's own count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.grouped_matmul import ops
from r1jax import types
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import flops, sharding
from r1jax.recipe import pretrain


def _count(function, *shapes, num_devices=1):
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  traced = jax.jit(function).trace(*args)
  return flops.per_device(traced.jaxpr, num_devices)


def test_products_by_hand():
  product = lambda x, w: jnp.einsum('bmk,bkn->bmn', x, w)
  assert _count(product, (5, 2, 3), (5, 3, 7)) == 2 * 5 * 2 * 3 * 7


def test_a_scan_counts_its_turns_and_its_gradient_the_recomputation():
  def run(x_mk, w_kk):
    body = lambda x_mk, _: (jnp.tanh(x_mk @ w_kk), None)
    x_mk, _ = jax.lax.scan(jax.checkpoint(body), x_mk, None, length=6)
    return x_mk.sum()

  once = 2 * 4 * 8 * 8
  assert _count(run, (4, 8), (8, 8)) == 6 * once
  # Forward, again, and one product for each of two gradients.
  gradient = jax.grad(run, argnums=(0, 1))
  assert _count(gradient, (4, 8), (8, 8)) == 6 * 4 * once


def test_the_dearest_branch_counts():
  def run(x_kk):
    return jax.lax.cond(x_kk[0, 0] > 0, lambda x: x @ x, lambda x: x, x_kk)

  assert _count(run, (8, 8)) == 2 * 8**3


def test_what_is_written_for_one_device_is_not_divided():
  mesh = Mesh(np.array(jax.devices()[:4]), ('x',))
  product = lambda x, w: x @ w
  sharded = jax.shard_map(
    product, mesh=mesh, in_specs=(P('x'), P()), out_specs=P('x')
  )
  shapes = (16, 8), (8, 8)
  assert _count(sharded, *shapes, num_devices=4) == 2 * 16 * 8 * 8 / 4
  assert _count(product, *shapes, num_devices=4) == 2 * 16 * 8 * 8 / 4


@pytest.mark.parametrize('estimate', [None, 123])
def test_a_kernel_counts_what_it_says_or_its_grid(estimate):
  def kernel(x_ref, o_ref):
    o_ref[...] = x_ref[...] @ x_ref[...]

  cost = estimate and pl.CostEstimate(
    flops=estimate, bytes_accessed=0, transcendentals=0
  )

  def run(x_mk):
    spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
    return pl.pallas_call(
      kernel,
      grid=(3,),
      in_specs=[spec],
      out_specs=spec,
      out_shape=jax.ShapeDtypeStruct(x_mk.shape, x_mk.dtype),
      cost_estimate=cost,
    )(x_mk)

  assert _count(run, (24, 8)) == (estimate or 3 * 2 * 8**3)


@pytest.mark.parametrize('implementation', ['megablox', 'pallas'])
def test_a_grouped_product_counts_the_rows_it_finds(implementation):
  def run(x_mk, w_gkn):
    return ops.grouped_matmul(
      x_mk,
      w_gkn,
      size_g=jnp.array([128, 0]),
      block=128,
      implementation=implementation,
      interpret=False,
    )

  shapes = [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for shape in ((512, 256), (2, 256, 384))
  ]
  jaxpr = jax.jit(run).trace(*shapes).jaxpr
  once = 2 * 256 * 384
  assert flops.per_device(jaxpr, 1) == 512 * once
  assert flops.per_device(jaxpr, 1, num_rows=96) == pytest.approx(96 * once)
  assert flops.per_device(jaxpr, 1, num_rows=1000) == 512 * once


def test_rows_of_a_ragged_product_meet_one_matrix_each():
  run = lambda x, w: jax.lax.ragged_dot(x, w, jnp.array([4, 12]))
  assert _count(run, (16, 8), (2, 8, 5)) == 2 * 16 * 8 * 5


def _wide(scan_layers):
  return model_config.ModelConfig(
    vocab_size=1024,
    embed_dim=512,
    num_layers=3,
    num_dense_layers=3,
    dense_dim=2048,
    attention=model_config.GqaConfig(
      num_heads=4,
      num_kv_heads=2,
      head_dim=128,
      rope=model_config.RopeConfig(theta=1e4, interleaved=False),
    ),
    moe=None,
    scan_layers=scan_layers,
  )


def _batch(*shape):
  struct = jax.ShapeDtypeStruct
  ints, floats = struct(shape, jnp.int32), struct(shape, jnp.float32)
  scalar = struct((), jnp.float32)
  return types.Batch(ints, floats, ints, ints, scalar, scalar)


def test_a_gradient_agrees_with_xla_unrolled():
  """XLA counts a loop's body once, so only an unrolled model compares."""
  counts = {}
  for scan_layers in (False, True):
    config = _wide(scan_layers)
    loss = pretrain.make_loss(config, mtp_coef=0.0, balance_coef=0.0)
    shapes = sharding.unbox(
      jax.eval_shape(lambda c=config: transformer.init(c, jax.random.key(0)))
    )
    batch = _batch(4, 128)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    traced = gradient.trace(shapes, batch)
    counts[scan_layers] = flops.per_device(traced.jaxpr, 1)
    if not scan_layers:
      known = traced.lower().compile().cost_analysis()['flops']
  assert counts[True] == pytest.approx(counts[False], rel=1e-3)
  # XLA adds what is no product: norms, softmax, rotation.
  assert counts[False] < known < 1.05 * counts[False]
