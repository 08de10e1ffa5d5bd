"""A model of some thousand parameters, its configs, and a policy by hand."""

import contextlib
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from configs import mesh as mesh_config
from r1jax.data import question, tokenizer
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.recipe import grpo, rollouts
from r1jax.recipe import stage as stage_lib
from r1jax.sampling import filters

_DIGITS = '0123456789'


@functools.cache
def model(**changes) -> model_config.ModelConfig:
  """1 dense and 1 MoE layer with the tokenizer's vocabulary."""
  whole = model_config.ModelConfig(
    vocab_size=tokenizer.default().vocab_size,
    embed_dim=32,
    num_layers=2,
    num_dense_layers=1,
    dense_dim=32,
    attention=model_config.MlaConfig(
      num_heads=2,
      q_lora_rank=None,
      kv_lora_rank=16,
      nope_head_dim=8,
      rope_head_dim=8,
      v_head_dim=8,
      rope=model_config.RopeConfig(theta=10000.0, interleaved=True),
    ),
    moe=model_config.MoeConfig(
      num_experts=4, top_k=2, expert_dim=16, num_shared=1, block=8
    ),
    mtp_depth=1,
    init_std=0.1,
    max_length=64,
  )
  return dataclasses.replace(whole, **changes)


def one_device() -> jax.sharding.Mesh:
  return mesh_lib.make_mesh(mesh_lib.MeshConfig(1, 1), jax.devices()[:1])


@contextlib.contextmanager
def on(mesh: jax.sharding.Mesh):
  """Runs of a stage use this mesh, not all 8 host devices: compiles faster."""
  with mock.patch.object(stage_lib, 'make_mesh', lambda config: mesh):
    yield


@functools.cache
def variables(config: model_config.ModelConfig, seed: int = 0):
  """Random values, in router biases too, on the default device."""
  rng = np.random.default_rng(seed)
  shapes = sharding.unbox(
    jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
  )

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    is_scale = 'scale' in jax.tree_util.keystr(path)
    return jnp.asarray(1 + 0.2 * noise if is_scale else 0.2 * noise)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def pretrain_dict(**changes) -> dict[str, Any]:
  """The values of a PretrainConfig; `train__num_steps=3` goes into 'train'."""
  values = {
    'seed': 0,
    'model': dataclasses.asdict(model()),
    'data': {'arithmetic': {'maximum': 100}},
    'tokenizer': '',
    'row_length': 64,
    'batch_size': 8,
    'eval_rows': 8,
    'mtp_coef': 0.3,
    'optim': _optim(3e-3),
    'train': _train(3),
    'mesh': mesh_config.get_config().to_dict(),
    'init_from': '',
  }
  return _changed(values, changes)


def grpo_dict(init_from: str, /, **changes) -> dict[str, Any]:
  """The values of a GrpoConfig, likewise."""
  values = {
    'seed': 0,
    'init_from': init_from,
    'tokenizer': '',
    'task': {'maximum': 100},
    'template': 'plain',
    'eval_problems': 0,
    'rollout': dataclasses.asdict(rollout()),
    'loss': dataclasses.asdict(policy_loss()),
    'optim': _optim(1e-2),
    'train': _train(3),
    'mesh': mesh_config.get_config().to_dict(),
  }
  return _changed(values, changes)


def rollout(**changes) -> rollouts.RolloutConfig:
  whole = rollouts.RolloutConfig(
    num_prompts=4,
    group_size=8,
    max_prompt_tokens=12,
    max_new_tokens=12,
    sampling=filters.SamplingConfig(),
    num_minibatches=2,
    max_rollouts=1,
    row_length=32,
    rows_multiple=8,
    format_weight=0.5,
    accuracy_weight=1.0,
    gap_every=1,
    samples_every=1,
  )
  return dataclasses.replace(whole, **changes)


def policy_loss(**changes) -> grpo.LossConfig:
  whole = grpo.LossConfig(
    clip_low=0.2,
    clip_high=0.28,
    kl_coef=0.01,
    reduction='sequence_mean',
    advantage='group',
  )
  return dataclasses.replace(whole, **changes)


def questions(index: int) -> question.Question:
  """Sums of one digit: the policy by hand is right a tenth of the time."""
  a, b = index % 5, index // 5 % 5
  return question.Question(f'What is {a}+{b}?\n', str(a + b), 'add', 'en')


@functools.cache
def policy(well_formed: float = 0.8) -> dict[str, Any]:
  """Variables of `model()` that write <think></think><answer>digit</answer>.

  Every output projection but the head is 0, so that the next token depends on
  the last one alone. After <think> the completion ends at once with
  probability 1 - well_formed; the digit is uniform.
  """
  t = tokenizer.default()
  digits = [t.encode(d)[-1] for d in _DIGITS]
  chain = {
    t.encode('\n')[-1]: {t.think_id: 1.0},
    t.think_id: {t.end_think_id: well_formed, t.eos_id: 1 - well_formed},
    t.end_think_id: {t.answer_id: 1.0},
    t.answer_id: dict.fromkeys(digits, 0.1),
    t.end_answer_id: {t.eos_id: 1.0},
  } | {digit: {t.end_answer_id: 1.0} for digit in digits}
  config = model()
  D, V = config.embed_dim, config.vocab_size
  embedding_VD = np.zeros((V, D), np.float32)
  head_DV = np.zeros((D, V), np.float32)
  for row, (token, following) in enumerate(chain.items()):
    embedding_VD[token, row] = 1.0
    # The final norm scales a one-hot row to √D.
    head_DV[row] = -20 / D**0.5
    for target, probability in following.items():
      head_DV[row, target] = np.log(max(probability, 1e-9)) / D**0.5
  out = jax.tree_util.tree_map_with_path(
    lambda path, x: x * _is_kept(jax.tree_util.keystr(path)),
    variables(config),
  )
  out['params']['norm']['scale'] = jnp.ones(D)
  out['params']['embedding'] = jnp.asarray(embedding_VD)
  out['params']['head'] = jnp.asarray(head_DV)
  return out


def _is_kept(path: str) -> float:
  """0 for what blocks write to the residual stream with."""
  return float(not path.endswith(("['out']", "['down']")))


def _optim(peak_lr: float) -> dict[str, Any]:
  return {
    'peak_lr': peak_lr,
    'warmup_steps': 0,
    'schedule': 'constant',  # So that num_steps changes nothing before it.
    'final_lr_ratio': 1.0,
    'weight_decay': 0.0,
  }


def _train(num_steps: int) -> dict[str, Any]:
  return {
    'num_steps': num_steps,
    'num_microbatches': 1,
    'bias_update_speed': 1e-3,
    'balance_coef': 1e-2,
    'checkpoint_every': 0,
    'max_to_keep': 2,
    'eval_every': 0,
    'reference_every': 0,
  }


def _changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
  for name, value in changes.items():
    *groups, key = name.split('__')
    place = values
    for group in groups:
      place = place[group]
    place[key] = value
  return values
