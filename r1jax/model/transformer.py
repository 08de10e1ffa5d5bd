"""The one transformer: embedding, dense then MoE blocks, norm, head, MTP."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from r1jax import fp8
from r1jax.losses import token
from r1jax.model import attention, layers, moe, rope
from r1jax.model import block as block_lib
from r1jax.model import cache as cache_lib
from r1jax.model import config as model_config
from r1jax.model import router as router_lib
from r1jax.parallel import load_balance, sharding

_EMBEDDING_AXES = ('vocab', 'embed')
_HEAD_AXES = (None, 'head_vocab')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What a call of the transformer returns.

  Attributes:
    hidden_BTD: After the final norm; times the head it gives the logits of
      the next token.
    mtp_hidden: For depth k = 1…M, [B, T, D] after its own norm; times the
      head it gives the logits of token t + k + 1. Empty unless asked for.
    cache: The cache with this call's tokens, None if none was given.
    moe: Stacked over the MoE layers of the main model, then of MTP (when
      asked for): counts [L, E], balance [L, B]; None without experts.
    indexer_LBT: How far each layer's indexer is from attention, the main
      model's layers first; None unless asked for.
  """

  hidden_BTD: jax.Array
  mtp_hidden: tuple[jax.Array, ...]
  cache: cache_lib.Base | None
  moe: moe.MoeMetrics | None
  indexer_LBT: jax.Array | None


class MtpModule(nn.Module):
  """Depth-k module: h' = M [norm(Emb(t_{i+k})); norm(h)], then one block.

  Source: DeepSeek-V3, arXiv:2412.19437, §2.2; the order of the two halves is
  that of the released weights, the reverse of eq. 21.
  """

  config: model_config.ModelConfig

  @nn.compact
  def __call__(
    self,
    hidden_BTD: jax.Array,
    embedded_BTD: jax.Array,
    context: attention.Context,
    mode: attention.Mode,
  ) -> tuple[jax.Array, jax.Array, block_lib.BlockMetrics]:
    """Returns the chain's hidden state, its normed form, and metrics."""
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    norm = lambda name: layers.RmsNorm(c.norm_eps, dtype, name=name)
    D = c.embed_dim
    project_ED = sharding.param(
      self,
      'project',
      (2 * D, D),
      (None, 'embed'),
      std=c.init_std,
      dtype=dtype,
    )
    both_BTE = jnp.concatenate(
      [norm('embed_norm')(embedded_BTD), norm('hidden_norm')(hidden_BTD)],
      axis=-1,
    )
    x_BTD = jnp.einsum('BTE,ED->BTD', both_BTE, project_ED)
    block = _block_class(c)(c, c.moe is not None, mode, name='block')
    x_BTD, _, metrics = block(x_BTD, context, None, 0)
    return x_BTD, norm('final_norm')(x_BTD), metrics


class Transformer(nn.Module):
  """The language model; `apply` is the only way in."""

  config: model_config.ModelConfig

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    *,
    segment_BT: jax.Array | None = None,
    position_BT: jax.Array | None = None,
    cache: cache_lib.Base | None = None,
    decode: bool = False,
    mtp: bool = False,
    indexer_loss: bool = False,
  ) -> Output:
    """Computes hidden states.

    Args:
      tokens_BT: int32.
      segment_BT: int32 document of each token, 0 is padding; default all 1.
      position_BT: int32 position inside the document; default 0, 1, ….
      cache: Receives this call's latents.
      decode: Attend to everything in the cache (absorbed form); else to the
        tokens of this call only (expanded form: training and prefill).
      mtp: Also run the multi-token-prediction modules.
      indexer_loss: Also return what sparse attention's indexers have to learn.

    Raises:
      ValueError: decode without a cache.
    """
    c = self.config
    if decode and cache is None:
      raise ValueError('decode=True needs a cache')
    mode = make_mode(
      c, decode=decode, indexer_loss=indexer_loss, whole_rows=cache is not None
    )
    B, T = tokens_BT.shape
    if segment_BT is None:
      segment_BT = jnp.ones((B, T), jnp.int32)
    if position_BT is None:
      position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    V, D = c.vocab_size, c.embed_dim
    param = functools.partial(sharding.param, self, std=c.init_std, whole=False)
    embedding = param('embedding', (V, D), _EMBEDDING_AXES)
    if not c.tie_embeddings:
      param('head', (D, V), _HEAD_AXES)
    filled = None
    if cache is not None:
      # Slots are taken first: decode attends to its own tokens as well.
      filled = cache.advance(segment_BT, position_BT)
    context = make_context(
      c, segment_BT, position_BT, filled if decode else None, mode
    )
    x_BTD, cache, metrics = self._run_stacks(
      embed(c, embedding, tokens_BT, mode), context, cache, mode
    )
    if cache is not None:
      cache = dataclasses.replace(filled, layers=cache.layers)
    hidden_BTD, mtp_hidden, of_mtp = self.finish(
      x_BTD, embedding, tokens_BT, context, mode, mtp=mtp
    )
    metrics += of_mtp
    return Output(
      hidden_BTD=hidden_BTD,
      mtp_hidden=mtp_hidden,
      cache=cache,
      moe=_concatenate([m.moe for m in metrics]),
      indexer_LBT=_whole_rows(
        _concatenate([m.indexer_BT for m in metrics]), mode.split_length
      ),
    )

  @nn.compact
  def finish(
    self,
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    tokens_BT: jax.Array,
    context: attention.Context,
    mode: attention.Mode,
    *,
    mtp: bool,
  ) -> tuple[jax.Array, tuple[jax.Array, ...], list[block_lib.BlockMetrics]]:
    """What follows the blocks: the final norm, and MTP if asked for.

    Returns hidden_BTD, mtp_hidden and each MTP module's metrics, [1, …].
    """
    c, metrics, mtp_hidden = self.config, [], []
    norm = layers.RmsNorm(c.norm_eps, jnp.dtype(c.dtype), name='norm')
    hidden_BTD = norm(x_BTD)
    if mtp and c.mtp_depth:
      chain_BTD = hidden_BTD if c.mtp_after_norm else x_BTD
      for k in range(1, c.mtp_depth + 1):
        ahead_BT = jnp.roll(tokens_BT, -k, axis=1)
        module = MtpModule(c, name=f'mtp_{k}')
        chain_BTD, out_BTD, m = module(
          chain_BTD, embed(c, embedding_VD, ahead_BT, mode), context, mode
        )
        mtp_hidden.append(out_BTD)
        metrics.append(jax.tree.map(lambda x: x[None], m))
    return hidden_BTD, tuple(mtp_hidden), metrics

  @nn.compact
  def logits(self, tokens_BT: jax.Array, **kwargs: Any) -> jax.Array:
    """Float32 logits of the next token, [B, T, V]; arguments as __call__.

    Of this device's part of the rows where `context` splits them.
    """
    hidden_BTD = self(tokens_BT, **kwargs).hidden_BTD
    params = self.variables['params']
    return head(params, self.config).logits(hidden_BTD)

  def _run_stacks(self, x_BTD, context, cache, mode):
    """The dense blocks, then the MoE blocks; one metrics tree per stack."""
    c, metrics = self.config, []
    num_moe = c.num_layers - c.num_dense_layers
    stacks = (
      ('dense', False, 0, c.num_dense_layers),
      ('moe', True, c.num_dense_layers, num_moe),
    )
    for name, is_moe, first, count in stacks:
      if not count:
        continue
      run = self._scan if c.scan_layers else self._unroll
      x_BTD, cache, m = run(
        name, is_moe, first, count, x_BTD, context, cache, mode
      )
      metrics.append(m)
    return x_BTD, cache, metrics

  def _scan(self, name, is_moe, first, count, x_BTD, context, cache, mode):
    def body(block, carry, layer):
      x_BTD, cache = carry
      x_BTD, cache, m = block(x_BTD, context, cache, layer)
      return (x_BTD, cache), m

    scan = nn.scan(
      body,
      variable_axes={'params': 0, 'router': 0, moe.PLACEMENT: 0},
      split_rngs={'params': True},
      length=count,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )
    block = _block_class(self.config)(self.config, is_moe, mode, name=name)
    (x_BTD, cache), m = scan(
      block, (x_BTD, cache), first + jnp.arange(count, dtype=jnp.int32)
    )
    return x_BTD, cache, m

  def _unroll(self, name, is_moe, first, count, x_BTD, context, cache, mode):
    metrics = []
    for i in range(count):
      block = _block_class(self.config)(
        self.config, is_moe, mode, name=f'{name}_{i}'
      )
      x_BTD, cache, m = block(x_BTD, context, cache, first + i)
      metrics.append(m)
    return x_BTD, cache, jax.tree.map(lambda *xs: jnp.stack(xs), *metrics)


def embed(
  config: model_config.ModelConfig,
  embedding_VD: jax.Array,
  tokens_BT: jax.Array,
  mode: attention.Mode,
) -> jax.Array:
  """The blocks' input, [B, T, D]; of this device's part of whole rows."""
  V, D = config.vocab_size, config.embed_dim
  own_BT = sharding.own_length(tokens_BT) if mode.split_length else tokens_BT
  return sharding.look_up(embedding_VD, own_BT, V, D).astype(config.dtype)


def make_mode(
  config: model_config.ModelConfig,
  *,
  decode: bool = False,
  indexer_loss: bool = False,
  whole_rows: bool = False,
) -> attention.Mode:
  """How the blocks of a call run, on this device.

  Args:
    config: Of the model.
    decode: Attend to the cache.
    indexer_loss: Return what the indexers have to learn.
    whole_rows: Not parts of rows where there are devices of `context`: what a
      cache holds.
  """
  return attention.Mode(
    decode=decode,
    indexer_loss=indexer_loss,
    split_length=not whole_rows and sharding.axis_size('context') > 1,
    implementation=(
      config.decode_implementation
      if decode
      else config.attention_implementation
    ),
  )


def make_context(
  config: model_config.ModelConfig,
  segment_BT: jax.Array,
  position_BT: jax.Array,
  filled: cache_lib.Base | None,
  mode: attention.Mode,
) -> attention.Context:
  """Rotation and mask, once for all blocks.

  Args:
    config: Of the model.
    segment_BT: Of whole rows.
    position_BT: Of whole rows.
    filled: The cache that queries attend to; None for the tokens themselves.
      Pages need no mask, and bring no keys.
    mode: Of this call.
  """
  c = config.attention
  keys = segment_BT, position_BT
  if isinstance(filled, cache_lib.Cache):
    keys = filled.segment_BS, filled.position_BS
  if mode.split_length:
    segment_BT = sharding.own_length(segment_BT)
    position_BT = sharding.own_length(position_BT)
  mask_BTS = None
  if mode.needs_mask:
    mask_BTS = attention.attention_mask(segment_BT, position_BT, *keys)
  return attention.Context(
    cos_sin=rope.cos_sin(position_BT, c.rope, c.rotated_dim),
    segment_BT=segment_BT,
    segment_BS=keys[0],
    mask_BTS=mask_BTS,
  )


def _whole_rows(x_LBT: jax.Array | None, splits: bool) -> jax.Array | None:
  if x_LBT is None or not splits:
    return x_LBT
  return jax.vmap(sharding.join_length)(x_LBT)


def _concatenate(stacks: list[Any]) -> Any:
  """Joins trees [L, …] of several stacks, without those that are None."""
  stacks = [s for s in stacks if s is not None]
  if not stacks:
    return None
  return jax.tree.map(lambda *xs: jnp.concatenate(xs), *stacks)


def _block_class(config: model_config.ModelConfig) -> type[nn.Module]:
  if not config.remat:
    return block_lib.Block
  return nn.remat(block_lib.Block, prevent_cse=not config.scan_layers)


def head(params: Any, config: model_config.ModelConfig) -> token.Head:
  """The output projection."""
  V, D = config.vocab_size, config.embed_dim
  if config.tie_embeddings:
    embedding_VD = sharding.gather(params['embedding'], (V, D), _EMBEDDING_AXES)
    shared = sharding.share_columns(embedding_VD.T, V)
  else:
    shared = sharding.share_columns(params['head'], V)
  return dataclasses.replace(shared, implementation=config.head_implementation)


def make_cache(
  config: model_config.ModelConfig, batch: int, length: int
) -> cache_lib.Base:
  """An empty cache that fits the model, for `length` tokens a row."""
  shared = {
    'num_layers': config.num_layers,
    'batch': batch,
    'length': length,
    'dtype': jnp.dtype(config.dtype),
    'stacked': config.scan_layers,
  }
  a = config.attention
  if config.decode_implementation == 'pallas':
    return cache_lib.make_pages(
      latent_dim=a.kv_lora_rank, rope_dim=a.rope_head_dim, **shared
    )
  match a:
    case model_config.MlaConfig():
      shapes = {'latent': (a.kv_lora_rank + a.rope_head_dim,)}
      if a.indexer is not None:
        shapes['index'] = (a.indexer.head_dim,)
    case model_config.GqaConfig():
      shapes = dict.fromkeys(('key', 'value'), (a.num_kv_heads, a.head_dim))
  return cache_lib.make_cache(shapes=shapes, **shared)


def init(config: model_config.ModelConfig, key: jax.Array) -> Any:
  """Random variables with their axis names: {'params', 'router'}.

  `sharding.unbox` strips the names, `sharding.tree_shardings` reads them.
  """
  tokens_BT = jnp.zeros((1, 2), jnp.int32)
  # Too few of them for a kernel.
  config = dataclasses.replace(config, attention_implementation='naive')
  variables = Transformer(config).init(key, tokens_BT, mtp=True)
  return {'router': {}, **variables}


def abstract(config: model_config.ModelConfig) -> Any:
  """Shapes of what `init` returns, with their axis names."""
  return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def shardings(config: model_config.ModelConfig, mesh: jax.sharding.Mesh) -> Any:
  """Where a model's variables lie on a mesh, to be trained.

  Raises:
    ValueError: As `sharding.tree_shardings`, or the devices of `tensor` would
      have parts of FP8's tiles.
  """
  if config.precision == 'block_fp8':
    _check_tiles(config, mesh.shape['tensor'])
  return sharding.tree_shardings(mesh, abstract(config))


def _check_tiles(config: model_config.ModelConfig, parts: int) -> None:
  """A part of each width must be whole tiles, as the whole's scales are."""
  widths = {
    f'attention.{name}': width
    for name, width in config.attention.head_widths.items()
  }
  if config.num_dense_layers:
    widths['dense_dim'] = config.dense_dim
  if config.moe is not None:
    widths['moe.expert_dim'] = config.moe.expert_dim
  is_whole = lambda width, parts: width % (parts * fp8.TILE) == 0
  for name, width in widths.items():
    if parts > 1 and not is_whole(width, parts):
      would_do = max(
        n
        for n in range(1, parts)
        if n == 1 or all(is_whole(w, n) for w in widths.values())
      )
      raise ValueError(
        f'mesh.tensor={parts} cuts model.{name}={width} into parts of '
        f"{width / parts:g}; precision='block_fp8' needs a multiple of its "
        f'blocks of {fp8.TILE}: tensor={would_do} would do'
      )


def unstack_layers(variables: Any, config: model_config.ModelConfig) -> Any:
  """From the layout of scan_layers=True to that of scan_layers=False.

  Decoding unrolled reads each layer's weights in place; a loop over the
  stack would copy them out of it at every token.
  """

  def unstack(collection):
    out = {}
    for name, tree in collection.items():
      if name not in ('dense', 'moe'):
        out[name] = tree
        continue
      count = jax.tree.leaves(tree)[0].shape[0]
      for i in range(count):
        out[f'{name}_{i}'] = jax.tree.map(lambda x, i=i: x[i], tree)
    return out

  if not config.scan_layers:
    return variables
  return {name: unstack(tree) for name, tree in variables.items()}


def with_replicas(
  variables: Any,
  config: model_config.ModelConfig,
  placement: load_balance.Placement,
) -> Any:
  """Variables to sample from, with replicas in place of experts.

  Inside `per_device`, this device's. They need scan_layers=False, or
  `unstack_layers` after this. MTP modules, which sampling does not use, are
  left out.

  Args:
    variables: Where they lie to be sampled from.
    config: Of the model.
    placement: Of its MoE layers, in their order.
  """
  params = {
    name: tree
    for name, tree in variables['params'].items()
    if not name.startswith('mtp_')
  }
  count = config.num_layers - config.num_dense_layers
  if config.scan_layers:
    stacks = {'moe': slice(0, count)}
  else:
    stacks = {f'moe_{i}': slice(i, i + 1) for i in range(count)}
  placed = {}
  for name, rows in stacks.items():
    part = jax.tree.map(lambda x, rows=rows: x[rows], placement)
    stack = lambda x: x if config.scan_layers else x[None]
    unstack = lambda x: x if config.scan_layers else x[0]
    layer = dict(params[name]['moe'])
    for weight in ('gate', 'up', 'down'):
      layer[weight] = unstack(
        load_balance.physical_weights(stack(layer[weight]), part)
      )
    params[name] = {**params[name], 'moe': layer}
    where = {'replica': part.replica_LEX, 'count': part.count_LE}
    placed[name] = {'moe': jax.tree.map(unstack, where)}
  return {**variables, 'params': params, moe.PLACEMENT: placed}


def update_router(router: Any, counts_LE: jax.Array, *, speed: float) -> Any:
  """Moves the router biases of every MoE layer against its load.

  Args:
    router: The collection 'router'.
    counts_LE: Output.moe.counts_E over the whole global batch: the main
      model's layers, then one row per MTP module. Modules that did not run
      have no row, and keep their biases.
    speed: γ.
  """
  first, updated = 0, {}
  # moe or moe_0, moe_1, …, then mtp_1, …: by number, 2 before 10.
  for name in sorted(router, key=lambda n: (n[:3], len(n), n)):
    bias = jax.tree.leaves(router[name])[0]
    rows = bias.shape[0] if bias.ndim == 2 else 1
    last, updated[name] = first + rows, router[name]
    if last <= counts_LE.shape[0]:
      counts = counts_LE[first:last].reshape(bias.shape)
      updated[name] = jax.tree.map(
        lambda b, n=counts: router_lib.updated_bias(b, n, speed), router[name]
      )
    first = last
  return updated
