"""Programs that tests compile for TPUs: devices in, jax.stages.Lowered out."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from configs import pretrain as pretrain_config
from configs.model import tiny
from pallas_kernels.flash_attention import ops as flash_attention_ops
from pallas_kernels.grouped_matmul import ops as grouped_matmul_ops
from r1jax import config
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.recipe import origin, pretrain, programs
from r1jax.sampling import filters, generate


def matmul(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """The worker's own check: rows over all devices, then a sum over them."""
  mesh = Mesh(np.array(devices), ('data',))
  rows = NamedSharding(mesh, PartitionSpec('data'))
  whole = NamedSharding(mesh, PartitionSpec())
  x_mk = jax.ShapeDtypeStruct((1024, 256), jnp.bfloat16, sharding=rows)
  w_kn = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=whole)

  @jax.jit
  def total(x_mk, w_kn):
    return jnp.sum(jnp.einsum('mk,kn->mn', x_mk, w_kn), axis=0)

  return total.lower(x_mk, w_kn)


def too_large(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Does not fit: what the report of a compile error looks like."""
  mesh = Mesh(np.array(devices), ('data',))
  whole = NamedSharding(mesh, PartitionSpec())
  x_mk = jax.ShapeDtypeStruct((1 << 18, 1 << 18), jnp.bfloat16, sharding=whole)
  return jax.jit(jnp.sin).lower(x_mk)


def abort(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Kills the process, as the compiler itself may."""
  del devices
  os.abort()


# Rows, k, n, groups: Moonlight's widths; 1408 is no whole number of tiles.
MEGABLOX = 4096, 2048, 1408, 4


def megablox(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """A grouped matmul with its gradient, on one device."""
  m, k, n, g = MEGABLOX

  @jax.jit
  def run(x_mk, w_gkn, size_g, pull_mn):
    multiply = functools.partial(
      grouped_matmul_ops.grouped_matmul,
      size_g=size_g,
      block=512,
      implementation='megablox',
    )
    out_mn, vjp = jax.vjp(multiply, x_mk, w_gkn)
    return out_mn, vjp(pull_mn)

  struct = functools.partial(
    jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices[0])
  )
  return run.lower(
    struct((m, k), jnp.bfloat16),
    struct((g, k, n), jnp.bfloat16),
    struct((g,), jnp.int32),
    struct((m, n), jnp.bfloat16),
  )


# Queries, keys, heads, and the widths of MLA's keys and values.
SPLASH = 1024, 4096, 8, 192, 128


def splash(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Attention of some of a row's queries, with its gradient, on one device."""
  T, S, H, Q, U = SPLASH

  @jax.jit
  def run(q_BTHQ, k_BSHQ, v_BSHU, segment_BS, first, pull_BTHU):
    segment_BT = jax.lax.dynamic_slice_in_dim(segment_BS, first, T, axis=1)
    out_BTHU, vjp = jax.vjp(
      lambda *args: flash_attention_ops.flash_attention(
        *args,
        segment_BT,
        segment_BS,
        first,
        scale=Q**-0.5,
        implementation='splash',
      ),
      q_BTHQ,
      k_BSHQ,
      v_BSHU,
    )
    return out_BTHU, vjp(pull_BTHU)

  struct = functools.partial(
    jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(devices[0])
  )
  return run.lower(
    struct((1, T, H, Q), jnp.bfloat16),
    struct((1, S, H, Q), jnp.bfloat16),
    struct((1, S, H, U), jnp.bfloat16),
    struct((1, S), jnp.int32),
    struct((), jnp.int32),
    struct((1, T, H, U), jnp.bfloat16),
  )


def tiny_train_step(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Pretraining the demo's model, half of the devices on each mesh axis."""
  mesh = mesh_lib.MeshConfig(data=-1, fsdp=2)
  run = dataclasses.replace(demo_run(), mesh=mesh)
  return programs.build('train', run, devices).trace().lower()


def tiny_decode_step(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Prefill and decode of the demo's model, 8 rows for each device."""
  run = demo_run()
  mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), devices)
  program = generate.make_generate(
    run.model,
    mesh,
    max_new_tokens=100,
    sampling=filters.SamplingConfig(),
    stop_ids=(1,),
    pad_id=0,
  )
  B = 8 * len(devices)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return program.lower(
    origin.abstract_variables(run.model, mesh),
    _struct(mesh, (B, 12), jnp.int32),
    _struct(mesh, (B,), jnp.int32),
    jax.ShapeDtypeStruct(
      key.shape, key.dtype, sharding=sharding.replicated(mesh)
    ),
  )


def demo_run() -> pretrain.PretrainConfig:
  """The demo's base, wide, its experts in the form for accelerators."""
  run = pretrain_config.get_config()
  run.model = tiny.get_config('wide')
  run.model.moe.implementation = 'grouped'
  return config.from_dict(pretrain.PretrainConfig, run.to_dict())


def _struct(
  mesh: Mesh, shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.ShapeDtypeStruct:
  """An array with rows first on the mesh, or a scalar."""
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.batch_sharding(mesh, len(shape))
  )
