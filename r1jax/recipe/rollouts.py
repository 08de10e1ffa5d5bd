"""What GRPO trains on: rollouts, their rewards, and minibatches of them."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from r1jax import config as config_lib
from r1jax import types
from r1jax.data import chat_tokens
from r1jax.data import question as question_lib
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.losses import token
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import sharding
from r1jax.recipe import expert_balance, scoring
from r1jax.rl import packing
from r1jax.rl.reward import grading
from r1jax.sampling import filters, generate


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How completions are sampled and cut into minibatches.

  Attributes:
    num_prompts: P, prompts of one rollout.
    group_size: G, completions of each prompt.
    max_prompt_tokens: Longest prompt, bos included.
    max_new_tokens: Longest completion, the stop token included.
    sampling: Temperature; top_k and top_p must keep all tokens.
    num_minibatches: Optimizer steps per rollout; divides the groups trained.
    rule: How completions are graded, one of `grading.RULES`.
    redundant_experts: Replicas beyond one of each expert that the sampler has,
      of those with most load; 0 for none.
    rebalance_every: Measure the load of experts and place replicas anew each
      so many batches of groups.
    load_decay: Of the load's moving average.
    max_rollouts: Sample up to this many rollouts until `num_prompts` groups
      have rewards that differ; 1 trains on every rollout as it comes.
    row_length: Tokens of a packed training row.
    rows_multiple: Packed rows of a minibatch are a multiple of this.
    format_weight: Weight of the format reward.
    accuracy_weight: Weight of the accuracy reward.
    gap_every: Measure the sampler-trainer gap each so many rollouts; 0 never.
    samples_every: Write sample completions each so many rollouts; 0 never.
  """

  num_prompts: int
  group_size: int
  max_prompt_tokens: int
  max_new_tokens: int
  sampling: filters.SamplingConfig
  num_minibatches: int
  max_rollouts: int
  row_length: int
  rows_multiple: int
  format_weight: float
  accuracy_weight: float
  gap_every: int
  samples_every: int
  rule: str = 'tokens'
  redundant_experts: int = 0
  rebalance_every: int = 1
  load_decay: float = 0.9

  def __post_init__(self):
    if self.rule not in grading.RULES:
      raise ValueError(
        f'rule={self.rule!r}, it must be one of {", ".join(grading.RULES)}'
      )
    check = functools.partial(config_lib.check_at_least, self)
    check(1, 'num_prompts', 'max_prompt_tokens', 'max_new_tokens')
    check(1, 'max_rollouts', 'rows_multiple', 'rebalance_every')
    check(0, 'redundant_experts', 'load_decay')
    if self.load_decay >= 1:
      raise ValueError(f'load_decay={self.load_decay} must be below 1')
    check(0, 'format_weight', 'accuracy_weight', 'gap_every', 'samples_every')
    if self.group_size < 2:
      raise ValueError(
        f'group_size={self.group_size} must be at least 2: the advantage '
        'compares completions of one prompt'
      )
    if self.num_minibatches < 1 or self.num_prompts % self.num_minibatches:
      raise ValueError(
        f'num_minibatches={self.num_minibatches} must divide '
        f'num_prompts={self.num_prompts}'
      )
    if self.sampling.temperature <= 0:
      raise ValueError(
        f'sampling.temperature={self.sampling.temperature} must be positive: '
        'greedy completions of one prompt are all equal'
      )
    if self.sampling.top_k or self.sampling.top_p < 1:
      raise ValueError(
        f'sampling.top_k={self.sampling.top_k}, top_p={self.sampling.top_p}: '
        'the policy is trained on the whole distribution, use 0 and 1'
      )
    longest = self.max_prompt_tokens + self.max_new_tokens
    if self.row_length < longest:
      raise ValueError(
        f'row_length={self.row_length} must hold max_prompt_tokens + '
        f'max_new_tokens = {longest}'
      )


def make_logp(
  config: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
  *,
  temperature: float,
) -> Callable[[Any, types.PolicyBatch], jax.Array]:
  """Builds logp(variables, batch) -> [B, T]: the reference and gap passes."""
  model = transformer.Transformer(config)

  def logp(variables, batch):
    out = model.apply(
      variables,
      batch.tokens_BT,
      segment_BT=batch.segment_BT,
      position_BT=batch.position_BT,
    )
    head = transformer.head(variables['params'], config)
    return token.next_token_logp(
      out.hidden_BTD, head, batch.tokens_BT, temperature=temperature
    )[0]

  shardings = transformer.shardings(config, mesh)
  return sharding.per_device(logp, mesh, (shardings, 'rows'), 'rows')


def make_sampler(
  config: RolloutConfig,
  model: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  sampling: filters.SamplingConfig | None = None,
  copies: int = 1,
) -> Callable[..., types.Rollout]:
  """The program that completes prompts as the config says.

  Args:
    config: Lengths, and how tokens are drawn.
    model: The policy's shape.
    mesh: Where it lives.
    tokenizer: Its stop and padding tokens.
    sampling: Draws tokens in another way.
    copies: Completions of each prompt.
  """
  return generate.make_generate(
    model,
    mesh,
    max_new_tokens=config.max_new_tokens,
    sampling=sampling or config.sampling,
    stop_ids=tokenizer.stop_ids,
    pad_id=tokenizer.pad_id,
    copies=copies,
  )


def encode_prompts(
  questions: list[question_lib.Question],
  tokenizer: tokenizer_lib.Tokenizer,
  width: int,
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [P, width] (bos first, right-padded) and lengths [P] of prompts.

  A prompt that begins with bos, as templates write it, gets no other one.

  Raises:
    UserError: A prompt is longer than the width.
  """
  tokens_PT = np.full((len(questions), width), tokenizer.pad_id, np.int32)
  length_P = np.zeros(len(questions), np.int32)
  encoded = tokenizer.encode_batch([q.prompt for q in questions])
  for i, ids in enumerate(encoded):
    ids = chat_tokens.with_bos(ids, tokenizer)
    if len(ids) > width:
      raise config_lib.UserError(
        f'prompt {questions[i].prompt!r} has {len(ids)} tokens, '
        f'max_prompt_tokens is {width}'
      )
    tokens_PT[i, : len(ids)] = ids
    length_P[i] = len(ids)
  return tokens_PT, length_P


class GrpoSource:
  """Samples, rewards, compares, packs: one PolicyBatch per optimizer step.

  Everything is a function of the seed and of how many rollouts were made, so
  that a resumed run goes on bit for bit; minibatches not yet consumed are part
  of the state, with their old log-probabilities.
  """

  def __init__(
    self,
    config: RolloutConfig,
    model: model_config.ModelConfig,
    mesh: jax.sharding.Mesh,
    tokenizer: tokenizer_lib.Tokenizer,
    questions: Callable[[int], question_lib.Question],
    *,
    advantage: Callable[[jax.Array], jax.Array],
    use_reference: bool,
    seed: int,
    write: Callable[[int, dict[str, float]], None],
    write_samples: Callable[[int, list[dict[str, Any]]], None],
  ):
    """Builds the programs.

    Args:
      config: Of the rollouts.
      model: The policy's shape.
      mesh: Where it lives.
      tokenizer: Its tokenizer.
      questions: Training question by index.
      advantage: Rewards [P, G] to advantages [P, G].
      use_reference: Whether batches get the reference's log-probabilities.
      seed: Of prompts and sampling.
      write: Takes (step, metrics of the rollout behind that step).
      write_samples: Takes (step, sample completions).
    """
    self._config, self._tokenizer = config, tokenizer
    self._mesh, self._questions = mesh, questions
    self._write, self._write_samples = write, write_samples
    self._advantage = jax.jit(advantage)
    self._use_reference = use_reference
    self._key = jax.random.key(seed)
    self._reshard = generate.make_reshard(model, mesh)
    copies = generate.copies_at_once(
      config.num_prompts, config.group_size, mesh
    )
    self._prompt_times = config.group_size // copies
    self._generate = make_sampler(config, model, mesh, tokenizer, copies=copies)
    self._score = scoring.make_score(tokenizer, config.rule)
    self._logp = jax.jit(
      make_logp(model, mesh, temperature=config.sampling.temperature)
    )
    self._experts = None
    if config.redundant_experts:
      self._experts = expert_balance.ExpertBalance(
        model,
        mesh,
        redundant=config.redundant_experts,
        decay=config.load_decay,
      )
    self._num_rollouts = 0
    self._num_batches = 0
    self._pending: list[types.PolicyBatch] = []

  def next(self, state: Any) -> types.PolicyBatch:
    """Returns the next minibatch; samples from state.variables if none wait."""
    if not self._pending:
      self._pending = self._sample(state)
    return sharding.put_batch(self._mesh, self._pending.pop(0))

  def get_state(self) -> dict[str, Any]:
    state = {
      'num_rollouts': self._num_rollouts,
      'num_batches': self._num_batches,
      'pending': [vars(b) for b in self._pending],
    }
    if self._experts is not None:
      state['experts'] = self._experts.get_state()
    return state

  def set_state(self, state: dict[str, Any]) -> None:
    self._num_rollouts = state['num_rollouts']
    self._num_batches = state['num_batches']
    self._pending = [types.PolicyBatch(**b) for b in state['pending']]
    if self._experts is not None:
      self._experts.set_state(state['experts'])

  def _sample(self, state: Any) -> list[types.PolicyBatch]:
    """One batch of groups, as minibatches of packed rows."""
    c, step = self._config, int(state.step) + 1
    start = time.perf_counter()
    variables = jax.block_until_ready(self._reshard(state.variables))
    reshard_seconds = time.perf_counter() - start
    rollouts, scores, informative = [], [], []
    while len(rollouts) < c.max_rollouts:
      rollout, score = self._rollout(variables, step)
      rollouts.append(rollout)
      scores.append(score)
      spread_P = score['reward'].max(1) - score['reward'].min(1)
      informative.append(spread_P > 1e-6)
      if np.concatenate(informative).sum() >= c.num_prompts:
        break
    del variables  # On many devices, a copy that lies elsewhere.
    merged = jax.tree.map(lambda *xs: np.concatenate(xs), *rollouts)
    score = {k: np.concatenate([s[k] for s in scores]) for k in scores[0]}
    adv_PG = np.asarray(self._advantage(score['reward']))
    # Groups that teach something first, in the order they were sampled.
    order_P = np.argsort(~np.concatenate(informative), kind='stable')
    groups = order_P[: c.num_prompts]
    self._num_batches += 1
    rng = np.random.default_rng((self._num_batches, 0))
    groups = rng.permutation(groups)
    # Of about as many tokens each: the largest minibatch has the cost of all.
    size_PG = merged.length_B.reshape(-1, c.group_size)[groups]
    minibatches = []
    for part in packing.even_parts(size_PG.sum(1), c.num_minibatches):
      first = groups[part, None] * c.group_size
      chosen = (first + np.arange(c.group_size)).ravel()
      batch = packing.pack(
        merged,
        adv_PG.reshape(-1),
        chosen,
        row_length=c.row_length,
        rows_multiple=c.rows_multiple,
      )
      if self._use_reference:
        ref_logp_BT = self._logp(
          state.reference, sharding.put_batch(self._mesh, batch)
        )
        batch = dataclasses.replace(
          batch, ref_logp_BT=sharding.to_host(ref_logp_BT)
        )
      minibatches.append(batch)
    metrics = self._metrics(merged, score, np.concatenate(informative))
    metrics['perf/reshard_seconds'] = reshard_seconds
    metrics['rl/reward_trained'] = score['reward'][groups].mean()
    if c.gap_every and self._num_batches % c.gap_every == 1 % c.gap_every:
      metrics |= self._gap(state.variables, minibatches[0])
    if self._experts is not None:
      if self._num_batches % c.rebalance_every == 0:
        metrics |= self._experts.update(state.variables, minibatches[0])
    self._write(step, metrics)
    return minibatches

  def _rollout(self, variables, step):
    """Samples and scores P groups; everything comes back to the host."""
    c = self._config
    index = self._num_rollouts
    self._num_rollouts += 1
    questions = [
      self._questions(index * c.num_prompts + i) for i in range(c.num_prompts)
    ]
    prompt_PT, length_P = encode_prompts(
      questions, self._tokenizer, c.max_prompt_tokens
    )
    repeat = lambda x: np.repeat(x, self._prompt_times, axis=0)
    prompts = sharding.put_batch(
      self._mesh, (repeat(prompt_PT), repeat(length_P))
    )
    key = jax.random.fold_in(self._key, index)
    placement = None if self._experts is None else self._experts.placement
    rollout = self._generate(variables, *prompts, key, placement)
    score = self._score(rollout, questions)
    rollout, score = sharding.to_host((rollout, score))
    score['reward'] = (
      c.accuracy_weight * score['accuracy'] + c.format_weight * score['format']
    )
    if c.samples_every and index % c.samples_every == 0:
      self._write_samples(step, self._examples(questions, rollout, score))
    return rollout, score

  def _metrics(self, rollout, score, informative_P):
    length_B = rollout.length_B - rollout.prompt_length_B
    return {
      'rl/reward': score['reward'].mean(),
      'rl/accuracy': score['accuracy'].mean(),
      'rl/format': score['format'].mean(),
      'rl/length': length_B.mean(),
      'rl/length_max': length_B.max(),
      'rl/finished': rollout.finished_B.mean(),
      'rl/zero_variance_groups': (~informative_P).mean(),
      'rl/rollouts': self._num_rollouts,
    }

  def _gap(self, variables, batch):
    """How far the sampler's log-probs are from the trainer's."""
    logp_BT = self._logp(variables, sharding.put_batch(self._mesh, batch))
    kept = batch.mask_BT > 0
    gap = (sharding.to_host(logp_BT) - batch.old_logp_BT)[kept]
    ratio = np.exp(gap)
    return {
      'rl/gap_mean': np.abs(gap).mean(),
      'rl/gap_max': np.abs(gap).max(),
      'rl/gap_outside': ((ratio < 0.9) | (ratio > 1.1)).mean(),
    }

  def _examples(self, questions, rollout, score, num_prompts=4, each=2):
    rows, G = [], self._config.group_size
    for p, q in enumerate(questions[:num_prompts]):
      for g in range(min(each, G)):
        i = p * G + g
        start, end = rollout.prompt_length_B[i], rollout.length_B[i]
        rows.append(
          {
            'prompt': q.prompt,
            'completion': self._tokenizer.decode(
              rollout.tokens_BT[i, start:end]
            ),
            'gold': q.answer,
            'reward': float(score['reward'][p, g]),
            'correct': bool(score['accuracy'][p, g]),
          }
        )
    return rows
