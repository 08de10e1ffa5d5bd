"""Supervised finetuning on conversations: loss on the assistant's tokens."""

import dataclasses
from typing import Any

import jax
from etils import epath

from r1jax import config as config_lib
from r1jax.data import conversation, hf_tokenizer
from r1jax.model import config as model_config
from r1jax.parallel import mesh as mesh_lib
from r1jax.recipe import config_check, origin, pretrain
from r1jax.recipe import stage as stage_lib
from r1jax.train import optimizer
from r1jax.train import state as state_lib

_MTP_COEF = 0.0  # MTP modules stay as they are.


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """A finetuning run.

  Attributes:
    seed: Of the order of the data, and of the initialisation if there is one.
    init_from: Workdir or Hugging Face folder to start from; '' starts from
      random variables of `model`.
    model: Shape of the model; None for that of `init_from`.
    data: The conversations; their template may be 'auto', as
      `origin.find_template`.
    tokenizer: Folder of a Hugging Face tokenizer, path of a sentencepiece
      model, or '' for that of `init_from`.
    row_length: Tokens of a packed row, the longest example; examples of a row
      do not see each other.
    batch_size: Rows of a global batch.
    optim: Optimizer.
    train: Loop.
    mesh: Devices.
  """

  seed: int
  init_from: str
  model: model_config.ModelConfig | None
  data: conversation.ConversationConfig
  tokenizer: str
  row_length: int
  batch_size: int
  optim: optimizer.OptimConfig
  train: stage_lib.TrainConfig
  mesh: mesh_lib.MeshConfig

  def __post_init__(self):
    config_lib.check_at_least(self, 0, 'seed')
    config_lib.check_at_least(self, 1, 'batch_size')
    config_lib.check_at_least(self, 2, 'row_length')
    if bool(self.init_from) == (self.model is not None):
      raise ValueError(
        f'init_from={self.init_from!r} with model='
        f'{"None" if self.model is None else "…"}: give one of them'
      )


def run(
  config: SftConfig,
  workdir: str,
  *,
  profile_steps: int = 0,
  dry_run: bool = False,
) -> state_lib.State | dict[str, Any]:
  """Finetunes a model in a workdir, or with dry_run only compiles.

  Raises:
    UserError: What the config asks for cannot be.
  """
  mesh = stage_lib.make_mesh(config.mesh)
  model, path, source = config.model, config.tokenizer, ''
  if model is None:
    source = origin.find_source(config.init_from, workdir)
    model = origin.load_model_config(source)
    model = origin.for_mesh(model, source, mesh)
    path = path or origin.load_tokenizer_path(source)
  tokenizer = hf_tokenizer.load_tokenizer(path)
  template = origin.resolve_template(
    config.data.template, source, model, tokenizer
  )
  data = config_lib.replace(config.data, template=template)
  config = dataclasses.replace(config, data=data)
  pretrain.prepare_tokenizer(tokenizer, model, template=template)
  config_check.check_rows(
    'batch_size',
    config.batch_size,
    mesh,
    num_microbatches=config.train.num_microbatches,
  )
  config_check.check_context('row_length', config.row_length, mesh)
  config_check.check_length('row_length', config.row_length, model)
  train_rows, evaluate = _make_rows(config, tokenizer, 'train'), None
  if config.data.held_out_fraction > 0:
    held_out_rows = _make_rows(config, tokenizer, 'held_out')
    evaluate = pretrain.make_held_out(
      model, held_out_rows, config.batch_size, mesh
    )
  stage = stage_lib.Stage(
    workdir=epath.Path(workdir),
    model=model,
    train=config.train,
    optim=config.optim,
    mesh=mesh,
    seed=config.seed,
    title='sft',
    init_from=config.init_from,
    tokenizer=path,
    untrained=pretrain.untrained(_MTP_COEF),
    profile_steps=profile_steps,
    pipeline=config.mesh.pipeline,
  )
  loss_fn = pretrain.make_loss(
    model, mtp_coef=_MTP_COEF, balance_coef=config.train.balance_coef
  )

  def make_source(write):
    del write
    return pretrain.MeshSource(
      train_rows,
      mesh,
      batch_size=config.batch_size,
      shuffle_seed=config.seed,
    )

  if dry_run:
    return stage.dry_run(loss_fn, make_source(None).next(None))
  resolved = config_lib.to_dict(config)
  resolved |= {'model': config_lib.to_dict(model)}
  return stage_lib.run(
    stage,
    resolved,
    loss_fn=loss_fn,
    make_source=make_source,
    evaluate=evaluate,
  )


def _make_rows(config: SftConfig, tokenizer: Any, split: str) -> Any:
  rows, num_long = conversation.make_rows(
    config.data,
    tokenizer,
    row_length=config.row_length,
    seed=config.seed,
    split=split,
  )
  if num_long and jax.process_index() == 0:
    print(
      f'{num_long} of {num_long + rows.num_documents} examples ({split}) are '
      f'longer than row_length={config.row_length} tokens: left out'
    )
  return rows
