"""README's commands for the models of others, word for word."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from r1jax.interop import export
from r1jax.model import transformer
from tests import quick
from tests.data import tiny_tokenizer
from tests.recipe import foreign, micro

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# What makes them fit a tiny model and a test's patience.
_SIZES = {
  'generate': ['--config.max_new_tokens=4'],
  'evaluate': [
    '--config.num_samples=1',
    '--config.max_prompt_tokens=256',
    '--config.max_new_tokens=4',
    '--config.batch_size=8',
  ],
  'pretrain': [
    '--config.row_length=64',
    '--config.batch_size=2',
    '--config.train.num_steps=1',
    '--config.data.held_out_fraction=0.2',
  ],
  'sft': [
    '--config.row_length=128',
    '--config.batch_size=2',
    '--config.train.num_steps=1',
    '--config.data.held_out_fraction=0',
  ],
  'grpo': [
    '--config.rollout.num_prompts=4',
    '--config.rollout.group_size=2',
    '--config.rollout.max_prompt_tokens=256',
    '--config.rollout.max_new_tokens=4',
    '--config.rollout.row_length=512',
    '--config.train.num_steps=1',
  ],
}


def _commands() -> list[list[str]]:
  """Those of the second block of the chapter."""
  chapter = (_ROOT / 'README.md').read_text().split('## Models of others')[1]
  blocks = re.findall(r'^```\w*\n(.*?)^```', chapter, re.DOTALL | re.MULTILINE)
  block = next(block for block in blocks if 'experiments.' in block)
  return [shlex.split(line, comments=True) for line in block.splitlines()]


def test_every_program_is_there():
  commands = _commands()
  assert {command[2] for command in commands} == {
    f'experiments.{name}' for name in (*_SIZES, 'convert', 'check_logits')
  }


def _write_lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


@pytest.fixture
def place(tmp_path):
  """A Qwen3, its logits, questions (5 to test, one too long) and chats."""
  model = foreign.model('qwen3', max_length=1024)
  variables = micro.variables(model)
  export.save(tmp_path / 'qwen', model, variables, dtype='float32')
  tiny_tokenizer.write_qwen(tmp_path / 'qwen')
  tokens_BT = np.arange(8).reshape(2, 4)
  logits_BTV = transformer.Transformer(model).apply(
    variables, tokens_BT, method='logits'
  )
  np.savez(tmp_path / 'io.npz', input_ids=tokens_BT, logits=logits_BTV)
  rows = [
    {'question': f'What is {i}+{i}?', 'answer': f'It is\n#### {2 * i}'}
    for i in range(20)
  ]
  rows[3]['question'] += ' Think well!' * 30
  _write_lines(tmp_path / 'train.jsonl', rows)
  _write_lines(tmp_path / 'test.jsonl', rows[:6])
  turns = lambda row: [
    {'role': 'user', 'content': row['question'][:20]},
    {'role': 'assistant', 'content': row['answer']},
  ]
  _write_lines(
    tmp_path / 'chats.jsonl', [{'messages': turns(row)} for row in rows]
  )
  (tmp_path / 'configs').symlink_to(_ROOT / 'configs')
  return tmp_path


@pytest.mark.slow
def test_the_commands_run_in_turn_on_a_qwen(place):
  names = {'DIR': 'qwen', 'FILE.npz': 'io.npz'}
  outputs = {}
  for _, module_flag, module, *arguments in _commands():
    program = module.removeprefix('experiments.')
    for name, value in names.items():
      arguments = [
        re.sub(rf'={re.escape(name)}$', f'={value}', a) for a in arguments
      ]
    done = subprocess.run(
      [sys.executable, module_flag, module]
      + arguments
      + _SIZES.get(program, []),
      cwd=place,
      env={
        **os.environ,
        'PYTHONPATH': str(_ROOT),
        'XLA_FLAGS': quick.XLA_FLAGS,
      },
      capture_output=True,
      text=True,
      timeout=300,
    )
    assert done.returncode == 0, (module, arguments, done.stderr[-2000:])
    outputs[program] = done.stdout
  assert (
    '1 of 6 held-out prompts are longer than max_prompt_tokens=256: left out\n'
    '1319 held-out questions are asked for, there are 5: all are taken\n'
  ) in outputs['evaluate']
  assert '1 of 20 training prompts are longer' in outputs['grpo']
  read = lambda *names: json.loads(place.joinpath(*names).read_text())
  assert read('runs', 'evaluated', 'evaluation.json')['num_problems'] == 5
  assert read('runs', 'rl', 'config.json')['template'] == 'qwen3'
  assert read('OUT', 'config.json')['model_type'] == 'qwen3'
  assert (place / 'OUT' / 'tokenizer.json').exists()
