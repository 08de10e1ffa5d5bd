"""Reads optimised HLO: lines of real modules, shortened."""

import pathlib

import pytest

from r1jax.parallel import chips, hlo, roofline

_MESH = {'data': 2, 'fsdp': 2}

_LOOP = pathlib.Path(__file__).parents[1] / 'data' / 'loop.hlo'


def _lines(*lines, header='ENTRY %main'):
  body = '\n'.join(f'  {line}' for line in lines)
  return f'{header} (p: f32[8]) -> f32[8] {{\n{body}\n}}\n'


def _read(text, mesh=_MESH):
  return hlo.collectives(hlo.parse(text), mesh)


@pytest.mark.parametrize(
  ('backend', 'turns'),
  [
    ('', 58),
    (', backend_config={"known_trip_count":{"n":"7"},"known_init":1}', 7),
  ],
)
def test_a_loop_counts_by_its_turns(backend, turns):
  said = 'metadata={op_name="jit(train_step)/while"}'
  text = _LOOP.read_text().replace(said, said + backend)
  (found,) = _read(text)
  assert (found.kind, found.axes) == ('all-gather', ('fsdp',))
  assert found.times == turns
  # Half of [128, 64] float32 stays where it was.
  assert found.wire_bytes == 128 * 64 * 4 / 2


def test_a_tuple_with_index_comments_is_summed_over_both_axes():
  text = _lines(
    '%all-reduce.391 = (f32[]{:T(128)}, f32[2,8]{1,0:T(2,128)}, '
    '/*index=5*/bf16[16]{0:T(128)(2,1)}) all-reduce(%a, %b, /*index=5*/%c), '
    'channel_id=3, replica_groups={{0,1,2,3}}, use_global_device_ids=true, '
    'to_apply=%region_107.109.clone'
  )
  (found,) = _read(text)
  assert found.axes == ('data', 'fsdp')
  assert found.wire_bytes == pytest.approx(2 * 3 / 4 * (4 + 64 + 32))


@pytest.mark.parametrize(
  ('groups', 'axes', 'first'),
  [
    ('[4,2]<=[8]', ('z',), (0, 1)),
    ('[2,4]<=[8]', ('y', 'z'), (0, 1, 2, 3)),
    ('[4,2]<=[2,4]T(1,0)', ('x',), (0, 4)),
    ('[2,4]<=[4,2]T(1,0)', ('x', 'y'), (0, 2, 4, 6)),
    ('[4,2]<=[2,2,2]T(0,2,1)', ('y',), (0, 2)),
    ('{{0,2},{1,3},{4,6},{5,7}}', ('y',), (0, 2)),
    ("mesh['a'=4,'b'=1,'c'=2] {'c'}", ('z',), (0, 1)),
    (
      "mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}",
      ('x', 'y'),
      (0, 2, 4, 6),
    ),
  ],
)
def test_groups_of_both_forms_are_mapped_to_mesh_axes(groups, axes, first):
  text = _lines(
    '%reduce_scatter.403 = f32[64,64]{1,0:T(8,128)} reduce-scatter(%fusion.1)'
    f', channel_id=1, replica_groups={groups}, use_global_device_ids=true, '
    'dimensions={0}, to_apply=%region_110.112'
  )
  (found,) = _read(text, {'x': 2, 'y': 2, 'z': 2})
  assert (found.axes, found.members) == (axes, first)
  assert found.wire_bytes == (len(first) - 1) * 64 * 64 * 4


def test_an_asynchronous_permutation_counts_once():
  text = _lines(
    '%collective-permute-start.30 = (bf16[64,256]{1,0:T(8,128)(2,1)S(1)}, '
    'bf16[64,256]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) '
    'collective-permute-start(%divide_bitcast_fusion.3), channel_id=61, '
    'source_target_pairs={{0,0},{2,1},{1,2},{3,3}}',
    '%collective-permute-done.30 = bf16[64,256]{1,0:T(8,128)(2,1)} '
    'collective-permute-done(%collective-permute-start.30)',
  )
  (found,) = _read(text)
  assert (found.kind, found.axes) == ('collective-permute', ('data', 'fsdp'))
  assert found.wire_bytes == 64 * 256 * 2


_ASYNC = """HloModule m, is_scheduled=true

%sent (p.0: f32[8,128]) -> f32[8,128] {
  %p.0 = f32[8,128]{1,0} parameter(0)
  %all-gather.1 = f32[16,128]{1,0} all-gather(%p.0), replica_groups={{0,1}}
  ROOT %s = (f32[8,128]{1,0}, f32[16,128]{1,0}) custom-call(%all-gather.1)
    , custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (q.0: f32[8,128]) -> f32[8,128] {
  %q.0 = f32[8,128]{1,0} parameter(0)
  %all-gather.2 = f32[16,128]{1,0} all-gather(%q.0), replica_groups={{0,1}}
  ROOT %convolution.1 = f32[8,128]{1,0} convolution(%q.0, %q.0)
}

%received (r.0: f32[8,128]) -> f32[16,128] {
  %r.0 = f32[8,128]{1,0} parameter(0)
  %all-gather.3 = f32[16,128]{1,0} all-gather(%r.0), replica_groups={{0,1}}
  ROOT %d = f32[16,128]{1,0} custom-call(%all-gather.3)
    , custom_call_target="AsyncCollectiveDone"
}

%async_computation (t.0: f32[8,128]) -> f32[8,128] {
  %t.0 = f32[8,128]{1,0} parameter(0)
  ROOT %exchange = f32[8,128]{1,0} all-to-all(%t.0), replica_groups={{0,1}}
}

%async_computation.1 (u.0: f32[8,128]) -> f32[8,128] {
  %u.0 = f32[8,128]{1,0} parameter(0)
  ROOT %exchange.1 = f32[8,128]{1,0} all-to-all(%u.0), replica_groups={{0,1}}
}

ENTRY %main (x: f32[8,128]) -> f32[8,128] {
  %x = f32[8,128]{1,0} parameter(0)
  %start = (f32[8,128]{1,0}, f32[16,128]{1,0}) fusion(%x), kind=kCustom
    , calls=%sent
  %part = f32[8,128]{1,0} get-tuple-element(%start), index=0
  %middle = f32[8,128]{1,0} fusion(%part), kind=kOutput
    , calls=%async_collective_fusion.1
  %end = f32[16,128]{1,0} fusion(%middle), kind=kCustom
    , calls=%received
  %a-start = ((f32[8,128]{1,0}), f32[8,128]{1,0}, u32[]) async-start(%x)
    , calls=%async_computation
  %kernel = f32[8,128]{1,0} custom-call(%x)
    , custom_call_target="tpu_custom_call"
  %a-done = f32[8,128]{1,0} async-done(%a-start)
  %b-start = ((f32[8,128]{1,0}), f32[8,128]{1,0}, u32[]) async-start(%a-done)
    , calls=%async_computation.1
  %sum = f32[8,128]{1,0} add(%x, %x)
  ROOT %b-done = f32[8,128]{1,0} async-done(%b-start)
}
"""


def test_what_is_under_way_while_products_run_counts_once_and_is_told():
  found = hlo.collectives(hlo.parse(_ASYNC), {'x': 2})
  told = {c.name: (c.kind, c.beside_products) for c in found}
  assert told == {
    'all-gather.1': ('all-gather', True),
    'exchange': ('all-to-all', True),
    'exchange.1': ('all-to-all', False),
  }
  waiting = _ASYNC.replace('tpu_custom_call', 'Sharding').replace(
    'convolution(', 'add('
  )
  found = hlo.collectives(hlo.parse(waiting), {'x': 2})
  assert len(found) == 3 and not any(c.beside_products for c in found)


def test_a_ragged_exchange_sends_no_more_than_its_smaller_side():
  text = _lines(
    '%rows.1 = bf16[32768,2,3584]{2,1,0:T(2,128)(2,1)} copy(%p)',
    '%ragged_all_to_all.187 = bf16[65536,2,3584]{2,1,0:T(2,128)(2,1)} '
    'ragged-all-to-all(%rows.1, %out.1, %a, %b, %c, /*index=5*/%d), '
    'channel_id=1, replica_groups={{0,1},{2,3}}',
  )
  (found,) = _read(text)
  assert found.kind == 'ragged-all-to-all'
  assert found.wire_bytes == 32768 * 7168 * 2 / 2


def test_an_instruction_of_several_lines_does_not_end_its_computation():
  text = _lines(
    '%splash.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom", '
    'frontend_attributes={kernel_metadata={',
    '}}, metadata={op_name="jit(f)/pallas_call"}',
    '%all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}',
  ).replace('  }}', '}}')
  (found,) = _read(text)
  assert found.wire_bytes == 2 * 32 / 2


def test_a_scatter_fused_as_a_sum_sends_half_of_it():
  text = _lines(
    '%input.10 = f32[7168,1536]{1,0:T(8,128)} parameter(0)',
    '%all-reduce.132 = f32[7168,1536]{1,0:T(8,128)} all-reduce(%input.10), '
    'channel_id=137, replica_groups={{0,2},{1,3}}, to_apply=%add',
    header='%all-reduce-scatter.clone.1',
  ) + _lines(
    '%fusion.1231 = f32[3584,1536]{1,0:T(8,128)} fusion(%p), kind=kCustom, '
    'calls=%all-reduce-scatter.clone.1'
  )
  (found,) = _read(text)
  assert (found.kind, found.axes) == ('reduce-scatter', ('data',))
  assert found.wire_bytes == 7168 * 1536 * 4 / 2


def test_devices_that_keep_to_themselves_send_nothing():
  text = _lines(
    '%all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0},{1},{2},'
    '{3}}, to_apply=%add',
    '%collective-permute.1 = f32[8]{0} collective-permute(%p), '
    'source_target_pairs={{0,0},{1,1}}',
  )
  assert _read(text) == []


def _sent(kind, target):
  return _lines(
    '%p = f32[8,128]{1,0} parameter(0)',
    '%after = token[] after-all()',
    '%send.1 = (f32[8,128]{1,0}, u32[], token[]) send(%p, %after), '
    'channel_id=4, is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_handler_name="xla_megascale_runtime",'
    f'_xla_megascale_target="{target}",'
    f'_xla_megascale_transfer_type="{kind}"}}',
  )


@pytest.mark.parametrize(
  ('kind', 'target', 'shares', 'slices'),
  [
    ('ALL_GATHER', '{1,2}x{0:15}', 1, 2),
    ('ALL_GATHER', '{0:3}x{0:1}', 3, 4),
    ('ALL_REDUCE', '{0:3}x{0:1}', 1.5, 4),
    ('REDUCE_SCATTER', '{0:3}x{0:1}', 0.75, 4),
    ('ALL_TO_ALL', '{0,1}x{0:1}', 0.5, 2),
  ],
)
def test_what_hosts_send_to_other_slices(kind, target, shares, slices):
  (found,) = hlo.collectives(hlo.parse(_sent(kind, target)), {'x': 8})
  assert found.kind == kind.lower().replace('_', '-')
  assert found.wire_bytes == shares * 8 * 128 * 4
  assert found.axes == ('slices',) and len(found.members) == slices
  places = [roofline.Place(i // (8 // slices), (i, 0, 0)) for i in range(8)]
  assert roofline.link_of(found.members, places) == 'DCN'


_SLICES = {
  'where': 'ROOT %s.3 = f32[1,64,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, '
  '%param_1, %param_1, %param_1), dynamic_slice_sizes={1,64,128}',
  'at 3': 'ROOT %s.3 = f32[1,64,128]{2,1,0:T(8,128)} slice(%param_0), '
  'slice={[3:4], [0:64], [0:128]}',
}


@pytest.mark.parametrize('which', _SLICES)
@pytest.mark.parametrize('depth', [1, 2])
def test_what_is_sliced_counts_by_its_slices(which, depth):
  parameters = (
    '%param_0 = f32[58,64,128]{2,1,0:T(8,128)} parameter(0)',
    '%param_1 = s32[]{:T(128)} parameter(1)',
  )
  around = (
    'ROOT %inner.1 = f32[1,64,128]{2,1,0:T(8,128)} fusion(%param_0, %param_1), '
    'kind=kLoop, calls=%fused_computation.1'
  )
  text = ''.join(
    (
      _lines(*parameters, _SLICES[which], header='%fused_computation.1'),
      _lines(*parameters, around, header='%fused_computation.2'),
      _lines(
        '%p = f32[58,64,128]{2,1,0:T(8,128)} parameter(0)',
        '%i = s32[]{:T(128)S(6)} parameter(1)',
        '%fusion.1 = f32[1,64,128]{2,1,0:T(8,128)} fusion(%p, %i), kind=kLoop, '
        f'calls=%fused_computation.{depth}',
        '%kept.1 = f32[1,64,128]{2,1,0:T(8,128)S(1)} copy(%fusion.1)',
        'ROOT %out.1 = f32[1,64,128]{2,1,0:T(8,128)} negate(%kept.1)',
      ),
    )
  )
  # A slice is read and written, read into VMEM, and written from there.
  assert hlo.traffic_bytes(hlo.parse(text)) == 4 * 64 * 128 * 4


def test_text_without_an_entry_is_an_error():
  with pytest.raises(ValueError, match='ENTRY'):
    hlo.parse('HloModule nothing')


def _collective(kind, members, wire_bytes=1e9, times=2):
  return hlo.Collective(kind, ('x',), members, wire_bytes, times, 'c', 'f32[]')


def test_times_follow_the_torus():
  chip = chips.CHIPS['v5p']
  # 8 x 4 chips in each of two slices.
  places = [
    roofline.Place(s, (x, y, 0))
    for s in range(2)
    for x in range(8)
    for y in range(4)
  ]
  ring = tuple(range(0, 32, 4))  # One dimension, 8 chips.
  plane = tuple(range(32))
  time = lambda *args: roofline.seconds(_collective(*args), places, chip)
  assert time('all-gather', ring) == pytest.approx(2e9 / 200e9)
  assert time('all-gather', plane) == pytest.approx(2e9 / 400e9)
  assert time('ragged-all-to-all', plane) == pytest.approx(2e9 * 8 / 800e9)
  assert time('collective-permute', (0, 1)) == pytest.approx(2e9 / 100e9)
  assert time('all-reduce', (0, 32)) == pytest.approx(2e9 / 6.25e9)
  assert roofline.link_of((0, 32), places) == 'DCN'


def test_bounds_and_sums_by_axis():
  chip = chips.CHIPS['v5p']
  places = [roofline.Place(0, (x, 0, 0)) for x in range(4)]
  found = [_collective('all-gather', (0, 1))] * 3
  assert roofline.by_axis(found, places) == {
    'x': {
      'all-gather': {
        'bytes': 6e9,
        'sites': 3,
        'beside_products': 0,
        'link': 'ICI',
      }
    }
  }
  bounds = roofline.bounds(459e12, 2765e9 / 2, found, places, chip)
  assert bounds == pytest.approx(
    {'mxu': 1.0, 'hbm': 0.5, 'ici': 0.03, 'bound': 1.0}
  )
