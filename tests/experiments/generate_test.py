"""The program that completes prompts: a policy by hand, imported models."""

import io
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console
import tokenizers

from r1jax.data import hf_tokenizer
from r1jax.evaluate import transcript
from r1jax.interop import huggingface
from r1jax.model import transformer
from tests.experiments import policy_workdir
from tests.recipe import foreign

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


_RENDERED = {
  'qwen3': (
    '<|im_start|>user\nWhat is 37+45?<|im_end|>\n<|im_start|>assistant\n'
  ),
  'deepseek': (
    '<｜begin▁of▁sentence｜><｜User｜>What is 37+45?<｜Assistant｜><think>\n'
  ),
}
_NUM_TOKENS = 24


def _greedy(folder, prompt_ids, stop_ids):
  """The likeliest completion, by whole forward passes."""
  config, variables = huggingface.load(folder)

  @jax.jit
  def best(tokens_BT):
    logits_BTV = transformer.Transformer(config).apply(
      variables, tokens_BT, method='logits'
    )
    return logits_BTV.argmax(-1)

  ids = list(prompt_ids)
  while ids[-1] not in stop_ids and len(ids) < len(prompt_ids) + _NUM_TOKENS:
    tokens_BT = np.zeros((1, config.max_length), np.int32)
    tokens_BT[0, : len(ids)] = ids  # What comes later is not seen.
    ids.append(int(best(tokens_BT)[0, len(ids) - 1]))
  return ids[len(prompt_ids) :]


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['qwen3', 'deepseek'])
def test_an_imported_model_answers_in_its_own_tokens_and_template(
  tmp_path, kind
):
  folder, run = foreign.write(tmp_path / 'hf', kind), str(tmp_path / 'run')
  tokenizer = hf_tokenizer.load_tokenizer(folder)
  reader = tokenizers.Tokenizer.from_file(f'{folder}/tokenizer.json')
  prompt_ids = reader.encode(_RENDERED[kind], add_special_tokens=False).ids
  stop_ids = {'qwen3': (2, 0), 'deepseek': (1,)}[kind]  # As their files say.
  completion = _greedy(folder, prompt_ids, stop_ids)
  console = rich.console.Console(file=io.StringIO())
  writer = transcript.Writer(tokenizer, console, is_thinking=kind == 'deepseek')
  for token in completion:
    if token not in stop_ids:
      writer.write(token)
  writer.close()
  expected = console.file.getvalue()
  assert len(completion) > 3 and expected.strip()

  def generate(workdir, *flags):
    return _program(
      'generate',
      f'--workdir={workdir}',
      '--prompt=What is 37+45?',
      '--config.sampling.temperature=0',
      f'--config.max_new_tokens={_NUM_TOKENS}',
      *flags,
    )

  answered = generate(folder)
  assert answered.stdout == expected, answered.stderr
  assert generate(folder, '--template=plain').stdout != expected
  done = _program('convert', f'--from_hf={folder}', f'--workdir={run}')
  assert done.returncode == 0, done.stderr
  shutil.rmtree(folder)
  assert generate(run).stdout == expected


def _program(name, *arguments):
  return subprocess.run(
    [sys.executable, '-m', f'experiments.{name}', *arguments],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
  )
