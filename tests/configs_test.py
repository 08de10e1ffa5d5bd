"""Every config file loads strictly, and its numbers fit each other."""

import copy
import dataclasses
import functools
import itertools
import pathlib
import random
import runpy

import numpy as np
import pytest

from r1jax import config as config_lib
from r1jax.data import corpus, tokenizer
from r1jax.data.tasks import arithmetic
from r1jax.model import config as model_config
from r1jax.parallel import mesh
from r1jax.recipe import demo, evaluation, grpo, pretrain, sft
from r1jax.sampling import stream
from r1jax.train import optimizer

_FOLDER = pathlib.Path(__file__).resolve().parents[1] / 'configs'
_FILES = sorted(
  str(path.relative_to(_FOLDER))
  for path in _FOLDER.rglob('*.py')
  if path.name != '__init__.py'
)
# A key that only this kind of config, or one above it, has at its top.
_CLASSES = {
  'num_slices': mesh.MeshConfig,
  'r1_zero': demo.DemoConfig,
  'rollout': grpo.GrpoConfig,
  'num_samples': evaluation.EvaluateConfig,
  'mtp_coef': pretrain.PretrainConfig,
  'row_length': sft.SftConfig,
  'attention': model_config.ModelConfig,
  'sampling': stream.StreamConfig,
}


def _values(name: str) -> dict:
  return runpy.run_path(str(_FOLDER / name))['get_config']().to_dict()


@functools.cache
def _load(name: str):
  values = _values(name)
  cls = next(cls for key, cls in _CLASSES.items() if key in values)
  return config_lib.from_dict(cls, values)


def _arithmetic_stages(cls):
  for name, config in _stages(cls):
    if isinstance(config.task, arithmetic.ArithmeticConfig):
      yield name, config


def _of(cls) -> list[str]:
  return [name for name in _FILES if isinstance(_load(name), cls)]


def _tokenizer(path: str) -> tokenizer.Tokenizer:
  return tokenizer.Tokenizer.load(path) if path else tokenizer.default()


def _stages(cls):
  """Yields (name, config) of a kind, those inside a demo's config too."""
  for name in _FILES:
    config = _load(name)
    parts = [config]
    if isinstance(config, demo.DemoConfig):
      parts = [config.base, config.r1_zero, config.evaluate]
    for part in parts:
      if isinstance(part, cls):
        yield name, part


def test_the_files_are_found():
  assert {'demo.py', 'gsm8k.py', 'model/deepseek_v3_671b.py'} <= set(_FILES)


@pytest.mark.parametrize('name', _FILES)
def test_every_config_loads_and_says_what_it_is(name):
  _load(name)
  assert runpy.run_path(str(_FOLDER / name))['__doc__']


@pytest.mark.parametrize('name', _FILES)
def test_a_key_too_many_is_an_error(name):
  values = _values(name) | {'no_such_key': 1}
  with pytest.raises(config_lib.UserError, match='no_such_key'):
    config_lib.from_dict(type(_load(name)), values)


# Numbers that switch something off, or are a share or weight of nothing.
_MAY_BE_ZERO = {
  *('seed', 'mtp_depth', 'num_dense_layers', 'num_shared', 'init_std'),
  *('uneven', 'good_guess', 'held_out_fraction', 'mtp_coef', 'kl_coef'),
  *('b1', 'b2', 'final_lr_ratio', 'warmup_steps', 'weight_decay'),
  *('balance_coef', 'bias_update_speed', 'format_weight', 'accuracy_weight'),
  *('checkpoint_every', 'eval_every', 'reference_every', 'gap_every'),
  *('samples_every', 'eval_problems', 'temperature', 'top_k'),
  *('redundant_experts', 'load_decay', 'tokens_at_once'),
}


def _numbers(values: dict, path: tuple[str, ...] = ()):
  """Yields the path and value of every number of nested dicts."""
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _numbers(value, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
      yield (*path, key), value


@pytest.mark.parametrize(
  'name',
  ['pretrain.py', 'r1_zero.py', 'evaluate.py', 'sft_gsm8k.py', 'generate.py'],
)
def test_impossible_numbers_are_refused_and_named(name):
  values, cls = _values(name), type(_load(name))
  for path, value in _numbers(values):
    *above, key = path
    if above == ['mesh']:
      continue  # -1 stands for what is left.
    for wrong in (0, -1):
      if wrong == 0 and (key in _MAY_BE_ZERO or name == 'generate.py'):
        continue
      changed = copy.deepcopy(values)
      functools.reduce(dict.__getitem__, above, changed)[key] = type(value)(
        wrong
      )
      with pytest.raises(config_lib.UserError) as error:
        config_lib.from_dict(cls, changed)
        pytest.fail(f'{".".join(path)}={wrong} is accepted')
      assert key in str(error.value)


def test_rows_fit_the_model_and_its_vocabulary_holds_the_tokenizers():
  for name, config in _stages(pretrain.PretrainConfig):
    assert config.row_length <= config.model.max_length, name
    assert config.batch_size % config.train.num_microbatches == 0, name
    if config.init_from or config.tokenizer:  # Of a folder that is not here.
      continue
    V = _tokenizer(config.tokenizer).vocab_size
    assert V <= config.model.vocab_size < V + 8, name


@pytest.mark.parametrize('name', _of(demo.DemoConfig))
def test_the_stages_of_a_demo_are_about_one_task(name):
  config = _load(name)
  tasks = config.base.data.arithmetic, config.r1_zero.task, config.evaluate.task
  assert len({task.maximum for task in tasks}) == 1
  assert len({task.languages for task in tasks}) == 1
  stages = config.base, config.r1_zero, config.evaluate
  assert len({stage.tokenizer for stage in stages}) == 1
  sampled = config.r1_zero.rollout, config.evaluate
  assert len({s.max_prompt_tokens for s in sampled}) == 1
  # A completion that training cuts short would count as wrong only there.
  assert len({s.max_new_tokens for s in sampled}) == 1
  assert config.r1_zero.rollout.row_length <= config.base.model.max_length
  for s in sampled:
    longest = s.max_prompt_tokens + s.max_new_tokens
    assert longest <= config.base.model.max_length
  assert config.evaluate.num_problems >= 1000
  assert config.evaluate.sampling.temperature == 1


def test_the_demo_is_made_of_its_stages_configs():
  whole = _load('demo.py')
  assert whole.base == _load('pretrain.py')
  assert whole.r1_zero == _load('r1_zero.py')
  assert whole.evaluate == _load('evaluate.py')


def test_an_ablation_changes_one_key():
  base, ablation = (
    _values('pretrain.py'),
    _values('ablations/router_bias_off.py'),
  )
  assert base['train'].pop('bias_update_speed') > 0
  assert ablation['train'].pop('bias_update_speed') == 0
  assert base == ablation


@pytest.mark.parametrize(
  ('of', 'first', 'last', 'epochs'),
  [
    ('r1', 5e-5, 5e-6, '2-3 epochs, cosine from 5e-5 to 5e-6'),
    ('v3', 5e-6, 1e-6, '2 epochs, cosine from 5e-6 to 1e-6'),
  ],
)
def test_finetuning_is_the_papers(of, first, last, epochs):
  """R1's and V3's rates; R1's batch and context; epochs as the file says."""
  file = runpy.run_path(str(_FOLDER / 'sft.py'))
  values = file['get_config'](of).to_dict()
  config = config_lib.from_dict(sft.SftConfig, values)
  num_steps = config.train.num_steps
  rate = optimizer.make_schedule(config.optim, num_steps)
  halfway = (first + last) / 2
  for step, expected in ((0, first), (num_steps // 2, halfway)):
    assert float(rate(step)) == pytest.approx(expected, rel=1e-5)
  assert float(rate(num_steps)) == pytest.approx(last, rel=1e-5)
  assert (config.optim.kind, config.optim.schedule) == ('adamw', 'cosine')
  assert (config.optim.b1, config.optim.b2) == (0.9, 0.95)
  assert (config.optim.weight_decay, config.optim.clip_norm) == (0.1, 1.0)
  assert (config.batch_size, config.row_length) == (128, 32768)
  assert config.train.bias_update_speed == 0
  assert epochs in ' '.join(file['__doc__'].split())


@pytest.mark.parametrize(
  ('stage', 'lr', 'num_steps', 'rows', 'tokens', 'trainable'),
  [
    ('warm_up', 1e-3, 1000, 16, 2.1e9, 'indexer'),
    ('sparse', 7.3e-6, 15000, 480, 943.7e9, ''),
  ],
)
def test_sparse_attention_is_taught_as_v32s(
  stage, lr, num_steps, rows, tokens, trainable
):
  """The report's rate, steps, sequences and tokens in all."""
  file = runpy.run_path(str(_FOLDER / 'sparse_attention.py'))
  values = file['get_config'](stage).to_dict()
  config = config_lib.from_dict(pretrain.PretrainConfig, values)
  rate = optimizer.make_schedule(config.optim, config.train.num_steps)
  for step in (0, num_steps // 2, num_steps - 1):
    assert float(rate(step)) == pytest.approx(lr)
  assert config.optim.trainable == trainable
  assert (config.train.num_steps, config.batch_size) == (num_steps, rows)
  assert config.row_length == 128 * 1024
  seen = num_steps * rows * config.row_length
  assert seen == pytest.approx(tokens, rel=2e-3)
  indexer = config.model.attention.indexer
  assert indexer.dense == (stage == 'warm_up') and indexer.top_k == 2048
  # But for the indexers the model is V3.
  v3 = _load('model/deepseek_v3_671b.py')
  attention = dataclasses.replace(config.model.attention, indexer=None)
  assert dataclasses.replace(config.model, attention=attention) == v3


@pytest.mark.parametrize(
  ('name', 'variants'),
  [
    ('sft.py', 'r1, v3'),
    ('gsm8k.py', 'tiny, imported'),
    ('sparse_attention.py', 'warm_up, sparse'),
  ],
)
def test_a_variant_that_there_is_not_lists_those_that_are(name, variants):
  file = runpy.run_path(str(_FOLDER / name))
  with pytest.raises(ValueError, match=f"'v9' is no variant, .* {variants}$"):
    file['get_config']('v9')


def test_text_is_pretrained_on_by_an_imported_model_too():
  values = runpy.run_path(str(_FOLDER / 'gsm8k.py'))['get_config']('imported')
  values.init_from = 'somewhere'
  config = config_lib.from_dict(pretrain.PretrainConfig, values.to_dict())
  assert config.model is None and config.mtp_coef == 0


def _prompts_of_every_length(maximum: int):
  """Yields a problem for each operation, language and pair of digit counts.

  Digits are tokens of their own, so that no other problem has a longer prompt.
  """
  digits = lambda n_N: np.char.str_len(n_N.astype(str))
  for operation, held_out in itertools.product(
    arithmetic.OPERATIONS, (False, True)
  ):
    a_N, b_N = arithmetic.keys(operation, maximum, held_out)
    sizes_N2 = np.stack([digits(a_N), digits(b_N)], axis=1)
    _, first = np.unique(sizes_N2, axis=0, return_index=True)
    for i, language in itertools.product(first, arithmetic.LANGUAGES):
      a, b = a_N.item(i), b_N.item(i)
      yield arithmetic.Problem(operation, a, b, 0, language)


def _prompt_tokens(t: tokenizer.Tokenizer, problems) -> list[int]:
  """Tokens of each prompt, <bos> included."""
  texts = [arithmetic.prompt(problem) for problem in problems]
  return [len(ids) + 1 for ids in t.encode_batch(texts)]


def test_the_longest_prompt_is_among_those_of_every_length():
  every = [
    arithmetic.Problem(operation, a, b, 0, language)
    for operation in arithmetic.OPERATIONS
    for held_out in (False, True)
    for a, b in zip(
      *(x.tolist() for x in arithmetic.keys(operation, 100, held_out))
    )
    for language in arithmetic.LANGUAGES
  ]
  t = tokenizer.default()
  assert len(every) == 2 * (2601 + 5151 + 347 + 582)
  assert max(_prompt_tokens(t, every)) == max(
    _prompt_tokens(t, _prompts_of_every_length(100))
  )


@pytest.mark.parametrize('cls', [grpo.GrpoConfig, evaluation.EvaluateConfig])
def test_prompts_fit(cls):
  for name, config in _arithmetic_stages(cls):
    part = config.rollout if cls is grpo.GrpoConfig else config
    t = _tokenizer(config.tokenizer)
    problems = _prompts_of_every_length(config.task.maximum)
    assert max(_prompt_tokens(t, problems)) <= part.max_prompt_tokens, name


@pytest.mark.parametrize('cls', [grpo.GrpoConfig, evaluation.EvaluateConfig])
def test_worked_solutions_fit(cls):
  for name, config in _arithmetic_stages(cls):
    part = config.rollout if cls is grpo.GrpoConfig else config
    t, rng = _tokenizer(config.tokenizer), random.Random(0)
    shares = dict.fromkeys(corpus.KINDS, 0.0) | {'clean': 1.0}
    documents = corpus.CorpusConfig(config.task, **shares)
    longest = 0
    for _ in range(1000):
      problem = arithmetic.draw(config.task, rng, held_out=False)
      text = corpus.completion(documents, problem, 'clean', rng)
      longest = max(longest, len(t.encode(text)) + 1)  # With <eos>.
    assert longest <= part.max_new_tokens, name
