"""pass@k, consensus and their summary, from answers that are already graded."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# Bounds the memory of a bootstrap: 2 MiB of indices.
_RESAMPLED_AT_ONCE = 1 << 18


@dataclasses.dataclass(frozen=True)
class Completion:
  """One graded completion.

  Attributes:
    answer: What stands in the answer tags, stripped; None if nothing does.
    correct: Whether the answer is the right one.
    format: Whether the completion has the demanded form.
    length: Completion length in tokens, the stop token included.
    finished: Whether a stop token was sampled within the budget.
  """

  answer: str | None
  correct: bool
  format: bool
  length: int
  finished: bool


@dataclasses.dataclass(frozen=True)
class Samples:
  """One problem and everything sampled for it.

  Attributes:
    prompt: The prompt as text.
    gold: The right answer, written as the completions should write it.
    operation: Group label, for instance 'add'.
    language: Group label, for instance 'en'.
    completions: The k sampled completions, in the order they were drawn.
    greedy: The greedy completion, or None if none was made.
  """

  prompt: str
  gold: str
  operation: str
  language: str
  completions: tuple[Completion, ...]
  greedy: Completion | None = None


def pass_at_k(
  num_correct_P: np.ndarray, num_samples: int, k: int
) -> np.ndarray:
  """Estimates, per problem, P(one of k samples is correct) without bias.

  pass@k = 1 - C(n-c, k) / C(n, k) = 1 - Π_{i=n-c+1..n} (1 - k/i)

  Args:
    num_correct_P: Correct samples c of each problem, 0 <= c <= n.
    num_samples: Samples per problem, n.
    k: 1 <= k <= n.

  Returns:
    float64 [P], each in [0, 1].

  Raises:
    ValueError: k or a count is out of range.

  Source: Codex, arXiv:2107.03374, §2.1; the product avoids its binomials.
  """
  correct_P = np.asarray(num_correct_P)
  if not 1 <= k <= num_samples:
    raise ValueError(f'{k=} must lie in [1, num_samples={num_samples}]')
  if correct_P.size and not 0 <= correct_P.min() <= correct_P.max() <= (
    num_samples
  ):
    raise ValueError(
      f'num_correct spans [{correct_P.min()}, {correct_P.max()}], it must '
      f'lie in [0, num_samples={num_samples}]'
    )
  # Where n - c < k the factor of i = k makes the product 0, so that no factor
  # below it is needed; left negative they could overflow.
  i_G = np.arange(1, num_samples + 1)
  factor_G = np.maximum(1 - k / i_G, 0.0)
  factor_PG = np.where(i_G > num_samples - correct_P[:, None], factor_G, 1.0)
  return 1.0 - factor_PG.prod(axis=1)


def majority(answers_G: Sequence[str | None]) -> str | None:
  """Returns the most frequent answer; of equals, the one that came first.

  A completion without an answer (None) casts no vote; None if there is none.
  """
  # Counter keeps first-seen order and most_common is stable.
  votes = collections.Counter(a for a in answers_G if a is not None)
  return votes.most_common(1)[0][0] if votes else None


def consensus(
  answers_PG: Sequence[Sequence[str | None]], gold_P: Sequence[str]
) -> np.ndarray:
  """Grades each problem's majority answer: cons@k.

  Returns:
    bool [P]; a problem without any answer is wrong.

  Raises:
    ValueError: The lengths differ.

  Source: DeepSeek-R1, arXiv:2501.12948, §3 (evaluation setup).
  """
  return np.array(
    [
      majority(answers_G) == gold
      for answers_G, gold in zip(answers_PG, gold_P, strict=True)
    ],
    dtype=bool,
  )


def bootstrap_interval(
  values_P: np.ndarray,
  *,
  num_resamples: int = 1000,
  seed: int,
  level: float = 0.95,
) -> tuple[float, float]:
  """Interval of the mean by resampling problems (percentile bootstrap).

  Problems, not samples, are drawn: the samples of one problem are not
  independent. When all values are equal the interval has no width.

  Args:
    values_P: One score per problem.
    num_resamples: Number of resampled means.
    seed: Of the resampling.
    level: Coverage, in (0, 1).

  Raises:
    ValueError: No values, or level outside (0, 1).
  """
  values_P = np.asarray(values_P, np.float64)
  if not values_P.size:
    raise ValueError('no values to resample')
  if not 0 < level < 1:
    raise ValueError(f'{level=} must lie in (0, 1)')
  P = values_P.size
  rng = np.random.default_rng(seed)
  means = []
  block = max(1, _RESAMPLED_AT_ONCE // P)
  for start in range(0, num_resamples, block):
    pick = rng.integers(P, size=(min(block, num_resamples - start), P))
    means.append(values_P[pick].mean(axis=1))
  low, high = np.quantile(
    np.concatenate(means), [(1 - level) / 2, (1 + level) / 2]
  )
  return float(low), float(high)


def summarise(samples: Sequence[Samples], *, seed: int = 0) -> dict[str, Any]:
  """Summarises an evaluation; the result can be written as JSON.

  Args:
    samples: One entry per problem, all with the same number of completions.
    seed: Of the bootstrap.

  Returns:
    'num_problems', 'num_samples' (k), 'pass@1' (mean over all completions) and
    'pass@1_interval' (95%), 'pass@2', 'pass@4', ... up to k, 'cons@<k>',
    'format', 'length' (mean, tokens), 'finished'; where every problem has a
    greedy completion also 'greedy', 'greedy_interval', 'greedy_format' and
    'greedy_length'; 'by_operation' and 'by_language': the same of each group.
    All shares lie in [0, 1].

  Raises:
    ValueError: No problems, or problems with different numbers of completions.
  """
  sizes = sorted({len(s.completions) for s in samples})
  if len(sizes) != 1 or sizes[0] == 0:
    raise ValueError(
      f'{len(samples)} problems with {sizes} completions each: summarise '
      'needs at least one problem and the same positive number for all'
    )
  return {
    **_summarise_group(samples, seed),
    'by_operation': _by(samples, lambda s: s.operation, seed),
    'by_language': _by(samples, lambda s: s.language, seed),
  }


def _by(
  samples: Sequence[Samples], label: Callable[[Samples], str], seed: int
) -> dict[str, Any]:
  groups = collections.defaultdict(list)
  for s in samples:
    groups[label(s)].append(s)
  return {name: _summarise_group(groups[name], seed) for name in sorted(groups)}


def _summarise_group(samples: Sequence[Samples], seed: int) -> dict[str, Any]:
  """The figures of `summarise` for one group, without sub-groups."""
  correct_PG = np.array([[c.correct for c in s.completions] for s in samples])
  answers_PG = [[c.answer for c in s.completions] for s in samples]
  drawn = [c for s in samples for c in s.completions]
  k = correct_PG.shape[1]
  agreed_P = consensus(answers_PG, [s.gold for s in samples])
  summary = {
    'num_problems': len(samples),
    'num_samples': k,
    'pass@1': float(correct_PG.mean()),
    'pass@1_interval': list(bootstrap_interval(correct_PG.mean(1), seed=seed)),
  }
  for power in range(1, k.bit_length()):
    passed_P = pass_at_k(correct_PG.sum(1), k, 2**power)
    summary[f'pass@{2**power}'] = float(passed_P.mean())
  summary |= {
    f'cons@{k}': float(agreed_P.mean()),
    'format': float(np.mean([c.format for c in drawn])),
    'length': float(np.mean([c.length for c in drawn])),
    'finished': float(np.mean([c.finished for c in drawn])),
  }
  greedy = [s.greedy for s in samples if s.greedy is not None]
  if len(greedy) == len(samples):
    right_P = np.array([c.correct for c in greedy])
    summary |= {
      'greedy': float(right_P.mean()),
      'greedy_interval': list(bootstrap_interval(right_P, seed=seed)),
      'greedy_format': float(np.mean([c.format for c in greedy])),
      'greedy_length': float(np.mean([c.length for c in greedy])),
    }
  return summary
