"""Which tensor of a checkpoint each part of our variables is.

One table serves import, export and every check: a leaf of ours is cut into
slices along its stacks (layers, experts); each slice is a tensor of the
checkpoint seen in another shape, of which a window is taken, its axes
permuted. Linear weights are [out, in] there and [in, …, out] here, but for
attention's `out`, [out, heads, in].

Source: names as in transformers 5.23 and the released checkpoints.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from r1jax.model import config as model_config

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
  """A slice of a leaf, as a part of a checkpoint's tensor.

  Attributes:
    name: Of the tensor.
    view: Shape it is seen in: that of the tensor, its axes split.
    num_rows: Leading axes of the view that make up the tensor's first axis.
    window: Part of the view.
    axes: Our axes as axes of the window.
  """

  name: str
  view: tuple[int, ...]
  num_rows: int
  window: tuple[slice, ...]
  axes: tuple[int, ...]

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the tensor in the checkpoint."""
    rows, columns = self.view[: self.num_rows], self.view[self.num_rows :]
    if not columns:
      return (math.prod(rows),)
    return math.prod(rows), math.prod(columns)

  @property
  def slice_shape(self) -> tuple[int, ...]:
    """Of the slice of our leaf."""
    lengths = [s.stop - s.start for s in self.window]
    return tuple(lengths[axis] for axis in self.axes)


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of our variables.

  Attributes:
    path: Its keys, the collection first.
    stack: Sizes of its leading axes, layers and experts.
    sources: Of each slice, by index into the stack.
  """

  path: Path
  stack: tuple[int, ...]
  sources: dict[tuple[int, ...], Source]

  @property
  def shape(self) -> tuple[int, ...]:
    return (*self.stack, *next(iter(self.sources.values())).slice_shape)


@dataclasses.dataclass(frozen=True)
class Mapping:
  """All of a model.

  Attributes:
    leaves: Each leaf of {'params', 'router'} once.
    copies: Tensors that must be equal to another one: name to name.
    spare_copies: The same for tensors that may be left out: the head of tied
      embeddings, which some released files have.
    empty: Tensors without numbers, by name: those of no shared experts, which
      transformers has all the same. They may be left out.
  """

  leaves: tuple[Leaf, ...]
  copies: dict[str, str]
  spare_copies: dict[str, str]
  empty: dict[str, tuple[int, ...]]

  def names(self) -> set[str]:
    """Every tensor of the checkpoint, scales of FP8 weights aside."""
    return {
      s.name for leaf in self.leaves for s in leaf.sources.values()
    } | set(self.copies)


def make_mapping(config: model_config.ModelConfig) -> Mapping:
  """The mapping of a model, in the layout that its scan_layers asks for."""
  D, V = config.embed_dim, config.vocab_size
  leaves = [
    _single(('params', 'embedding'), _vector_rows('model.embed_tokens', V, D)),
    _single(('params', 'norm', 'scale'), _vector('model.norm.weight', D)),
  ]
  if not config.tie_embeddings:
    leaves.append(_single(('params', 'head'), _linear('lm_head', (V,), (D,))))
  first, count = config.num_dense_layers, config.num_layers
  for name, is_moe, layers in (
    ('dense', False, range(first)),
    ('moe', True, range(first, count)),
  ):
    if not layers:
      continue
    if config.scan_layers:
      leaves += _stack(config, (name,), is_moe, layers)
    else:
      for i, layer in enumerate(layers):
        leaves += _block(config, (f'{name}_{i}',), is_moe, layer)
  copies = {}
  for k in range(1, config.mtp_depth + 1):
    more, its_copies = _mtp(config, k)
    leaves += more
    copies |= its_copies
  spare_copies = {}
  if config.tie_embeddings:
    spare_copies = {'lm_head.weight': 'model.embed_tokens.weight'}
  return Mapping(tuple(leaves), copies, spare_copies, _empty(config))


def split_indexers(mapping: Mapping) -> tuple[Mapping, tuple[Leaf, ...]]:
  """The mapping without sparse attention's indexers, and their leaves."""
  is_indexers = lambda leaf: 'indexer' in leaf.path
  rest = tuple(leaf for leaf in mapping.leaves if not is_indexers(leaf))
  indexers = tuple(leaf for leaf in mapping.leaves if is_indexers(leaf))
  return dataclasses.replace(mapping, leaves=rest), indexers


def _empty(config: model_config.ModelConfig) -> dict[str, tuple[int, ...]]:
  is_deepseek = isinstance(config.attention, model_config.MlaConfig)
  if config.moe is None or config.moe.num_shared or not is_deepseek:
    return {}
  D = config.embed_dim
  shapes = {'gate': (0, D), 'up': (0, D), 'down': (D, 0)}
  return {
    f'model.layers.{layer}.mlp.shared_experts.{name}_proj.weight': shape
    for layer in range(
      config.num_dense_layers, config.num_layers + config.mtp_depth
    )
    for name, shape in shapes.items()
  }


def _mtp(
  config: model_config.ModelConfig, k: int
) -> tuple[list[Leaf], dict[str, str]]:
  """An MTP module stands behind the last layer, with copies of the ends."""
  layer = config.num_layers + k - 1
  at, D = f'model.layers.{layer}', config.embed_dim
  path = ('params', f'mtp_{k}')
  # Columns of eh_proj: first the embedding's, then the hidden state's, as ours.
  leaves = [
    _single((*path, 'project'), _linear(f'{at}.eh_proj', (D,), (2 * D,))),
    _single((*path, 'embed_norm', 'scale'), _vector(f'{at}.enorm.weight', D)),
    _single((*path, 'hidden_norm', 'scale'), _vector(f'{at}.hnorm.weight', D)),
    _single(
      (*path, 'final_norm', 'scale'),
      _vector(f'{at}.shared_head.norm.weight', D),
    ),
  ]
  leaves += _block(config, (f'mtp_{k}', 'block'), config.moe is not None, layer)
  embedding = 'model.embed_tokens.weight'
  head = embedding if config.tie_embeddings else 'lm_head.weight'
  copies = {
    f'{at}.embed_tokens.weight': embedding,
    f'{at}.shared_head.head.weight': head,
  }
  return leaves, copies


def _stack(config, path, is_moe, layers) -> Iterator[Leaf]:
  """One leaf for the layers of a stack, from a leaf of each."""
  blocks = [_block(config, path, is_moe, layer) for layer in layers]
  for alike in zip(*blocks, strict=True):
    yield Leaf(
      path=alike[0].path,
      stack=(len(alike), *alike[0].stack),
      sources={
        (i, *index): source
        for i, leaf in enumerate(alike)
        for index, source in leaf.sources.items()
      },
    )


def _block(config, path, is_moe, layer) -> list[Leaf]:
  at, D = f'model.layers.{layer}', config.embed_dim
  path = ('params', *path)
  leaves = [
    _single(
      (*path, 'attention_norm', 'scale'),
      _vector(f'{at}.input_layernorm.weight', D),
    ),
    _single(
      (*path, 'ffn_norm', 'scale'),
      _vector(f'{at}.post_attention_layernorm.weight', D),
    ),
  ]
  attention = (*path, 'attention')
  match config.attention:
    case model_config.MlaConfig():
      leaves += _mla(config.attention, attention, f'{at}.self_attn', D)
    case model_config.GqaConfig():
      leaves += _gqa(config.attention, attention, f'{at}.self_attn', D)
  if is_moe:
    leaves += _moe(config.moe, (*path, 'moe'), f'{at}.mlp', D)
  else:
    leaves += _swiglu((*path, 'ffn'), f'{at}.mlp', D, config.dense_dim)
  return leaves


def _mla(c, path, at, D) -> list[Leaf]:
  H, N, R, U = c.num_heads, c.nope_head_dim, c.rope_head_dim, c.v_head_dim
  A, C = c.q_lora_rank, c.kv_lora_rank
  leaf = lambda name, source: _single((*path, name), source)
  norm = lambda name, source: _single((*path, name, 'scale'), source)
  if A is None:
    leaves = [leaf('q_up', _linear(f'{at}.q_proj', (H, N + R), (D,)))]
  else:
    leaves = [
      leaf('q_down', _linear(f'{at}.q_a_proj', (A,), (D,))),
      norm('q_norm', _vector(f'{at}.q_a_layernorm.weight', A)),
      leaf('q_up', _linear(f'{at}.q_b_proj', (H, N + R), (A,))),
    ]
  # Of each head first the rows of its keys, then those of its values.
  kv_up = _linear(f'{at}.kv_b_proj', (H, N + U), (C,))
  part = lambda rows: dataclasses.replace(
    kv_up, window=(slice(0, H), rows, slice(0, C))
  )
  leaves += [
    leaf('kv_down', _linear(f'{at}.kv_a_proj_with_mqa', (C + R,), (D,))),
    norm('kv_norm', _vector(f'{at}.kv_a_layernorm.weight', C)),
    leaf('k_up', part(slice(0, N))),
    leaf('v_up', part(slice(N, N + U))),
    leaf('out', _as_there(_linear(f'{at}.o_proj', (D,), (H, U)))),
  ]
  if c.indexer is not None:
    J, dim = c.indexer.num_heads, c.indexer.head_dim
    index = lambda *name: (*path, 'indexer', *name)
    at = f'{at}.indexer'
    leaves += [
      _single(index('q_up'), _linear(f'{at}.wq_b', (J, dim), (A,))),
      _single(index('key'), _linear(f'{at}.wk', (dim,), (D,))),
      _single(index('key_norm', 'scale'), _vector(f'{at}.k_norm.weight', dim)),
      _single(index('key_norm', 'bias'), _vector(f'{at}.k_norm.bias', dim)),
      _single(index('weight'), _linear(f'{at}.weights_proj', (J,), (D,))),
    ]
  return leaves


def _gqa(c, path, at, D) -> list[Leaf]:
  Q = c.head_dim
  out = _as_there(_linear(f'{at}.o_proj', (D,), (c.num_heads, Q)))
  leaves = [_single((*path, 'out'), out)]
  for name, heads in (
    ('q', c.num_heads),
    ('k', c.num_kv_heads),
    ('v', c.num_kv_heads),
  ):
    weight = _linear(f'{at}.{name}_proj', (heads, Q), (D,))
    leaves.append(_single((*path, f'{name}_proj'), weight))
    if c.qkv_bias:
      bias = _vector(f'{at}.{name}_proj.bias', heads, Q)
      leaves.append(_single((*path, f'{name}_bias'), bias))
    if c.qk_norm and name != 'v':
      norm = _vector(f'{at}.{name}_norm.weight', Q)
      leaves.append(_single((*path, f'{name}_norm', 'scale'), norm))
  return leaves


def _moe(c, path, at, D) -> list[Leaf]:
  E, F = c.num_experts, c.expert_dim
  leaves = [_single((*path, 'router'), _linear(f'{at}.gate', (E,), (D,)))]
  if c.has_bias:
    bias = _vector(f'{at}.gate.e_score_correction_bias', E)
    leaves.append(_single(('router', *path[1:], 'bias'), bias))
  experts = [_swiglu(path, f'{at}.experts.{e}', D, F) for e in range(E)]
  leaves += [
    Leaf(
      path=alike[0].path,
      stack=(E,),
      sources={(e,): leaf.sources[()] for e, leaf in enumerate(alike)},
    )
    for alike in zip(*experts, strict=True)
  ]
  if c.num_shared:
    shared = (*path, 'shared')
    leaves += _swiglu(shared, f'{at}.shared_experts', D, c.num_shared * F)
  return leaves


def _swiglu(path, at, D, F) -> list[Leaf]:
  return [
    _single((*path, 'gate'), _linear(f'{at}.gate_proj', (F,), (D,))),
    _single((*path, 'up'), _linear(f'{at}.up_proj', (F,), (D,))),
    _single((*path, 'down'), _linear(f'{at}.down_proj', (D,), (F,))),
  ]


def _single(path: Path, source: Source) -> Leaf:
  return Leaf(path, (), {(): source})


def _linear(
  name: str, rows: tuple[int, ...], columns: tuple[int, ...]
) -> Source:
  """A weight [out, in] there, its axes split, is [in, out] here."""
  r, n = len(rows), len(rows) + len(columns)
  return Source(
    name=f'{name}.weight',
    view=(*rows, *columns),
    num_rows=r,
    window=tuple(slice(0, size) for size in (*rows, *columns)),
    axes=(*range(r, n), *range(r)),
  )


def _as_there(source: Source) -> Source:
  """Its axes in the checkpoint's order."""
  return dataclasses.replace(source, axes=tuple(range(len(source.view))))


def _vector_rows(name: str, rows: int, columns: int) -> Source:
  """A table of vectors is the same here."""
  return _as_there(_linear(name, (rows,), (columns,)))


def _vector(name: str, *sizes: int) -> Source:
  """A vector there, its axis split here."""
  return Source(
    name=name,
    view=sizes,
    num_rows=len(sizes),
    window=tuple(slice(0, size) for size in sizes),
    axes=tuple(range(len(sizes))),
  )


def at(tree: Any, path: Path) -> Any:
  """The leaf of a tree of dicts at a path."""
  for key in path:
    tree = tree[key]
  return tree


def stack_indices(stack: tuple[slice, ...]) -> Iterator[tuple[int, ...]]:
  """All indices in a box."""
  return itertools.product(*(range(s.start, s.stop) for s in stack))
