"""Our kernels at small shapes: what `.ci/run` compiles for one generation."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.expert_all_to_all import ops as expert_all_to_all_ops
from pallas_kernels.grouped_matmul import ops as grouped_matmul_ops
from pallas_kernels.linear_cross_entropy import ops as linear_cross_entropy_ops
from pallas_kernels.linear_fp8 import ops as linear_fp8_ops
from pallas_kernels.mla_attention import ops as mla_attention_ops
from pallas_kernels.mla_decode import ops as mla_decode_ops
from pallas_kernels.sparse_mla import ops as sparse_mla_ops

_struct = jax.ShapeDtypeStruct


def lower(
  devices: Sequence[jax.Device], function: Callable, args: Sequence
) -> jax.stages.Lowered:
  """A function of arrays on the first device, of whose kind kernels ask."""
  mesh = Mesh(np.array(devices[:1]), ('x',))
  here = NamedSharding(mesh, PartitionSpec())
  placed = jax.tree.map(
    lambda x: _struct(x.shape, x.dtype, sharding=here), tuple(args)
  )
  with jax.set_mesh(mesh):
    return jax.jit(function).lower(*placed)


def linear_cross_entropy(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """600 tokens and 4,100 columns, which are no whole tiles, with gradients."""

  def run(x_mD, w_DV, target_m, pull_m):
    (logp_m, entropy_m), vjp = jax.vjp(
      lambda x, w: linear_cross_entropy_ops.linear_cross_entropy(
        x, w, target_m, implementation='pallas'
      ),
      x_mD,
      w_DV,
    )
    return logp_m, entropy_m, vjp((pull_m, jnp.zeros_like(pull_m)))

  return lower(
    devices,
    run,
    (
      _struct((600, 256), jnp.bfloat16),
      _struct((256, 4100), jnp.bfloat16),
      _struct((600,), jnp.int32),
      _struct((600,), jnp.float32),
    ),
  )


def mla_attention(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Four heads of 1,024 tokens, with its gradients."""

  def run(q_BTHQ, k_BSHN, rope_BSR, v_BSHU, segment_BT, pull_BTHU):
    out_BTHU, vjp = jax.vjp(
      lambda *args: mla_attention_ops.mla_attention(
        *args, segment_BT, segment_BT, scale=192**-0.5, implementation='pallas'
      ),
      q_BTHQ,
      k_BSHN,
      rope_BSR,
      v_BSHU,
    )
    return out_BTHU, vjp(pull_BTHU)

  B, T, H = 1, 1024, 4
  heads = lambda width: _struct((B, T, H, width), jnp.bfloat16)
  return lower(
    devices,
    run,
    (
      heads(192),
      heads(128),
      _struct((B, T, 64), jnp.bfloat16),
      heads(128),
      _struct((B, T), jnp.int32),
      heads(128),
    ),
  )


def mla_decode(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """Two tokens each of 8 sequences of up to 2,048."""
  B, T, H, P, pages = 8, 2, 16, 128, 16
  N = B * pages
  cache = mla_decode_ops.LatentCache(
    _struct((N, P, 512), jnp.bfloat16),
    _struct((N, P // 4, 256), jnp.bfloat16),
    None,
  )

  def run(q_BTHC, cache, block_table_Bn, length_B):
    return mla_decode_ops.mla_decode(
      q_BTHC,
      cache,
      block_table_Bn,
      length_B,
      value_dim=512,
      scale=192**-0.5,
      implementation='pallas',
    )

  return lower(
    devices,
    run,
    (
      _struct((B, T, H, 640), jnp.bfloat16),
      cache,
      _struct((B, pages), jnp.int32),
      _struct((B,), jnp.int32),
    ),
  )


def grouped_matmul(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """1,000 rows of four groups of any sizes, with both gradients."""

  def run(x_mk, w_gkn, size_g, pull_mn):
    out_mn, vjp = jax.vjp(
      lambda x, w: grouped_matmul_ops.grouped_matmul(
        x, w, size_g, block=1, implementation='pallas'
      ),
      x_mk,
      w_gkn,
    )
    return out_mn, vjp(pull_mn)

  return lower(
    devices,
    run,
    (
      _struct((1000, 256), jnp.bfloat16),
      _struct((4, 256, 512), jnp.bfloat16),
      _struct((4,), jnp.int32),
      _struct((1000, 512), jnp.bfloat16),
    ),
  )


def linear_fp8(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """A SwiGLU with its gradients: quantised twice over, and all its products."""
  return _swiglu_fp8(devices, (), lambda: None)


def grouped_fp8(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """The same of four groups of 128 rows and more."""
  size_g = jnp.int32([128, 0, 256, 128])
  return _swiglu_fp8(
    devices, (4,), lambda: linear_fp8_ops.Groups(size_g, block=128)
  )


def _swiglu_fp8(devices, groups, make_groups):
  m, k, n = 512, 256, 384

  def run(x_mk, gate, up, down, pull_mk):
    y_mk, vjp = jax.vjp(
      lambda *args: linear_fp8_ops.swiglu(
        *args,
        make_groups(),
        recipe=linear_fp8_ops.Recipe(implementation='pallas'),
      ),
      *(x_mk, gate, up, down),
    )
    return y_mk, vjp(pull_mk)

  rows = _struct((m, k), jnp.bfloat16)
  weight = lambda *shape: _struct((*groups, *shape), jnp.float32)
  return lower(
    devices, run, (rows, weight(k, n), weight(k, n), weight(n, k), rows)
  )


def sparse_mla(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """The indexer, its choice, and attention of 128 tokens to 256 of 1,024."""
  T, S, J, I, H, C, R = 128, 1024, 16, 128, 16, 512, 64

  def run(q_BTJI, k_BSI, weight_BTJ, q_BTHC, latent_BSC):
    end_BT = jnp.arange(S - T + 1, S + 1)[None]
    logits_BTS = sparse_mla_ops.index_logits(
      q_BTJI, k_BSI, weight_BTJ, end_BT=end_BT
    )
    index_BTK = sparse_mla_ops.top_k(logits_BTS, 256)
    return sparse_mla_ops.sparse_mla(
      q_BTHC, latent_BSC, index_BTK, value_dim=C, scale=192**-0.5
    )

  return lower(
    devices,
    run,
    (
      _struct((1, T, J, I), jnp.bfloat16),
      _struct((1, S, I), jnp.bfloat16),
      _struct((1, T, J), jnp.float32),
      _struct((1, T, H, C + 128), jnp.bfloat16),
      _struct((1, S, C + R), jnp.bfloat16),
    ),
  )


def expert_all_to_all(devices: Sequence[jax.Device]) -> jax.stages.Lowered:
  """FP8 rows and their scales in tiles, and single bfloat16 rows."""
  mesh = Mesh(np.array(devices).reshape(2, -1), ('data', 'expert'))
  R = mesh.shape['expert']
  rows = PartitionSpec(('data', 'expert'))

  def run(q_nD, scale_nt, x_nD, *spans):
    exchange = lambda arrays, multiple: expert_all_to_all_ops.ragged_exchange(
      arrays,
      2 * 512,
      *spans,
      axis_name='expert',
      implementation='pallas',
      multiple=multiple,
    )
    return exchange((q_nD, scale_nt), 8), exchange(x_nD, 1)

  def struct(n, *width, dtype=jnp.int32):
    here = NamedSharding(mesh, rows)
    return _struct((mesh.size * n, *width), dtype, sharding=here)

  shared = jax.shard_map(
    run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
  )
  return jax.jit(shared).lower(
    struct(512, 1024, dtype=jnp.float8_e4m3fn),
    struct(512, 8, dtype=jnp.float32),
    struct(512, 1024, dtype=jnp.bfloat16),
    *[struct(R)] * 5,
  )
