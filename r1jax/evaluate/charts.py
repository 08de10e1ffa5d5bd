"""Small line charts as inline SVG, readable without scripts."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from r1jax.evaluate import markup

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 22
MAX_POINTS = 400
_MAX_SMOOTH_POINTS = 120
_SMOOTH_FROM = 24


@dataclasses.dataclass(frozen=True)
class Line:
  """One curve: finite values over increasing steps."""

  label: str
  steps_N: np.ndarray
  values_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scale:
  """Maps data to pixels along one axis, linearly or by logarithm."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def __call__(self, value_N: np.ndarray | float) -> np.ndarray | float:
    low, high = self.low, self.high
    if self.log:
      value_N, low, high = np.log(value_N), math.log(low), math.log(high)
    return self.start + (value_N - low) / (high - low) * (self.end - self.start)


def downsample(
  steps_N: np.ndarray, values_N: np.ndarray, limit: int = MAX_POINTS
) -> tuple[np.ndarray, np.ndarray]:
  """Keeps at most `limit` points: the ends, and each bucket's two extremes."""
  if len(steps_N) <= limit:
    return steps_N, values_N
  keep = {0, len(steps_N) - 1}
  for bucket in np.array_split(np.arange(len(steps_N)), (limit - 2) // 2):
    keep.add(int(bucket[values_N[bucket].argmin()]))
    keep.add(int(bucket[values_N[bucket].argmax()]))
  index = sorted(keep)
  return steps_N[index], values_N[index]


def smooth(values_N: np.ndarray) -> np.ndarray:
  """Centred moving mean over a twentieth of the curve, narrower at its ends."""
  N = len(values_N)
  half = max(1, N // 40)
  sum_N = np.concatenate([[0.0], np.cumsum(values_N, dtype=np.float64)])
  i_N = np.arange(N)
  # Narrow enough not to lag behind a trend, wide enough not to end in noise.
  reach_N = np.minimum(half, np.minimum(i_N, N - 1 - i_N))
  reach_N = np.maximum(reach_N, (half + 1) // 2)
  low_N = np.maximum(i_N - reach_N, 0)
  high_N = np.minimum(i_N + reach_N + 1, N)
  return (sum_N[high_N] - sum_N[low_N]) / (high_N - low_N)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
  """Round numbers inside [low, high], about `count` of them."""
  raw = (high - low) / count
  unit = 10.0 ** math.floor(math.log10(raw))
  step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * 0.999)
  first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
  return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
  """Numbers 1, 3 or 1, 2, 5 times powers of ten, as few as show the range."""
  first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
  powers = range(first, last + 1, max(1, (last - first + 5) // 6))
  for mantissas in ((1,), (1, 3), (1, 2, 5)):
    found = [float(f'{m}e{p}') for p in powers for m in mantissas]
    found = [v for v in found if low <= v <= high]
    if len(found) > 2:
      break
  return found or [low, high]


def number(value: float, *, percent: bool = False) -> str:
  """Formats for people: three or four digits, k and M, no long zeros."""
  if percent:
    return f'{100 * value:.3g}%' if abs(value) < 0.9995 else '100%'
  size = abs(value)
  if size >= 999_500:
    return f'{value / 1e6:.4g}M'
  if size >= 10_000:
    return f'{value / 1e3:.4g}k'
  if size and size < 1e-3:
    mantissa, exponent = f'{value:.1e}'.split('e')
    return f'{float(mantissa):g}e{int(exponent)}'
  return f'{value:.4g}'


def draw(
  lines: Sequence[Line],
  *,
  percent: bool = False,
  domain: tuple[float, float] | None = None,
  log: bool = False,
  marks: Sequence[float] = (),
  label: str = '',
) -> markup.Html:
  """Draws lines over steps: raw faint, smoothed strong; short ones with dots.

  Args:
    lines: At least one line, each with at least one point.
    percent: Whether values are shares to show as percentages.
    domain: The value axis; by default what the values need.
    log: Whether a logarithmic axis is wanted, used if all values are positive
      and span more than a factor of thirty.
    marks: Steps to label below; by default round ones.
    label: Description for readers who do not see the picture.
  """
  values_N = np.concatenate([line.values_N for line in lines])
  steps_N = np.concatenate([line.steps_N for line in lines])
  log = log and values_N.min() > 0 and values_N.max() > 30 * values_N.min()
  low, high = domain or _domain(values_N, log)
  y = Scale(low, high, HEIGHT - BOTTOM, TOP, log)
  first, last = float(steps_N.min()), float(steps_N.max())
  if first == last:
    marks = marks or [first]
    first, last = first - 1, last + 1
  x = Scale(first, last, LEFT, WIDTH - RIGHT)
  marks = marks or [m for m in ticks(first, last) if m == int(m)]
  return markup.tag(
    'svg',
    _axes(x, y, percent, marks),
    (_line(line, x, y, i) for i, line in enumerate(lines)),
    viewBox=f'0 0 {WIDTH} {HEIGHT}',
    class_='chart',
    role='img',
    aria_label=label,
    data_x=f'{x.low:.6g},{x.high:.6g},{x.start:g},{x.end:g}',
    data_y=f'{y.low:.6g},{y.high:.6g},{y.start:g},{y.end:g},{int(log)}',
    data_percent='1' if percent else None,
  )


def _domain(values_N: np.ndarray, log: bool) -> tuple[float, float]:
  """The value axis: from zero where that costs little, with some air above."""
  low, high = float(values_N.min()), float(values_N.max())
  if log:
    return low / 1.2, high * 1.2
  if low >= 0 and low < 0.4 * high:
    return 0.0, high * 1.06
  air = 0.08 * (high - low)
  # A constant, or one up to rounding noise, gets room instead of drama.
  if high - low <= 1e-6 * max(abs(low), abs(high)) or low == high:
    if high == 0:
      return 0.0, 1.0
    air = 0.1 * abs(high)
  return low - air, high + air


def _axes(
  x: Scale, y: Scale, percent: bool, marks: Sequence[float]
) -> markup.Html:
  """Grid lines with their numbers, and step numbers below."""
  parts = []
  for value in log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high):
    at = y(value)
    parts.append(
      markup.tag('path', d=f'M{LEFT} {at:.1f}H{WIDTH - RIGHT}', class_='grid')
    )
    parts.append(
      markup.tag(
        'text',
        number(value, percent=percent),
        x=LEFT - 6,
        y=f'{at + 3.5:.1f}',
        text_anchor='end',
      )
    )
  for value in marks:
    at = float(x(value))
    anchor = 'end' if at > WIDTH - RIGHT - 12 else 'middle'
    parts.append(
      markup.tag(
        'text',
        number(value),
        x=f'{WIDTH - RIGHT if anchor == "end" else at:.1f}',
        y=HEIGHT - 6,
        text_anchor=anchor,
      )
    )
  return markup.join(parts)


def _line(line: Line, x: Scale, y: Scale, index: int) -> markup.Html:
  """One curve with the data that hovering shows."""
  steps_N, values_N = downsample(line.steps_N, line.values_N)
  parts = []
  if len(line.steps_N) < _SMOOTH_FROM:
    parts.append(markup.tag('path', d=_path(steps_N, values_N, x, y)))
    parts += [
      markup.tag('circle', cx=f'{x(s):.1f}', cy=f'{y(v):.1f}', r=2)
      for s, v in zip(steps_N, values_N)
    ]
  else:
    parts.append(
      markup.tag('path', d=_path(steps_N, values_N, x, y), class_='raw')
    )
    pick = np.linspace(0, len(line.steps_N) - 1, _MAX_SMOOTH_POINTS)
    pick = np.unique(pick.round().astype(int))
    calm_N = smooth(line.values_N)[pick]
    parts.append(markup.tag('path', d=_path(line.steps_N[pick], calm_N, x, y)))
  return markup.tag(
    'g',
    parts,
    class_=f'line c{index % 8}',
    data_label=line.label,
    data_steps=','.join(f'{s:.10g}' for s in steps_N),
    data_values=','.join(f'{v:.4g}' for v in values_N),
  )


def _path(steps_N: np.ndarray, values_N: np.ndarray, x: Scale, y: Scale) -> str:
  points = zip(x(steps_N), np.clip(y(values_N), 0, HEIGHT))
  return 'M' + 'L'.join(f'{px:.1f} {py:.1f}' for px, py in points)
