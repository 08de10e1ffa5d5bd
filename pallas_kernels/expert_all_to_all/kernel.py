"""The TPU kernel: each device writes into the memory of the others."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Rows of a tile, whatever their dtype.
SUBLANES = 8
# Of a block of zeros, at most.
_ZERO_BYTES = 2**18
# The scalars of each device, in the order of ops.ragged_exchange.
_FIRST, _COUNT, _PLACE, _RECEIVE, _RECEIVED = range(5)


def ragged_exchange(
  arrays: Sequence[jax.Array],
  num_out: int,
  spans_5R: jax.Array,
  *,
  axis_name: str,
  collective_id: int,
  interpret,
) -> list[jax.Array]:
  """Sends spans of what stands side by side: whole tiles of 128 lanes.

  Of 8 rows, [n / 8, 8, D], as matrices stand in HBM, or of one row in tiles of
  its own, [n, p, D / p], where p = 4 / itemsize elements share a word of 32
  bits. Either is contiguous, so that one transfer moves a span.
  """
  R = spans_5R.shape[1]
  row_bytes = [x.nbytes // len(x) for x in arrays]
  # VMEM: zeros, 256 KiB or a tile of each array.
  num_zeros = [min(num_out, max(1, _ZERO_BYTES // size)) for size in row_bytes]
  zeros = [
    jnp.zeros((n, *x.shape[1:]), x.dtype)
    for n, x in zip(num_zeros, arrays, strict=True)
  ]
  in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
  outs = pl.pallas_call(
    functools.partial(
      _exchange_kernel,
      num_arrays=len(arrays),
      axis_name=axis_name,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(),
      in_specs=[in_hbm] * 2 * len(arrays),
      out_specs=[in_hbm] * len(arrays),
      scratch_shapes=[
        *[pltpu.VMEM(x.shape, x.dtype) for x in zeros],
        pltpu.SemaphoreType.DMA((R,)),
        pltpu.SemaphoreType.DMA((R,)),
        pltpu.SemaphoreType.DMA,
        pltpu.SemaphoreType.REGULAR,
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((num_out, *x.shape[1:]), x.dtype) for x in arrays
    ],
    # No grid, so no dimension_semantics: one core issues all transfers.
    compiler_params=pltpu.CompilerParams(
      collective_id=collective_id if R > 1 else None,
      # Of the spans, which are checked nowhere, as those of XLA's exchange.
      disable_bounds_checks=True,
    ),
    cost_estimate=pl.CostEstimate(
      flops=0,
      transcendentals=0,
      bytes_accessed=(len(arrays[0]) + num_out) * sum(row_bytes),
      remote_bytes_transferred=len(arrays[0]) * sum(row_bytes),
    ),
    interpret=interpret,
    name='expert_all_to_all',
  )(spans_5R, *arrays, *zeros)
  return list(outs)


def _exchange_kernel(spans_ref, *refs, num_arrays, axis_name):
  """Starts all transfers before it waits for any.

  spans_ref [5, R] in SMEM; rows, zeros and results of each array in HBM; zeros
  in VMEM; semaphores of what goes to each device and comes from it, of zeros,
  and of the barrier's second half.
  """
  rows, zeros, outs, blocks = (
    refs[i * num_arrays : (i + 1) * num_arrays] for i in range(4)
  )
  send_sem, receive_sem, zero_sem, passed_sem = refs[4 * num_arrays :]
  R = spans_ref.shape[1]
  me = jax.lax.axis_index(axis_name)

  def of(name, r):
    return spans_ref[name, r]

  def others(run):
    """From the next device on, so that not all begin with the same one."""
    pl.loop(1, R)(lambda i: run(jax.lax.rem(me + i, R)))

  def signal_others(sem):
    others(lambda r: pl.semaphore_signal(sem, 1, device_id={axis_name: r}))

  def copy_to(r):
    return lambda source, destination: pltpu.make_async_remote_copy(
      source,
      destination,
      send_sem.at[r],
      receive_sem.at[me],
      device_id={axis_name: r},
    )

  def copy_here(source, destination):
    return pltpu.make_async_copy(source, destination, receive_sem.at[me])

  def send(r, copy):
    source = pl.ds(of(_FIRST, r), of(_COUNT, r))
    destination = pl.ds(of(_PLACE, r), of(_COUNT, r))

    @pl.when(of(_COUNT, r) > 0)
    def _send():
      for row, out in zip(rows, outs, strict=True):
        copy(row.at[source], out.at[destination]).start()

  def gaps(run):
    """Rows that nobody sends: before, between and behind the sources'."""
    run(0, of(_RECEIVE, 0))

    @pl.loop(0, R)
    def _behind(r):
      following = of(_RECEIVE, jnp.minimum(r + 1, R - 1))
      end = jnp.where(r == R - 1, outs[0].shape[0], following)
      run(of(_RECEIVE, r) + of(_RECEIVED, r), end)

  def fill(begin, end):
    for out, block in zip(outs, blocks, strict=True):
      size = block.shape[0]
      full = jnp.maximum(end - begin, 0) // size

      @pl.loop(0, full)
      def _block(k, out=out, block=block, size=size):
        rows = out.at[pl.ds(begin + k * size, size)]
        pltpu.make_async_copy(block, rows, zero_sem).start()

      rest = end - begin - full * size

      @pl.when(rest > 0)
      def _rest(out=out, block=block, rest=rest):
        rows = out.at[pl.ds(end - rest, rest)]
        pltpu.make_async_copy(block.at[pl.ds(0, rest)], rows, zero_sem).start()

  def wait(size, sem):
    """For so many rows of each array, wherever they are."""

    @pl.when(size > 0)
    def _wait():
      for out in outs:
        some = out.at[pl.ds(0, size)]
        pltpu.make_async_copy(some, some, sem).wait()

  load = [
    pltpu.make_async_copy(zero, block, zero_sem)
    for zero, block in zip(zeros, blocks, strict=True)
  ]
  for copy in load:
    copy.start()
  if R > 1:
    # Nobody is written to before it is here: its memory may hold other things.
    # The second half keeps all here until all have passed the first: a device
    # that leaves and comes again would be counted twice, for one yet to come.
    barrier = pltpu.get_barrier_semaphore()
    signal_others(barrier)
    pl.semaphore_wait(barrier, R - 1)
    signal_others(passed_sem)
  others(lambda r: send(r, copy_to(r)))
  send(me, copy_here)
  for copy in load:
    copy.wait()
  gaps(fill)

  others(lambda r: wait(of(_COUNT, r), send_sem.at[r]))
  pl.loop(0, R)(lambda r: wait(of(_RECEIVED, r), receive_sem.at[r]))
  gaps(lambda begin, end: wait(end - begin, zero_sem))
  if R > 1:
    pl.semaphore_wait(passed_sem, R - 1)
