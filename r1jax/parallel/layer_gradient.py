"""The gradient of a layer in two parts: of its input now, of weights later.

The backward pass is traced once and its equations are parted. What leads to
the gradient of the input runs first, with all that is cheap; the products that
only a weight's gradient needs wait, and with them their operands, which are
what the layer's own products took in and the gradients of what they gave.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

Tree = Any
# layer(params, frozen, x, context) -> (x, loss, metrics).
Layer = Callable[..., tuple[Tree, jax.Array, Tree]]

# What makes an equation worth putting off; inside others as well.
_PRODUCTS = frozenset(
  ('dot_general', 'ragged_dot_general', 'pallas_call', 'scan', 'while')
)


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


class LayerGradient:
  """The gradient of one kind of layer, for what its forward keeps.

  Attributes:
    loss: Shape of the layer's loss.
    metrics: Shapes of its metrics.
    kept: Shapes of what a forward keeps for its backward: the leaves of x, or
      with `keep_all` what the backward needs that x or context went into.
    stash: Shapes of what put-off gradients need.
    put_off: Names of the parameters whose gradients may be put off: those of
      rank 2 and more, where no other gradient needs the same products.
  """

  def __init__(
    self, layer: Layer, arguments: Arguments, x: Tree, *, keep_all: bool
  ):
    """Traces the layer.

    Args:
      layer: The layer.
      arguments: Those of one layer, or their shapes.
      x: Its input, or the shapes.
      keep_all: A backward recomputes nothing but what comes of weights alone.

    Raises:
      ValueError: It changes the shape of x.
    """
    self._layer = layer
    y, self.loss, self.metrics = jax.eval_shape(self.run, arguments, x)
    if _shapes(y) != _shapes(x):
      raise ValueError(f'a layer turns {_shapes(x)} into {_shapes(y)}')
    flat, self._of_arguments = jax.tree.flatten(arguments)
    leaves, self._of_x = jax.tree.flatten(x)
    weights = jax.tree.leaves((arguments.params, arguments.frozen))
    self._num_weights = len(weights)
    linearized = jax.make_jaxpr(self._linearize)(flat, leaves)
    residuals = linearized.jaxpr.outvars[self._num_results :]
    self._keep(linearized, residuals, keep_all)
    self.kept = [_shape(v) for v in self._kept_vars]
    backward = jax.make_jaxpr(self._pull_back)(flat, self.kept, leaves)
    self._split(backward, arguments.params)

  def run(self, arguments: Arguments, x: Tree) -> tuple[Tree, Any, Tree]:
    a = arguments
    return self._layer(a.params, a.frozen, x, a.context)

  def forward(
    self, arguments: Arguments, x: Tree
  ) -> tuple[tuple[Tree, Any, Tree], list[jax.Array]]:
    """Returns (x, loss, metrics), and what is kept."""
    flat = jax.tree.leaves((arguments, x))
    out = self._forward(self._forward.inputs(flat))
    results = jax.tree.unflatten(self._of_results, out[: self._num_results])
    return results, out[self._num_results :]

  def of_input(
    self, arguments: Arguments, kept: Sequence[jax.Array], g: Tree
  ) -> tuple[Tree, dict[str, jax.Array], list[jax.Array]]:
    """Gradients of x and of what is never put off, and the stash."""
    flat = jax.tree.leaves((arguments, list(kept), g))
    out = self._now(self._now.inputs(flat))
    num_x = self._of_x.num_leaves
    num_now = num_x + len(self._at_once)
    g_x = jax.tree.unflatten(self._of_x, out[:num_x])
    at_once = dict(zip(self._at_once, out[num_x:num_now], strict=True))
    return g_x, at_once, out[num_now:]

  def of_weights(
    self, arguments: Arguments, stash: Sequence[jax.Array]
  ) -> dict[str, jax.Array]:
    """The gradients that were put off; reads no context."""
    weights = jax.tree.leaves((arguments.params, arguments.frozen))
    values = self._later.inputs(weights)
    values |= dict(zip(self._stashed, stash, strict=True))
    return dict(zip(self.put_off, self._later(values), strict=True))

  def _linearize(self, flat: list[jax.Array], x: list[jax.Array]) -> Any:
    """Leaves of (x, loss, metrics), then of what is linear in g."""
    arguments = jax.tree.unflatten(self._of_arguments, flat)

    def run(params: Tree, x: Tree) -> Any:
      a = dataclasses.replace(arguments, params=params)
      y, loss, metrics = self.run(a, x)
      return (y, loss), metrics

    (y, loss), pull, metrics = jax.vjp(
      run, arguments.params, jax.tree.unflatten(self._of_x, x), has_aux=True
    )
    results, self._of_results = jax.tree.flatten((y, loss, metrics))
    residuals, self._of_pull = jax.tree.flatten(pull)
    self._num_results = len(results)
    return results + residuals

  def _keep(
    self, linearized: core.ClosedJaxpr, residuals: Sequence[Any], keep_all: bool
  ) -> None:
    """Parts residuals in what is kept and what is computed from the rest."""
    jaxpr = linearized.jaxpr
    inputs = jaxpr.invars
    x = inputs[self._of_arguments.num_leaves :]
    if not keep_all:
      self._kept_vars = x
    else:
      varying = {*inputs[self._num_weights :]}
      for eqn in jaxpr.eqns:
        if any(_is_var(v) and v in varying for v in eqn.invars):
          varying.update(eqn.outvars)
      given = {*inputs[: self._of_arguments.num_leaves]}
      kept = [v for v in residuals if _is_var(v) and v in varying - given]
      self._kept_vars = list(dict.fromkeys(kept))
    self._forward = _Program(
      linearized,
      [*jaxpr.outvars[: self._num_results], *self._kept_vars],
    )
    # From arguments and what is kept to the residuals.
    self._recompute = _Program(linearized, residuals, self._kept_vars)

  def _pull_back(
    self, flat: list[jax.Array], kept: list[jax.Array], g: list[jax.Array]
  ) -> list[jax.Array]:
    """Leaves of the gradients of x, then of the parameters."""
    values = self._recompute.inputs(flat)
    values |= dict(zip(self._kept_vars, kept, strict=True))
    pull = jax.tree.unflatten(self._of_pull, self._recompute(values))
    g = jax.tree.unflatten(self._of_x, g)
    params, x = pull((g, jnp.ones(self.loss.shape, self.loss.dtype)))
    return jax.tree.leaves((x, params))

  def _split(self, backward: core.ClosedJaxpr, params: Tree) -> None:
    """Parts the equations, and finds what passes from one to the other."""
    jaxpr, num_x = backward.jaxpr, self._of_x.num_leaves
    of_x, of_params = jaxpr.outvars[:num_x], jaxpr.outvars[num_x:]
    named = dict(zip(named_leaves(params), of_params, strict=True))
    first = [named[n] for n, w in named_leaves(params).items() if w.ndim < 2]
    now, later, waiting = [], [], set()
    for eqn, is_first in zip(
      jaxpr.eqns, _needed(jaxpr.eqns, [*of_x, *first]), strict=True
    ):
      reads_later = any(_is_var(v) and v in waiting for v in eqn.invars)
      if not is_first and (reads_later or _is_product(eqn)):
        later.append(eqn)
        waiting.update(eqn.outvars)
      else:
        now.append(eqn)
    put_off = {n: v for n, v in named.items() if _is_var(v) and v in waiting}
    at_once = {n: v for n, v in named.items() if n not in put_off}
    self.put_off, self._at_once = tuple(put_off), tuple(at_once)
    read = [v for eqn in later for v in eqn.invars if _is_var(v)]
    given = {*jaxpr.invars[: self._num_weights], *jaxpr.constvars, *waiting}
    self._stashed = list(dict.fromkeys(v for v in read if v not in given))
    self.stash = [_shape(v) for v in self._stashed]
    out = [*of_x, *at_once.values(), *self._stashed]
    self._now = _Program(backward, out, eqns=now)
    self._later = _Program(backward, put_off.values(), eqns=later)


class _Program:
  """The equations of a jaxpr that lead from some variables to others."""

  def __init__(
    self,
    closed: core.ClosedJaxpr,
    out: Iterable[Any],
    given: Sequence[Any] = (),
    eqns: Sequence[core.JaxprEqn] | None = None,
  ):
    """Leaves out what leads to `given` alone, and what nothing needs."""
    jaxpr = closed.jaxpr
    self._inputs, out = jaxpr.invars, list(out)
    eqns = jaxpr.eqns if eqns is None else eqns
    live = _needed(eqns, out, given)
    eqns = [e for e, is_live in zip(eqns, live, strict=True) if is_live]
    known = {*jaxpr.constvars, *(v for eqn in eqns for v in eqn.outvars)}
    read = [v for eqn in eqns for v in eqn.invars] + out
    read = dict.fromkeys(filter(_is_var, read))
    self._free = [v for v in read if v not in known]
    self._run = core.jaxpr_as_fun(
      core.ClosedJaxpr(
        jaxpr.replace(invars=self._free, outvars=out, eqns=eqns), closed.consts
      )
    )

  def inputs(self, leaves: Sequence[jax.Array]) -> dict[Any, jax.Array]:
    """Values of the first inputs of the jaxpr."""
    return dict(zip(self._inputs, leaves, strict=False))

  def __call__(self, values: dict[Any, jax.Array]) -> list[jax.Array]:
    return list(self._run(*(values[v] for v in self._free)))


def _is_var(v: Any) -> bool:
  return not isinstance(v, core.Literal)


def _is_product(eqn: core.JaxprEqn) -> bool:
  return eqn.primitive.name in _PRODUCTS or any(
    _is_product(inner)
    for jaxpr in core.jaxprs_in_params(eqn.params)
    for inner in jaxpr.eqns
  )


def _needed(
  eqns: Sequence[core.JaxprEqn], out: Iterable[Any], given: Sequence[Any] = ()
) -> list[bool]:
  """Which equations lead to `out`, from what is given and the inputs."""
  given, needed = set(given), []
  live = {v for v in out if _is_var(v)} - given
  for eqn in reversed(eqns):
    needed.append(any(v in live for v in eqn.outvars))
    if needed[-1]:
      live.update(v for v in eqn.invars if _is_var(v) and v not in given)
  return needed[::-1]


def _shape(v: core.Var) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def _shapes(tree: Tree) -> Any:
  return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)
