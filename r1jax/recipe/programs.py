"""The jitted programs of a run with the shapes it calls them with.

For compiling them ahead: nothing is allocated, and the devices may be those
of a topology that is not there.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from r1jax import types
from r1jax.model import config as model_config
from r1jax.parallel import sharding
from r1jax.recipe import (
  config_check,
  fit,
  grpo,
  origin,
  pretrain,
  rollouts,
  sft,
)
from r1jax.recipe import stage as stage_lib
from r1jax.sampling import generate

Config = pretrain.PretrainConfig | sft.SftConfig | grpo.GrpoConfig


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function and what it is called with.

  Attributes:
    function: As the run has it.
    args: Shapes with their shardings.
    mesh: Where it runs.
    shapes: What was assumed, for people.
    num_choices: Pairs of token and expert of a device in one pass, if it gets
      as many as the others; None without experts.
  """

  function: Any
  args: tuple[Any, ...]
  mesh: jax.sharding.Mesh
  shapes: dict[str, str]
  num_choices: int | None = None

  def trace(self) -> jax.stages.Traced:
    with jax.set_mesh(self.mesh):
      return self.function.trace(*self.args)


def names(config: Config) -> tuple[str, ...]:
  """The programs of a run."""
  return tuple(_BUILDERS) if isinstance(config, grpo.GrpoConfig) else ('train',)


def build(
  name: str,
  config: Config,
  devices: Sequence[jax.Device],
  *,
  model: model_config.ModelConfig | None = None,
) -> Program:
  """Builds one of the programs of a run.

  Args:
    name: One of `names(config)`.
    config: Of the run.
    devices: Real ones, or a topology's.
    model: In place of that of `init_from`, as suits the devices; None if the
      config has its own, or to read it there.

  Raises:
    UserError: The mesh does not fit the devices, or the sizes each other.
  """
  mesh = stage_lib.make_mesh(config.mesh, devices)
  own = getattr(config, 'model', None)  # A GRPO run has none.
  if own is not None:
    model = own
  elif model is not None:
    model = origin.suited(model, mesh.devices.flat[0].platform)
  else:
    model = origin.load_model_config(config.init_from)
    model = origin.for_mesh(model, config.init_from, mesh)
  return _BUILDERS[name](config, model, mesh)


def train_rows(config: Config) -> tuple[int, int]:
  """Rows of a train step and their tokens."""
  if isinstance(config, grpo.GrpoConfig):
    return config.rollout.rows_multiple, config.rollout.row_length
  return config.batch_size, config.row_length


def to_fit(config: Config, model: model_config.ModelConfig | None) -> fit.Run:
  """A run's train step, for `fit.candidates`.

  Args:
    config: Of the run.
    model: In place of that of `init_from`; None if the config has its own, or
      to read it there.
  """
  own = getattr(config, 'model', None)
  if own is None:
    model = model or origin.load_model_config(config.init_from)
    model = origin.suited(model, 'tpu')
  rows, length = train_rows(config)
  with_reference = isinstance(config, grpo.GrpoConfig) and config.loss.kl_coef
  return fit.Run(
    own or model,
    config.optim,
    rows,
    length,
    copies=int(with_reference > 0),
    num_slices=config.mesh.num_slices,
  )


def _train(
  config: Config, model: model_config.ModelConfig, mesh: jax.sharding.Mesh
) -> Program:
  with_reference, batch_class = False, types.Batch
  balance_coef = config.train.balance_coef
  rows, length = train_rows(config)
  match config:
    case grpo.GrpoConfig():
      with_reference = config.loss.kl_coef > 0
      batch_class = types.PolicyBatch
      loss_fn = grpo.make_loss(
        model,
        config.loss,
        temperature=config.rollout.sampling.temperature,
        balance_coef=balance_coef,
      )
    case _:
      mtp_coef = getattr(config, 'mtp_coef', 0.0)  # SFT has none.
      loss_fn = pretrain.make_loss(
        model, mtp_coef=mtp_coef, balance_coef=balance_coef
      )
  config_check.check_length('row_length', length, model)
  num_microbatches = config.train.num_microbatches
  config_check.check_rows('rows', rows, mesh, num_microbatches=num_microbatches)
  stage = stage_lib.Stage(
    workdir=epath.Path('unused'),
    model=model,
    train=config.train,
    optim=config.optim,
    mesh=mesh,
    seed=config.seed,
    title='train',
    with_reference=with_reference,
    pipeline=config.mesh.pipeline,
  )
  return Program(
    stage.make_train_step(loss_fn),
    (stage.abstract_state(), _batch(batch_class, mesh, rows, length)),
    mesh,
    _assumed(model, mesh, rows, length, num_microbatches=num_microbatches),
    _num_choices(model, mesh, rows // num_microbatches, length),
  )


def _logp(config, model, mesh):
  rollout = config.rollout
  rows, length = rollout.rows_multiple, rollout.row_length
  config_check.check_rows('rollout.rows_multiple', rows, mesh)
  function = rollouts.make_logp(
    model, mesh, temperature=rollout.sampling.temperature
  )
  return Program(
    jax.jit(function),
    (
      origin.abstract_variables(model, mesh),
      _batch(types.PolicyBatch, mesh, rows, length),
    ),
    mesh,
    _assumed(model, mesh, rows, length),
    _num_choices(model, mesh, rows, length),
  )


def _prefill(config, model, mesh):
  rollout = config.rollout
  completions, prompt = (
    _num_completions(config, mesh),
    rollout.max_prompt_tokens,
  )
  copies = generate.copies_at_once(
    rollout.num_prompts, rollout.group_size, mesh
  )
  rows, slots = completions // copies, prompt + rollout.max_new_tokens
  function = generate.make_prefill(
    model, mesh, num_slots=slots, copies=copies, **_sampling(rollout)
  )
  args = (
    generate.abstract_variables(model, mesh),
    _struct(mesh, (rows, prompt), jnp.int32),
    _struct(mesh, (rows,), jnp.int32),
    _key(mesh),
  )
  return Program(
    function,
    args,
    mesh,
    _assumed(model, mesh, rows, prompt, slots=slots, completions=completions),
    _num_choices(model, mesh, rows, prompt, split=False),
  )


def _decode(config, model, mesh):
  rollout = config.rollout
  rows = _num_completions(config, mesh)
  slots = rollout.max_prompt_tokens + rollout.max_new_tokens
  function = generate.make_decode_step(model, mesh, **_sampling(rollout))
  args = (
    generate.abstract_variables(model, mesh),
    _struct(mesh, (), jnp.int32),
    generate.abstract_rows(
      model,
      mesh,
      batch=rows,
      num_slots=slots,
      max_new_tokens=rollout.max_new_tokens,
    ),
    _key(mesh),
  )
  return Program(
    function,
    args,
    mesh,
    _assumed(model, mesh, rows, 1, slots=slots),
    _num_choices(model, mesh, rows, 1, split=False),
  )


def _reshard(config, model, mesh):
  del config
  variables = origin.abstract_variables(model, mesh)
  function = jax.jit(generate.make_reshard(model, mesh))
  count = sum(x.size for x in jax.tree.leaves(variables))
  return Program(function, (variables,), mesh, {'parameters': f'{count:,}'})


_BUILDERS: dict[str, Callable[..., Program]] = {
  'train': _train,
  'logprob': _logp,
  'prefill': _prefill,
  'decode': _decode,
  'reshard': _reshard,
}
NAMES = tuple(_BUILDERS)


def _num_completions(config, mesh):
  rows = config.rollout.num_prompts * config.rollout.group_size
  config_check.check_rows('rollout.num_prompts x group_size', rows, mesh)
  return rows


def _sampling(rollout):
  """How tokens are drawn; which ones stop does not change the program."""
  return {
    'max_new_tokens': rollout.max_new_tokens,
    'sampling': rollout.sampling,
    'stop_ids': (1,),
    'pad_id': 0,
  }


def _batch(cls, mesh, rows, length):
  kinds = {'tokens_BT': 'i', 'segment_BT': 'i', 'position_BT': 'i'}
  fields = {}
  for field in dataclasses.fields(cls):
    dtype = jnp.int32 if field.name in kinds else jnp.float32
    shape = (rows, length) if field.name.endswith('_BT') else ()
    fields[field.name] = _struct(mesh, shape, dtype)
  return cls(**fields)


def _struct(mesh, shape, dtype):
  """An array with rows first on the mesh, or a scalar."""
  return jax.ShapeDtypeStruct(
    shape, dtype, sharding=sharding.batch_sharding(mesh, len(shape))
  )


def _key(mesh):
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.ShapeDtypeStruct(
    key.shape, key.dtype, sharding=sharding.replicated(mesh)
  )


def _num_choices(model, mesh, rows, length, *, split=True):
  if model.moe is None:
    return None
  parts = mesh.shape['context'] if split else 1
  own_rows = rows // sharding.num_batch_shards(mesh)
  num_tokens = own_rows * length // parts
  if mesh.shape['expert'] > 1:
    num_tokens //= model.moe.exchange.num_parts(num_tokens)
  return num_tokens * model.moe.top_k


def _assumed(model, mesh, rows, length, **more):
  shapes = {
    'rows x tokens': f'{rows:,} x {length:,}',
    'rows a device': f'{rows // sharding.num_batch_shards(mesh):,}',
  }
  shapes |= {name.replace('_', ' '): f'{n:,}' for name, n in more.items()}
  if model.moe is not None and mesh.shape['expert'] > 1:
    exchange = model.moe.exchange
    shapes['exchange'] = exchange.kind
    shapes['receive factor'] = str(exchange.receive_factor)
    if exchange.tokens_at_once:
      shapes['tokens at once'] = f'{exchange.tokens_at_once:,}'
  return shapes
