"""Spans of rows between devices: the kernel moves what the reference does."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as ipc
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels.expert_all_to_all import kernel, ops

# Rows that each of four devices sends to each.
_R = 4
SHAPES = {
  'random': np.random.default_rng(0).integers(0, 6, (_R, _R)),
  'to one device': np.eye(1, _R, 2, dtype=int) * [[5], [3], [0], [4]],
  'single row': np.outer(np.eye(_R)[1], np.eye(_R)[3]).astype(int),
  'nothing': np.zeros((_R, _R), int),
  'to themselves': 3 * np.eye(_R, dtype=int),
}
_TILES = 8 * np.array([[0, 1, 0, 2], [1, 0, 0, 0], [0, 0, 1, 1], [0, 2, 0, 1]])
_LATE = 7  # Rows for the first device, of a device that comes late.
_MOST = 32  # Rows sent, and received.
_GAP = 8  # Rows of results before, between and behind what sources send.
_OUT = _MOST + _GAP * (_R + 1)
_SPEC = PartitionSpec('data', 'expert')


@functools.cache
def _mesh(num_ranks=_R):
  """Two axes: what one group of devices sends never leaves it."""
  devices = np.array(jax.devices()).reshape(-1, num_ranks)
  return Mesh(devices, ('data', 'expert'))


@pytest.fixture(autouse=True)
def _few_zeros(monkeypatch):
  """Three rows of 512 bytes, so that gaps take several blocks."""
  monkeypatch.setattr(kernel, '_ZERO_BYTES', 3 * 512)


def _both(count_RR):
  """Of two groups of devices, the second one's the other way round."""
  return np.stack([count_RR, count_RR.T])


def _spans(count_GRR):
  """Of every device, each [G, R, R]: of sources, then of destinations."""
  first = np.cumsum(count_GRR, axis=2) - count_GRR
  source_R1 = np.arange(count_GRR.shape[1])[:, None]
  place = np.cumsum(count_GRR, axis=1) - count_GRR + _GAP * (source_R1 + 1)
  back = lambda x: x.swapaxes(1, 2)
  spans = first, count_GRR, place, back(place), back(count_GRR)
  return tuple(np.int32(x) for x in spans)


def _rows(*kinds, groups=(2, _R)):
  """[G, R, n, D] for each width and dtype."""
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.normal(size=(*groups, _MOST, width)), dtype)
    for width, dtype in kinds
  ]


def _on_devices(function, mesh):
  """Of what stands before each device, without the two axes of the mesh."""

  def run(*args):
    out = function(*jax.tree.map(lambda x: x[0, 0], args))
    return jax.tree.map(lambda x: x[None, None], out)

  return jax.jit(
    jax.shard_map(
      run, mesh=mesh, in_specs=_SPEC, out_specs=_SPEC, check_vma=False
    )
  )


@functools.cache
def _exchange(implementation, multiple=1, num_ranks=_R):
  def run(rows, spans):
    return ops.ragged_exchange(
      rows,
      _OUT,
      *spans,
      axis_name='expert',
      implementation=implementation,
      multiple=multiple,
      interpret=pltpu.InterpretParams(),
    )

  return _on_devices(run, _mesh(num_ranks))


def _assert_by_the_documentation(got, rows, count_GRR):
  """In loops."""
  first, _, place, *_ = _spans(count_GRR)
  for out, sent in zip(got, rows, strict=True):
    assert out.dtype == sent.dtype
    out, sent = (np.asarray(x, np.float32) for x in (out, sent))
    expected = np.zeros((*sent.shape[:2], _OUT, sent.shape[-1]))
    for g, source, to in np.ndindex(count_GRR.shape):
      for k in range(count_GRR[g, source, to]):
        row = sent[g, source, first[g, source, to] + k]
        expected[g, to, place[g, source, to] + k] = row
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize('implementation', ['pallas', 'reference'])
@pytest.mark.parametrize('shape', SHAPES)
def test_rows_go_where_the_documentation_says(shape, implementation):
  rows, count_GRR = _rows((256, jnp.bfloat16)), _both(SHAPES[shape])
  got = _exchange(implementation)(rows, _spans(count_GRR))
  _assert_by_the_documentation(got, rows, count_GRR)


@pytest.mark.parametrize('multiple', [1, 8])
def test_fp8_and_its_scales_travel_together(multiple):
  rows = _rows((200, jnp.float8_e4m3fn), (2, jnp.float32))
  count_GRR = _both(_TILES)
  got = _exchange('pallas', multiple)(rows, _spans(count_GRR))
  _assert_by_the_documentation(got, rows, count_GRR)


def test_a_device_alone_sends_to_itself():
  [rows] = _rows((128, jnp.float32), groups=(8, 1))
  count_GRR = np.arange(8).reshape(8, 1, 1)
  got = _exchange('pallas', num_ranks=1)(rows, _spans(count_GRR))
  _assert_by_the_documentation([got], [rows], count_GRR)


def test_calls_that_follow_each_other_have_no_races():
  """What came goes back where it came from."""
  exchange = functools.partial(
    ops.ragged_exchange,
    axis_name='expert',
    implementation='pallas',
    interpret=pltpu.InterpretParams(detect_races=True),
  )

  def there_and_back(rows, spans, home_R):
    first_R, count_R, _, receive_R, received_R = spans
    got = exchange(rows, _OUT, *spans)
    back = receive_R, received_R, home_R, first_R, count_R
    return exchange(got, _MOST, *back)

  [rows], count_GRR = _rows((128, jnp.float32)), _both(SHAPES['random'])
  spans = _spans(count_GRR)
  home = spans[0].swapaxes(1, 2)
  got = _on_devices(there_and_back, _mesh())(rows, spans, home)
  jax.block_until_ready(got)
  assert ipc.races.races_found is False
  is_sent = np.arange(_MOST) < count_GRR.sum(2)[..., None]
  np.testing.assert_array_equal(got, np.where(is_sent[..., None], rows, 0))


def test_nobody_writes_to_a_device_that_is_not_there_yet():
  def wait(count_R):
    if count_R[0] == _LATE:
      time.sleep(0.5)
    return count_R

  def run(rows, first_R, count_R, *spans):
    count_R = jax.pure_callback(wait, count_R, count_R)
    return ops.ragged_exchange(
      rows,
      _OUT,
      first_R,
      count_R,
      *spans,
      axis_name='expert',
      implementation='pallas',
      # Whoever sends, writes at once.
      interpret=pltpu.InterpretParams(dma_execution_mode='eager'),
    )

  rows, count_GRR = _rows((128, jnp.float32)), _both(SHAPES['random'])
  count_GRR[:, 2, 0] = _LATE
  got = _on_devices(run, _mesh())(rows, *_spans(count_GRR))
  _assert_by_the_documentation(got, rows, count_GRR)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rows': [(8, 4), (9, 4)]}, r'rows \(9, 4\) must be \[n, D\] with n=8'),
    ({'rows': [(8, 4, 2)]}, r'rows \(8, 4, 2\) must be \[n, D\]'),
    ({'span': np.zeros(3, np.int32)}, r'int32\(3,\) are not int32 of 4 devi'),
    ({'span': np.zeros(4, np.float32)}, r'float32\(4,\) are not int32 of 4'),
    ({'multiple': 4}, 'multiple=4, it must be 1 or 8'),
    ({'multiple': 8}, '20 rows are no multiple of 8'),
    ({'implementation': 'cuda'}, "implementation='cuda', it must be one of"),
  ],
)
def test_what_does_not_fit_raises(changes, message):
  span = np.zeros(4, np.int32)

  def run():
    ops.ragged_exchange(
      [jnp.zeros(shape) for shape in changes.get('rows', [(8, 4)])],
      20,
      *[span] * 4,
      changes.get('span', span),
      axis_name='expert',
      implementation=changes.get('implementation', 'pallas'),
      multiple=changes.get('multiple', 1),
    )

  nothing = PartitionSpec()
  with pytest.raises(ValueError, match=message):
    jax.shard_map(run, mesh=_mesh(), in_specs=(), out_specs=nothing)()
