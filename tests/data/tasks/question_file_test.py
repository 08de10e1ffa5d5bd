"""Questions of files: gold answers, what is held out, and mistakes."""

import decimal
import json
import re

import pytest

from configs import grpo_gsm8k
from r1jax import config as config_lib
from r1jax.data.tasks import question_file
from r1jax.rl.reward import text

_GOLD = '#### (.+)'
_ROWS = [
  {
    'question': f'What is {i}+{i}?',
    'answer': f'#### {i}+{i}\n#### {2 * i:,}',  # The last one counts.
  }
  for i in range(1000, 1020)
]


def _write(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


def test_gold_answers_and_two_files(tmp_path):
  config = question_file.QuestionFileConfig(
    paths=(_write(tmp_path / 'train.jsonl', _ROWS[:15]),),
    eval_paths=(_write(tmp_path / 'test.jsonl', _ROWS[15:]),),
    gold=_GOLD,
  )
  train, held_out = question_file.load(config)
  assert [q.answer for q in train[:2]] == ['2,000', '2,002']
  assert [q.prompt for q in held_out] == [r['question'] for r in _ROWS[15:]]


def test_questions_to_evaluate_alone(tmp_path):
  path = _write(tmp_path / 'test.jsonl', _ROWS)
  config = question_file.QuestionFileConfig(
    paths=(), eval_paths=(path,), gold=_GOLD
  )
  train, held_out = question_file.load(config)
  assert not train and len(held_out) == len(_ROWS)


def test_a_share_is_held_out_by_the_question_alone(tmp_path):
  changes = {'held_out_fraction': 0.3, 'gold': _GOLD}
  sides = []
  for rows in (_ROWS, [r | {'answer': '#### 7'} for r in reversed(_ROWS)]):
    path = _write(tmp_path / 'all.jsonl', rows)
    config = question_file.QuestionFileConfig(paths=(path,), **changes)
    train, held_out = question_file.load(config)
    assert len(train) + len(held_out) == len(_ROWS)
    sides.append({q.prompt for q in held_out})
  assert sides[0] == sides[1] and 0 < len(sides[0]) < 15


def test_gsm8k_is_a_task_with_numbers_for_answers(shared_data):
  values = grpo_gsm8k.get_config().task.to_dict()
  folder = shared_data / 'gsm8k'
  values |= {
    'paths': (str(folder / 'train.jsonl'),),
    'eval_paths': (str(folder / 'test.jsonl'),),
  }
  config = config_lib.from_dict(question_file.QuestionFileConfig, values)
  train, held_out = question_file.load(config)
  assert (len(train), len(held_out)) == (7473, 1319)
  assert train[0].prompt.startswith('Natalia sold clips to 48 of her friends')
  assert (train[0].answer, held_out[0].answer) == ('72', '18')
  lines = [
    line
    for name in ('train.jsonl', 'test.jsonl')
    for line in (folder / name).read_text(encoding='utf-8').splitlines()
  ]
  for q, line in zip((*train, *held_out), lines, strict=True):
    whole = json.loads(line)
    assert q.prompt == whole['question']
    assert q.answer == whole['answer'].rpartition('####')[2].strip()
    assert re.fullmatch(r'-?\d[\d,]*(\.\d+)?', q.answer), q
    number = text.number(q.answer)
    assert number == decimal.Decimal(q.answer.replace(',', '')), q
    boxed = '<think>a</think>\\boxed{' + str(number) + '}'
    grade = text.grade(boxed, q.answer, format_name='boxed', finished=True)
    assert grade.correct and grade.format, q


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'gold': '@@ (.+)'},
      r"all.jsonl:1: no gold answer, the pattern '@@ \(\.\+",
    ),
    ({'question': 'prompt'}, "all.jsonl:1: no field 'prompt'; present: quest"),
    ({'held_out_fraction': 1e-9}, 'there is no held-out question in '),
  ],
)
def test_what_is_wrong_with_the_files_is_named(tmp_path, changes, message):
  path = _write(tmp_path / 'all.jsonl', _ROWS)
  values = {'paths': (path,), 'held_out_fraction': 0.5, 'gold': _GOLD}
  config = question_file.QuestionFileConfig(**(values | changes))
  with pytest.raises(config_lib.UserError, match=message):
    question_file.load(config)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'paths': ()}, 'paths=.. must name at least one file'),
    ({'gold': '(a'}, "gold='.a' is no pattern"),
    ({'gold': 'a'}, "gold='a' must have one group, has 0"),
    ({'held_out_fraction': 0.0}, 'give one of them'),
    ({'eval_paths': ('b.jsonl',)}, 'give one of them'),
    ({'held_out_fraction': 1.5}, 'held_out_fraction=1.5 must be in'),
    ({'format': 'csv'}, "format='csv' must be one of auto, jsonl"),
  ],
)
def test_what_is_wrong_with_the_config_is_named(changes, message):
  values = {'paths': ('a.jsonl',), 'held_out_fraction': 0.5}
  with pytest.raises(ValueError, match=message):
    question_file.QuestionFileConfig(**(values | changes))
