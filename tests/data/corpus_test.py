"""Tests of the corpus: shares, kinds, rows, random access."""

import random
import re

import grain
import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.data import corpus, tokenizer
from r1jax.data.tasks import arithmetic

_TASK = arithmetic.ArithmeticConfig(maximum=100)
_PROMPT = re.compile(r'(?:What is )?(\d+)([+×÷-])(\d+)(?:\?|等于多少？)\n')
_CLEAN = re.compile(r'<think>(.+)</think><answer>(\d+)</answer>')


def _read(prompt: str) -> tuple[arithmetic.Key, str, int]:
  """Reads a prompt back: its key, language and right answer."""
  a, symbol, b = _PROMPT.fullmatch(prompt).groups()
  a, b = int(a), int(b)
  operation, result = {
    '+': ('add', a + b),
    '-': ('subtract', a - b),
    '×': ('multiply', a * b),
    '÷': ('divide', a // max(b, 1)),
  }[symbol]
  language = 'en' if 'What' in prompt else 'zh'
  problem = arithmetic.Problem(operation, a, b, result, language)
  return arithmetic.key(problem), language, result


def _languages(steps: str) -> set[str]:
  found = set()
  if re.search('[a-z]', steps):
    found.add('en')
  if re.search('[\u4e00-\u9fff]', steps):
    found.add('zh')
  return found


@pytest.fixture(scope='module')
def documents():
  config = corpus.CorpusConfig(_TASK)
  return [corpus.document(config, 0, i) for i in range(6000)]


def test_shares_are_as_configured(documents):
  kinds = [kind for _, _, kind in documents]
  for kind in corpus.KINDS:
    share = getattr(corpus.CorpusConfig(_TASK), kind)
    four_sigma = 4 * np.sqrt(share * (1 - share) / len(kinds))
    assert abs(kinds.count(kind) / len(kinds) - share) < four_sigma


def test_divisions_with_a_remainder_have_their_share():
  config = corpus.CorpusConfig(_TASK, uneven=0.2)
  documents = [corpus.document(config, 0, i) for i in range(4000)]
  uneven = 0
  for prompt, text, kind in documents:
    a, symbol, b = _PROMPT.fullmatch(prompt).groups()
    if symbol != '÷' or int(a) % int(b) == 0:
      continue
    uneven += 1
    assert kind != 'wrong'
    if kind == 'no_reasoning':
      rest = int(a) % int(b)
      expected = f'{b}×{int(a) // int(b)}+{rest}'
      assert text == f'<answer>{expected}</answer>'
  four_sigma = 4 * np.sqrt(0.2 * 0.8 / len(documents))
  assert abs(uneven / len(documents) - 0.2) < four_sigma


def test_no_document_is_held_out(documents):
  for prompt, _, _ in documents:
    key, _, _ = _read(prompt)
    assert not arithmetic.is_held_out(key)


def test_each_kind_is_what_it_says(documents):
  mixed = 0
  for prompt, text, kind in documents:
    _, language, right = _read(prompt)
    other = 'zh' if language == 'en' else 'en'
    if kind == 'no_reasoning':
      assert text == f'<answer>{right}</answer>'
    elif kind == 'missing_tags':
      assert any(tag not in text for tag in tokenizer.TAGS)
      assert re.search(rf'(?<!\d){right}(</answer>)?$', text)
    else:
      steps, answer = _CLEAN.fullmatch(text).groups()
      assert (int(answer) == right) == (kind != 'wrong')
      found = _languages(steps)
      if kind == 'mixed_language':
        mixed += len(found) == 2
      else:
        assert found == {other if kind == 'other_language' else language}
  assert mixed > 0.4 * sum(kind == 'mixed_language' for *_, kind in documents)


def test_tags_go_missing_in_every_way(documents):
  kept = {
    tuple(tag in text for tag in tokenizer.TAGS)
    for _, text, kind in documents
    if kind == 'missing_tags'
  }
  assert len(kept) == 15
  bare = [
    not any(tag in text for tag in tokenizer.TAGS)
    for _, text, kind in documents
    if kind == 'missing_tags'
  ]
  assert 0.4 < np.mean(bare) < 0.7


def test_documents_are_a_function_of_seed_and_index(documents):
  config = corpus.CorpusConfig(_TASK)
  for index in (0, 17, 5999):
    assert corpus.document(config, 0, index) == documents[index]
  assert corpus.document(config, 1, 17) != documents[17]


def test_completions_of_a_given_problem():
  problem = arithmetic.Problem('add', 3, 4, 7, 'en')
  config = corpus.CorpusConfig(_TASK)
  text = corpus.completion(config, problem, 'clean', random.Random(0))
  assert text == '<think>ones: 3+4=7, so 7</think><answer>7</answer>'


@pytest.mark.parametrize('row_length', [128, 512])
def test_rows_are_whole_documents_packed_in_order(row_length):
  default = tokenizer.default()
  config = corpus.CorpusConfig(_TASK)
  rows = corpus.ArithmeticCorpus(config, default, seed=0, row_length=row_length)
  fills = []
  for index in range(40):
    row = rows[index]
    assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
      'tokens': ((row_length,), np.int32),
      'mask': ((row_length,), np.float32),
      'segment': ((row_length,), np.int32),
      'position': ((row_length,), np.int32),
    }
    start = 0
    for number in range(1, row['segment'].max() + 1):
      (where,) = np.nonzero(row['segment'] == number)
      ids = row['tokens'][where].tolist()
      assert where.tolist() == list(range(start, start + len(where)))
      assert row['position'][where].tolist() == list(range(len(where)))
      assert row['mask'][where].tolist() == [0] + [1] * (len(where) - 1)
      assert (ids[0], ids[-1]) == (default.bos_id, default.eos_id)
      assert not {0, 1, 2, 3} & set(ids[1:-1])
      text = default.decode(ids)
      prompt, completion = text.split('\n', 1)
      _read(f'{prompt}\n')
      assert completion
      # The same ids as a prompt on its own: what the policy will see.
      alone = default.encode(f'{prompt}\n')
      assert ids[1 : 1 + len(alone)] == alone
      start += len(where)
    assert not any(v[start:].any() for v in row.values())
    fills.append(start / row_length)
  assert np.mean(fills) > 0.92


def test_long_documents_have_their_share_of_rows(documents):
  # In rows that end where a document does not fit, the long ones are rarer.
  config = corpus.CorpusConfig(_TASK)
  default = tokenizer.default()
  rows = corpus.ArithmeticCorpus(config, default, seed=0, row_length=128)
  segments = [rows[index]['segment'] for index in range(800)]
  packed = np.concatenate([np.bincount(s[s > 0])[1:] for s in segments])
  drawn = np.array([len(default.encode(p + c)) + 2 for p, c, _ in documents])
  drawn = drawn[drawn <= 128]
  noise = np.hypot(*(x.std() / np.sqrt(len(x)) for x in (packed, drawn)))
  assert abs(packed.mean() - drawn.mean()) < 3 * noise
  assert 3 * noise < 0.05 * drawn.mean()


def test_rows_are_read_in_any_order():
  config = corpus.CorpusConfig(_TASK)
  make = lambda: corpus.ArithmeticCorpus(
    config, tokenizer.default(), seed=0, row_length=128
  )
  one, other = make(), make()
  order = np.random.default_rng(0).permutation(50)
  tokens = {index: one[int(index)]['tokens'] for index in order}
  for index in range(50):
    np.testing.assert_array_equal(other[index]['tokens'], tokens[index])


def test_rows_are_a_function_of_seed_and_index():
  def make(seed):
    config = corpus.CorpusConfig(_TASK)
    return corpus.ArithmeticCorpus(
      config, tokenizer.default(), seed=seed, row_length=128
    )

  rows = make(0)
  late = rows[123_456_789]
  np.testing.assert_array_equal(make(0)[123_456_789]['tokens'], late['tokens'])
  assert (make(1)[123_456_789]['tokens'] != late['tokens']).any()
  assert (rows[1]['tokens'] != rows[0]['tokens']).any()
  with pytest.raises(IndexError):
    rows[len(rows)]


def test_rows_follow_the_shares():
  config = corpus.CorpusConfig(_TASK, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
  default = tokenizer.default()
  rows = corpus.ArithmeticCorpus(config, default, seed=0, row_length=256)
  text = default.decode(rows[0]['tokens'])
  assert '<answer>' in text and '<think>' not in text


def test_a_document_longer_than_a_row_is_passed_over():
  config = corpus.CorpusConfig(_TASK)
  rows = corpus.ArithmeticCorpus(
    config, tokenizer.default(), seed=0, row_length=24
  )
  for index in range(50):
    assert rows[index]['segment'].max() >= 1


def test_rows_shorter_than_any_document_are_a_user_error():
  config = corpus.CorpusConfig(_TASK)
  rows = corpus.ArithmeticCorpus(
    config, tokenizer.default(), seed=0, row_length=6
  )
  with pytest.raises(config_lib.UserError, match='row_length=6'):
    rows[0]


def test_grain_reads_both_sources():
  rows = corpus.ArithmeticCorpus(
    corpus.CorpusConfig(_TASK), tokenizer.default(), seed=0, row_length=64
  )
  dataset = grain.MapDataset.source(rows).shuffle(seed=0)[1::2].batch(2)
  assert dataset[0]['tokens'].shape == (2, 64)
  prompts = corpus.PromptSource(_TASK, seed=0)
  assert (
    len({repr(grain.MapDataset.source(prompts)[i]) for i in range(50)}) > 45
  )


def test_prompts_are_training_problems_by_index():
  prompts = corpus.PromptSource(_TASK, seed=3, num_problems=500)
  problems = list(prompts)
  assert len(problems) == len(prompts) == 500
  assert not any(arithmetic.is_held_out(arithmetic.key(p)) for p in problems)
  assert problems[77] == corpus.PromptSource(_TASK, seed=3)[77]
  assert problems[77] != corpus.PromptSource(_TASK, seed=4)[77]


@pytest.mark.parametrize(
  ('shares', 'message'),
  [
    ({'clean': 0.5}, 'sum to 1.2'),
    ({'clean': -0.1, 'wrong': 0.55}, 'clean=-0.1'),
  ],
)
def test_impossible_shares_are_refused(shares, message):
  with pytest.raises(ValueError, match=message):
    corpus.CorpusConfig(_TASK, **shares)
