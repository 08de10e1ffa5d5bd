"""Completions of any length packed into rows of one length, on the host."""

from collections.abc import Sequence

import numpy as np

from r1jax import types


def best_fit(length_N: np.ndarray, row_length: int) -> list[list[int]]:
  """Packs items into few rows: longest first, each where it fits tightest.

  Args:
    length_N: Tokens of each item, at most row_length.
    row_length: Tokens of a row.

  Returns:
    The items of each row.

  Source: DeepSeek-R1, arXiv:2501.12948v2, supplement (training packing).
  """
  rows, free = [], []
  for item in np.argsort(-length_N, kind='stable'):
    need = int(length_N[item])
    fits = [(room, i) for i, room in enumerate(free) if room >= need]
    if fits:
      _, i = min(fits)
      rows[i].append(int(item))
      free[i] -= need
    else:
      rows.append([int(item)])
      free.append(row_length - need)
  return rows


def even_parts(size_N: np.ndarray, num_parts: int) -> np.ndarray:
  """Parts items so that each part has as many, and about the same total.

  The largest first, each goes where the total is the smallest so far.

  Args:
    size_N: Size of each item.
    num_parts: A divisor of N.

  Returns:
    The items of each part, [num_parts, N / num_parts].
  """
  parts = [[] for _ in range(num_parts)]
  total_p = np.zeros(num_parts)
  for item in np.argsort(-size_N, kind='stable'):
    p = int(np.argmin(total_p))
    parts[p].append(int(item))
    total_p[p] += size_N[item]
    if len(parts[p]) == len(size_N) // num_parts:
      total_p[p] = np.inf  # Full.
  return np.array(parts)


def pack(
  rollout: types.Rollout,
  adv_B: np.ndarray,
  chosen: Sequence[int],
  *,
  row_length: int,
  rows_multiple: int,
) -> types.PolicyBatch:
  """Packs the chosen completions of a rollout into a batch.

  Args:
    rollout: Host arrays.
    adv_B: Advantage of each completion.
    chosen: Its rows to pack.
    row_length: Tokens of a packed row.
    rows_multiple: The number of rows is rounded up to a multiple of this, so
      that batches have few different shapes.

  Returns:
    A batch of numpy arrays; ref_logp_BT is 0.
  """
  chosen = np.asarray(chosen)
  rows = best_fit(rollout.length_B[chosen], row_length)
  num_rows = -(-len(rows) // rows_multiple) * rows_multiple
  shape = (num_rows, row_length)
  out = {name: np.zeros(shape, np.float32) for name in ('mask', 'logp', 'adv')}
  out |= {
    name: np.zeros(shape, np.int32)
    for name in ('tokens', 'segment', 'position')
  }
  length_BT = np.ones(shape, np.float32)
  for r, items in enumerate(rows):
    start = 0
    for segment, item in enumerate(items, start=1):
      i = chosen[item]
      n = int(rollout.length_B[i])
      where = (r, slice(start, start + n))
      out['tokens'][where] = rollout.tokens_BT[i, :n]
      out['mask'][where] = rollout.mask_BT[i, :n]
      out['logp'][where] = rollout.logp_BT[i, :n]
      out['adv'][where] = adv_B[i]
      out['segment'][where] = segment
      out['position'][where] = np.arange(n)
      length_BT[where] = max(float(rollout.mask_BT[i, :n].sum()), 1.0)
      start += n
  return types.PolicyBatch(
    tokens_BT=out['tokens'],
    mask_BT=out['mask'],
    segment_BT=out['segment'],
    position_BT=out['position'],
    num_tokens=np.float32(max(out['mask'].sum(), 1.0)),
    num_sequences=np.float32(len(chosen)),
    old_logp_BT=out['logp'],
    ref_logp_BT=np.zeros(shape, np.float32),
    adv_BT=out['adv'],
    length_BT=length_BT,
  )
