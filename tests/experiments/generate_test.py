"""The program that completes prompts, with a policy made by hand."""

import pathlib
import re
import subprocess
import sys

import pytest

from tests.experiments import policy_workdir

_ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('policy')
  policy_workdir.make(folder)

  def run(*arguments, prompts=''):
    return subprocess.run(
      [
        sys.executable,
        '-m',
        'experiments.generate',
        f'--workdir={folder}',
        '--config.sampling.temperature=0',
        *arguments,
      ],
      cwd=_ROOT,
      input=prompts,
      capture_output=True,
      text=True,
      timeout=120,
    )

  return run


@pytest.mark.slow
def test_every_line_is_a_prompt_until_one_is_too_long(run):
  result = run(prompts=f'What is 3+4?\n\n你好🎉\n{"1" * 70}\n')
  whole = r'thinking:\nanswer:\n\d\n'
  assert re.fullmatch(rf'{whole}\n{whole}', result.stdout)
  *notes, error = result.stderr.splitlines()
  assert notes[-1].startswith('step 7 of ')
  assert error == (
    'error: the prompt has 72 tokens, model.max_length=64 must hold it and a '
    'completion'
  )
  assert result.returncode == 2


def test_a_prompt_as_it_is_and_an_end_before_the_end(run):
  result = run('--prompt=1\\n', '--noadd_newline', '--config.max_new_tokens=3')
  assert result.stdout == 'thinking:\nanswer:\n'
  assert result.stderr.splitlines()[-1] == (
    'stopped after 3 tokens: max_new_tokens'
  )
  assert result.returncode == 0
