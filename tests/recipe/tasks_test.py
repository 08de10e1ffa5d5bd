"""Questions of files as they are asked."""

import json

import pytest

from r1jax import config as config_lib
from r1jax.data import tokenizer
from r1jax.data.tasks import question_file
from r1jax.recipe import tasks


def _make(
  tmp_path,
  *,
  template='qwen3',
  max_tokens=1000,
  say=print,
  is_trained=False,
  **changes,
) -> tasks.Task:
  path = tmp_path / 'questions.jsonl'
  # Plain prompts of 5, 7, 9 and 11 tokens, bos included.
  rows = [
    {'question': f'{10**i}+{10**i}?', 'answer': str(2 * 10**i)}
    for i in range(4)
  ]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config = question_file.QuestionFileConfig(
    paths=(str(path),) if is_trained else (), eval_paths=(str(path),), **changes
  )
  return tasks.make_task(
    config,
    seed=0,
    render=tasks.renderer(template),
    limit=tasks.PromptLimit(tokenizer.default(), max_tokens),
    say=say,
  )


def test_instructions_stand_below_the_question(tmp_path):
  task = _make(tmp_path, instruction='Think.')
  prompts = {q.prompt for q in task.held_out(4, 0)}
  assert '<|im_start|>user\n10+10?\nThink.<|im_end|>\n' in ' '.join(prompts)
  task = _make(tmp_path)
  assert all('?<|im_end|>' in q.prompt for q in task.held_out(4, 0))


def test_what_is_only_evaluated_is_not_trained_on(tmp_path):
  with pytest.raises(config_lib.UserError, match='names no training questions'):
    _make(tmp_path).training(0)


@pytest.mark.parametrize('is_trained', [False, True])
def test_prompts_that_are_too_long_are_left_out_and_counted(
  tmp_path, is_trained
):
  said = []
  task = _make(
    tmp_path,
    template='plain',
    max_tokens=8,
    say=said.append,
    is_trained=is_trained,
  )
  if is_trained:
    questions = [task.training(i) for i in range(20)]
  else:
    questions = task.held_out(2, 0)
  assert {q.prompt for q in questions} == {'1+1?', '10+10?'}
  name = 'training' if is_trained else 'held-out'
  assert said == [
    f'2 of 4 {name} prompts are longer than max_prompt_tokens=8: left out'
  ]


def test_all_prompts_are_too_long(tmp_path):
  task = _make(tmp_path, template='plain', max_tokens=4, is_trained=True)
  for name, ask in (
    ('training', lambda: task.training(0)),
    ('held-out', lambda: task.held_out(2, 0)),
  ):
    with pytest.raises(
      config_lib.UserError,
      match=f'max_prompt_tokens=4 must be at least 5, the shortest of 4 {name}',
    ):
      ask()


def test_fewer_questions_than_asked_are_all_taken(tmp_path):
  said = []
  task = _make(tmp_path, say=said.append)
  assert len(task.held_out(4, 0)) == 4 and not said
  assert len({q.prompt for q in task.held_out(5, 0)}) == 4
  assert said == [
    '5 held-out questions are asked for, there are 4: all are taken'
  ]
