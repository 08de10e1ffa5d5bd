"""Spans of rows to the devices of a mesh axis: dispatch and combine."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.expert_all_to_all import kernel, reference

IMPLEMENTATIONS = ('pallas', 'xla', 'reference')


def ragged_exchange(
  rows_nD: jax.Array | Sequence[jax.Array],
  num_out: int,
  first_R: jax.Array,
  count_R: jax.Array,
  place_R: jax.Array,
  receive_R: jax.Array,
  received_R: jax.Array,
  *,
  axis_name: str,
  implementation: str,
  multiple: int = 1,
  collective_id: int = 0,
  interpret=False,
) -> jax.Array | list[jax.Array]:
  """Sends each device of a mesh axis a span of rows; for inside shard_map.

  out of device d [place_R[d] of source …] = rows of source [first_R[d] …]

  count_R[d] of them; rows that nobody sends are 0. All devices of the axis
  call it together, with spans that agree: what one sends is what the other
  receives, at the same place, and inside of its rows. Nobody checks that.

  The kernel occupies its core until all has come: XLA's exchange may run
  beside matrix products, this one may not. It moves whole tiles of HBM: spans
  of multiples of 8 rows are moved as they stand. Any other rows have to be
  contiguous, which matrices are not, and XLA copies them before and after, as
  it does for its own exchange.

  Args:
    rows_nD: [n, D] bfloat16, float32 or e4m3, or several such with the same
      rows, which travel together.
    num_out: Rows of the result.
    first_R: int32 first row for each destination.
    count_R: int32 rows for it.
    place_R: int32 where they go in its result.
    receive_R: int32 where the rows of each source go in this device's result,
      in order: those of a source end before the next one's start.
    received_R: int32 how many they are.
    axis_name: Of the mesh axis, of R devices; other axes are left alone.
    implementation: 'pallas' (TPU), 'xla' (`jax.lax.ragged_all_to_all`, not on
      a CPU) or 'reference' (everyone gets everything).
    multiple: Of all numbers of spans and rows: 1 or 8.
    collective_id: Of the barrier. Calls over different axes that one program
      may have under way, and other kernels with barriers, need others.
    interpret: Run the kernel on a CPU, pltpu.InterpretParams.

  Returns:
    [num_out, D] for each array.

  Raises:
    ValueError: Shapes that do not fit, or an unknown implementation.

  Source: DeepEP (https://github.com/deepseek-ai/DeepEP); DeepSeek-V3,
    arXiv:2412.19437, §3.2.2; jax.lax.ragged_all_to_all for the semantics.
  """
  is_one = not isinstance(rows_nD, list | tuple)
  arrays = [rows_nD] if is_one else list(rows_nD)
  spans = first_R, count_R, place_R, receive_R, received_R
  _check(arrays, spans, jax.lax.axis_size(axis_name))
  _check_multiple(multiple, num_out, len(arrays[0]))
  match implementation:
    case 'pallas':
      outs = _pallas(
        arrays,
        num_out,
        spans,
        multiple,
        axis_name=axis_name,
        collective_id=collective_id,
        interpret=interpret,
      )
    case 'xla':
      outs = _xla(arrays, num_out, spans, axis_name)
    case 'reference':
      outs = reference.ragged_exchange(arrays, num_out, spans, axis_name)
    case _:
      raise ValueError(
        f'implementation={implementation!r}, it must be one of '
        f'{", ".join(IMPLEMENTATIONS)}'
      )
  return outs[0] if is_one else outs


def _check(arrays, spans, num_ranks):
  for x in arrays:
    if x.ndim != 2 or len(x) != len(arrays[0]):
      raise ValueError(f'rows {x.shape} must be [n, D] with n={len(arrays[0])}')
  for x in spans:
    if x.shape != (num_ranks,) or x.dtype != jnp.int32:
      raise ValueError(
        f'spans {x.dtype}{x.shape} are not int32 of {num_ranks} devices'
      )


def _check_multiple(multiple, *sizes):
  if multiple not in (1, kernel.SUBLANES):
    raise ValueError(f'multiple={multiple}, it must be 1 or {kernel.SUBLANES}')
  for size in sizes:
    if size % multiple:
      raise ValueError(f'{size} rows are no multiple of {multiple}')


def _pallas(arrays, num_out, spans, multiple, **options):
  outs = kernel.ragged_exchange(
    [_in_tiles(x, multiple) for x in arrays],
    num_out // multiple,
    jnp.stack(spans) // multiple,
    **options,
  )
  return [
    out.reshape(num_out, -1)[:, : x.shape[1]]
    for out, x in zip(outs, arrays, strict=True)
  ]


def _in_tiles(x_nD, multiple):
  """[n / 8, 8, D], or [n, p, D / p]: see kernel.ragged_exchange."""
  p = 1 if multiple > 1 else 4 // x_nD.dtype.itemsize
  x_nD = jnp.pad(x_nD, ((0, 0), (0, -x_nD.shape[1] % (p * kernel.LANES))))
  return x_nD.reshape(len(x_nD) // multiple, multiple * p, -1)


def _xla(arrays, num_out, spans, axis_name):
  first_R, count_R, place_R, _, received_R = spans
  return [
    jax.lax.ragged_all_to_all(
      x,
      jnp.zeros((num_out, x.shape[1]), x.dtype),
      first_R,
      count_R,
      place_R,
      received_R,
      axis_name=axis_name,
    )
    for x in arrays
  ]
