"""The gradient of a layer in parts: of its input now, of weights later.

A layer passes its matrix products through `product`, which records what goes
in; from that and the gradient of what comes out follows the weight's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
# product(path, function, x) = function(x, weight at path), linear in both.
Product = Callable[[str, Callable[[Any, jax.Array], jax.Array], Any], jax.Array]
Layer = Callable[..., tuple[Tree, jax.Array, Tree]]


class _Tape:
  """The `product` of a layer: records inputs, adds taps to outputs.

  With y = function(x, w) + tap, the gradient of the tap is that of y, and
  with x it gives the weight's: no second recomputation is needed for that.
  """

  def __init__(self, weights: Mapping[str, jax.Array], taps: Tree = None):
    self._weights, self._taps = weights, taps
    self.inputs, self.outputs, self.functions = {}, {}, {}

  def __call__(self, path: str, function: Callable, x: Any) -> jax.Array:
    if path not in self._weights:
      raise ValueError(
        f'product of {path!r}: no such parameter; there are '
        f'{", ".join(self._weights)}'
      )
    if path in self.inputs:
      raise ValueError(f'product of {path!r}: used twice in one layer')
    # Remat: what is kept for its transpose is the weight, not a cast of it.
    y = jax.checkpoint(function, prevent_cse=False)(x, self._weights[path])
    self.inputs[path], self.functions[path] = x, function
    self.outputs[path] = y
    return y if self._taps is None else y + self._taps[path]


def named_leaves(tree: Tree) -> dict[str, jax.Array]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  return {name(path): leaf for path, leaf in leaves}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arguments:
  """Everything a layer reads that is not kept from forward to backward."""

  params: Tree
  frozen: Tree
  context: Tree

  @property
  def leaves(self) -> list[jax.Array]:
    return jax.tree.leaves((self.params, self.frozen, self.context))


class LayerGradient:
  """The gradient of one kind of layer, in parts.

  What is linear (`pull`) and the recorded inputs of the products can be
  packed into a list of arrays, which leaves out the layer's arguments.
  """

  def __init__(self, layer: Layer, arguments: Arguments, x: Tree):
    self._layer = layer

    def trace(a: Arguments, x: Tree) -> Any:
      tape = _Tape(named_leaves(a.params))
      out = layer(a.params, a.frozen, x, a.context, tape)
      return *out, tape.inputs, tape.outputs

    y, self.loss, self.metrics, self.inputs, self.taps = jax.eval_shape(
      trace, arguments, x
    )
    if _shapes(y) != _shapes(x):
      raise ValueError(f'a layer turns {_shapes(x)} into {_shapes(y)}')
    self.packed = jax.eval_shape(
      lambda a, x: self.pack(a, self.linearize(a, x)[1]), arguments, x
    )

  def run(self, arguments: Arguments, x: Tree) -> tuple[Tree, Any, Tree]:
    a, tape = arguments, _Tape(named_leaves(arguments.params))
    return self._layer(a.params, a.frozen, x, a.context, tape)

  def linearize(self, arguments: Arguments, x: Tree) -> Any:
    """Returns (x, loss, metrics), (pull, inputs of the products)."""
    named = named_leaves(arguments.params)
    treedef = jax.tree.structure(arguments.params)
    rest = {n: w for n, w in named.items() if n not in self.taps}

    def run(rest, x, taps):
      weights = {n: rest.get(n, w) for n, w in named.items()}
      tape = _Tape(weights, taps)
      params = treedef.unflatten(weights.values())
      y, loss, metrics = self._layer(
        params, arguments.frozen, x, arguments.context, tape
      )
      self._functions = tape.functions
      return (y, loss), (metrics, tape.inputs)

    taps = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), self.taps)
    (y, loss), pull, (metrics, inputs) = jax.vjp(
      run, rest, x, taps, has_aux=True
    )
    return (y, loss, metrics), (pull, inputs)

  def pack(self, arguments: Arguments, residuals: Any) -> list[jax.Array]:
    """The arrays of (pull, inputs), each once, without the arguments."""
    leaves, self._treedef = jax.tree.flatten(residuals)
    known = {id(x): ('argument', i) for i, x in enumerate(arguments.leaves)}
    packed, self._origins = [], []
    for leaf in leaves:
      if id(leaf) not in known:
        known[id(leaf)] = 'packed', len(packed)
        packed.append(leaf)
      self._origins.append(known[id(leaf)])
    return packed

  def unpack(self, arguments: Arguments, packed: list[jax.Array]) -> Any:
    """(pull, inputs), for the same layer and microbatch."""
    source = {'argument': arguments.leaves, 'packed': packed}
    leaves = [source[kind][i] for kind, i in self._origins]
    return self._treedef.unflatten(leaves)

  def pull(self, pull: Callable, g: Tree) -> tuple[Tree, Tree, Tree]:
    """Gradients of the parameters used directly, of x, and of the products."""
    return pull((g, jnp.ones(self.loss.shape, self.loss.dtype)))

  def weight_gradients(
    self, arguments: Arguments, inputs: Tree, taps: Tree
  ) -> dict[str, jax.Array]:
    named, grads = named_leaves(arguments.params), {}
    for path, function in self._functions.items():
      of_weight = lambda w, f=function, x=inputs[path]: f(x, w)
      grads[path] = jax.vjp(of_weight, named[path])[1](taps[path])[0]
    return grads


def _shapes(tree: Tree) -> Any:
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
