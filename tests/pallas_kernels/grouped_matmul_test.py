"""Grouped matmul: all forms and their gradients equal the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul import (
  blocks as blocks_lib,
)
from pallas_kernels.grouped_matmul import cases, megablox, ops, plan

# (k, n, rows, rows a block, blocks of each group)
SHAPES = (
  (4, 6, 8, 2, (2, 1, 1)),
  (4, 6, 8, 2, (1, 0, 3)),  # Group 1 is empty.
  (4, 6, 12, 2, (1, 0, 3)),  # Two blocks hold padding only.
  (5, 3, 1, 1, (0, 1)),  # A single row.
  (3, 3, 8, 4, (2,)),
  (3, 3, 8, 4, (0, 0)),  # Nothing but padding.
)


@functools.partial(
  jax.jit, static_argnames=('block', 'blocks', 'implementation', 'interpret')
)
def _with_gradients(x_mk, w_gkn, size_g, pull_mn, **options):
  def run(x_mk, w_gkn):
    return ops.grouped_matmul(x_mk, w_gkn, size_g, **options)

  out_mn, vjp = jax.vjp(run, x_mk, w_gkn)
  return out_mn, vjp(pull_mn)


def _inputs(m, k, n, g):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return draw(m, k), draw(g, k, n), draw(m, n)


def _blocks(heights, width, chunk, parts):
  product = blocks_lib.BlockSizes(heights, width, chunk, parts)
  gradient = blocks_lib.GradBlockSizes(heights, width, width, chunk, parts)
  return blocks_lib.Blocks(product, product, gradient)


@pytest.mark.parametrize('implementation', ['xla', 'megablox', 'pallas'])
@pytest.mark.parametrize(('k', 'n', 'm', 'block', 'blocks'), SHAPES)
def test_all_forms_and_their_vjps_are_the_references(
  k, n, m, block, blocks, implementation
):
  x_mk, w_gkn, pull_mn = _inputs(m, k, n, len(blocks))
  size_g = block * np.int32(blocks)
  rows = size_g.sum()
  # What comes after the last group is never read: combine pulls back zeros.
  pull_mn[rows:] = 0
  run = functools.partial(
    _with_gradients, x_mk, w_gkn, size_g, pull_mn, block=block, interpret=True
  )
  out_mn, (grad_mk, grad_gkn) = run(implementation=implementation)
  expected_mn, (expected_mk, expected_gkn) = run(implementation='reference')
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  close(out_mn[:rows], expected_mn[:rows])
  close(grad_mk[:rows], expected_mk[:rows])
  close(grad_gkn, expected_gkn)
  assert np.isfinite(out_mn[-1]).all()
  assert np.isfinite(grad_mk[-1]).all()
  group_m = np.repeat(np.arange(len(blocks)), size_g)
  for i, group in enumerate(group_m):
    close(out_mn[i], x_mk[i] @ w_gkn[group])


def test_megablox_tiles_widths_that_are_no_whole_tiles():
  k, n = 1280, 1408  # Two tiles of 640, of 768 and 640; three of 512 each.
  x_mk, w_gkn, pull_mn = _inputs(4, k, n, 2)
  run = functools.partial(
    _with_gradients, x_mk, w_gkn, np.int32([0, 4]), pull_mn, block=4
  )
  out = run(implementation='megablox', interpret=True)
  expected = run(implementation='reference')
  for got, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
    np.testing.assert_allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize(
  ('size', 'most', 'tile'),
  [(7168, 1024, 1024), (2048, 1024, 1024), (1408, 1024, 768), (40, 1024, 40)],
)
def test_tiles_are_equal_and_whole_lanes(size, most, tile):
  assert megablox._tile(size, most) == tile


@pytest.mark.parametrize('implementation', ['megablox', 'pallas'])
def test_kernels_accumulate_bfloat16_in_float32(implementation):
  x_mk, w_gkn, pull_mn = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), _inputs(96, 256, 4, 2)
  )
  size_g = np.int32([48, 48])  # Three tiles each.
  options = {'blocks': _blocks((16,), 128, 128, 1)}
  out = _with_gradients(
    x_mk,
    w_gkn,
    size_g,
    pull_mn,
    block=16,
    implementation=implementation,
    interpret=True,
    **(options if implementation == 'pallas' else {}),
  )
  expected = _with_gradients(
    *(jnp.float32(x) for x in (x_mk, w_gkn)),
    size_g,
    jnp.float32(pull_mn),
    block=16,
    implementation='reference',
  )
  for got, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(expected)):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), wanted, rtol=2**-7, atol=0.01)


# Of interpreted kernels: reads before a copy is there, writes before it left.
_RACES = pltpu.InterpretParams(detect_races=True)


def _has_races():
  return interpret_pallas_call.races.races_found


# k, n, block, rows of each group, sizes of tiles.
PALLAS_SHAPES = (
  # Groups share tiles of memory (8 rows), of which one has four groups; two
  # heights, two tiles of columns of two products each.
  (512, 512, 1, (0, 41, 3, 0, 1, 2, 60), _blocks((32, 16), 256, 128, 1)),
  # Groups in whole tiles of memory; two cores; no whole lanes.
  (250, 200, 8, (40, 0, 24), _blocks((24, 8), 128, 128, 2)),
)


@pytest.mark.parametrize(('k', 'n', 'block', 'sizes', 'blocks'), PALLAS_SHAPES)
def test_pallas_takes_groups_of_any_size_without_a_race(
  k, n, block, sizes, blocks
):
  size_g = np.int32(sizes)
  rows = size_g.sum()
  m = rows + 2 * block
  x_mk, w_gkn, pull_mn = _inputs(m, k, n, len(sizes))
  # What is behind the last group belongs to nobody.
  is_row_m1 = np.arange(m)[:, None] < rows

  def run(nobodys, **options):
    return _with_gradients(
      np.where(is_row_m1, x_mk, nobodys),
      w_gkn,
      size_g,
      np.where(is_row_m1, pull_mn, nobodys),
      block=block,
      **options,
    )

  expected_mn, (expected_mk, expected_gkn) = run(
    np.float32(0), implementation='reference'
  )
  out_mn, (grad_mk, grad_gkn) = run(
    np.float32(np.nan),
    blocks=blocks,
    implementation='pallas',
    interpret=_RACES,
  )
  close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
  close(out_mn[:rows], expected_mn[:rows])
  close(grad_mk[:rows], expected_mk[:rows])
  close(grad_gkn, expected_gkn)
  assert np.isfinite(out_mn[-1]).all()
  assert np.isfinite(grad_mk[-1]).all()
  assert not _has_races()


# Room for rows, rows of each group, sizes of tiles (k = 256, n = 384).
MASKED_SHAPES = (
  (40, (0, 40, 1, 17), blocks_lib.BlockSizes((16, 8), 384, 128, 1)),
  (3, (3, 0, 2), None),  # No whole tile of memory.
  (8, (0, 0), None),
)


@pytest.mark.parametrize(('m', 'sizes', 'blocks'), MASKED_SHAPES)
def test_masked_rows_are_the_references_without_a_race(m, sizes, blocks):
  g, size_g = len(sizes), np.int32(sizes)
  x_mk, w_gkn, _ = _inputs(g * m, 256, 384, g)
  is_row_gm1 = (np.arange(m) < size_g[:, None])[..., None]
  x_gmk = np.where(is_row_gm1, x_mk.reshape(g, m, -1), np.float32(np.nan))
  multiply = ops.grouped_matmul_masked
  expected_gmn = multiply(x_gmk, w_gkn, size_g, implementation='reference')
  out_gmn = multiply(
    x_gmk,
    w_gkn,
    size_g,
    blocks=blocks,
    implementation='pallas',
    interpret=_RACES,
  )
  assert out_gmn.shape == (g, m, 384)
  for i, size in enumerate(sizes):
    np.testing.assert_allclose(
      out_gmn[i, :size], expected_gmn[i, :size], atol=1e-4
    )
    np.testing.assert_allclose(
      expected_gmn[i, :size], x_gmk[i, :size] @ w_gkn[i], atol=1e-4
    )
  assert not _has_races()


@pytest.mark.parametrize('heights', [(512, 416, 192, 128), (64, 48), (16,)])
def test_plans_cover_each_group_once_with_tiles_of_its_own(heights):
  align = 16
  rng = np.random.default_rng(1)
  size_g = rng.integers(0, 3 * heights[0], 20)
  size_g[[3, 4, 19]] = 0
  start_g = np.cumsum(size_g) - size_g
  for visit_empty in (False, True):
    made = plan.make_plan(
      jnp.int32(start_g),
      jnp.int32(size_g),
      size_g.sum(),
      heights=heights,
      align=align,
      visit_empty=visit_empty,
    )
    groups = [g for g in range(20) if visit_empty or size_g[g]]
    assert made.num_visits == len(groups)
    assert made.num_tiles <= len(made.kind_t)
    assert made.group_v[: len(groups)].tolist() == groups
    seen = []
    for t in range(int(made.num_tiles[0])):
      visit, kind, first, rows, begin, end = (
        int(x[t])
        for x in (
          made.visit_t,
          made.kind_t,
          made.first_t,
          made.rows_t,
          made.begin_t,
          made.end_t,
        )
      )
      group = groups[visit]
      assert first % align == rows % align == 0
      assert rows <= (*heights, 0)[kind]
      assert made.is_first_t[t] == (t == 0 or made.visit_t[t - 1] != visit)
      assert made.is_last_t[t] == (
        t == made.num_tiles - 1 or made.visit_t[t + 1] != visit
      )
      if size_g[group] == 0:
        assert rows == 0
        continue
      assert 0 <= begin < align and rows - align < end <= rows
      seen += [(group, row) for row in range(first + begin, first + end)]
    assert seen == [
      (group, row)
      for group in groups
      for row in range(start_g[group], start_g[group] + size_g[group])
    ]


def test_plans_cut_at_the_least_cost():
  # 1,000 rows: 416 thrice is too much, 512 and 512 cheaper than smaller ones.
  pieces_rp, length_r = plan._pieces((512, 416, 192, 128))
  cut = lambda rows: pieces_rp[rows // 32, : length_r[rows // 32]].tolist()
  assert cut(992) == [0, 0]
  assert cut(832) == [1, 1]
  assert cut(928) == [0, 1]
  assert cut(32) == [3]
  assert cut(0) == []


@pytest.mark.parametrize(
  ('version', 'generation'),
  [
    (pltpu.ChipVersion.TPU_V5E, 'v5e'),
    (pltpu.ChipVersion.TPU_V5P, 'v5p'),
    (pltpu.ChipVersion.TPU_V6E, 'v6e'),
    (pltpu.ChipVersion.TPU_7X, 'tpu7x'),
  ],
)
def test_chips_are_as_jax_says(version, generation):
  chip = blocks_lib.CHIPS[generation]
  info = pltpu.get_tpu_info_for_chip(version, chip.cores)
  assert chip == blocks_lib.Chip(
    info.vmem_capacity_bytes, info.mxu_column_size, info.num_cores
  )


@pytest.mark.parametrize('generation', [*blocks_lib.CHIPS, 'any'])
@pytest.mark.parametrize(
  ('m', 'k', 'n', 'itemsize'),
  [
    (8192, 7168, 4096, 2),
    (8192, 2048, 7168, 2),
    (4096, 7168, 4096, 4),
    (16, 128, 256, 2),
    (1024, 2048, 1408, 2),
    (1024, 18432, 7168, 2),
  ],
)
def test_default_tiles_fit_the_shapes_and_vmem(m, k, n, itemsize, generation):
  chip = blocks_lib.CHIPS.get(generation, blocks_lib.ANY_CHIP)
  blocks = blocks_lib.default(m, k, n, itemsize, 1, chip)
  for sizes, depth, width in (
    (blocks.forward, k, n),
    (blocks.grad_x, n, k),
  ):
    sizes.check(width, itemsize)
    used = sizes.vmem_bytes(depth, itemsize)
    assert used < sizes.vmem_limit_bytes < chip.vmem_bytes
  blocks.grad_w.check(k, n, itemsize)
  used = blocks.grad_w.vmem_bytes(itemsize)
  assert used < blocks.grad_w.vmem_limit_bytes < chip.vmem_bytes


def test_cases_have_names_of_their_own_and_can_be_traced():
  found = {(case.generations, case.name): case for case in cases.cases()}
  assert len(found) == len(cases.cases()) == 14 * len(blocks_lib.CHIPS)
  for name in ('forward', 'grad_rows', 'grad_weights', 'masked'):
    case = found[('v5p',), name]
    out = jax.eval_shape(case.function, *case.args)
    assert out.dtype == case.dtype


@pytest.mark.parametrize(
  ('x_shape', 'w_shape', 'implementation', 'message'),
  [
    ((5, 4), (3, 4, 6), 'xla', '5 rows are no whole number of blocks of 2'),
    ((4, 5), (3, 4, 6), 'xla', 'k=5 of the rows is not k=4'),
    ((4, 4), (3, 4, 6), 'mosaic', "implementation='mosaic'"),
  ],
)
def test_what_does_not_fit_raises(x_shape, w_shape, implementation, message):
  with pytest.raises(ValueError, match=message):
    ops.grouped_matmul(
      np.zeros(x_shape),
      np.zeros(w_shape),
      np.zeros(3, np.int32),
      block=2,
      implementation=implementation,
    )


@pytest.mark.parametrize(
  ('dtype', 'blocks', 'message'),
  [
    (jnp.bfloat16, None, 'weights of float32'),
    (jnp.int8, None, 'rows of int8'),
    (jnp.float32, _blocks((8, 16), 128, 128, 1), 'heights=.* must fall'),
    (jnp.float32, _blocks((12,), 128, 128, 1), 'multiples of 8'),
    (jnp.float32, _blocks((8,), 128, 96, 1), 'chunk=96 does not divide'),
    (jnp.float32, _blocks((8,), 128, 128, 2), 'width . parts=256 does not'),
  ],
)
def test_what_does_not_fit_pallas_raises(dtype, blocks, message):
  with pytest.raises(ValueError, match=message):
    ops.grouped_matmul(
      jnp.zeros((8, 128), dtype),
      jnp.zeros((2, 128, 128)),
      np.int32([4, 4]),
      block=4,
      implementation='pallas',
      blocks=blocks,
    )


@pytest.mark.parametrize(
  ('x_shape', 'implementation', 'message'),
  [
    ((3, 4, 8), 'pallas', '3 groups of rows are not 2 of weights'),
    ((2, 4, 9), 'pallas', 'k=9 of the rows is not k=8'),
    ((2, 4, 8), 'xla', "implementation='xla'"),
  ],
)
def test_what_does_not_fit_masked_raises(x_shape, implementation, message):
  with pytest.raises(ValueError, match=message):
    ops.grouped_matmul_masked(
      np.zeros(x_shape),
      np.zeros((2, 8, 8)),
      np.zeros(2, np.int32),
      implementation=implementation,
    )
