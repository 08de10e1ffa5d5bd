"""Pretraining: next-token loss, MTP loss and the sequence balance loss."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from r1jax import config as config_lib
from r1jax import types
from r1jax.data import chat_tokens, corpus, hf_tokenizer, loader, text
from r1jax.data import tokenizer as tokenizer_lib
from r1jax.losses import token
from r1jax.model import config as model_config
from r1jax.model import router, transformer
from r1jax.parallel import mesh as mesh_lib
from r1jax.parallel import sharding
from r1jax.recipe import config_check, objective, origin
from r1jax.recipe import stage as stage_lib
from r1jax.train import optimizer
from r1jax.train import state as state_lib


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """A pretraining run.

  Attributes:
    seed: Of initialisation and data.
    model: Shape of the model; None for that of `init_from`, with its tokenizer.
    data: Generated arithmetic documents, or text from files.
    tokenizer: Path of a sentencepiece model or folder of a Hugging Face one;
      '' for the one that ships or, without a model, that of `init_from`.
    row_length: Tokens of a packed row.
    batch_size: Rows of a global batch.
    eval_rows: Held-out rows of an evaluation on the generated corpus; the
      held-out part of text files is evaluated whole.
    mtp_coef: λ of the MTP loss.
    optim: Optimizer.
    train: Loop.
    mesh: Devices.
    init_from: Workdir or Hugging Face folder to start from; '' for random
      variables.
  """

  seed: int
  model: model_config.ModelConfig | None
  data: corpus.CorpusConfig | text.TextConfig
  tokenizer: str
  row_length: int
  batch_size: int
  eval_rows: int
  mtp_coef: float
  optim: optimizer.OptimConfig
  train: stage_lib.TrainConfig
  mesh: mesh_lib.MeshConfig
  init_from: str

  def __post_init__(self):
    config_lib.check_at_least(self, 0, 'seed', 'mtp_coef')
    config_lib.check_at_least(self, 1, 'batch_size', 'eval_rows')
    config_lib.check_at_least(self, 2, 'row_length')
    if self.model is None:
      if not self.init_from:
        raise ValueError("init_from='' with model=None: give one of them")
      return  # Checked again when it is known.
    if self.row_length > self.model.max_length:
      raise ValueError(
        f'row_length={self.row_length} exceeds model.max_length='
        f'{self.model.max_length}'
      )
    indexer = getattr(self.model.attention, 'indexer', None)
    if indexer is not None and indexer.dense:
      if self.optim.trainable != 'indexer':
        raise ValueError(
          f'optim.trainable={self.optim.trainable!r} with a dense indexer, it '
          "must be 'indexer': the warm-up trains nothing else"
        )


Tokenizer = tokenizer_lib.Tokenizer | hf_tokenizer.HfTokenizer


def load_tokenizer(
  path: str, model: model_config.ModelConfig, *, template: str = 'plain'
) -> Tokenizer:
  """Loads and prepares a tokenizer; '' is the one that ships.

  Raises:
    UserError: There is no such path, or as `prepare_tokenizer`.
  """
  tokenizer = hf_tokenizer.load_tokenizer(path)
  prepare_tokenizer(tokenizer, model, template=template)
  return tokenizer


def prepare_tokenizer(
  tokenizer: Tokenizer, model: model_config.ModelConfig, *, template: str
) -> None:
  """Checks it against its model; what ends a turn of the template stops it.

  Raises:
    UserError: The model has fewer rows than it has ids, or the template's
      tokens are missing.
  """
  if tokenizer.vocab_size > model.vocab_size:
    raise config_lib.UserError(
      f'model.vocab_size={model.vocab_size} is smaller than the '
      f'{tokenizer.vocab_size} ids of the tokenizer'
    )
  try:
    tokenizer.stop_ids = chat_tokens.stop_ids(tokenizer, template=template)
  except ValueError as e:
    raise config_lib.UserError(str(e)) from e


class MeshSource:
  """Batches of rows on the mesh; each host reads its part of them."""

  def __init__(
    self,
    rows: loader.Rows,
    mesh: jax.sharding.Mesh,
    *,
    batch_size: int,
    shuffle_seed: int | None,
  ):
    """Builds the source; the arguments are those of `loader.RowSource`."""
    self._mesh = mesh
    self._source = loader.RowSource(
      rows,
      batch_size=batch_size,
      shuffle_seed=shuffle_seed,
      host_index=jax.process_index(),
      host_count=jax.process_count(),
      reduce=sharding.sum_over_processes,
    )
    self.get_state = self._source.get_state
    self.set_state = self._source.set_state

  def next(self, state: Any) -> types.Batch:
    return sharding.put_local_batch(self._mesh, self._source.next(state))


def run(
  config: PretrainConfig,
  workdir: str,
  *,
  profile_steps: int = 0,
  dry_run: bool = False,
) -> state_lib.State | dict[str, Any]:
  """Trains a base model in a workdir, or with dry_run only compiles.

  Raises:
    UserError: What the config asks for cannot be.
  """
  mesh = stage_lib.make_mesh(config.mesh)
  path = config.tokenizer
  source = origin.find_source(config.init_from, workdir)
  if config.model is None:
    path = path or origin.load_tokenizer_path(source)
    model = origin.load_model_config(source)
    model = origin.for_mesh(model, source, mesh)
    config = config_lib.replace(config, model=model)
  elif config.init_from:
    origin.check_model(config.model, source, say=print)
  tokenizer = load_tokenizer(path, config.model)
  config_check.check_rows(
    'batch_size',
    config.batch_size,
    mesh,
    num_microbatches=config.train.num_microbatches,
  )
  config_check.check_context('row_length', config.row_length, mesh)
  train_rows, held_out_rows = _make_rows(config, tokenizer)
  is_text = isinstance(config.data, text.TextConfig)
  stage = stage_lib.Stage(
    workdir=epath.Path(workdir),
    model=config.model,
    train=config.train,
    optim=config.optim,
    mesh=mesh,
    seed=config.seed,
    title='pretrain',
    init_from=config.init_from,
    tokenizer=path,
    untrained=untrained(config.mtp_coef),
    profile_steps=profile_steps,
    pipeline=config.mesh.pipeline,
  )
  loss_fn = make_loss(
    config.model,
    mtp_coef=config.mtp_coef,
    balance_coef=config.train.balance_coef,
  )

  def make_source(write):
    del write
    return MeshSource(
      train_rows,
      mesh,
      batch_size=config.batch_size,
      shuffle_seed=config.seed if is_text else None,
    )

  if dry_run:
    return stage.dry_run(loss_fn, make_source(None).next(None))
  return stage_lib.run(
    stage,
    config_lib.to_dict(config),
    loss_fn=loss_fn,
    make_source=make_source,
    evaluate=make_held_out(
      config.model, held_out_rows, config.batch_size, mesh
    ),
  )


def _make_rows(config: PretrainConfig, tokenizer: tokenizer_lib.Tokenizer):
  """Training rows and held-out rows."""
  if isinstance(config.data, text.TextConfig):
    return tuple(
      text.make_rows(
        config.data,
        tokenizer,
        row_length=config.row_length,
        seed=config.seed,
        split=split,
      )
      for split in ('train', 'held_out')
    )
  return tuple(
    corpus.ArithmeticCorpus(
      config.data,
      tokenizer,
      seed=config.seed,
      row_length=config.row_length,
      held_out=is_held_out,
      **({'num_rows': config.eval_rows} if is_held_out else {}),
    )
    for is_held_out in (False, True)
  )


def make_held_out(
  model: model_config.ModelConfig,
  rows: Any,
  batch_size: int,
  mesh: jax.sharding.Mesh,
) -> Callable[[Any], dict[str, float]]:
  """Builds evaluate(variables) -> metrics over all held-out rows.

  With 'eval/bits_per_byte' where the rows know their bytes.
  """
  batches = loader.evaluation_batches(rows, batch_size)
  num_bytes = getattr(rows, 'num_bytes', 0)
  sums_of_rows = make_evaluate(model)
  sums_of = jax.jit(
    sharding.per_device(
      lambda *args: sharding.sum_rows(sums_of_rows(*args)),
      mesh,
      (transformer.shardings(model, mesh), 'rows'),
      'whole',
    )
  )

  def evaluate(variables):
    total = None
    for batch in batches:
      sums = sums_of(variables, sharding.put_batch(mesh, batch))
      total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    result = summarise(jax.device_get(total))
    if num_bytes:
      bits = float(total['nats']) / math.log(2)
      result['eval/bits_per_byte'] = bits / num_bytes
    return result

  return evaluate


def make_loss(
  config: model_config.ModelConfig, *, mtp_coef: float, balance_coef: float
) -> objective.Objective:
  """Builds loss(variables, batch): L = L_next + λ mean_k L_k + α L_balance.

  With sparse attention its indexers' divergence is added, which no other
  parameter sees; in their dense warm-up it is the whole loss.

  Args:
    config: Of the model.
    mtp_coef: λ; 0 leaves the MTP modules out.
    balance_coef: α of the sequence-wise balance loss.

  Source: DeepSeek-V3, arXiv:2412.19437, §2.1.2 and §2.2.
  """

  def of_hidden(head, hidden_BTD, mtp_hidden, batch):
    logp_BT, _ = token.next_token_logp(hidden_BTD, head, batch.tokens_BT)
    loss = token.cross_entropy(logp_BT, batch.mask_BT, batch.num_tokens)
    metrics = {'train/next_token_loss': loss}
    if mtp_hidden:
      mtp_loss = jnp.mean(
        jnp.stack(
          [
            _mtp_loss(hidden_BTD, head, batch, depth)
            for depth, hidden_BTD in enumerate(mtp_hidden, start=1)
          ]
        )
      )
      metrics['mtp/loss'] = mtp_loss
      loss += mtp_coef * mtp_loss
    return loss, metrics

  return objective.Objective(
    config,
    of_hidden,
    mtp=mtp_coef > 0,
    balance_coef=balance_coef,
    indexer=getattr(config.attention, 'indexer', None),
  )


def untrained(mtp_coef: float) -> tuple[str, ...]:
  """Parts of the paths of parameters that `make_loss`'s loss does not see."""
  return () if mtp_coef > 0 else ('mtp_',)


def _mtp_loss(hidden_BTD, head, batch, depth):
  """Cross entropy of the depth-k drafts, divided by the same token count."""
  logp_BT, _ = token.token_logp(
    hidden_BTD, head, token.shifted(batch.tokens_BT, depth + 1)
  )
  mask_BT = token.mtp_mask(batch.mask_BT, batch.segment_BT, depth)
  return token.cross_entropy(logp_BT, mask_BT, batch.num_tokens)


def make_evaluate(
  config: model_config.ModelConfig,
) -> Callable[[Any, types.Batch], dict[str, jax.Array]]:
  """Builds sums(variables, batch) for held-out evaluation; sums add up.

  Returns a function to a dict of scalars: 'nats' and 'tokens' of the next
  token, and with MTP the depth-1 'mtp_nats', 'mtp_tokens' and 'mtp_accepted':
  drafts that equal the main model's own greedy choice at that place, which
  greedy speculative decoding would accept.
  """
  model = transformer.Transformer(config)

  def evaluate(variables, batch):
    out = model.apply(
      variables,
      batch.tokens_BT,
      segment_BT=batch.segment_BT,
      position_BT=batch.position_BT,
      mtp=config.mtp_depth > 0,
    )
    head = transformer.head(variables['params'], config)
    logp_BT, _ = token.next_token_logp(out.hidden_BTD, head, batch.tokens_BT)
    sums = {
      'nats': -jnp.sum(logp_BT * batch.mask_BT),
      'tokens': batch.mask_BT.sum(),
    }
    if out.mtp_hidden:
      mask_BT = token.mtp_mask(batch.mask_BT, batch.segment_BT, 1)
      logp_BT, _ = token.token_logp(
        out.mtp_hidden[0], head, token.shifted(batch.tokens_BT, 2)
      )
      best = lambda hidden_BTD: jnp.argmax(head.logits(hidden_BTD), axis=-1)
      draft_BT = best(out.mtp_hidden[0])
      main_BT = token.shifted(best(out.hidden_BTD), 1)
      sums['mtp_nats'] = -jnp.sum(logp_BT * mask_BT)
      sums['mtp_tokens'] = mask_BT.sum()
      sums['mtp_accepted'] = jnp.sum((draft_BT == main_BT) * mask_BT)
    if out.moe is not None:
      sums['counts'] = out.moe.counts_E
    return sums

  return evaluate


def summarise(sums: dict[str, jax.Array]) -> dict[str, float]:
  """Turns added-up sums of `make_evaluate` into the metrics that are logged.

  'eval/loss' is nats per token, 'eval/max_vio' the largest over the layers.
  """
  result = {'eval/loss': float(sums['nats'] / sums['tokens'])}
  if 'mtp_nats' in sums:
    drafts = sums['mtp_tokens']
    result['eval/mtp_loss'] = float(sums['mtp_nats'] / drafts)
    result['mtp/accept'] = float(sums['mtp_accepted'] / drafts)
  if 'counts' in sums:
    result['eval/max_vio'] = float(router.max_violation(sums['counts']).max())
  return result
