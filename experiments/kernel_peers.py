"""Other people's kernels as cases, at the shapes of ours.

JAX's megablox (grouped matmuls), its example matmul and splash attention, and
what XLA makes of a dot and a ragged dot. Block sizes are the best of those that
were measured for these shapes and fit VMEM's default limit.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import matmul as example_matmul
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)

from pallas_kernels import common

# DeepSeek-V3's experts, gate and up side by side: rows, k, n, groups.
EXPERTS = 8192, 7168, 4096, 8
EVEN = (1024,) * 8
UNEVEN = (1227, 821, 1103, 945, 1180, 868, 1071, 977)
MATMUL = 8192
# Heads, tokens, widths of a head's keys (of which 192 are useful) and values.
ATTENTION = 8, 4096, 256, 128
_USEFUL_KEY_DIM = 192

_ROWS_TILE = 512
_TILES = {
  'megablox_512_1024_1024': (512, 1024, 1024),
  'megablox_512_1024_2048': (512, 1024, 2048),
}
# Rows of XLA's tiles in a ragged dot, read off its programs.
_RAGGED_ROWS = {('v5e', 'v5p'): 128, ('v6e', 'tpu7x'): 256}
# Elsewhere the wide tiles are over the default limit of VMEM.
_WIDE = ('v6e', 'tpu7x')


def cases() -> tuple[common.Case, ...]:
  """All peers; what one cannot do for a generation is left out."""
  return (
    *_forward('forward', EVEN),
    *_forward('forward_uneven', UNEVEN),
    *_grad_rows(),
    *_grad_weights(),
    *_matmul(),
    *_splash(),
  )


def _struct(*shape: int, dtype: jnp.dtype = jnp.bfloat16):
  return jax.ShapeDtypeStruct(shape, dtype)


def _case(
  kernel: str,
  name: str,
  implementation: str,
  function: Callable[..., jax.Array],
  args: Sequence[jax.ShapeDtypeStruct],
  flops: float,
  **more,
) -> common.Case:
  """A case whose least traffic is each of its arrays once."""
  arrays = [*args, *jax.tree.leaves(jax.eval_shape(function, *args))]
  return common.Case(
    kernel=kernel,
    name=name,
    implementation=implementation,
    function=function,
    args=tuple(args),
    flops=flops,
    hbm_bytes=sum(x.size * x.dtype.itemsize for x in arrays),
    **more,
  )


def _forward(name: str, sizes: tuple[int, ...]) -> list[common.Case]:
  """Rows times the weights of their expert."""
  m, k, n, g = EXPERTS
  make = functools.partial(_case, 'grouped_matmul', name, flops=2 * m * k * n)
  args = _struct(m, k), _struct(g, k, n), _struct(g, dtype=jnp.int32)
  found = [
    make(
      implementation,
      functools.partial(_megablox, tiles=tiles),
      args,
      scalars={'gmm': _metadata(sizes, m)},
      generations=_WIDE if tiles[-1] > 1024 else (),
    )
    for implementation, tiles in _TILES.items()
  ]
  found += [
    make(
      'ragged_dot',
      _ragged,
      args,
      scalars={'ragged-dot-none': _metadata(sizes, m, tile_rows)},
      generations=generations,
    )
    for generations, tile_rows in _RAGGED_ROWS.items()
  ]
  if sizes == EVEN:  # A dense product knows no groups.
    found.append(make('xla_dot', jnp.matmul, (args[0], _struct(k, n))))
  return found


def _grad_rows() -> list[common.Case]:
  """The gradient of the rows: times the transposed weights."""
  m, k, n, g = EXPERTS
  make = functools.partial(
    _case, 'grouped_matmul', 'grad_rows', flops=2 * m * k * n
  )
  args = _struct(m, n), _struct(g, k, n), _struct(g, dtype=jnp.int32)
  tiles = _TILES['megablox_512_1024_1024']
  return [
    make(
      'megablox_512_1024_1024',
      functools.partial(_megablox, tiles=tiles, transpose_rhs=True),
      args,
      scalars={'gmm': _metadata(EVEN, m)},
    ),
    make('xla_dot', lambda x, w: x @ w.T, (args[0], _struct(k, n))),
  ]


def _grad_weights() -> list[common.Case]:
  """The gradient of the weights: a product over each expert's rows."""
  m, k, n, g = EXPERTS
  make = functools.partial(
    _case, 'grouped_matmul', 'grad_weights', flops=2 * m * k * n
  )
  args = _struct(m, k), _struct(m, n), _struct(g, dtype=jnp.int32)
  tiles = _TILES['megablox_512_1024_1024']

  def dense(x_mk, grad_mn):
    x_gmk, grad_gmn = (y.reshape(g, m // g, -1) for y in (x_mk, grad_mn))
    return jnp.einsum('gmk,gmn->gkn', x_gmk, grad_gmn)

  return [
    make(
      'megablox_512_1024_1024',
      lambda x, grad, sizes: tgmm(x.T, grad, sizes, jnp.bfloat16, tiles),
      args,
      scalars={'gmm': _metadata(EVEN, m)},
    ),
    make('xla_dot', dense, args[:2]),
  ]


def _matmul() -> list[common.Case]:
  """A square product."""
  n = MATMUL
  make = functools.partial(
    _case,
    'matmul',
    'square_8192',
    args=(_struct(n, n), _struct(n, n)),
    flops=2 * n**3,
  )
  blocked = functools.partial(
    example_matmul.matmul, block_shape=(512, 1024), block_k=1024
  )
  return [
    make('example_512_1024_1024', blocked),
    make('xla_dot', jnp.matmul),
  ]


def _splash() -> list[common.Case]:
  """Causal attention, blocks of 1,024 queries and keys, and its gradient."""
  H, T, Q, U = ATTENTION
  block = 1024
  kernel = splash_kernel.make_splash_mha(
    mask=splash_mask.MultiHeadMask([splash_mask.CausalMask((T, T))] * H),
    block_sizes=splash_kernel.BlockSizes(
      **{
        name: block
        for way in ('', '_dkv', '_dq')
        for name in (f'block_q{way}', f'block_kv{way}')
      }
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  forward = lambda q, k, v: kernel(q, k, v)

  def vjp(q, k, v, pull):
    out, back = jax.vjp(forward, q, k, v)
    return out, back(pull)

  args = _struct(H, T, Q), _struct(H, T, Q), _struct(H, T, U)
  scalars = {
    'fwd': _mask_scalars(kernel.fwd_mask_info),
    'dq': _mask_scalars(kernel.dq_mask_info),
    'dkv': _mask_scalars(kernel.dkv_mask_info),
  }
  make = functools.partial(
    _case, 'mla_attention', implementation='splash_1024', scalars=scalars
  )
  # Half of the square of scores, and nothing of what is padded.
  pairs, width = H * T * T, _USEFUL_KEY_DIM
  products, grad_products = pairs * (width + U), pairs * (3 * width + 2 * U)
  least = 2 * H * T * (2 * width + 2 * U)
  return [
    dataclasses.replace(case, hbm_bytes=hbm_bytes)
    for case, hbm_bytes in (
      (
        make('forward_t4096_h8', function=forward, args=args, flops=products),
        least,
      ),
      (
        make(
          'vjp_t4096_h8',
          function=vjp,
          args=(*args, args[-1]),
          flops=products + grad_products,
        ),
        3 * least,  # Backward reads all again, and writes as much.
      ),
    )
  ]


def _mask_scalars(info) -> dict[int, np.ndarray]:
  """Which blocks are visited, in the order of a kernel's operands."""
  return {0: np.asarray(info.data_next), 1: np.asarray(info.block_mask)}


def _megablox(x, w, sizes, *, tiles, transpose_rhs=False):
  return gmm(x, w, sizes, x.dtype, tiles, transpose_rhs=transpose_rhs)


def _ragged(x, w, sizes):
  return jax.lax.ragged_dot(x, w, sizes)


def _metadata(
  sizes: Sequence[int], m: int, tile_rows: int = _ROWS_TILE
) -> dict[int, np.ndarray | int]:
  """What megablox derives from sizes of groups, in the order of its operands.

  The number of visits, then the groups' first rows, and of each visit its
  group and tile of rows: a tile is visited once for each group in it.
  """
  ends = np.cumsum(sizes)
  visits = [
    (group, tile)
    for group, (end, size) in enumerate(zip(ends, sizes))
    for tile in range((end - size) // tile_rows, -(-end // tile_rows))
  ]
  most = m // tile_rows + len(sizes) - 1
  columns = np.zeros((2, most), np.int32)
  columns[:, : len(visits)] = np.transpose(visits)
  return {
    0: len(visits),
    1: np.concatenate([[0], ends]),
    2: columns[0],
    3: columns[1],
    4: [0],
  }
