"""What an optimised HLO module moves: between devices, and to and from HBM.

Text in, numbers out; what stands inside a loop counts as often as it runs.
Source of the text: `jax.stages.Compiled.as_text()`.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
)

_HEADER = re.compile(r'^(ENTRY )?%([^\s(]+) \(.*\{$')
_INSTRUCTION = re.compile(r'^\s+(ROOT )?%(\S+) = ')
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_CALLED = re.compile(
  r'(calls|to_apply|body|branch_computations|true_computation|'
  r'false_computation)=(\{[^}]*\}|%[^\s,]+)'
)
_CONDITION = re.compile(r'condition=%([^\s,]+)')
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(r'replica_groups=\{(\{[\d,{}]*\})\}')
_IOTA = re.compile(
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_NAMED = re.compile(
  r'replica_groups=mesh\[([^\]]*)\]'
  r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}'
)
_PAIRS = re.compile(r'source_target_pairs=\{(\{[\d,{}]*\})\}')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# What goes to other slices, over the host: an exchange is one of these inside
# each slice and one of those between them.
_BETWEEN_SLICES = re.compile(
  r'_xla_megascale_target="\{([^}]*)\}.*_xla_megascale_transfer_type="(\w+)"'
)
_SPACE = re.compile(r'S\((\d+)\)')
# What moves no data of its own.
_FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast'),
  *('while', 'conditional', 'call', 'after-all', 'add-dependency'),
  *('partition-id', 'replica-id', 'iota', 'opt-barrier', 'domain'),
}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of HLO.

  Attributes:
    name: Without %.
    type: Of the result, as it is written.
    op: Its opcode.
    arguments: What stands in its parentheses.
    rest: What follows the operands.
  """

  name: str
  type: str
  op: str
  arguments: str
  rest: str

  @property
  def operands(self) -> list[str]:
    return re.findall(r'%([^\s,()]+)', self.arguments)

  @property
  def kind(self) -> str | None:
    """Which of KINDS it is; the end of an asynchronous one is none."""
    op = self.op.removesuffix('-start')
    return op if op in KINDS else None


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations by name; `entry` is the one that runs."""

  computations: dict[str, list[Instruction]]
  entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
  """One site of communication.

  Attributes:
    kind: One of KINDS.
    axes: Mesh axes along which its devices differ.
    members: One group of devices, by their place in the mesh.
    wire_bytes: What each device sends, each time.
    times: How often it runs.
    name: Of its instruction.
    type: Of its result.
    beside_products: Matrix products or kernels run while it is under way.
  """

  kind: str
  axes: tuple[str, ...]
  members: tuple[int, ...]
  wire_bytes: float
  times: int
  name: str
  type: str
  beside_products: bool = False


def parse(text: str) -> Module:
  """Reads a module.

  Raises:
    ValueError: It has no entry.
  """
  computations, entry, lines = {}, None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif line == '}':
      lines = None
    elif lines is not None:
      found = _parse_instruction(line)
      if found is not None:
        lines.append(found)
      elif lines:  # What a kernel says of itself may take several lines.
        lines[-1] = dataclasses.replace(
          lines[-1], rest=f'{lines[-1].rest}\n{line}'
        )
  if entry is None:
    raise ValueError('HLO text without an ENTRY computation')
  return Module(computations, entry)


def _parse_instruction(line: str) -> Instruction | None:
  match = _INSTRUCTION.match(line)
  if match is None:
    return None
  start = match.end()
  end = _closing(line, start) if line[start] == '(' else line.find(' ', start)
  type_ = line[start:end].strip()
  paren = line.find('(', end)
  if paren < 0:
    return None
  last = _closing(line, paren)
  op, arguments = line[end:paren].strip(), line[paren + 1 : last - 1]
  return Instruction(match[2], type_, op, arguments, line[last:])


def _closing(line: str, start: int) -> int:
  """The place after the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(line)):
    depth += (line[i] == '(') - (line[i] == ')')
    if depth == 0:
      return i + 1
  return len(line)


def array_bytes(type_: str, *, space: int | None = None) -> list[int]:
  """Bytes of each array of a type; of those of one memory space, if given."""
  out = []
  for name, dims, layout in _ARRAY.findall(type_):
    found = _SPACE.search(layout)
    if space is not None and (int(found[1]) if found else 0) != space:
      continue
    size = math.prod(int(n) for n in dims.split(',')) if dims else 1
    out.append(math.ceil(size * _bits(name) / 8))
  return out


def _bits(name: str) -> int:
  if name == 'pred':
    return 8
  digits = re.match(r'[a-z]+(\d+)', name)
  return int(digits[1]) if digits else 0


def run_counts(module: Module) -> dict[str, int]:
  """How often each computation runs, those inside fusions included."""
  counts = collections.Counter()

  def visit(name: str, times: int) -> None:
    counts[name] += times
    for instruction in module.computations.get(name, ()):
      turns = trip_count(module, instruction)
      for called in _called(instruction):
        visit(called, times * turns)

  visit(module.entry, 1)
  return dict(counts)


def _called(instruction: Instruction) -> list[str]:
  if '=%' not in instruction.rest and '={%' not in instruction.rest:
    return []
  return [
    name
    for _, names in _CALLED.findall(instruction.rest)
    for name in re.findall(r'%([^\s,}]+)', names)
  ]


def trip_count(module: Module, instruction: Instruction) -> int:
  """How often a loop turns: 1 for what is no loop.

  As the compiler says it, else the largest integer of its condition; loops
  of jax count from 0.
  """
  if instruction.op != 'while':
    return 1
  known = _TRIP_COUNT.search(instruction.rest)
  if known:
    return int(known[1])
  condition = _CONDITION.search(instruction.rest)
  return max(_integers(module, condition[1]), default=1)


def _integers(module: Module, name: str) -> Iterator[int]:
  for instruction in module.computations.get(name, ()):
    if instruction.op == 'constant' and instruction.type.startswith('s32[]'):
      yield int(instruction.arguments)
    for called in _called(instruction):
      yield from _integers(module, called)


def collectives(
  module: Module, mesh_shape: Mapping[str, int]
) -> list[Collective]:
  """Every site of communication between devices.

  Args:
    module: Compiled for all devices of a mesh, in its order.
    mesh_shape: Sizes by axis.
  """
  found = []
  counts = run_counts(module)
  beside = _beside_products(module)
  for name, instructions in module.computations.items():
    if _continues(instructions, name):
      continue  # Counted where it starts.
    types = {i.name: i.type for i in instructions}
    for instruction in instructions:
      kind, times = instruction.kind, counts.get(name, 0)
      if instruction.op == 'send' and times:
        found.extend(_sent_to_slices(instruction, types, mesh_shape, times))
      if kind is None or not times:
        continue
      groups = _groups(instruction, math.prod(mesh_shape.values()))
      members = next((g for g in groups if len(g) > 1), ())
      if not members:
        continue
      # A fused scatter is written as a sum of which a part is kept.
      if kind == 'all-reduce' and 'reduce-scatter' in name:
        kind = 'reduce-scatter of a sum'
      wire_bytes = _wire_bytes(kind, instruction, len(members))
      if kind == 'ragged-all-to-all':
        # One side has more room than what travels.
        rows = sum(array_bytes(types.get(instruction.operands[0], '')))
        most = rows * (len(members) - 1) / len(members)
        wire_bytes = min(wire_bytes, most or wire_bytes)
      found.append(
        Collective(
          kind=kind.removesuffix(' of a sum'),
          axes=_varying(groups, mesh_shape),
          members=tuple(members),
          wire_bytes=wire_bytes,
          times=times,
          name=instruction.name,
          type=instruction.type,
          beside_products=instruction.name in beside or name in beside,
        )
      )
  return found


def _sent_to_slices(
  instruction: Instruction,
  types: Mapping[str, str],
  mesh_shape: Mapping[str, int],
  times: int,
) -> Iterator[Collective]:
  """What a host sends to other slices for a device, if it does.

  Members are told as if slices were the mesh's outermost part.
  """
  match = _BETWEEN_SLICES.search(instruction.rest)
  if match is None:
    return
  n = sum(
    int(last or first) - int(first) + 1
    for first, last in re.findall(r'(\d+)(?::(\d+))?', match[1])
  )
  kind = match[2].lower().replace('_', '-')
  size = sum(array_bytes(types.get(instruction.operands[0], '')))
  others = (n - 1) / n
  shares = {
    'all-gather': n - 1,
    'all-reduce': 2 * others,
    'reduce-scatter': others,
    'all-to-all': others,
  }
  num_devices = math.prod(mesh_shape.values())
  yield Collective(
    kind=kind,
    axes=('slices',),
    members=tuple(range(0, num_devices, num_devices // n)),
    wire_bytes=size * shares.get(kind, 1.0),
    times=times,
    name=instruction.name,
    type=types.get(instruction.operands[0], ''),
  )


def _continues(instructions: Sequence[Instruction], name: str) -> bool:
  """Whether these repeat a collective that an earlier fusion has started."""
  return name.startswith('async_collective_fusion') or any(
    _target(i) == 'AsyncCollectiveDone' for i in instructions
  )


def _target(instruction: Instruction) -> str:
  found = _TARGET.search(instruction.rest)
  return found[1] if found else ''


def _beside_products(module: Module) -> set[str]:
  """Collectives with products between their start and their end.

  They are named by their instruction or the computation that they stand in.
  Instructions stand in the order in which they run.
  """
  has_product, starts, ends = {}, set(), set()

  def visit(name: str) -> bool:
    if name not in has_product:
      has_product[name] = any(
        map(is_product, module.computations.get(name, ()))
      )
    return has_product[name]

  def is_product(i: Instruction) -> bool:
    if i.op in ('convolution', 'dot') or _target(i) == 'tpu_custom_call':
      return True
    return any(map(visit, _called(i)))

  for name, instructions in module.computations.items():
    targets = {_target(i) for i in instructions}
    is_wrapped = name.startswith('async_computation')
    if 'AsyncCollectiveStart' in targets or (
      is_wrapped and any(i.kind for i in instructions)
    ):
      starts.add(name)
    if 'AsyncCollectiveDone' in targets:
      ends.add(name)

  def is_end(i: Instruction) -> bool:
    return i.op.endswith('-done') or any(c in ends for c in _called(i))

  found = set()
  for instructions in module.computations.values():
    for place, start in enumerate(instructions):
      started = [c for c in _called(start) if c in starts]
      if start.kind is not None and start.op.endswith('-start'):
        started = [start.name]
      if started and _runs_beside(instructions, place, is_end, is_product):
        found.update(started)
  return found


def _runs_beside(
  instructions: Sequence[Instruction],
  place: int,
  is_end: Callable[[Instruction], bool],
  is_product: Callable[[Instruction], bool],
) -> bool:
  """Whether a product stands between a start and its end."""
  following, seen = {instructions[place].name}, False
  for later in instructions[place + 1 :]:
    if not following.isdisjoint(later.operands):
      if is_end(later):
        return seen
      following.add(later.name)
    seen = seen or is_product(later)
  return False


def _groups(instruction: Instruction, num_devices: int) -> list[list[int]]:
  """Devices that exchange with each other; pairs for a permutation."""
  rest = instruction.rest
  iota = _IOTA.search(rest)
  if iota:
    shape, source, order = (
      [int(n) for n in part.split(',')] if part else None
      for part in iota.groups()
    )
    ids = np.arange(math.prod(source)).reshape(source)
    ids = ids.transpose(order) if order else ids
    return ids.reshape(shape).tolist()
  named = _NAMED.search(rest)
  if named:
    return _named_groups(*named.groups())
  written = _GROUPS.search(rest) or _PAIRS.search(rest)
  if written is None:
    return [list(range(num_devices))]
  groups = [
    [int(n) for n in group.split(',')]
    for group in re.findall(r'\{([\d,]+)\}', written[1])
  ]
  if instruction.kind == 'collective-permute':
    groups = [g for g in groups if g[0] != g[1]]
  return groups


def _named_groups(
  axes: str, source: str | None, order: str | None, along: str
) -> list[list[int]]:
  """Groups along some axes of a mesh that the compiler has named."""
  sizes = {n: int(s) for n, s in re.findall(r"'([^']+)'=(\d+)", axes)}
  ids = np.arange(math.prod(sizes.values()))
  if source:
    ids = ids.reshape([int(n) for n in source.split(',')])
  if order:
    ids = ids.transpose([int(n) for n in order.split(',')])
  ids = ids.reshape(tuple(sizes.values()))
  last = [list(sizes).index(n) for n in re.findall(r"'([^']+)'", along)]
  first = [i for i in range(len(sizes)) if i not in last]
  size = math.prod(ids.shape[i] for i in last)
  return ids.transpose(first + last).reshape(-1, size).tolist()


def _varying(
  groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]
) -> tuple[str, ...]:
  sizes = tuple(mesh_shape.values())
  differs = np.zeros(len(sizes), bool)
  for group in groups:
    place = np.stack(np.unravel_index(np.asarray(group), sizes))
    differs |= (place != place[:, :1]).any(1)
  return tuple(a for a, d in zip(mesh_shape, differs) if d)


def _wire_bytes(kind: str, instruction: Instruction, n: int) -> float:
  """What a device sends if rings go round once (a sum: twice)."""
  sizes = array_bytes(instruction.type)
  if instruction.op.endswith('-start') and kind != 'all-reduce':
    # (operands, results, …) of which two are flags.
    data = [s for s in sizes if s > 4] or sizes
    sizes = data[len(data) // 2 :]
  size, others = sum(sizes), (n - 1) / n
  match kind:
    case 'all-reduce':
      return 2 * others * size
    case 'reduce-scatter':
      return (n - 1) * size
    case 'collective-permute':
      return size
  # All-gather: the rest of the result; the exchanges keep 1 / n at home.
  return others * size


def traffic_bytes(module: Module) -> float:
  """Bytes read from and written to HBM, if each instruction does so once.

  Of what is sliced or gathered only the slices count. Loops count by their
  turns; what the compiler keeps in VMEM does not.
  """
  fused = {
    called
    for instructions in module.computations.values()
    for i in instructions
    if i.op not in ('while', 'conditional', 'call')
    for called in _called(i)
  }
  total = 0
  for name, times in run_counts(module).items():
    instructions = module.computations.get(name, ())
    if name in fused or not instructions:
      continue
    types = {i.name: i.type for i in instructions}
    total += times * sum(_touched(module, i, types) for i in instructions)
  return total


def _touched(
  module: Module, instruction: Instruction, types: Mapping[str, str]
) -> int:
  op = instruction.op
  if op in _FREE or op.endswith('-done'):
    return 0
  in_hbm = lambda type_: sum(array_bytes(type_, space=0))
  out = in_hbm(instruction.type)
  read = [in_hbm(types.get(name, '')) for name in instruction.operands]
  match op:
    case 'dynamic-slice' | 'gather' | 'slice':
      return 2 * out if read[0] else out
    case 'dynamic-update-slice':
      return 2 * read[1]
    case 'fusion':
      called = _called(instruction)[0]
      part, written = _fused_use(module, called)
      read = [min(r, part.get(i, r)) for i, r in enumerate(read)]
      return sum(read) + min(out, written)
  if op.endswith('-start'):  # Operands stand in the result.
    return out
  return out + sum(read)


def _fused_use(module: Module, name: str) -> tuple[dict[int, float], float]:
  """What a fusion reads of operands that it slices, and what it writes.

  A fusion inside it may be what slices.
  """
  instructions = module.computations.get(name, [])
  number = {
    i.name: int(i.arguments) for i in instructions if i.op == 'parameter'
  }
  types = {i.name: i.type for i in instructions}
  used, written = {}, math.inf
  for i in instructions:
    inner = _fused_use(module, _called(i)[0])[0] if i.op == 'fusion' else {}
    for place, operand in enumerate(i.operands):
      if operand not in number:
        continue
      size = inner.get(place, math.inf)
      if i.op in ('dynamic-slice', 'gather', 'slice') and place == 0:
        size = sum(array_bytes(i.type))
      elif i.op == 'dynamic-update-slice' and place == 0:
        size = 0
      used[number[operand]] = used.get(number[operand], 0) + size
    if i.op == 'dynamic-update-slice':
      update = sum(array_bytes(types.get(i.operands[1], '')))
      written = update if written == math.inf else written + update
  return used, written
