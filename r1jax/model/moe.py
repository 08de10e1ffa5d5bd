"""DeepSeekMoE: routed experts, dropless and exact, beside shared ones."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels.routed_swiglu import ops as routed_swiglu_ops
from r1jax import fp8
from r1jax.model import config as model_config
from r1jax.model import layers, router
from r1jax.parallel import expert as expert_parallel
from r1jax.parallel import load_balance, sharding

# The collection of where replicas of experts lie, in variables that have some:
# 'replica' [E, X] and 'count' [E] of each layer, see `load_balance.Placement`.
PLACEMENT = 'placement'

# Parts of the tokens that stand side by side in a program of training; more go
# in a loop.
_UNROLLED_PARTS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MoeMetrics:
  """What a layer reports of its routing.

  Attributes:
    counts_BE: float32 choices per expert over the real tokens of each row.
    balance_B: float32 sequence-wise balance loss of each row, before α.
    overflow: float32 choices that this device sent or received no room for,
      0 where all experts are on one device.
  """

  counts_BE: jax.Array
  balance_B: jax.Array
  overflow: jax.Array

  @property
  def counts_E(self) -> jax.Array:
    """Over the whole batch; summed after all layers, not in each."""
    return self.counts_BE.sum(-2)


class Moe(nn.Module):
  """out = Σ_k w_k FFN_k(x) + FFN_shared(x).

  Source: DeepSeek-V3, arXiv:2412.19437, eq. 12-16.
  """

  config: model_config.MoeConfig
  init_std: float
  dtype: jnp.dtype
  recipe: fp8.Recipe | None = None

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, keep_BT: jax.Array
  ) -> tuple[jax.Array, MoeMetrics]:
    """Runs each token's experts; tokens with keep 0 are not counted."""
    c = self.config
    D, E, F = x_BTD.shape[-1], c.num_experts, c.expert_dim
    param = functools.partial(sharding.param, self, std=self.init_std)
    router_DE = param('router', (D, E), ('embed', None))
    param = functools.partial(
      param, dtype=fp8.weight_dtype(self.dtype, self.recipe)
    )
    gate_EDF = param('gate', (E, D, F), ('experts', 'expert_embed', 'mlp'))
    up_EDF = param('up', (E, D, F), ('experts', 'expert_embed', 'mlp'))
    down_EFD = param('down', (E, F, D), ('experts', 'expert_mlp', None))
    bias_E = jnp.zeros((E,), jnp.float32)
    if c.has_bias:
      bias_E = self.variable(
        'router', 'bias', jnp.zeros, (E,), jnp.float32
      ).value

    with jax.named_scope('router'):
      logits_BTE = jnp.einsum(
        'BTD,DE->BTE',
        x_BTD.astype(jnp.float32),
        router_DE,
        precision=jax.lax.Precision.HIGHEST,
      )
      score_BTE = router.scores(logits_BTE, c.score)
      expert_BTK, weight_BTK = router.route(score_BTE, bias_E, config=c)
    with jax.named_scope('experts'):
      flat = lambda a: a.reshape(-1, a.shape[-1])
      slot_TK = flat(expert_BTK)
      is_placed = self.has_variable(PLACEMENT, 'count')
      if is_placed:
        slot_TK = load_balance.spread(
          slot_TK,
          self.get_variable(PLACEMENT, 'replica'),
          self.get_variable(PLACEMENT, 'count'),
          start=sharding.batch_index(),
        )
      out_TD, overflow = _run_experts(
        flat(sharding.fan_out(x_BTD)),
        slot_TK,
        flat(sharding.fan_out(weight_BTK)),
        (gate_EDF, up_EDF, down_EFD),
        c,
        recipe=self.recipe,
        is_placed=is_placed,
      )
      out_BTD = sharding.fan_in(out_TD).reshape(x_BTD.shape)
    metrics = MoeMetrics(
      counts_BE=router.counts(expert_BTK, keep_BT, E),
      balance_B=router.sequence_balance(score_BTE, keep_BT, top_k=c.top_k),
      overflow=sharding.sum_length(overflow),
    )
    if c.num_shared:
      shared = layers.SwiGlu(
        c.num_shared * F,
        self.init_std,
        self.dtype,
        self.recipe,
        name='shared',
      )
      out_BTD = out_BTD + shared(x_BTD)
    return out_BTD, metrics


def _run_experts(
  x_TD, expert_TK, weight_TK, weights, config, *, recipe=None, is_placed=False
):
  """The routed part on one device: its tokens, or what its experts are sent.

  If they are placed, experts are replicas, of which a group's lie anywhere.

  Returns the sums [T, D] and the overflow.
  """
  c, tokens = config, (x_TD, weight_TK)
  if sharding.axis_size(expert_parallel.AXIS) == 1:
    out_TD = _routed_swiglu(
      x_TD, expert_TK, weight_TK, weights, c, recipe=recipe
    )
    return out_TD, jnp.zeros(())
  run = functools.partial(
    _exchange, config=c, recipe=recipe, is_placed=is_placed
  )
  num_parts = c.exchange.num_parts(len(x_TD))
  if num_parts == 1:
    return run(tokens, weights, expert_TK)
  return _in_parts(run, num_parts, tokens, weights, expert_TK)


def _routed_swiglu(x_TD, expert_TK, weight_TK, weights, config, **sizes):
  return routed_swiglu_ops.routed_swiglu(
    x_TD,
    expert_TK,
    weight_TK.astype(x_TD.dtype),
    *weights,
    block=config.block,
    implementation=config.implementation,
    **sizes,
  )


def _exchange(tokens, weights, expert_TK, *, config, recipe, is_placed):
  """Tokens (x, weight) travel to their experts, and the sums back."""
  c, (x_TD, weight_TK) = config, tokens
  num_local = weights[0].shape[0]
  num_ranks = sharding.axis_size(expert_parallel.AXIS)
  T, K = expert_TK.shape
  limits = expert_parallel.limits(
    T,
    num_ranks=num_ranks,
    num_experts=num_ranks * num_local,
    top_k=K,
    num_groups=1 if is_placed else c.num_groups,
    top_groups=1 if is_placed else c.top_groups,
    receive_factor=c.exchange.receive_factor,
    multiple=c.exchange.multiple,
  )
  plan = expert_parallel.plan(expert_TK, num_local, limits)
  x_ND, expert_NK, weight_NK = expert_parallel.send(
    x_TD,
    expert_TK,
    weight_TK,
    plan,
    limits,
    num_local,
    c.exchange.kind,
    in_fp8=c.exchange.fp8,
  )
  y_ND = _routed_swiglu(
    x_ND,
    expert_NK,
    weight_NK,
    weights,
    c,
    recipe=recipe,
    mean_choices=T * K,
    max_choices=limits.choices,
  )
  out_TD = expert_parallel.combine(y_ND, plan, limits, c.exchange.kind)
  held = (expert_NK < num_local).sum()
  overflow = plan.dropped + jnp.maximum(held - limits.choices, 0)
  return out_TD, overflow.astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_parts(run, num_parts, tokens, weights, expert_TK):
  """Runs parts of the tokens one after another; overflows add up.

  What a device holds of them is a part's or two, on the way back too: nothing
  is kept for it but the arguments, each part runs again. Gradients of weights
  add up in float32. To be differentiated, parts follow each other without a
  loop between them: one may travel while another's experts are at work, or the
  shared one. Otherwise they loop: a sampler has each layer's code of its own.
  """
  return _run_parts(run, num_parts, 1, tokens, weights, expert_TK)


def _run_parts(run, num_parts, unroll, tokens, weights, expert_TK):
  one = lambda _, part: (None, run(part[0], weights, part[1]))
  _, (out_TD, overflow_p) = _scan_parts(
    num_parts, unroll, one, None, tokens, expert_TK
  )
  return out_TD, overflow_p.sum()


def _in_parts_fwd(run, num_parts, *args):
  return _run_parts(run, num_parts, _UNROLLED_PARTS, *args), args


def _in_parts_bwd(run, num_parts, args, grads):
  tokens, weights, expert_TK = args

  def add_part(total, part):
    tokens, expert_TK, grad_TD = part
    of_part = lambda *args: run(*args, expert_TK)
    _, pull, _ = jax.vjp(of_part, tokens, weights, has_aux=True)
    of_tokens, of_weights = pull(grad_TD)
    return jax.tree.map(jnp.add, total, of_weights), of_tokens

  zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
  of_weights, of_tokens = _scan_parts(
    num_parts, _UNROLLED_PARTS, add_part, zeros, tokens, expert_TK, grads[0]
  )
  of_weights = jax.tree.map(lambda g, w: g.astype(w.dtype), of_weights, weights)
  return of_tokens, of_weights, None


_in_parts.defvjp(_in_parts_fwd, _in_parts_bwd)


def _scan_parts(num_parts, unroll, body, init, *rows):
  """Scans over parts of rows [T, …], and joins what the parts give by rows."""
  split = lambda a: a.reshape(num_parts, -1, a.shape[-1])
  join = lambda a: a.reshape(-1, a.shape[-1]) if a.ndim > 2 else a
  last, out = jax.lax.scan(
    body,
    init,
    jax.tree.map(split, rows),
    unroll=min(num_parts, unroll),
  )
  return last, jax.tree.map(join, out)
