"""One program that runs any pipeline schedule, given as a table.

All ranks scan over the ticks of the table together. In a tick a rank runs at
most one forward and one backward, in loops of zero or one trip (a loop, unlike
a branch, updates what it carries in place); then every rank sends to its
neighbours, needed or not, and files what arrives where the table says. So
only collectives over other axes stand inside such loops (`all_to_all` over
`expert`): their groups lie within one rank of `pipe` and take the same trips.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from r1jax.parallel import layer_gradient
from r1jax.parallel import table as table_lib
from r1jax.parallel.table import Backward, Column

AXIS = 'pipe'

Tree = Any


@dataclasses.dataclass(frozen=True)
class Stack:
  """The layers of one kind that each stage has.

  Attributes:
    layer: (params, frozen, x, context) -> (x, loss, metrics), for one
      microbatch on one device; no `ppermute` inside (see the module).
    num_layers: Of each stage; stages with fewer than the parameters have
      room for skip the last.
  """

  layer: layer_gradient.Layer
  num_layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Functions:
  """What the stages compute; losses and metrics of microbatches add up.

  Attributes:
    embed: (ends, batch) -> x, any tree of arrays that all stages share.
    stacks: Run by every stage, in this order.
    head: (ends, x, batch) -> (loss, metrics).
    context: (batch) -> what all layers want to know of a microbatch.
    is_max: Says by its name whether a metric of the head is combined by
      maximum, not by sum.
  """

  embed: Callable[[Tree, Tree], Tree]
  stacks: Mapping[str, Stack]
  head: Callable[[Tree, Tree, Tree], tuple[jax.Array, Tree]]
  context: Callable[[Tree], Tree]
  is_max: Callable[[str], bool] = lambda name: False


@dataclasses.dataclass(frozen=True)
class Options:
  """How the table is run.

  Attributes:
    keep: What a forward keeps for its backward: 'input' the stage's input (all
      else is recomputed), 'layers' the input of each layer (one layer at a
      time is recomputed), 'all' everything but weights and context.
    fused: The halves of a pair share one loop over the layers, so that the
      compiler may run one's collectives beside the other's products.
    masked: Every rank runs a forward, an input gradient and a weight gradient
      in every tick and drops what is not due: no loop whose trips differ
      between ranks, so any collective may stand in a layer.
  """

  keep: str = 'input'
  fused: bool = False
  masked: bool = False

  def __post_init__(self):
    if self.keep not in ('input', 'layers', 'all'):
      raise ValueError(f'keep={self.keep!r}: one of input, layers, all')
    if self.fused and self.keep == 'input':
      raise ValueError("fused=True needs keep='layers' or keep='all'")


def _names(spec: P) -> set[str]:
  """The mesh axes of a spec."""
  parts = ((p,) if isinstance(p, str) else p or () for p in spec)
  return {name for part in parts for name in part}


# False drops results; None is True, where nothing runs that is not due.
Mask = jax.Array | None
# The state of the scan: arrays by name. What layers have is flat, [slots ·
# layers, …] or [streams · layers, …], so that one index finds a layer.
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Pass:
  """One microbatch's way through one stage.

  Attributes:
    stream: Which of the rank's stages.
    context: Of the microbatch.
    saved: Slot of what the layers keep; None keeps nothing.
    stash: Slot of what W needs; None takes weight gradients at once.
    on: Whether its results count.
  """

  stream: jax.Array
  context: Tree
  saved: jax.Array | int | None
  stash: jax.Array | None
  on: Mask


class Run:
  """The executor on one rank; lives inside shard_map."""

  def __init__(
    self,
    functions: Functions,
    table: table_lib.Table,
    options: Options,
    params: Tree,
    frozen: Tree,
    counts: dict[str, jax.Array],
    batch: Tree,
  ):
    self._functions, self._table, self._options = functions, table, options
    self._schedule = schedule = table.schedule
    self._ends, self._counts = params['ends'], counts
    layers = params['stacks'], frozen
    if schedule.is_mirrored:
      layers = jax.tree.map(
        lambda a: jnp.concatenate([a, self._mirror(a)]), layers
      )
    self._size = {
      n: jax.tree.leaves(t)[0].shape[1] for n, t in layers[0].items()
    }
    for name, stack in functions.stacks.items():
      if max(stack.num_layers) > self._size[name]:
        raise ValueError(
          f'stack {name!r}: num_layers={max(stack.num_layers)}, the parameters '
          f'have {self._size[name]}'
        )
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    self._params, self._frozen = jax.tree.map(flat, layers)
    self._batch = jax.tree.map(self._split, batch)
    self._trace()

  def _mirror(self, x: jax.Array) -> jax.Array:
    """What the rank at the same distance from the other end has."""
    last = self._schedule.num_ranks - 1
    return lax.ppermute(x, AXIS, [(r, last - r) for r in range(last + 1)])

  def _split(self, x: jax.Array) -> jax.Array:
    """Rows [B, …] -> [microbatches, B / microbatches, …]."""
    if not jnp.ndim(x):
      return x
    count = self._schedule.num_microbatches
    if x.shape[0] % count:
      raise ValueError(
        f'num_microbatches={count} must divide the {x.shape[0]} rows of a '
        'device'
      )
    return x.reshape(count, -1, *x.shape[1:])

  def _trace(self) -> None:
    """Finds the shapes of all that waits."""
    batch, context = jax.eval_shape(lambda: self._microbatch(0))
    self._x = jax.eval_shape(self._functions.embed, self._ends, batch)
    self._head_loss, self._head_metrics = jax.eval_shape(
      self._functions.head, self._ends, self._x, batch
    )
    self._layers = {}
    for name, stack in self._functions.stacks.items():
      a = jax.eval_shape(lambda n=name: self._arguments(n, 0, None))
      a = dataclasses.replace(a, context=context)
      self._layers[name] = layer_gradient.LayerGradient(
        stack.layer, a, self._x, keep_all=self._options.keep == 'all'
      )

  def _microbatch(self, index: Any) -> tuple[Tree, Tree]:
    """(batch, context)."""
    batch = jax.tree.map(
      lambda x: _at(x, index) if jnp.ndim(x) else x, self._batch
    )
    return batch, self._functions.context(batch)

  def _arguments(
    self, name: str, index: Any, context: Tree
  ) -> layer_gradient.Arguments:
    params, frozen = jax.tree.map(
      lambda x: _at(x, index), (self._params[name], self._frozen.get(name, {}))
    )
    return layer_gradient.Arguments(params, frozen, context)

  # The scan.

  def scan(self, rows: jax.Array) -> State:
    """Runs all ticks; rows is [ticks, columns]."""
    step = lambda state, row: (self._tick(row, state), None)
    return lax.scan(step, self._initial_state(), rows)[0]

  def _initial_state(self) -> State:
    t, spare = self._table, int(self._options.masked)
    num_saved = 1 if t.recompute else t.num_saved + spare
    num_stashes = t.num_stashes + spare
    streams = self._schedule.num_streams
    state = {
      'x_out': _zeros(self._x),
      'g_out': _zeros(self._x),
      'g_head': _zeros(self._x),
      'inputs': _zeros(self._x, t.num_inputs + 1),
      'gradients': _zeros(self._x, t.num_gradients + 1),
      'ends_grads': _zeros_like_gradients(self._ends),
      'loss': _zeros_like_gradients(self._head_loss),
      'head_metrics': self._of_head(
        lambda x: jnp.full(x.shape, -jnp.inf, x.dtype),
        lambda x: jnp.zeros(x.shape, x.dtype),
        self._head_metrics,
      ),
      'metrics': {},
      'saved': {},
      'stash': {},
      'rest_grads': {},
      'weight_grads': {},
    }
    for name, layer in self._layers.items():
      size = self._size[name]
      grads = _zeros_like_gradients(
        layer_gradient.named_leaves(self._params[name])
      )
      state['weight_grads'][name] = {
        n: g for n, g in grads.items() if n in layer.put_off
      }
      state['rest_grads'][name] = {
        n: g for n, g in grads.items() if n not in layer.put_off
      }
      state['metrics'][name] = _zeros(layer.metrics, streams * size)
      state['saved'][name] = _zeros(layer.kept, num_saved * size)
      state['stash'][name] = _zeros(layer.stash, num_stashes * size)
    return state

  def _tick(self, row: jax.Array, state: State) -> State:
    sent = None
    if self._table.latency == 2:  # What the tick before made.
      sent = self._exchange(state)
    run = self._tick_masked if self._options.masked else self._tick_in_loops
    state = run(row, state)
    if sent is None:
      sent = self._exchange(state)
    own = {
      Column.X_OWN: state['x_out'],
      Column.G_OWN: state['g_out'],
      Column.G_HEAD: state['g_head'],
    }
    with jax.named_scope('arrivals'):
      for column, message in (own | sent).items():
        if self._is_used(column):
          buffer = 'inputs' if column in _TO_INPUTS else 'gradients'
          state[buffer] = _put(state[buffer], message, row[column])
    return state

  def _is_used(self, column: Column) -> bool:
    """Says whether anything ever arrives there, on any rank."""
    t = self._table
    none = t.num_inputs if column in _TO_INPUTS else t.num_gradients
    return bool((t.rows[..., column] != none).any())

  def _exchange(self, state: State) -> dict[Column, Tree]:
    """Sends to both neighbours what one of them waits for."""
    up = [(r, r + 1) for r in range(self._schedule.num_ranks - 1)]
    down = [(r + 1, r) for r, _ in up]
    arrived = {}
    with jax.named_scope('exchange'):
      for key, column, edges in (
        ('x_out', Column.X_PREVIOUS, up),
        ('x_out', Column.X_NEXT, down),
        ('g_out', Column.G_PREVIOUS, up),
        ('g_out', Column.G_NEXT, down),
      ):
        if self._is_used(column):
          arrived[column] = jax.tree.map(
            lambda x, e=edges: lax.ppermute(x, AXIS, e), state[key]
          )
    return arrived

  def _tick_in_loops(self, row: jax.Array, state: State) -> State:
    """Runs what the row says, each half in a loop of zero or one trip."""
    kinds = self._table.rows[..., Column.BACKWARD]
    kind, forward = row[Column.BACKWARD], row[Column.FORWARD]
    keep, fused = self._options.keep, self._options.fused
    reports = ['saved', 'loss', 'metrics', 'ends_grads', 'head_metrics']
    of_forward = ['x_out']
    of_backward = ['g_out', 'ends_grads', 'rest_grads']
    if keep == 'input':
      # The last stage's backward recomputes what its forward would find.
      forward = forward * (1 - row[Column.F_LAST])
      of_backward += reports
    else:
      of_forward += [*reports, 'g_head']
    is_pair = forward * (kind == Backward.B) if fused else 0
    state = _loop_if(
      forward - is_pair,
      lambda state: self._forward(row, state),
      state,
      of_forward,
    )
    if fused:
      keys = {*of_forward, *of_backward, 'weight_grads'}
      state = _loop_if(
        is_pair, lambda state: self._pair(row, state), state, keys
      )
    for code, change in ((Backward.B, 'weight_grads'), (Backward.I, 'stash')):
      if (kinds == code).any():
        state = _loop_if(
          (kind == code) - (is_pair if code == Backward.B else 0),
          lambda state, code=code: self._backward(
            row, state, split=code == Backward.I
          ),
          state,
          [*of_backward, change],
        )
    if (kinds == Backward.W).any():
      state = _loop_if(
        kind == Backward.W,
        lambda state: self._weight(row, state),
        state,
        ['weight_grads'],
      )
    return state

  def _tick_masked(self, row: jax.Array, state: State) -> State:
    """Runs everything and drops what the row does not ask for."""
    kind = row[Column.BACKWARD]
    is_gradient = (kind == Backward.B) | (kind == Backward.I)
    is_weight = (kind == Backward.B) | (kind == Backward.W)
    halves = self._pair if self._options.fused else self._both
    state = halves(row, state, row[Column.FORWARD] == 1, is_gradient)
    return self._weight(row, state, is_weight)

  def _both(
    self, row: jax.Array, state: State, forward_on: Mask, backward_on: Mask
  ) -> State:
    state = self._forward(row, state, forward_on)
    return self._backward(row, state, split=True, on=backward_on)

  # The halves of an op.

  def _forward(self, row: jax.Array, state: State, on: Mask = None) -> State:
    run, batch, state = self._begin_forward(row, state, on)
    for name in self._layers:
      state = self._each_layer(name, run, state, 'forward')
    return self._end_forward(row, run, batch, state)

  def _begin_forward(self, row: jax.Array, state: State, on: Mask):
    batch, context = self._microbatch(row[Column.F_MICROBATCH])
    keeps = self._options.keep != 'input'
    run = _Pass(
      stream=row[Column.F_STREAM],
      context=context,
      saved=row[Column.F_SAVED] if keeps else None,
      stash=None,
      on=on,
    )
    x = self._input(row[Column.F_FIRST], row[Column.F_INPUT], batch, state)
    return run, batch, state | {'x': x}

  def _end_forward(
    self, row: jax.Array, run: _Pass, batch: Tree, state: State
  ) -> State:
    if self._options.keep != 'input':
      state = self._head(row[Column.F_LAST], run, batch, state, 'g_head')
    return _without(state | {'x_out': state['x']}, 'x')

  def _backward(
    self, row: jax.Array, state: State, split: bool, on: Mask = None
  ) -> State:
    run, batch, state = self._begin_backward(row, state, split, on)
    for name in reversed(self._layers):
      state = self._each_layer(name, run, state, 'backward')
    return self._end_backward(row, run, batch, state)

  def _begin_backward(
    self, row: jax.Array, state: State, split: bool, on: Mask
  ):
    batch, context = self._microbatch(row[Column.B_MICROBATCH])
    recompute = self._options.keep == 'input'
    stash = row[Column.B_STASH] if split else None
    if split and on is not None:
      stash = jnp.where(on, stash, self._table.num_stashes)
    run = _Pass(
      stream=row[Column.B_STREAM],
      context=context,
      saved=0 if recompute else row[Column.B_SAVED],
      stash=stash,
      on=on,
    )
    g = _at(state['gradients'], row[Column.B_GRADIENT])
    state = state | {'g': g}
    if recompute:
      x = self._input(row[Column.B_FIRST], row[Column.B_INPUT], batch, state)
      state = state | {'x': x}
      for name in self._layers:
        state = self._each_layer(name, run, state, 'forward')
      state = self._head(row[Column.B_LAST], run, batch, state, 'g')
      state = _without(state, 'x')
    return run, batch, state

  def _end_backward(
    self, row: jax.Array, run: _Pass, batch: Tree, state: State
  ) -> State:
    with jax.named_scope('embed'):
      state = self._if(
        row[Column.B_FIRST],
        run.on,
        lambda state, on: self._embed_gradient(batch, state, on),
        state,
        ['ends_grads'],
      )
    return _without(state | {'g_out': state['g']}, 'g')

  def _weight(self, row: jax.Array, state: State, on: Mask = None) -> State:
    """Weight gradients from the stash."""
    run = _Pass(
      stream=row[Column.B_STREAM],
      context=None,
      saved=None,
      stash=row[Column.B_STASH],
      on=on,
    )
    for name in self._layers:
      state = self._each_layer(name, run, state, 'weight')
    return state

  def _pair(
    self,
    row: jax.Array,
    state: State,
    forward_on: Mask = None,
    backward_on: Mask = None,
  ) -> State:
    """A forward and a backward, together in the loop of the last stack."""
    masked = self._options.masked
    forward, f_batch, state = self._begin_forward(row, state, forward_on)
    backward, b_batch, state = self._begin_backward(
      row, state, masked, backward_on
    )
    *others, last = self._layers
    for name in others:
      state = self._each_layer(name, forward, state, 'forward')
    state = self._each_layer_of_both(last, forward, backward, state)
    for name in reversed(others):
      state = self._each_layer(name, backward, state, 'backward')
    state = self._end_forward(row, forward, f_batch, state)
    return self._end_backward(row, backward, b_batch, state)

  def _each_layer_of_both(
    self, name: str, forward: _Pass, backward: _Pass, state: State
  ) -> State:
    """A forward and a backward in one loop, then what one of them has more."""
    halves = [
      (run, self._count(name, run), kind)
      for run, kind in ((forward, 'forward'), (backward, 'backward'))
    ]
    changes = [k for run, _, kind in halves for k in self._changes(run, kind)]

    def both(i: jax.Array, state: State) -> State:
      for run, count, kind in halves:
        state = self._one_layer(name, run, i, count, state, kind)
      return state

    if self._options.masked:
      return _loop(0, self._size[name], both, state, changes)
    shared = jnp.minimum(*(count for _, count, _ in halves))
    state = _loop(0, shared, both, state, changes)
    for run, count, kind in halves:
      one = lambda i, state, r=run, c=count, k=kind: self._one_layer(
        name, r, i, c, state, k
      )
      state = _loop(shared, count, one, state, self._changes(run, kind))
    return state

  # Embedding and head.

  def _if(
    self,
    condition: jax.Array,
    on: Mask,
    body: Callable[[State, Mask], State],
    state: State,
    keys: Sequence[str],
  ) -> State:
    """body(state, on) where `condition`, as a loop or masked."""
    if self._options.masked:
      return body(state, condition.astype(bool) & on)
    return _loop_if(condition, lambda state: body(state, None), state, keys)

  def _input(
    self, first: jax.Array, slot: jax.Array, batch: Tree, state: State
  ) -> Tree:
    """The stage's input: the embedded microbatch, or what arrived."""
    embed = lambda: self._functions.embed(self._ends, batch)
    arrived = lambda: _at(state['inputs'], slot)
    with jax.named_scope('embed'):
      if self._options.masked:
        return _where(first.astype(bool), embed(), arrived())
      return lax.cond(first.astype(bool), embed, arrived)

  def _embed_gradient(self, batch: Tree, state: State, on: Mask) -> State:
    embed = lambda ends: self._functions.embed(ends, batch)
    (grads,) = jax.vjp(embed, self._ends)[1](state['g'])
    return state | {'ends_grads': _add(state['ends_grads'], grads, on)}

  def _head(
    self, last: jax.Array, run: _Pass, batch: Tree, state: State, key: str
  ) -> State:
    """Loss, its gradients and metrics, on the last stage."""

    def body(state: State, on: Mask) -> State:
      head = lambda ends, x: self._functions.head(ends, x, batch)
      loss, pull, metrics = jax.vjp(head, self._ends, state['x'], has_aux=True)
      grads, g = pull(jnp.ones_like(loss))
      return state | {
        'loss': _add(state['loss'], loss, on),
        'head_metrics': self._of_head(
          lambda total, x: jnp.maximum(total, _where(on, x, total)),
          lambda total, x: _add(total, x, on),
          state['head_metrics'],
          metrics,
        ),
        'ends_grads': _add(state['ends_grads'], grads, on),
        key: _where(on, g, state[key]),
      }

    keys = ['loss', 'head_metrics', 'ends_grads', key]
    with jax.named_scope('head'):
      return self._if(last, run.on, body, state, keys)

  def _of_head(
    self, of_max: Callable[..., Any], of_sum: Callable[..., Any], *trees: Tree
  ) -> Tree:
    """Maps the head's metrics, by how they are combined."""

    def one(path: Any, *leaves: Any) -> Any:
      name = jax.tree_util.keystr(path[-1:], simple=True)
      return (of_max if self._functions.is_max(name) else of_sum)(*leaves)

    return jax.tree_util.tree_map_with_path(one, *trees)

  # Layers.

  def _each_layer(
    self, name: str, run: _Pass, state: State, kind: str
  ) -> State:
    """Runs the stage's layers of a stack, forwards or backwards."""
    count = self._count(name, run)
    step = lambda i, state: self._one_layer(name, run, i, count, state, kind)
    return _loop(0, count, step, state, self._changes(run, kind))

  def _count(self, name: str, run: _Pass) -> Any:
    if self._options.masked:
      return self._size[name]
    return self._counts[name][run.stream]

  def _one_layer(
    self,
    name: str,
    run: _Pass,
    i: jax.Array,
    count: Any,
    state: State,
    kind: str,
  ) -> State:
    if kind == 'forward':
      return self._forward_layer(name, run, i, state)
    if kind == 'backward':
      return self._backward_layer(name, run, count - 1 - i, state)
    return self._weight_layer(name, run, i, state)

  def _changes(self, run: _Pass, kind: str) -> list[str]:
    """What a layer's pass of this kind changes."""
    if kind == 'forward':
      kept = ['saved', 'loss', 'metrics'] if run.saved is not None else []
      return ['x', *kept]
    if kind == 'backward':
      weights = 'weight_grads' if run.stash is None else 'stash'
      return ['g', 'rest_grads', weights]
    return ['weight_grads']

  def _at_layer(
    self, name: str, run: _Pass, layer: jax.Array
  ) -> tuple[Any, layer_gradient.Arguments, Any]:
    """(its index, what it reads, whether it is on: None outside masked)."""
    index = run.stream * self._size[name] + layer
    on = None
    if self._options.masked:
      on = run.on & (layer < self._counts[name][run.stream])
    return index, self._arguments(name, index, run.context), on

  def _forward_layer(
    self, name: str, run: _Pass, layer: jax.Array, state: State
  ) -> State:
    gradient, x = self._layers[name], state['x']
    index, a, on = self._at_layer(name, run, layer)
    if run.saved is None:
      y, _, _ = gradient.run(a, x)
      return state | {'x': _where(on, y, x)}
    (y, loss, metrics), kept = gradient.forward(a, x)
    slot = run.saved * self._size[name] + layer
    state = state | {
      'x': _where(on, y, x),
      'loss': _add(state['loss'], loss, on),
    }
    state = _update(state, 'saved', name, lambda s: _put(s, kept, slot))
    return _update(
      state, 'metrics', name, lambda m: _add_at(m, metrics, index, on)
    )

  def _backward_layer(
    self, name: str, run: _Pass, layer: jax.Array, state: State
  ) -> State:
    gradient, size = self._layers[name], self._size[name]
    index, a, on = self._at_layer(name, run, layer)
    kept = _at(state['saved'][name], run.saved * size + layer)
    g, rest, stash = gradient.of_input(a, kept, state['g'])
    state = state | {'g': _where(on, g, state['g'])}
    state = _update(
      state, 'rest_grads', name, lambda r: _add_at(r, rest, index, on)
    )
    if run.stash is None:
      return self._add_weights(name, a, stash, index, on, state)
    slot = run.stash * size + layer
    return _update(state, 'stash', name, lambda s: _put(s, stash, slot))

  def _weight_layer(
    self, name: str, run: _Pass, layer: jax.Array, state: State
  ) -> State:
    index, a, on = self._at_layer(name, run, layer)
    slot = run.stash * self._size[name] + layer
    stash = _at(state['stash'][name], slot)
    return self._add_weights(name, a, stash, index, on, state)

  def _add_weights(
    self,
    name: str,
    a: layer_gradient.Arguments,
    stash: Tree,
    index: jax.Array,
    on: Mask,
    state: State,
  ) -> State:
    grads = self._layers[name].of_weights(a, stash)
    return _update(
      state, 'weight_grads', name, lambda w: _add_at(w, grads, index, on)
    )

  # The end.

  def collect(
    self,
    state: State,
    specs: Tree,
    batch_axes: tuple[str, ...],
    sum_axes: tuple[str, ...],
  ):
    """Sums over the ranks that hold parts: ((loss, metrics), grads)."""

    def total(x: jax.Array, spec: P, axes: Sequence[str]) -> jax.Array:
      axes = tuple(a for a in axes if a not in _names(spec))
      return lax.psum(x, axes) if axes else x

    def unstack(name: str, x: jax.Array) -> jax.Array:
      """[streams · layers, …] -> [stages of this rank, layers, …]."""
      x = x.reshape(-1, self._size[name], *x.shape[1:])
      return x[:1] + self._mirror(x[1:]) if self._schedule.is_mirrored else x

    everywhere = (AXIS, *batch_axes)
    whole = lambda x: lax.psum(x, everywhere)
    of_ends = lambda x, spec: total(x, spec, (*everywhere, *sum_axes))
    grads = {
      'ends': jax.tree.map(of_ends, state['ends_grads'], specs['ends']),
      'stacks': {},
    }
    metrics = {
      'head': self._of_head(
        lambda x: lax.pmax(x, everywhere), whole, state['head_metrics']
      ),
      'stacks': {},
    }
    for name in self._layers:
      named = state['weight_grads'][name] | state['rest_grads'][name]
      tree = jax.tree.structure(self._params[name]).unflatten(
        named[n] for n in layer_gradient.named_leaves(self._params[name])
      )
      grads['stacks'][name] = jax.tree.map(
        lambda x, spec, n=name: total(
          unstack(n, x), spec, (*batch_axes, *sum_axes)
        ),
        tree,
        specs['stacks'][name],
      )
      metrics['stacks'][name] = jax.tree.map(
        lambda x, n=name: total(unstack(n, x), P(), batch_axes),
        state['metrics'][name],
      )
    return (whole(state['loss']), metrics), grads


_TO_INPUTS = (Column.X_PREVIOUS, Column.X_NEXT, Column.X_OWN)


def _loop(
  lower: Any,
  upper: Any,
  body: Callable[[Any, State], State],
  state: State,
  changes: Sequence[str],
) -> State:
  """state = body(i, state) for lower ≤ i < upper, carrying `changes` only."""

  def step(i: jax.Array, part: State) -> State:
    new = body(i, state | part)
    lost = [k for k in new if k not in part and new[k] is not state.get(k)]
    assert not lost, f'{lost} change as well'
    return {k: new[k] for k in part}

  part = {k: state[k] for k in changes}
  return state | lax.fori_loop(lower, upper, step, part)


def _loop_if(
  on: Any,
  body: Callable[[State], State],
  state: State,
  changes: Sequence[str],
) -> State:
  """body(state) if `on`, as a loop of one trip or none."""
  trips = jnp.asarray(on, jnp.int32)
  return _loop(0, trips, lambda _, state: body(state), state, changes)


def _zeros(tree: Tree, slots: int | None = None) -> Tree:
  lead = () if slots is None else (slots,)
  return jax.tree.map(lambda x: jnp.zeros((*lead, *x.shape), x.dtype), tree)


def _zeros_like_gradients(tree: Tree) -> Tree:
  """Sums over microbatches are float32 at least."""
  dtype = lambda x: jnp.promote_types(x.dtype, jnp.float32)
  return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype(x)), tree)


def _where(on: Mask, new: Tree, old: Tree) -> Tree:
  if on is None:
    return new
  return jax.tree.map(lambda n, o: jnp.where(on, n, o), new, old)


def _add(total: Tree, x: Tree, on: Mask) -> Tree:
  def one(total, x):
    x = x.astype(total.dtype)
    return total + (x if on is None else jnp.where(on, x, 0))

  return jax.tree.map(one, total, x)


def _at(tree: Tree, index: Any) -> Tree:
  take = lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False)
  return jax.tree.map(take, tree)


def _put(tree: Tree, values: Tree, index: Any) -> Tree:
  put = lambda x, v: lax.dynamic_update_index_in_dim(x, v, index, 0)
  return jax.tree.map(put, tree, values)


def _add_at(tree: Tree, values: Tree, index: Any, on: Any) -> Tree:
  return _put(tree, _add(_at(tree, index), values, on), index)


def _update(state: State, key: str, name: str, function: Callable) -> State:
  return state | {key: state[key] | {name: function(state[key][name])}}


def _without(state: State, key: str) -> State:
  return {k: v for k, v in state.items() if k != key}
