"""The house stands: imports run downhill, and each thing is in its place."""

import ast
import pathlib
import sys
from collections.abc import Iterator

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ('configs', 'experiments', 'pallas_kernels', 'r1jax')

# The floors of design.md from the ground up; each imports from those below.
_FLOORS = (
  ('pallas_kernels',),
  ('r1jax.types', 'r1jax.config'),
  ('r1jax.losses', 'r1jax.rl', 'r1jax.data'),
  ('r1jax.fp8',),
  ('r1jax.parallel',),
  ('r1jax.model',),
  ('r1jax.train', 'r1jax.sampling', 'r1jax.evaluate', 'r1jax.interop'),
  ('r1jax.recipe',),
  ('experiments',),
)
_FLOOR_OF = {unit: i for i, units in enumerate(_FLOORS) for unit in units}
_SIBLINGS = {('r1jax.evaluate', 'r1jax.sampling'), ('r1jax.rl', 'r1jax.losses')}

# What knows nothing of a model, a mesh or flax, and what it may not name.
_PURE = ('r1jax.losses', 'r1jax.rl', 'r1jax.data')
_MESH_NAMES = (
  'flax',
  'jax.sharding',
  'jax.shard_map',
  'jax.make_mesh',
  'jax.set_mesh',
  'jax.NamedSharding',
  'jax.experimental.mesh_utils',
  'jax.experimental.shard_map',
)
_SPEC_NAMES = ('jax.sharding.PartitionSpec', 'jax.PartitionSpec', 'jax.P')
_VAGUE = ('utils', 'helpers', 'misc')


def _unit(name: str) -> str | None:
  """Returns the unit of the house that a dotted name belongs to, if any."""
  parts = name.split('.')
  if parts[0] not in _PACKAGES:
    return None
  return '.'.join(parts[:2]) if parts[0] == 'r1jax' else parts[0]


def _is_in(name: str, packages: tuple[str, ...]) -> bool:
  return any(name == p or name.startswith(f'{p}.') for p in packages)


def _imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str, str]]:
  """Yields (statement, dotted name, the local name it is bound to)."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        first = alias.name.split('.')[0]
        yield node, alias.name, alias.asname or first
    elif isinstance(node, ast.ImportFrom) and not node.level:
      for alias in node.names:
        bound = alias.asname or alias.name
        yield node, f'{node.module}.{alias.name}', bound


def _uses(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
  """Yields (node, full dotted name) of each import and attribute chain."""
  meaning = {}
  for node, name, bound in _imports(tree):
    yield node, name
    # `import a.b` binds a; `import a.b as c` and `from a import b` the whole.
    whole = isinstance(node, ast.ImportFrom) or bound != name.split('.')[0]
    meaning[bound] = name if whole else bound
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      chain, root = [node.attr], node.value
      while isinstance(root, ast.Attribute):
        chain.append(root.attr)
        root = root.value
      if isinstance(root, ast.Name) and root.id in meaning:
        yield node, '.'.join([meaning[root.id], *reversed(chain)])


def _import_error(unit: str, name: str) -> str | None:
  """Returns what is wrong with `unit` importing `name`, None if nothing."""
  top = name.split('.')[0]
  if unit == 'pallas_kernels':
    # numpy, which jax stands on, for plans and shapes on the host.
    known = 'jax', 'numpy', unit
    if top not in known and top not in sys.stdlib_module_names:
      return 'pallas_kernels imports jax only'
    return None
  if unit == 'configs':
    if top not in ('configs', 'ml_collections'):
      return 'configs import ml_collections and configs only'
    return None
  target = _unit(name)
  if target in (None, unit) or (unit, target) in _SIBLINGS:
    return None
  if target == 'configs' and unit == 'experiments':
    return None
  if target not in _FLOOR_OF:
    return f'{target} is no floor of the house below {unit}'
  if _FLOOR_OF.get(unit, -1) <= _FLOOR_OF[target]:
    return f'{unit} is not above {target}'
  return None


def violations(path: str, source: str) -> list[str]:
  """Lists where a file breaks the rules, as 'path:line: rule'.

  Args:
    path: Relative to the repository, with slashes; need not exist.
    source: Its text.
  """
  module = path.removesuffix('.py').replace('/', '.')
  unit = _unit(module.removesuffix('.__init__'))
  tree = ast.parse(source)
  found = set()

  def report(node: ast.AST, rule: str) -> None:
    found.add((node.lineno, rule))

  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.level:
      report(node, 'imports are absolute')
  for node, name, _ in _imports(tree):
    error = _import_error(unit, name)
    if error:
      report(node, error)
  for node, name in _uses(tree):
    if _is_in(unit, _PURE) and _is_in(name, _MESH_NAMES):
      report(node, f'{unit} knows neither flax nor a mesh')
    if _is_in(name, _SPEC_NAMES) and not _is_in(unit, ('r1jax.parallel',)):
      report(node, 'PartitionSpec is written in r1jax/parallel only')
    if name == 'importlib.import_module':
      report(node, 'nothing is imported by name')
    if name == 'flax.linen.scan' and module != 'r1jax.model.transformer':
      report(node, 'nn.scan appears in r1jax/model/transformer.py only')
  for part in module.split('.'):
    if part in _VAGUE:
      found.add((1, f'{part} says nothing; name what it holds'))
  return [f'{path}:{line}: {rule}' for line, rule in sorted(found)]


def test_the_house_stands():
  files = [p for name in _PACKAGES for p in (_ROOT / name).rglob('*.py')]
  assert len(files) > 10
  found = []
  for file in files:
    path = file.relative_to(_ROOT).as_posix()
    found += violations(path, file.read_text(encoding='utf-8'))
  assert not found, '\n'.join(['', *found])


_OFFENDING = [
  ('r1jax/config.py', 'from r1jax import types', 'not above r1jax.types'),
  ('r1jax/types.py', 'import r1jax.data.tokenizer', 'not above r1jax.data'),
  ('r1jax/data/loader.py', 'from r1jax.rl import grpo', 'not above'),
  ('r1jax/losses/token.py', 'from r1jax.rl import grpo', 'not above'),
  ('r1jax/rl/grpo.py', 'from r1jax.model import mla', 'not above'),
  ('r1jax/fp8.py', 'from r1jax.parallel import mesh', 'not above'),
  ('r1jax/model/mla.py', 'from r1jax import data, train', 'r1jax.train'),
  ('r1jax/sampling/a.py', 'from r1jax.evaluate import b', 'not above'),
  ('r1jax/train/loop.py', 'from r1jax.sampling import b', 'not above'),
  ('r1jax/train/loop.py', 'def f():\n  import r1jax.recipe.r1', 'not above'),
  ('r1jax/recipe/r1.py', 'from experiments import app', 'not above'),
  ('r1jax/recipe/r1.py', 'from configs import demo', 'no floor'),
  ('r1jax/recipe/r1.py', 'from r1jax.oddity import x', 'no floor'),
  ('r1jax/oddity.py', 'from r1jax import config', 'not above'),
  ('r1jax/__init__.py', 'from r1jax import config', 'not above'),
  ('r1jax/model/mla.py', 'from . import rope', 'absolute'),
  ('pallas_kernels/gmm/ops.py', 'from r1jax import types', 'jax only'),
  ('pallas_kernels/gmm/ops.py', 'import flax', 'jax only'),
  ('configs/demo.py', 'from r1jax import config', 'ml_collections'),
  ('configs/demo.py', 'import math', 'ml_collections'),
  ('r1jax/losses/token.py', 'from flax import linen as nn', 'flax'),
  ('r1jax/rl/grpo.py', 'from jax.sharding import Mesh', 'neither'),
  ('r1jax/data/a.py', 'import jax as j\nj.sharding.Mesh', 'neither'),
  ('r1jax/data/a.py', 'import jax\njax.make_mesh((1,), "x")', 'neither'),
  ('r1jax/train/a.py', 'import jax\njax.sharding.PartitionSpec()', 'parallel'),
  (
    'r1jax/train/a.py',
    'from jax import sharding as s\ns.PartitionSpec()',
    'pa',
  ),
  ('experiments/a.py', 'from jax.sharding import PartitionSpec as P', 'paral'),
  ('r1jax/model/a.py', 'from jax import P', 'parallel'),
  ('r1jax/model/a.py', 'import jax\njax.P("data")', 'parallel'),
  ('r1jax/model/mtp.py', 'from flax import linen as nn\nnn.scan(f)', 'nn.scan'),
  ('r1jax/model/mtp.py', 'import flax.linen\nflax.linen.scan(f)', 'nn.scan'),
  ('r1jax/model/mtp.py', 'import flax.linen as nn\nnn.scan(f)', 'nn.scan'),
  ('r1jax/model/utils.py', '', 'says nothing'),
  ('pallas_kernels/helpers/ops.py', '', 'says nothing'),
]


@pytest.mark.parametrize(('path', 'source', 'rule'), _OFFENDING)
def test_an_offence_is_found(path, source, rule):
  found = violations(path, source)
  assert len(found) == 1
  assert rule in found[0]


@pytest.mark.parametrize(
  ('path', 'source'),
  [
    ('r1jax/evaluate/a.py', 'from r1jax.sampling import generate'),
    ('r1jax/rl/grpo.py', 'from r1jax.losses import token'),
    ('r1jax/rl/reward/rule.py', 'from r1jax.rl import advantage'),
    ('r1jax/train/loop.py', 'from r1jax import config, types'),
    ('r1jax/model/moe.py', 'from pallas_kernels.gmm import ops'),
    ('r1jax/losses/a.py', 'import jax\nfrom jax import lax\nlax.scan(f)'),
    ('r1jax/recipe/r1.py', 'from r1jax.train import loop'),
    ('r1jax/parallel/a.py', 'from jax.sharding import PartitionSpec as P'),
    ('r1jax/model/transformer.py', 'from flax import linen\nlinen.scan(f)'),
    ('experiments/demo.py', 'from configs import demo\nimport r1jax.recipe'),
    ('pallas_kernels/gmm/ops.py', 'import math\nfrom pallas_kernels import c'),
    ('configs/demo.py', 'import ml_collections\nfrom configs.model import m'),
  ],
)
def test_what_the_house_allows(path, source):
  assert violations(path, source) == []
