"""Evaluates a workdir's model on held-out questions and keeps the figures."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath

from r1jax import config as config_lib
from r1jax.data import hf_tokenizer
from r1jax.data import question as question_lib
from r1jax.evaluate import run as run_lib
from r1jax.evaluate import scores
from r1jax.interop import huggingface
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import config_check, origin, pretrain, rollouts, tasks
from r1jax.recipe import stage as stage_lib
from r1jax.rl.reward import grading
from r1jax.sampling import filters, generate
from r1jax.train import progress
from r1jax.train import workdir as workdir_lib


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """An evaluation on held-out questions.

  Attributes:
    init_from: Workdir or Hugging Face folder of the model; '' for the workdir
      itself.
    seed: Of the choice of questions and of sampling.
    tokenizer: Path of a sentencepiece model; '' for that of the model.
    task: Where the questions come from.
    template: How they are asked, one of `chat_templates.TEMPLATES`; 'auto' as
      `origin.find_template`.
    rule: How completions are graded, one of `grading.RULES`.
    num_problems: Distinct held-out questions; of files all, if there are fewer.
    num_samples: k, completions of each, besides a greedy one.
    max_prompt_tokens: Longest prompt, bos included.
    max_new_tokens: Longest completion, the stop token included.
    sampling: Of the k completions.
    batch_size: Completions sampled at once.
    mesh: Devices.
  """

  init_from: str
  seed: int
  tokenizer: str
  task: tasks.TaskConfig
  template: str
  rule: str
  num_problems: int
  num_samples: int
  max_prompt_tokens: int
  max_new_tokens: int
  sampling: filters.SamplingConfig
  batch_size: int
  mesh: mesh_lib.MeshConfig

  def __post_init__(self):
    if self.rule not in grading.RULES:
      raise ValueError(
        f'rule={self.rule!r}, it must be one of {", ".join(grading.RULES)}'
      )
    check = functools.partial(config_lib.check_at_least, self)
    check(0, 'seed')
    check(1, 'num_problems', 'num_samples', 'batch_size')
    check(1, 'max_prompt_tokens', 'max_new_tokens')


def run(
  config: EvaluateConfig, workdir: str, say: Callable[[str], None]
) -> dict[str, Any]:
  """Evaluates the newest checkpoint of a workdir, or of `init_from`.

  Writes evaluation.json (figures) and completions.jsonl (the greedy
  completion of every question) into the workdir.

  Returns:
    What `scores.summarise` gives, with 'step' and 'seconds' added.

  Raises:
    UserError: There is no model, the workdir is another's folder of weights,
      or fewer questions exist.
  """
  start = time.perf_counter()
  if huggingface.is_checkpoint(workdir):
    raise config_lib.UserError(
      f'workdir={workdir} is a folder of Hugging Face, results are not written '
      f'there: give it as init_from={workdir}, and a workdir of your own'
    )
  source = config.init_from or workdir
  model = origin.load_model_config(source)
  path = config.tokenizer or origin.load_tokenizer_path(source)
  tokenizer = hf_tokenizer.load_tokenizer(path)
  template = origin.resolve_template(config.template, source, model, tokenizer)
  pretrain.prepare_tokenizer(tokenizer, model, template=template)
  mesh = stage_lib.make_mesh(config.mesh)
  model = origin.for_mesh(model, source, mesh)
  config_check.check_rows('batch_size', config.batch_size, mesh)
  config_check.check_length(
    'max_prompt_tokens + max_new_tokens',
    config.max_prompt_tokens + config.max_new_tokens,
    model,
  )
  task = tasks.make_task(
    config.task,
    seed=config.seed,
    render=tasks.renderer(template),
    limit=tasks.PromptLimit(tokenizer, config.max_prompt_tokens),
    say=say,
  )
  questions = task.held_out(config.num_problems, config.seed)
  prompt_PT, length_P = rollouts.encode_prompts(
    questions, tokenizer, config.max_prompt_tokens
  )
  # Another model's workdir is refused first; a new one is claimed when the
  # model is there: a wrong `init_from` must leave nothing.
  is_new = not (epath.Path(workdir) / 'config.json').exists()
  if config.init_from and not is_new:
    _claim(workdir, config)
  variables, step = origin.load_variables(source, model, mesh, say=say)
  variables = generate.make_reshard(model, mesh)(variables)
  if config.init_from and is_new:
    _claim(workdir, config)
  make = lambda sampling: generate.make_generate(
    model,
    mesh,
    max_new_tokens=config.max_new_tokens,
    sampling=sampling,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
  )
  with _shown_calls(config, len(questions)) as shown:
    results, greedy_ids = run_lib.evaluate(
      questions,
      prompt_PT,
      length_P,
      sampled=shown(make(config.sampling)),
      greedy=shown(make(filters.SamplingConfig(temperature=0.0))),
      variables=variables,
      mesh=mesh,
      grade=grading.make_grader(config.rule, tokenizer),
      stop_ids=tokenizer.stop_ids,
      num_samples=config.num_samples,
      batch_size=config.batch_size,
      key=jax.random.key(config.seed),
    )
  summary = scores.summarise(results, seed=config.seed)
  summary |= {'step': step, 'seconds': time.perf_counter() - start}
  texts = [tokenizer.decode(ids) for ids in greedy_ids]
  _write(epath.Path(workdir), config, summary, questions, texts)
  return summary


def load_finished(
  config: EvaluateConfig, workdir: str, step: int
) -> dict[str, Any] | None:
  """What `run` returned for this config and checkpoint, if it ever did.

  The mesh may differ: it does not change what is asked.
  """
  path = epath.Path(workdir) / 'evaluation.json'
  try:
    kept = json.loads(path.read_text())
    there, at = kept.pop('config'), kept['step']
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return None
  same = lambda values: {k: v for k, v in values.items() if k != 'mesh'}
  asked = json.loads(json.dumps(config_lib.to_dict(config)))
  return kept if at == step and same(there) == same(asked) else None


@contextlib.contextmanager
def _shown_calls(
  config: EvaluateConfig, num_problems: int
) -> Iterator[Callable[[run_lib.Generate], run_lib.Generate]]:
  """Wraps generators so that each batch that is done moves the progress."""
  sampled = math.ceil(num_problems * config.num_samples / config.batch_size)
  greedy = math.ceil(num_problems / config.batch_size)
  shown = progress.Progress(sampled + greedy, title='evaluate')
  calls = itertools.count(1)

  def wrap(generate: run_lib.Generate) -> run_lib.Generate:
    def shown_generate(*args):
      rollout = jax.block_until_ready(generate(*args))
      shown.update(next(calls), {})
      return rollout

    return shown_generate

  with shown:
    yield wrap


def _claim(workdir: str, config: EvaluateConfig) -> None:
  """Makes the workdir one of evaluations of this model alone."""
  values = config_lib.to_dict(config)
  workdir_lib.prepare(
    workdir,
    {'evaluate': values},
    may_differ=[f'evaluate.{key}' for key in values if key != 'init_from'],
  )


def _write(
  workdir: epath.Path,
  config: EvaluateConfig,
  summary: dict[str, Any],
  questions: Sequence[question_lib.Question],
  texts: Sequence[str],
) -> None:
  lines = [
    json.dumps(
      {'prompt': q.prompt, 'gold': q.answer, 'completion': text},
      ensure_ascii=False,
    )
    + '\n'
    for q, text in zip(questions, texts, strict=True)
  ]
  workdir_lib.write_text(workdir / 'completions.jsonl', ''.join(lines))
  # Last: where it stands, the other file is whole.
  kept = summary | {'config': config_lib.to_dict(config)}
  workdir_lib.write_text(
    workdir / 'evaluation.json', json.dumps(kept, indent=2) + '\n'
  )
