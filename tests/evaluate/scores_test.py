import itertools
import json

import numpy as np
import pytest

from r1jax.evaluate import scores


def _brute_pass_at_k(c, n, k):
  right = [True] * c + [False] * (n - c)
  draws = list(itertools.combinations(right, k))
  return sum(any(draw) for draw in draws) / len(draws)


@pytest.mark.parametrize('n, k', [(16, 8), (7, 1), (7, 3), (7, 7), (1, 1)])
def test_pass_at_k_equals_enumeration(n, k):
  counts_P = np.array([c for c in (0, 1, 2, 4, 7, n) if c <= n])
  expected_P = [_brute_pass_at_k(c, n, k) for c in counts_P]
  got_P = scores.pass_at_k(counts_P, n, k)
  np.testing.assert_allclose(got_P, expected_P, rtol=1e-12, atol=1e-15)


def test_pass_at_k_is_stable_and_exact_at_its_ends():
  got_P = scores.pass_at_k(np.array([0, 1, 100_000]), 100_000, 50_000)
  np.testing.assert_allclose(got_P, [0.0, 0.5, 1.0], rtol=1e-9)
  assert got_P[0] == 0.0 and got_P[2] == 1.0


def test_pass_at_k_refuses_what_cannot_be():
  with pytest.raises(ValueError, match='k=5'):
    scores.pass_at_k(np.array([1]), 4, 5)
  with pytest.raises(ValueError, match='k=0'):
    scores.pass_at_k(np.array([1]), 4, 0)
  with pytest.raises(ValueError, match='num_correct'):
    scores.pass_at_k(np.array([1, 5]), 4, 2)


@pytest.mark.parametrize(
  'answers_G, expected',
  [
    (['7', '8', '8'], '8'),
    (['7', '8', '8', '7'], '7'),  # A tie goes to what came first.
    ([None, '8', '7', '7', '8'], '8'),
    ([None, None, None, '7'], '7'),  # No answer is no vote.
    ([None, None], None),
    ([], None),
  ],
)
def test_majority(answers_G, expected):
  assert scores.majority(answers_G) == expected


def test_consensus_grades_each_problem():
  answers_PG = [['1', '2', '2'], ['1', '2', '2'], [None, None, None]]
  got_P = scores.consensus(answers_PG, ['2', '1', '1'])
  assert got_P.tolist() == [True, False, False]
  with pytest.raises(ValueError):
    scores.consensus(answers_PG, ['2'])


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
  rng = np.random.default_rng(0)
  covered = 0
  for seed in range(100):
    values_P = rng.random(120) < 0.3
    low, high = scores.bootstrap_interval(
      values_P, num_resamples=200, seed=seed, level=0.9
    )
    covered += low <= 0.3 <= high
  # Binomial(100, .9) has a standard deviation of 3: three of them, and the
  # percentile method covers a little less than nominally.
  assert 79 <= covered <= 98


def test_bootstrap_interval_is_repeatable_and_narrows():
  values_P = np.arange(400) % 2
  first = scores.bootstrap_interval(values_P, seed=3)
  assert first == scores.bootstrap_interval(values_P, seed=3)
  assert first != scores.bootstrap_interval(values_P, seed=4)
  # 1.96 σ / sqrt(P) on either side; a quantile of 4,000 resampled means strays
  # by 0.04 σ / sqrt(P), or 2%, and the means are multiples of 1 / P.
  wide = scores.bootstrap_interval(values_P, num_resamples=4000, seed=0)
  half = 1.96 * 0.5 / 20
  np.testing.assert_allclose(wide, [0.5 - half, 0.5 + half], atol=0.08 * half)
  assert scores.bootstrap_interval(np.ones(5), seed=0) == (1.0, 1.0)
  with pytest.raises(ValueError, match='no values'):
    scores.bootstrap_interval(np.array([]), seed=0)


def _completion(answer, correct, *, form=True, length=10, finished=True):
  return scores.Completion(answer, correct, form, length, finished)


def _problems():
  right, wrong = (
    _completion('7', True),
    _completion('8', False, form=False, length=20),
  )
  mute = _completion(None, False, form=False, length=30, finished=False)
  make = scores.Samples
  return [
    make('a', '7', 'add', 'en', (right, right, wrong, mute), right),
    make('b', '7', 'add', 'zh', (wrong, wrong, wrong, right), right),
    make('c', '7', 'divide', 'en', (mute, mute, mute, right), wrong),
  ]


def test_summary_of_all_and_by_group():
  summary = scores.summarise(_problems())
  assert summary['num_problems'] == 3 and summary['num_samples'] == 4
  assert summary['pass@1'] == pytest.approx(4 / 12)
  low, high = summary['pass@1_interval']
  assert low <= 4 / 12 <= high and low < high
  # By hand: 1 - C(2,2)/C(4,2) = 5/6 and twice 1 - C(3,2)/C(4,2) = 1/2.
  assert summary['pass@2'] == pytest.approx((5 / 6 + 1 / 2 + 1 / 2) / 3)
  assert summary['pass@4'] == 1.0
  assert 'pass@3' not in summary and 'pass@8' not in summary
  assert summary['cons@4'] == pytest.approx(2 / 3)
  assert summary['greedy'] == pytest.approx(2 / 3)
  assert summary['format'] == pytest.approx(4 / 12)
  assert summary['finished'] == pytest.approx(8 / 12)
  assert summary['length'] == pytest.approx((4 * 10 + 4 * 20 + 4 * 30) / 12)

  assert list(summary['by_operation']) == ['add', 'divide']
  add, divide = summary['by_operation'].values()
  assert add['num_problems'] == 2 and divide['num_problems'] == 1
  assert add['pass@1'] == pytest.approx(3 / 8)
  assert divide['pass@1'] == pytest.approx(1 / 4)
  assert add['greedy'] == 1.0 and divide['greedy'] == 0.0
  assert divide['format'] == pytest.approx(1 / 4)
  assert divide['cons@4'] == 1.0
  assert summary['by_language']['zh']['cons@4'] == 0.0
  assert json.loads(json.dumps(summary)) == summary


def test_summary_without_greedy_and_with_sizes_that_do_not_fit():
  problems = _problems()
  problems[0] = scores.Samples('a', '7', 'add', 'en', problems[0].completions)
  assert 'greedy' not in scores.summarise(problems)
  assert 'greedy' in scores.summarise(problems)['by_operation']['divide']
  odd = scores.Samples('d', '7', 'add', 'en', problems[0].completions[:3])
  with pytest.raises(ValueError, match='4 problems'):
    scores.summarise([*problems, odd])
  with pytest.raises(ValueError, match='0 problems'):
    scores.summarise([])
