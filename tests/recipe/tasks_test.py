"""Questions of files as they are asked."""

import json

import pytest

from r1jax import config as config_lib
from r1jax.data.tasks import question_file
from r1jax.recipe import tasks


def _make(tmp_path, **changes) -> tasks.Task:
  path = tmp_path / 'questions.jsonl'
  rows = [{'question': f'{i}+{i}?', 'answer': str(2 * i)} for i in range(4)]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config = question_file.QuestionFileConfig(
    paths=(), eval_paths=(str(path),), **changes
  )
  return tasks.make_task(config, seed=0, render=tasks.renderer('qwen3'))


def test_instructions_stand_below_the_question(tmp_path):
  task = _make(tmp_path, instruction='Think.')
  prompts = {q.prompt for q in task.held_out(4, 0)}
  assert '<|im_start|>user\n3+3?\nThink.<|im_end|>\n' in ' '.join(prompts)
  task = _make(tmp_path)
  assert all('?<|im_end|>' in q.prompt for q in task.held_out(4, 0))


def test_what_is_only_evaluated_is_not_trained_on(tmp_path):
  with pytest.raises(config_lib.UserError, match='names no training questions'):
    _make(tmp_path).training(0)
