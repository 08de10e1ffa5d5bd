"""GRPO: the policy loss on a model, and the stage that trains with it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from r1jax import config as config_lib
from r1jax import types
from r1jax.data import hf_tokenizer
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.losses import token
from r1jax.model import config as model_config
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.recipe import (
  config_check,
  objective,
  origin,
  pretrain,
  rollouts,
  samples,
  scoring,
  tasks,
)
from r1jax.recipe import stage as stage_lib
from r1jax.rl import advantage, grpo
from r1jax.sampling import filters
from r1jax.train import optimizer
from r1jax.train import state as state_lib


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """The policy loss.

  Attributes:
    clip_low: ε below 1; from 1 on there is no such bound.
    clip_high: ε above 1; R1 has 10 for both.
    kl_coef: β of the k3 penalty; 0 leaves the reference out.
    reduction: 'sequence_mean' (GRPO) or 'token_mean' (DAPO).
    advantage: 'group' (divided by the group's population std) or 'centred'.
  """

  clip_low: float
  clip_high: float
  kl_coef: float
  reduction: str
  advantage: str

  def __post_init__(self):
    for name, known in (('reduction', REDUCTIONS), ('advantage', ADVANTAGES)):
      if getattr(self, name) not in known:
        raise ValueError(
          f'{name}={getattr(self, name)!r}, it must be one of '
          f'{", ".join(known)}'
        )
    config_lib.check_positive(self, 'clip_low', 'clip_high')
    config_lib.check_at_least(self, 0, 'kl_coef')


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
  """A GRPO run; R1-Zero if `init_from` is a base model.

  Attributes:
    seed: Of prompts and sampling.
    init_from: Workdir or Hugging Face folder of the model to start from.
    tokenizer: Path of a sentencepiece model; '' for that of `init_from`.
    task: Where the questions come from.
    template: How they are asked, one of `chat_templates.TEMPLATES`; 'auto' as
      `origin.find_template`.
    eval_problems: Held-out questions, at most, that are answered greedily
      every `train.eval_every` steps and at the end; 0 for no evaluation.
    rollout: Sampling.
    loss: Policy loss.
    optim: Optimizer.
    train: Loop; `reference_every` replaces the reference policy.
    mesh: Devices.
  """

  seed: int
  init_from: str
  tokenizer: str
  task: tasks.TaskConfig
  template: str
  eval_problems: int
  rollout: rollouts.RolloutConfig
  loss: LossConfig
  optim: optimizer.OptimConfig
  train: stage_lib.TrainConfig
  mesh: mesh_lib.MeshConfig

  def __post_init__(self):
    if not self.init_from:
      raise ValueError("init_from='' must name the workdir of a base model")
    config_lib.check_at_least(self, 0, 'seed', 'eval_problems')


REDUCTIONS = {
  'sequence_mean': grpo.sequence_mean,
  'token_mean': grpo.token_mean,
}
ADVANTAGES = {
  'group': advantage.group_advantage,
  'centred': advantage.centred_advantage,
}


# Parts of the paths of parameters that the policy loss does not see: indexers
# choose tokens, which has no gradient.
UNTRAINED = ('mtp_', 'indexer')


def make_loss(
  config: model_config.ModelConfig,
  loss_config: LossConfig,
  *,
  temperature: float,
  balance_coef: float,
) -> objective.Objective:
  """Builds loss(variables, PolicyBatch): clipped gain, k3 penalty, balance.

  Source: DeepSeekMath, arXiv:2402.03300, eq. 3-4.
  """
  reduce = REDUCTIONS[loss_config.reduction]

  def of_hidden(head, hidden_BTD, mtp_hidden, batch):
    del mtp_hidden
    logp_BT, entropy_BT = token.next_token_logp(
      hidden_BTD, head, batch.tokens_BT, temperature=temperature
    )
    ref_logp_BT = batch.ref_logp_BT
    if loss_config.kl_coef == 0:  # No reference: as if it were the policy.
      ref_logp_BT = jax.lax.stop_gradient(logp_BT)
    loss_BT, terms = grpo.grpo_terms(
      logp_BT,
      batch.old_logp_BT,
      ref_logp_BT,
      batch.adv_BT,
      batch.mask_BT,
      clip_low=loss_config.clip_low,
      clip_high=loss_config.clip_high,
      kl_coef=loss_config.kl_coef,
    )
    loss = reduce(loss_BT, batch)
    metrics = {
      'rl/clip_fraction': grpo.token_mean(terms['clipped'], batch),
      'rl/entropy': grpo.token_mean(entropy_BT, batch),
      'rl/ratio_max': jnp.max(
        jnp.where(batch.mask_BT > 0, terms['ratio'], 1.0)
      ),
    }
    if loss_config.kl_coef > 0:
      metrics['rl/kl'] = grpo.token_mean(terms['kl'], batch)
    return loss, metrics

  return objective.Objective(
    config, of_hidden, mtp=False, balance_coef=balance_coef
  )


def run(
  config: GrpoConfig,
  workdir: str,
  *,
  profile_steps: int = 0,
  dry_run: bool = False,
) -> state_lib.State | dict[str, Any]:
  """Trains a policy in a workdir, or with dry_run only compiles.

  Raises:
    UserError: What the config asks for cannot be.
  """
  source = origin.find_source(config.init_from, workdir)
  model = origin.load_model_config(source)
  path = config.tokenizer or origin.load_tokenizer_path(source)
  tokenizer = hf_tokenizer.load_tokenizer(path)
  template = origin.resolve_template(config.template, source, model, tokenizer)
  config = dataclasses.replace(config, template=template)
  pretrain.prepare_tokenizer(tokenizer, model, template=template)
  mesh = stage_lib.make_mesh(config.mesh)
  model = origin.for_mesh(model, source, mesh)
  _check_sizes(config, model, mesh)
  stage = stage_lib.Stage(
    workdir=epath.Path(workdir),
    model=model,
    train=config.train,
    optim=config.optim,
    mesh=mesh,
    seed=config.seed,
    title='grpo',
    with_reference=config.loss.kl_coef > 0,
    init_from=config.init_from,
    tokenizer=path,
    untrained=UNTRAINED,
    profile_steps=profile_steps,
    pipeline=config.mesh.pipeline,
  )
  loss_fn = make_loss(
    model,
    config.loss,
    temperature=config.rollout.sampling.temperature,
    balance_coef=config.train.balance_coef,
  )
  if dry_run:
    batch = sharding.put_batch(mesh, _example_batch(config.rollout))
    sizes = stage.dry_run(loss_fn, batch)
    return sizes | _sampler_sizes(stage, config.rollout, tokenizer)
  task = tasks.make_task(
    config.task,
    seed=config.seed,
    render=tasks.renderer(config.template),
    limit=tasks.PromptLimit(tokenizer, config.rollout.max_prompt_tokens),
    say=print if jax.process_index() == 0 else lambda message: None,
  )
  task.training(0)  # Raises where there is none.
  writer = samples.SampleWriter(epath.Path(workdir))

  def make_source(write):
    return rollouts.GrpoSource(
      config.rollout,
      model,
      mesh,
      tokenizer,
      task.training,
      advantage=ADVANTAGES[config.loss.advantage],
      use_reference=config.loss.kl_coef > 0,
      seed=config.seed,
      write=write,
      write_samples=writer.write,
    )

  resolved = config_lib.to_dict(config)
  resolved |= {'model': config_lib.to_dict(model)}
  return stage_lib.run(
    stage,
    resolved,
    loss_fn=loss_fn,
    make_source=make_source,
    evaluate=_make_held_out(config, task, model, mesh, tokenizer),
  )


def _sampler_sizes(
  stage: stage_lib.Stage,
  rollout: rollouts.RolloutConfig,
  tokenizer: tokenizer_lib.Tokenizer,
) -> dict[str, Any]:
  """Compiles the sampler and says what it takes."""
  rows = rollout.num_prompts * rollout.group_size
  prompts = sharding.put_batch(
    stage.mesh,
    (
      np.zeros((rows, rollout.max_prompt_tokens), np.int32),
      np.ones(rows, np.int32),
    ),
  )
  seconds, memory = stage_lib.compile_program(
    rollouts.make_sampler(rollout, stage.model, stage.mesh, tokenizer),
    stage.abstract_state().variables,
    *prompts,
    jax.random.key(0),
  )
  return {
    'sampler: rows x new tokens': f'{rows}x{rollout.max_new_tokens}',
    'sampler: compile seconds': seconds,
    'sampler: temporaries MiB': memory.temp_size_in_bytes / 2**20,
  }


def _make_held_out(
  config: GrpoConfig,
  task: tasks.Task,
  model: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
  tokenizer: tokenizer_lib.Tokenizer,
) -> Callable[[Any], dict[str, float]] | None:
  """Builds evaluate(variables) -> greedy accuracy, format, mean length.

  The questions are the same for every seed, so that runs compare. Rows that
  do not divide over the devices are filled up with repeats.
  """
  if not config.eval_problems:
    return None
  rollout = config.rollout
  questions = task.held_out(config.eval_problems, 0)
  count, shards = len(questions), sharding.num_batch_shards(mesh)
  num_rows = -(-count // shards) * shards
  questions = [questions[i % count] for i in range(num_rows)]
  prompts = rollouts.encode_prompts(
    questions, tokenizer, rollout.max_prompt_tokens
  )
  greedy = rollouts.make_sampler(
    rollout,
    model,
    mesh,
    tokenizer,
    sampling=filters.SamplingConfig(temperature=0.0),
  )
  score = scoring.make_score(tokenizer, rollout.rule)
  key = jax.random.key(0)  # Greedy: nothing is drawn.

  def evaluate(variables: Any) -> dict[str, float]:
    best = greedy(variables, *sharding.put_batch(mesh, prompts), key)
    scores = jax.device_get(score(best, questions))
    return {
      'eval/greedy': float(scores['accuracy'][:count].mean()),
      'eval/format': float(scores['format'][:count].mean()),
      'eval/length': float(best.mask_BT[:count].sum(1).mean()),
    }

  return evaluate


def _check_sizes(
  config: GrpoConfig,
  model: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
) -> None:
  """Rows must divide over the devices, and sequences fit the model."""
  rollout = config.rollout
  config_check.check_rows(
    'rollout.num_prompts x group_size',
    rollout.num_prompts * rollout.group_size,
    mesh,
  )
  config_check.check_rows(
    'rollout.rows_multiple',
    rollout.rows_multiple,
    mesh,
    num_microbatches=config.train.num_microbatches,
  )
  config_check.check_length('rollout.row_length', rollout.row_length, model)
  config_check.check_context('rollout.row_length', rollout.row_length, mesh)


def _example_batch(rollout: rollouts.RolloutConfig) -> types.PolicyBatch:
  """A minibatch of the least rows, for its shapes."""
  shape = (rollout.rows_multiple, rollout.row_length)
  zeros = lambda dtype: np.zeros(shape, dtype)
  return types.PolicyBatch(
    tokens_BT=zeros(np.int32),
    mask_BT=zeros(np.float32),
    segment_BT=zeros(np.int32),
    position_BT=zeros(np.int32),
    num_tokens=np.float32(1),
    num_sequences=np.float32(1),
    old_logp_BT=zeros(np.float32),
    ref_logp_BT=zeros(np.float32),
    adv_BT=zeros(np.float32),
    length_BT=zeros(np.float32),
  )
