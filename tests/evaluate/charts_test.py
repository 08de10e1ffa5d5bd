import re

import numpy as np
import pytest

from r1jax.evaluate import charts


def test_downsample_keeps_ends_and_extremes():
  rng = np.random.default_rng(0)
  steps_N, values_N = np.arange(5000.0), rng.normal(size=5000)
  values_N[[1234, 4321]] = 50.0, -50.0
  steps_K, values_K = charts.downsample(steps_N, values_N)
  assert len(steps_K) <= charts.MAX_POINTS
  assert steps_K[0] == 0 and steps_K[-1] == 4999
  assert {1234, 4321} <= set(steps_K)
  assert (np.diff(steps_K) > 0).all()
  np.testing.assert_array_equal(values_K, values_N[steps_K.astype(int)])


def test_downsample_leaves_short_curves_alone():
  steps_N = np.arange(float(charts.MAX_POINTS))
  assert charts.downsample(steps_N, steps_N)[0] is steps_N


def test_smooth_equals_a_loop_inside_and_keeps_constants():
  values_N = np.random.default_rng(0).normal(size=200)
  half = 5
  expected = [values_N[i - half : i + half + 1].mean() for i in range(5, 195)]
  np.testing.assert_allclose(charts.smooth(values_N)[5:195], expected)
  np.testing.assert_allclose(charts.smooth(np.full(50, 3.0)), 3.0)


@pytest.mark.parametrize(
  'low, high, expected',
  [
    (0, 1, [0, 0.25, 0.5, 0.75, 1]),
    (0, 5.3, [0, 2, 4]),
    (-0.03, 0.03, [-0.02, 0, 0.02]),
    (1, 1500, [500, 1000, 1500]),
  ],
)
def test_ticks_are_round(low, high, expected):
  np.testing.assert_allclose(charts.ticks(low, high), expected, atol=1e-12)


def test_log_ticks_fit_the_range():
  assert charts.log_ticks(1e-7, 2e-5) == [1e-7, 1e-6, 1e-5]
  assert charts.log_ticks(0.09, 4) == [0.1, 0.3, 1.0, 3.0]
  assert len(charts.log_ticks(1e-30, 1e30)) <= 12


@pytest.mark.parametrize(
  'value, expected',
  [
    (0, '0'),
    (0.5442, '0.5442'),
    (21_940, '21.94k'),
    (2_500_000, '2.5M'),
    (2.2e-7, '2.2e-7'),
    (-0.02, '-0.02'),
  ],
)
def test_number(value, expected):
  assert charts.number(value) == expected


def test_number_percent_says_100_only_when_rounding_gives_it():
  assert charts.number(1.0, percent=True) == '100%'
  assert charts.number(0.994, percent=True) == '99.4%'


def _paths(svg):
  return [
    [tuple(map(float, p.split())) for p in d[1:].split('L')]
    for d in re.findall(r'<path d="(M[^H"]+)"', svg)
  ]


@pytest.mark.parametrize(
  'values',
  [
    [1.0],
    [0.0, 0.0],
    [3.0, 3.0, 3.0],
    [1e-30, 1e30],
    [-1.0, 5.0],
    list(range(1000)),
  ],
)
@pytest.mark.parametrize('log', [False, True])
def test_lines_stay_inside_the_picture(values, log):
  values_N = np.array(values, np.float64)
  line = charts.Line('x', np.arange(len(values), dtype=np.float64), values_N)
  svg = charts.draw([line], log=log)
  assert 'nan' not in svg and 'inf' not in svg
  for path in _paths(svg):
    for x, y in path:
      assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
      assert 0 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1


def test_higher_values_are_drawn_higher_on_both_axes():
  values_N = np.array([1.0, 10.0, 100.0])
  line = charts.Line('x', np.arange(3.0), values_N)
  ((linear,), (logarithmic,)) = (
    _paths(charts.draw([line], log=log)) for log in (False, True)
  )
  assert linear[0][1] > linear[1][1] > linear[2][1]
  # Equal ratios are equal distances on the logarithmic axis only.
  gaps = -np.diff([y for _, y in logarithmic])
  np.testing.assert_allclose(gaps[0], gaps[1], atol=0.2)
  assert linear[1][1] - linear[2][1] > 5 * (linear[0][1] - linear[1][1])
