"""Measures r1jax on one and more devices of a process; JSON on stdout.

  python -m experiments.bench_worker --host_devices=2 --ways=1,2 --times=5

`experiments.bench` runs it, once a round.
"""

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from experiments import app

_WAYS = flags.DEFINE_list('ways', ['1'], 'Numbers of devices to try.')
_REPEATS = flags.DEFINE_integer('times', 5, 'Times each figure is taken.', 1)

_BATCH, _LENGTH = 8, 128  # Of the train step.
_PROMPT, _NEW = 32, 64  # Tokens of decoding and of GRPO, 8 rows.
_STEPS = 8  # Train steps of one repeat.
# Steps before: the router's bias evens out the load, as it has in all but the
# first steps of a run.
_WARM_UP_STEPS = 40


def main() -> None:
  app.set_up_jax()
  import jax

  from r1jax.parallel import mesh as mesh_lib

  meshes = {
    way: mesh_lib.make_mesh(mesh_lib.MeshConfig(), jax.devices()[: int(way)])
    for way in _WAYS.value
  }
  print(json.dumps(measure(meshes, model_config(), _REPEATS.value)))


def model_config() -> Any:
  """The peers' model: 4.61 M parameters, of which 1 layer of 4 is dense."""
  from r1jax.model import config as model_config

  return model_config.ModelConfig(
    vocab_size=2048,
    embed_dim=256,
    num_layers=4,
    num_dense_layers=1,
    dense_dim=512,
    attention=model_config.MlaConfig(
      num_heads=4,
      q_lora_rank=128,
      kv_lora_rank=64,
      nope_head_dim=32,
      rope_head_dim=16,
      v_head_dim=32,
      rope=model_config.RopeConfig(theta=10000.0, interleaved=True),
    ),
    moe=model_config.MoeConfig(
      num_experts=8,
      top_k=2,
      expert_dim=128,
      num_shared=1,
      scale=2.5,
      block=32,
    ),
    init_std=0.02,
    max_length=512,
    # A loop would fill and cut stacks of the four layers in each step.
    scan_layers=False,
  )


def dense_twin(config: Any) -> Any:
  """The dense model whose layers have the same active width in sum.

  Its layers are all alike, so each has the mean of the MoE model's widths.
  """
  moe, num_moe = config.moe, config.num_layers - config.num_dense_layers
  active = (moe.top_k + moe.num_shared) * moe.expert_dim
  total = config.num_dense_layers * config.dense_dim + num_moe * active
  return dataclasses.replace(
    config,
    num_dense_layers=config.num_layers,
    dense_dim=total // config.num_layers,
    moe=None,
  )


def measure(
  meshes: dict[str, Any], config: Any, repeats: int
) -> dict[str, dict[str, list[float]]]:
  """Takes every figure `repeats` times on each mesh.

  Both models' train steps on all meshes take turns, so that their ratio bears
  a change of load whichever mesh suits which; so do the others.

  Returns:
    For each mesh lists of 'train', 'dense', 'decode' (tokens/s) and 'grpo'
    (seconds a step).
  """
  runs = {}
  for way, mesh in meshes.items():
    made = {
      'train': _make_training(mesh, config),
      'dense': _make_training(mesh, dense_twin(config)),
      'decode': _make_decoding(mesh, config),
      'grpo': _make_grpo(mesh, config),
    }
    runs |= {(way, name): _on_mesh(mesh, run) for name, run in made.items()}
  for (_, name), run in runs.items():
    # The first one compiles.
    for _ in range(2 + _WARM_UP_STEPS * (name in ('train', 'dense'))):
      run()
  figures = {way: {} for way in meshes}
  tokens = {'train': _BATCH * _LENGTH, 'decode': _BATCH * _NEW, 'grpo': None}
  tokens['dense'] = tokens['train']
  for turn in (('train', 'dense'), ('decode',), ('grpo',)):
    for _ in range(repeats):
      for (way, name), run in runs.items():
        if name in turn:
          seconds = _seconds(run, _STEPS if 'train' in turn else 1)
          value = tokens[name] / seconds if tokens[name] else seconds
          figures[way].setdefault(name, []).append(value)
  return figures


def _on_mesh(mesh: Any, run: Callable[[], None]) -> Callable[[], None]:
  import jax

  def run_there() -> None:
    with jax.set_mesh(mesh):
      run()

  return run_there


def _seconds(run: Callable[[], None], times: int) -> float:
  start = time.perf_counter()
  for _ in range(times):
    run()
  return (time.perf_counter() - start) / times


def _make_stage(mesh: Any, config: Any, *, peak_lr: float) -> Any:
  """A stage that updates as the peers do: AdamW, clip 1.0."""
  from etils import epath

  from r1jax.recipe import stage
  from r1jax.train import optimizer

  return stage.Stage(
    workdir=epath.Path('unused'),
    model=config,
    train=stage.TrainConfig(
      num_steps=1,
      num_microbatches=1,
      bias_update_speed=1e-3 if config.moe else 0.0,
      balance_coef=1e-4,
      checkpoint_every=0,
      max_to_keep=1,
      eval_every=0,
      reference_every=0,
    ),
    optim=optimizer.OptimConfig(
      peak_lr=peak_lr,
      warmup_steps=0,
      schedule='constant',
      final_lr_ratio=1.0,
    ),
    mesh=mesh,
    seed=0,
    title='bench',
  )


def _make_training(mesh: Any, config: Any) -> Callable[[], None]:
  """A train step on all tokens, its loss fetched."""
  import numpy as np

  from r1jax import types
  from r1jax.parallel import sharding
  from r1jax.recipe import pretrain

  stage = _make_stage(mesh, config, peak_lr=1e-3)
  state = stage.new_state(print)
  loss_fn = pretrain.make_loss(
    config, mtp_coef=0.0, balance_coef=stage.train.balance_coef
  )
  train_step = stage.make_train_step(loss_fn)
  shape = (_BATCH, _LENGTH)
  mask_BT = np.ones(shape, np.float32)
  mask_BT[:, 0] = 0
  rng = np.random.default_rng(0)
  batch = types.Batch(
    tokens_BT=rng.integers(2, config.vocab_size, shape).astype(np.int32),
    mask_BT=mask_BT,
    segment_BT=np.ones(shape, np.int32),
    position_BT=np.tile(np.arange(_LENGTH, dtype=np.int32), (_BATCH, 1)),
    num_tokens=mask_BT.sum(),
    num_sequences=np.float32(_BATCH),
  )
  batch = sharding.put_batch(mesh, batch)

  def run() -> None:
    nonlocal state
    state, metrics = train_step(state, batch)
    float(metrics['train/loss'])

  return run


def _make_decoding(mesh: Any, config: Any) -> Callable[[], None]:
  """Prefill and exactly 64 sampled tokens in each of 8 rows."""
  import jax
  import numpy as np

  from r1jax.parallel import sharding
  from r1jax.sampling import filters, generate

  variables = _make_stage(mesh, config, peak_lr=1e-3).new_state(print).variables
  program = generate.make_generate(
    config,
    mesh,
    max_new_tokens=_NEW,
    sampling=filters.SamplingConfig(),
    stop_ids=(config.vocab_size,),  # Never sampled.
    pad_id=0,
  )
  rng = np.random.default_rng(0)
  prompt_BT = rng.integers(2, config.vocab_size, (_BATCH, _PROMPT))
  prompt_BT, length_B = sharding.put_batch(
    mesh, (prompt_BT.astype(np.int32), np.full(_BATCH, _PROMPT, np.int32))
  )
  key = jax.random.key(0)

  def run() -> None:
    nonlocal key
    key, now = jax.random.split(key)
    rollout = program(variables, prompt_BT, length_B, now)
    assert float(rollout.mask_BT.sum()) == _BATCH * _NEW

  return run


def _make_grpo(mesh: Any, config: Any) -> Callable[[], None]:
  """One prompt x 8: rollout, device rewards, packing, one policy update."""
  from r1jax.data import question
  from r1jax.recipe import grpo, rollouts
  from r1jax.sampling import filters

  rollout = rollouts.RolloutConfig(
    num_prompts=1,
    group_size=_BATCH,
    max_prompt_tokens=_PROMPT,
    max_new_tokens=_NEW,
    sampling=filters.SamplingConfig(),
    num_minibatches=1,
    max_rollouts=1,
    row_length=_PROMPT + _NEW,
    rows_multiple=_BATCH,
    format_weight=1.0,
    accuracy_weight=1.0,
    gap_every=0,
    samples_every=0,
  )
  loss_config = grpo.LossConfig(
    clip_low=0.2,
    clip_high=0.2,
    kl_coef=0.0,  # TRL's β.
    reduction='sequence_mean',
    advantage='group',
  )
  source = rollouts.GrpoSource(
    rollout,
    config,
    mesh,
    _endless_tokenizer(config.vocab_size),
    # Digits are one token each: 31 of them after <bos>.
    lambda index: question.Question(str(10**30 + index), '1', 'add', 'en'),
    advantage=grpo.ADVANTAGES[loss_config.advantage],
    use_reference=loss_config.kl_coef > 0,
    seed=0,
    write=lambda step, metrics: None,
    write_samples=lambda step, rows: None,
  )
  stage = _make_stage(mesh, config, peak_lr=1e-4)
  state = stage.new_state(print)
  train_step = stage.make_train_step(
    grpo.make_loss(config, loss_config, temperature=1.0, balance_coef=0.0)
  )

  def run() -> None:
    nonlocal state
    batch = source.next(state)
    assert float(batch.num_tokens) == _BATCH * _NEW
    state, metrics = train_step(state, batch)
    float(metrics['train/loss'])

  return run


def _endless_tokenizer(vocab_size: int) -> Any:
  """The default tokenizer, its <eos> an id that the model does not have."""
  from r1jax.data import tokenizer

  endless = copy.copy(tokenizer.default())
  endless.vocab_size = vocab_size + 1
  endless.eos_id = vocab_size
  endless.stop_ids = (vocab_size,)
  endless.bytes_of = lambda token: b''  # No reward is earned: none is missed.
  return endless


if __name__ == '__main__':
  app.run(main)
