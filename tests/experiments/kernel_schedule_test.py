"""The reader of schedules: recorded ones, and one rule at a time."""

import pathlib

import numpy as np
import pytest

from experiments import bench_kernels, kernel_schedule
from r1jax.parallel import chips

_DATA = pathlib.Path(__file__).parents[1] / 'data' / 'kernel_schedule'
_SIZES = [1, 0, 2, 3]


def _recorded(name: str) -> kernel_schedule.Program:
  read = lambda kind: (_DATA / f'{name}-{kind}.txt').read_text()
  return kernel_schedule.parse(read('packed-bundles-post-ra'), read('original'))


def _run(*bundles: str, scalars=None, generation='v6e'):
  """Counts of bundles written as in a dump, without number and braces."""
  lines = [f' {i:#5x}   :  {{ {text} }}' for i, text in enumerate(bundles)]
  program = kernel_schedule.parse('\n'.join(lines), '')
  return kernel_schedule.run(program, generation, scalars or {})


def test_a_recorded_kernel_on_both_cores():
  # 64 rows in four blocks, of which those of positive size are multiplied by
  # a [128, 128] of bfloat16 into float32; v5p splits the grid over two cores.
  program = _recorded('some_rows_v5p')
  assert program.is_split
  # Two buffers of 16 rows in and out, one of weights, and 72 rows of its own.
  buffers = 2 * 16 * 128 * 2 + 128 * 128 * 2 + 2 * 16 * 128 * 4
  assert program.vmem_bytes == buffers + 72 * 128 * 4
  counts = [
    kernel_schedule.run(program, 'v5p', {0: _SIZES}, core) for core in (0, 1)
  ]
  for core, n in zip(counts, (1, 2)):
    assert not core.unknown and not core.spills
    flops = kernel_schedule.matmul_flops('v5p', core.matmuls)
    assert flops == n * 2 * 16 * 128 * 128
    assert core.dma_bytes == {
      'hbm_to_smem': 512,
      'hbm_to_vmem': 128 * 128 * 2 + 2 * 16 * 128 * 2,
      'vmem_to_hbm': 2 * 16 * 128 * 4,
    }
  # What the second core has more is a region: from behind the four delay
  # slots of the branch at 0x8e to its target, 0x13a.
  assert counts[1].cycles - counts[0].cycles == 0x13A - (0x8E + 1 + 4)


def test_without_its_scalars_a_region_is_unknown_and_runs():
  counts = kernel_schedule.run(_recorded('some_rows_v5p'), 'v5p', {})
  assert counts.unknown == {0x8E: 2}
  assert counts.matmuls == {'vmatmul.bf16.vlgmr.msra.gmra.mxu0': 2}


_LOOP = (
  '%s1_s0 = smov 0',
  '%s2_s1 = sadd.s32 1, %s4_s0  ;;  %s4_s0 = sphi %s1_s0, %s5_s0',
  '%p6_p0 = scmp.lt.s32.totalorder %s2_s1, 7',
  '%9 = sbr.rel (%p6_p0) target bundleno = 1 (0x1), region = 2',
  '%s5_s0 = smov %s2_s1',
  *('', '', ''),
  'vmatmul.mubr.bf16.gmra.mxu0 %v1_v0',
)


@pytest.mark.parametrize(
  ('generation', 'delay'), [('v5e', 4), ('v6e', 4), ('tpu7x', 6)]
)
def test_a_loop_runs_its_trips_and_delay_slots_issue(generation, delay):
  # The step of the counter stands in a delay slot.
  body = [*_LOOP[:5], *[''] * (delay - 1), _LOOP[-1]]
  counts = _run(*body, generation=generation)
  assert counts.cycles == 1 + 7 * (3 + delay) + 1
  assert sum(counts.matmuls.values()) == 1 and not counts.unknown


def test_an_operation_that_does_not_happen_leaves_its_register():
  counts = _run(
    '%s1_s3 = smov 5',
    '%p2_p0 = pmov 0',
    '%s3_s3 = smov (%p2_p0), 9',
    '%s4_s3 = smov (%p2_p0, %s3_s3), 7',
    '%p5_p1 = scmp.eq.s32.totalorder %s4_s3, 5',
    # Only if all of this is so, a DMA of 64 granules.
    '%6 = dma.hbm_to_vmem [thread:$0]  (%p5_p1), %s1_s3, 64, %s1_s3, %s1_s3',
    '%7 = dma.hbm_to_vmem [thread:$0]  (%p2_p0), %s1_s3, 32, %s1_s3, %s1_s3',
  )
  assert counts.dma_bytes == {'hbm_to_vmem': 64 * 32} and not counts.unknown


def test_a_dma_of_unknown_size_is_told():
  counts = _run('%1 = dma.vmem_to_hbm %s1_s0, %s2_s1, %s3_s2, %s4_s3')
  assert counts.unknown == {0: 1}


@pytest.mark.parametrize(
  ('operation', 'result'),
  [
    ('sadd.s32 4294967295, %s0_s0', 11),
    ('ssub.s32 %s0_s0, 20', -8),
    ('smul.u32 3, %s0_s0', 36),
    ('sand.u32 9, %s0_s0', 8),
    ('sor.u32 1, %s0_s0', 13),
    ('sshll.u32 %s0_s0, 4', 192),
    ('sshra.s32 %s1_s1, 1', -6),
    ('sshrl.u32 %s1_s1, 28', 15),
    ('smin.u32 %s0_s0, %s1_s1', 12),
    # 12 · ⌈2³² / 5⌉ / 2³².
    ('smulhi.u32 %s0_s0, 858993460', 2),
    ('smax.s32 %s0_s0, %s1_s1', 12),
    ('scalar_select %p0_p9, 3, 4', 3),
    ('sld [smem:[#allocation2 + $0x3]]', 77),
    ('sld [smem:[#allocation3_spill]]', -12),
  ],
)
def test_scalar_arithmetic(operation, result):
  counts = _run(
    '%s0_s0 = smov 12  ;;  %p0_p9 = pmov 1  ;;  %s5_s5 = smov [#allocation2]',
    '%s1_s1 = ssub.s32 0, %s0_s0',
    '%1 = sst [smem:[%s5_s5 + $0x3]] 77',
    '%2 = sst [smem:[#allocation3_spill]] %s1_s1',
    f'%s2_s2 = {operation}',
    f'%p3_p0 = scmp.eq.s32.totalorder %s2_s2, {result % 2**32}',
    '%6 = dma.hbm_to_vmem (%p3_p0), %s0_s0, 1, %s0_s0, %s0_s0',
  )
  assert counts.dma_bytes == {'hbm_to_vmem': 32} and not counts.unknown


@pytest.mark.parametrize(
  ('operation', 'decided'),
  [
    ('por %p1_p1, %p9_p9', True),
    ('por %p9_p9, %p1_p1', True),
    ('pnand %p0_p0, %p9_p9', True),
    ('pnor %p0_p0, %p0_p0', True),
    ('pxor %p0_p0, %p1_p1', True),
    ('pneg %p0_p0', True),
    ('pand %p1_p1, %p9_p9', None),
    ('por %p0_p0, %p9_p9', None),
    ('pxor %p1_p1, %p9_p9', None),
    ('pand %p0_p0, %p9_p9', False),
  ],
)
def test_one_known_side_may_decide(operation, decided):
  counts = _run(
    '%p0_p0 = pmov 0  ;;  %p1_p1 = pmov 1',
    f'%p2_p2 = {operation}',
    '%6 = dma.hbm_to_vmem (%p2_p2), %s0_s0, 1, %s0_s0, %s0_s0',
  )
  assert bool(counts.unknown) == (decided is None)
  assert bool(counts.dma_bytes) == (decided is not False)


def test_numbers_with_a_point_are_no_integers():
  counts = _run(
    '%s1_s0 = smul.f32 0.5, %s0_s0  ;;  %s2_s1 = smov 1e-05',
    '%p3_p0 = scmp.eq.s32.totalorder %s1_s0, 1',
    '%6 = dma.hbm_to_vmem (%p3_p0), %s0_s0, 1, %s0_s0, %s0_s0',
  )
  assert counts.unknown == {2: 1}


def test_spills_count_and_other_stores_do_not():
  counts = _run(
    '%1 = vst [vmem:[#allocation7_spill] sm:$0xff] %v1_v0',
    '%v2_v0 = vld [vmem:[#allocation7_spill] sm:$0xff]  ;;  '
    '%3 = vst [vmem:[%s1_s0 + $0x8] sm:$0xff] %v2_v0',
  )
  assert counts.spills == 2 and counts.cycles == 2


def test_a_loop_without_an_end_is_an_error(monkeypatch):
  monkeypatch.setattr(kernel_schedule, '_MOST_BLOCKS', 100)
  with pytest.raises(RuntimeError, match='no end after 100'):
    _run('%p0_p0 = pmov 1', '%1 = sbr.rel (%p0_p0) target bundleno = 0 (0x0)')


def test_comments_within_comments_are_no_operations():
  counts = _run(
    '%1 = shalt.err (!%p1_p0) /* BoundsCheck 0 for %2 = dma.hbm_to_vmem '
    '/*hbm=*/%s1, /*size_in_granules=*/16 \nhlo: a\n */',
    '',
  )
  assert counts.cycles == 2 and not counts.dma_bytes


def test_arrays_of_small_integers_lie_packed_in_smem():
  assert kernel_schedule.pack([3, -1]) == [3, -1]
  words = kernel_schedule.pack(np.arange(6).reshape(2, 3))
  assert words == [0, 1, 2, *[0] * 125, 3, 4, 5, *[0] * 125]
  x = np.array([[1, 2], [3, 4], [5, 6], [-1, 8], [9, 10]], np.int8)
  words = kernel_schedule.pack(x)
  assert len(words) == 256
  assert words[0] % 2**32 == 1 | 3 << 8 | 5 << 16 | 255 << 24
  assert words[1] == 2 | 4 << 8 | 6 << 16 | 8 << 24
  assert words[128:130] == [9, 10]


def test_the_generations_are_those_of_the_chips_and_the_flag():
  assert tuple(kernel_schedule.GENERATIONS) == bench_kernels.TOPOLOGIES
  assert set(kernel_schedule.GENERATIONS) == set(chips.CHIPS)


@pytest.mark.parametrize(
  ('generation', 'hertz'),
  [('v5e', 1.503e9), ('v5p', 1.751e9), ('v6e', 1.751e9), ('tpu7x', 2.2e9)],
)
def test_ideals_follow_from_the_peaks(generation, hertz):
  assert kernel_schedule.clock(generation) == pytest.approx(hertz, rel=1e-3)
  device = chips.CHIPS[generation].per_device()
  second = kernel_schedule.clock(generation)
  mxu = kernel_schedule.mxu_cycles
  assert mxu(generation, device.bf16_flops, 'bfloat16') == second
  assert mxu(generation, device.fp8_flops, 'float8_e4m3fn') == second
  hbm = kernel_schedule.hbm_cycles(generation, device.hbm_bytes_per_second)
  assert hbm == second


def test_a_register_of_rows_is_as_high_as_its_numbers_are_narrow():
  name = 'vmatmul.mubr.{}.vlgmr.msra.gmra.mxu1'
  for kind, rows in (('f32', 8), ('bf16', 16), ('f8e4m3fn', 32)):
    flops = kernel_schedule.matmul_flops('v6e', {name.format(kind): 3})
    assert flops == 3 * 2 * rows * 256 * 256
