"""Prefill and decode in one program, with early exit."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from r1jax import types
from r1jax.losses import token
from r1jax.model import cache as cache_lib
from r1jax.model import config as model_config
from r1jax.model import transformer
from r1jax.parallel import load_balance, sharding
from r1jax.sampling import filters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Decoding:
  """Rows in the middle of decoding.

  Attributes:
    new_BX: int32 sampled tokens, pad_id where none is yet.
    logp_BX: Their log-probabilities, 0 where none is yet.
    last_B: int32, the token to feed next.
    num_B: int32, tokens sampled.
    done_B: A stop token was sampled.
    length_B: int32, tokens of the prompt.
    row_B: int32, which row of the global batch it is.
    cache: Latents of prompt and fed tokens.
  """

  new_BX: jax.Array
  logp_BX: jax.Array
  last_B: jax.Array
  num_B: jax.Array
  done_B: jax.Array
  length_B: jax.Array
  row_B: jax.Array
  cache: cache_lib.Base


def phases(max_new_tokens: int, batch: int) -> tuple[tuple[int, int], ...]:
  """When to gather the unfinished rows: (last step, rows a wave) per phase.

  A phase decodes its rows in waves and skips the finished ones, and its cache
  is no longer than its last step needs. Few completions are long, so that the
  later phases cost little.
  """
  out, end, wave = [], 32, batch
  while end < max_new_tokens and wave > 32 and len(out) < 2:
    out.append((end, wave))
    end, wave = 2 * end, max(wave // 4, 32)
    while batch % wave:
      wave -= 1
  return (*out, (max_new_tokens, wave))


def generate(
  config: model_config.ModelConfig,
  variables: Any,
  prompt_PT: jax.Array,
  length_P: jax.Array,
  row_B: jax.Array,
  key: jax.Array,
  *,
  max_new_tokens: int,
  sampling: filters.SamplingConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
  placement: load_balance.Placement | None = None,
) -> types.Rollout:
  """Samples one completion per row.

  A prompt is read once for all of its rows, which follow each other. Decode
  steps take the same cache slot in every row, behind the padded
  prompts, so that each step is one in-place update; positions and masks make
  ragged rows exact. The rows are put together at the end. A row's tokens
  depend on its number and the key, not on the rows decoded beside it, nor on
  the devices that the batch is spread over.

  Args:
    config: Of the model.
    variables: Its parameters and router biases.
    prompt_PT: int32, right-padded.
    length_P: int32, tokens of each prompt, at least 1.
    row_B: int32, number of each row in the global batch; B / P of each prompt.
    key: Random key.
    max_new_tokens: Longest completion, the stop token included.
    sampling: Temperature and filters.
    stop_ids: A row ends after sampling one of these.
    pad_id: Fills what is not used.
    placement: Of the MoE layers' experts, to sample with replicas of them.

  Returns:
    A Rollout of width T + max_new_tokens.
  """
  if placement is not None:
    variables = transformer.with_replicas(variables, config, placement)
  sampler = _make_sampler(
    config,
    variables,
    key,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    stop_ids=stop_ids,
    pad_id=pad_id,
  )
  T, B = prompt_PT.shape[1], len(row_B)
  plan = phases(max_new_tokens, B)
  with jax.named_scope('prefill'):
    d = sampler.prefill(prompt_PT, length_P, row_B, T + plan[0][0])
  with jax.named_scope('decode'):
    start = 1
    for end, wave in plan:
      d = _run_phase(d, sampler.decode_step, start, end, wave, T)
      start = end
  prompt_BT = jnp.repeat(prompt_PT, B // len(prompt_PT), axis=0)
  return _assemble(
    prompt_BT, d.length_B, d.new_BX, d.logp_BX, d.num_B, d.done_B, pad_id
  )


@dataclasses.dataclass(frozen=True)
class _Sampler:
  """A model with its variables, and how its tokens are drawn.

  Prompts are read by a loop over the layers, where they are scanned: a layer's
  work is long, and one layer's code enough. Decoding has each layer's.
  """

  config: model_config.ModelConfig
  variables: Any
  decode_variables: Any
  head: token.Head
  key: jax.Array
  max_new_tokens: int
  sampling: filters.SamplingConfig
  stop_S: jax.Array
  pad_id: int

  def prefill(
    self,
    prompt_PT: jax.Array,
    length_P: jax.Array,
    row_B: jax.Array,
    num_slots: int,
  ) -> _Decoding:
    """Reads the prompts, and draws the first token of each of their rows."""
    P, T = prompt_PT.shape
    copies = len(row_B) // P
    slot_1T = jnp.arange(T, dtype=jnp.int32)[None]
    out = transformer.Transformer(self.config).apply(
      self.variables,
      prompt_PT,
      segment_BT=(slot_1T < length_P[:, None]).astype(jnp.int32),
      cache=transformer.make_cache(self.config, P, T),
    )
    last_PD = jnp.take_along_axis(
      out.hidden_BTD, (length_P - 1)[:, None, None], axis=1
    )[:, 0]
    last_BD = jnp.repeat(last_PD, copies, axis=0)
    token_B, logp_B = self._draw(last_BD, row_B, 0)
    B, X = len(row_B), self.max_new_tokens
    return _Decoding(
      new_BX=_place(jnp.full((B, X), self.pad_id), 0, token_B),
      logp_BX=_place(jnp.zeros((B, X)), 0, logp_B),
      last_B=token_B,
      num_B=jnp.ones((B,), jnp.int32),
      done_B=jnp.isin(token_B, self.stop_S),
      length_B=jnp.repeat(length_P, copies),
      row_B=row_B,
      cache=out.cache.unstacked().repeated(copies).grown(num_slots),
    )

  def decode_step(
    self, carry: tuple[jax.Array, _Decoding]
  ) -> tuple[jax.Array, _Decoding]:
    """One more token of each row that is not done."""
    step, d = carry
    live_B = ~d.done_B
    out = transformer.Transformer(_unrolled(self.config)).apply(
      self.decode_variables,
      d.last_B[:, None],
      segment_BT=live_B.astype(jnp.int32)[:, None],
      position_BT=(d.length_B + step - 1)[:, None],
      cache=d.cache,
      decode=True,
    )
    token_B, logp_B = self._draw(out.hidden_BTD[:, 0], d.row_B, step)
    token_B = jnp.where(live_B, token_B, self.pad_id)
    return step + 1, dataclasses.replace(
      d,
      new_BX=_place(d.new_BX, step, token_B),
      logp_BX=_place(d.logp_BX, step, jnp.where(live_B, logp_B, 0.0)),
      last_B=token_B,
      num_B=d.num_B + live_B,
      done_B=d.done_B | jnp.isin(token_B, self.stop_S),
      cache=out.cache,
    )

  def _draw(self, hidden_BD, row_B, step):
    logp_BV = filters.filtered_logp(self.head.logits(hidden_BD), self.sampling)
    if self.sampling.temperature == 0:
      token_B = jnp.argmax(logp_BV, axis=-1).astype(jnp.int32)
    else:
      keys_B = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.fold_in(self.key, step), row_B
      )
      token_B = _draw(jax.vmap(jax.random.uniform)(keys_B), logp_BV)
    taken_B1 = jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)
    return token_B, taken_B1[:, 0]


def _make_sampler(
  config: model_config.ModelConfig,
  variables: Any,
  key: jax.Array,
  *,
  max_new_tokens: int,
  sampling: filters.SamplingConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
) -> _Sampler:
  return _Sampler(
    config=dataclasses.replace(config, remat=False),
    variables=variables,
    decode_variables=transformer.unstack_layers(variables, config),
    head=transformer.head(variables['params'], config),
    key=key,
    max_new_tokens=max_new_tokens,
    sampling=sampling,
    stop_S=jnp.asarray(stop_ids, jnp.int32),
    pad_id=pad_id,
  )


def _unrolled(config: model_config.ModelConfig) -> model_config.ModelConfig:
  return dataclasses.replace(config, scan_layers=False, remat=False)


def _place(x_BX: jax.Array, step: int | jax.Array, value_B: jax.Array):
  return jax.lax.dynamic_update_slice(x_BX, value_B[:, None], (0, step))


def _run_phase(d, decode_step, start, end, wave, prompt_width):
  """Decodes steps start … end - 1 of all rows, `wave` of them at a time.

  Unfinished rows come first, so that the last waves have nothing to do.
  """
  d = dataclasses.replace(d, cache=d.cache.grown(prompt_width + end))

  def run(part):
    first = jnp.asarray(start, jnp.int32)
    unfinished = lambda carry: (
      (carry[0] < end) & ~sharding.is_everywhere(carry[1].done_B.all())
    )
    _, part = jax.lax.while_loop(unfinished, decode_step, (first, part))
    # Every wave ends at the same slot, however early it was done.
    slot = jnp.asarray(prompt_width + end - 1, jnp.int32)
    return dataclasses.replace(part, cache=part.cache.at_slot(slot))

  B = d.done_B.shape[0]
  if wave == B:
    return run(d)
  order_WB = jnp.argsort(d.done_B, stable=True).reshape(-1, wave)
  pick = lambda x, rows_B: x if x.ndim == 0 else x[rows_B]

  def one(i, all_rows):
    rows_B = order_WB[i]
    part = run(jax.tree.map(lambda x: pick(x, rows_B), all_rows))
    return jax.tree.map(
      lambda x, y: x if x.ndim == 0 else x.at[rows_B].set(y), all_rows, part
    )

  ended = jax.lax.fori_loop(0, B // wave, one, d)
  slot = jnp.asarray(prompt_width + end - 1, jnp.int32)
  return dataclasses.replace(ended, cache=ended.cache.at_slot(slot))


def _draw(uniform_B: jax.Array, logp_BV: jax.Array) -> jax.Array:
  """Inverse-CDF sampling: one uniform a row instead of V Gumbels."""
  cdf_BV = jnp.cumsum(jnp.exp(logp_BV), axis=-1)
  total_B1 = cdf_BV[:, -1:]
  u_B1 = uniform_B[:, None] * total_B1
  # Rounding must not reach the total: no token lies behind it.
  u_B1 = jnp.minimum(u_B1, jnp.nextafter(total_B1, jnp.zeros_like(total_B1)))
  return jnp.sum(cdf_BV <= u_B1, axis=-1).astype(jnp.int32)


def _assemble(prompt_BT, length_B, new_BX, logp_BX, num_B, done_B, pad_id):
  """Moves each completion up to the end of its prompt."""
  T, X = prompt_BT.shape[1], new_BX.shape[1]
  column_1Y = jnp.arange(T + X, dtype=jnp.int32)[None]
  offset_BY = column_1Y - length_B[:, None]
  sampled_BY = (offset_BY >= 0) & (offset_BY < num_B[:, None])
  index_BY = jnp.clip(offset_BY, 0, X - 1)
  pick = lambda x_BX: jnp.take_along_axis(x_BX, index_BY, axis=1)
  prompt_BY = jnp.pad(prompt_BT, ((0, 0), (0, X)), constant_values=pad_id)
  tokens_BY = jnp.where(offset_BY < 0, prompt_BY, pad_id)
  return types.Rollout(
    tokens_BT=jnp.where(sampled_BY, pick(new_BX), tokens_BY),
    mask_BT=sampled_BY.astype(jnp.float32),
    logp_BT=jnp.where(sampled_BY, pick(logp_BX), 0.0),
    prompt_length_B=length_B,
    length_B=length_B + num_B,
    finished_B=done_B,
  )


@functools.cache
def make_generate(
  config: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
  *,
  max_new_tokens: int,
  sampling: filters.SamplingConfig,
  stop_ids: tuple[int, ...],
  pad_id: int,
  copies: int = 1,
) -> Callable[..., types.Rollout]:
  """A jitted (variables, prompt_PT, length_P, key) -> Rollout on a mesh.

  Its rows are `copies` completions of each prompt, one after the other; the
  devices that share a batch have to divide the prompts. The same one for the
  same arguments: two stages of a process compile it once. Each shard of the
  batch runs its own loop and leaves it when its own rows are done, or where
  devices share the experts, those of all of them. A fifth argument is the
  `load_balance.Placement` of replicas to sample with.
  """

  def run(variables, prompt_PT, length_P, row_B, key, placement):
    return generate(
      config,
      variables,
      prompt_PT,
      length_P,
      row_B,
      key,
      max_new_tokens=max_new_tokens,
      sampling=sampling,
      stop_ids=stop_ids,
      pad_id=pad_id,
      placement=placement,
    )

  return _with_rows(run, config, mesh, copies)


def copies_at_once(
  num_prompts: int, group_size: int, mesh: jax.sharding.Mesh
) -> int:
  """Into how many rows, of a group's, `make_generate` can turn a prompt.

  The divisor of group_size that leaves fewest prompts, of which each is given
  group_size / copies times, to divide among the devices.
  """
  shards = sharding.num_batch_shards(mesh)
  for times in range(1, group_size):
    if group_size % times == 0 and num_prompts * times % shards == 0:
      return group_size // times
  return 1


def abstract_variables(
  config: model_config.ModelConfig, mesh: jax.sharding.Mesh
) -> Any:
  """Shapes of variables where they lie to be sampled from.

  Each in the dtype that the model reads it in: the same numbers come out, and
  of a model that computes in bfloat16 half of the bytes are moved and read.
  """
  boxed = transformer.abstract(config)
  return jax.tree.map(
    lambda x, dtype, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s),
    sharding.unbox(boxed),
    sharding.used_dtypes(boxed),
    _layout(config, mesh),
  )


def _layout(config, mesh):
  return sharding.for_sampling(transformer.shardings(config, mesh))


def make_reshard(
  config: model_config.ModelConfig, mesh: jax.sharding.Mesh
) -> Callable[[Any], Any]:
  """A function of variables: from where they are trained to where they sample.

  One jitted program; if nothing has to move or to be cast, variables are given
  back as they are. The programs of this module take both: moved before,
  variables are moved once for several calls.
  """
  there = abstract_variables(config, mesh)
  stays = jax.tree.map(
    lambda x, s: (
      x.dtype == jnp.float32 and x.sharding.is_equivalent_to(s, x.ndim)
    ),
    there,
    transformer.shardings(config, mesh),
  )
  if all(jax.tree.leaves(stays)):
    return lambda variables: variables
  return jax.jit(
    lambda variables: jax.tree.map(
      lambda x, to: x.astype(to.dtype), variables, there
    ),
    out_shardings=jax.tree.map(lambda x: x.sharding, there),
  )


def make_prefill(
  config: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
  *,
  num_slots: int,
  copies: int = 1,
  **how: Any,
) -> Callable[..., Any]:
  """The first half of `make_generate` alone, with a cache of num_slots.

  The other arguments and the program's are those of `make_generate`.
  """

  def run(variables, prompt_PT, length_P, row_B, key, placement):
    del placement
    sampler = _make_sampler(config, variables, key, **how)
    return sampler.prefill(prompt_PT, length_P, row_B, num_slots)

  return _with_rows(run, config, mesh, copies, _kinds(config))


def make_decode_step(
  config: model_config.ModelConfig, mesh: jax.sharding.Mesh, **how: Any
) -> Callable[..., Any]:
  """One step of the loop in `make_generate` alone.

  A jitted (variables, step, rows, key) -> rows that donates the rows, which
  are those of `abstract_rows`. The arguments are those of `make_generate`.
  """

  def run(variables, step, rows, key):
    sampler = _make_sampler(config, variables, key, **how)
    return sampler.decode_step((step, rows))[1]

  layout = _layout(config, mesh)
  sharded = sharding.per_device(
    run, mesh, (layout, 'whole', 'rows', 'whole'), _kinds(config)
  )
  return jax.jit(sharded, donate_argnums=2)


def abstract_rows(
  config: model_config.ModelConfig,
  mesh: jax.sharding.Mesh,
  *,
  batch: int,
  num_slots: int,
  max_new_tokens: int,
) -> Any:
  """Shapes of rows in the middle of decoding, spread over a mesh."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding.batch_sharding(mesh, x.ndim)
    ),
    _shapes(config, batch, num_slots, max_new_tokens),
  )


def _shapes(config, batch, num_slots, max_new_tokens):
  ints = jax.ShapeDtypeStruct((batch,), jnp.int32)
  return _Decoding(
    new_BX=jax.ShapeDtypeStruct((batch, max_new_tokens), jnp.int32),
    logp_BX=jax.ShapeDtypeStruct((batch, max_new_tokens), jnp.float32),
    last_B=ints,
    num_B=ints,
    done_B=jax.ShapeDtypeStruct((batch,), jnp.bool_),
    length_B=ints,
    row_B=ints,
    cache=jax.eval_shape(
      lambda: transformer.make_cache(_unrolled(config), batch, num_slots)
    ),
  )


def _kinds(config):
  """What of them is rows, for `sharding.per_device`."""
  return jax.tree.map(
    lambda x: 'rows' if x.ndim else 'whole', _shapes(config, 1, 1, 1)
  )


def _with_rows(run, config, mesh, copies, out='rows'):
  """Jits a program of (variables, prompt, length, row, key, placement)."""
  layout = _layout(config, mesh)
  sharded = sharding.per_device(
    run, mesh, (layout, 'rows', 'rows', 'rows', 'whole', 'whole'), out
  )

  @jax.jit
  def program(variables, prompt_PT, length_P, key, placement=None):
    row_B = jnp.arange(copies * len(prompt_PT), dtype=jnp.int32)
    return sharded(variables, prompt_PT, length_P, row_B, key, placement)

  return program
