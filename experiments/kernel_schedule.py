"""Reads the schedules that the TPU compiler dumps, and counts their cycles.

A dump holds each program of an executable as bundles, one a cycle: a kernel's
grid is a loop of them, whose trips, skipped regions and DMAs are decided by
scalar code. `run` executes that scalar code and counts how often each bundle
issues; of vector code only MXU operations and spills are counted.

What a schedule does not say is lost time: waits for DMAs, stalls of any kind
and what comes between programs. The format is libtpu's own and not stable;
read with jax 0.10.2 and libtpu 0.0.42.1.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np

from r1jax.parallel import chips


@dataclasses.dataclass(frozen=True)
class Generation:
  """What cycles are held against; peaks per second are those of chips.CHIPS.

  Units and edges of the MXU are Google's (https://docs.cloud.google.com/tpu)
  and jax's `pltpu.get_tpu_info`; rows a cycle and delay slots are read off
  schedules.

  Attributes:
    topology: One that has the chip.
    num_mxus: Of a core.
    mxu_edge: Rows and columns of the weights that an MXU holds.
    mxu_rows: bfloat16 rows that an MXU takes a cycle. One is too few for v6e
      and tpu7x: a step of 512 x 512 x 512 is scheduled in fewer cycles.
    num_cores: Of a device: what is parallel of a grid is split over them.
    num_delay_slots: Bundles that still issue behind a branch.
  """

  topology: str
  num_mxus: int
  mxu_edge: int
  mxu_rows: int
  num_cores: int
  num_delay_slots: int


GENERATIONS = {
  'v5e': Generation('v5e:2x2', 4, 128, 1, 1, 4),
  'v5p': Generation('v5p:2x2x1', 4, 128, 1, 2, 4),
  'v6e': Generation('v6e:2x2', 2, 256, 2, 1, 4),
  'tpu7x': Generation('tpu7x:2x2x1', 2, 256, 2, 1, 6),
}
_GRANULE = 32  # Bytes in which a DMA counts.
_LANES, _SUBLANES = 128, 8


def clock(name: str) -> float:
  """Cycles per second: as many as a device's peak needs of its MXUs."""
  kind = GENERATIONS[name]
  rows = kind.num_cores * kind.num_mxus * kind.mxu_rows
  device = chips.CHIPS[name].per_device()
  return device.bf16_flops / (2 * rows * kind.mxu_edge**2)


def mxu_cycles(name: str, flops: float, dtype: str) -> float:
  """The least that so much work takes all MXUs of a device."""
  device = chips.CHIPS[name].per_device()
  is_fp8 = dtype.startswith('float8')
  peak = device.fp8_flops if is_fp8 else device.bf16_flops
  return flops / peak * clock(name)


def hbm_cycles(name: str, num_bytes: float) -> float:
  """The least that so many bytes take between a device and its HBM."""
  device = chips.CHIPS[name].per_device()
  return num_bytes / device.hbm_bytes_per_second * clock(name)


# An address: the sum of registers, names of allocations and numbers.
Operand = str | int | tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Op:
  """A scalar operation.

  Attributes:
    name: With its variants: 'scmp.lt.s32.totalorder'.
    result: '%s12_s3', value and register; None if there is none.
    guard: The predicate under which it happens; None for always.
    is_negated: Whether it happens where the predicate does not hold.
    operands: '%s12_s3', '#allocation3', a number, or a sum of them.
    target: Of a branch, the number of a bundle.
    index: Of a parameter, its place.
    place: The number of its bundle.
  """

  name: str
  result: str | None
  guard: str | None
  is_negated: bool
  operands: tuple[Operand, ...]
  target: int | None
  index: int | None
  place: int


@dataclasses.dataclass(frozen=True)
class Bundle:
  """What issues in one cycle.

  Attributes:
    ops: Its scalar operations, phis first.
    matmuls: Names of its operations that push rows through an MXU.
    num_spills: Vector registers that it spills or fills.
  """

  ops: tuple[Op, ...]
  matmuls: tuple[str, ...]
  num_spills: int


@dataclasses.dataclass(frozen=True)
class Program:
  """A kernel, or what XLA made.

  Attributes:
    bundles: In the order of their numbers.
    vmem_bytes: That it allocates, without spilled registers.
    core_index: The allocation that holds the number of the core, if it asks.
  """

  bundles: tuple[Bundle, ...]
  vmem_bytes: int = 0
  core_index: str | None = None

  @property
  def is_split(self) -> bool:
    """Whether each core does a part: it asks which it is on."""
    return any(
      op.name == 'sld' and op.operands == ((self.core_index,),)
      for bundle in self.bundles
      for op in bundle.ops
    )


_HEAD = re.compile(r'^ *(?:0|0x[0-9a-f]+) +(?:[A-Z]{2})?: [> ]*\{', re.M)
_COMMENT = re.compile(r'/\*.*?\*/', re.S)
_OP = re.compile(r'(?:(%[\w.]+) = )?([a-z][\w.]*)(.*)', re.S)
_GUARD = re.compile(r'\((!?)(%p\w+)(?:, [^()]*)?\)')
_NOTE = re.compile(r'\[\w+:\$\w+\]')  # [thread:$0]
_ADDRESS = r'\[((?:[^\[\]]|\[[^\]]*\])*)\]'
_NUMBER = r'-?\b(?:0x[0-9a-f]+|\d+)\b'
_OPERAND = re.compile(rf'{_ADDRESS}|(%\w+|{_NUMBER})')
_TERM = re.compile(rf'%\w+|#\w+|{_NUMBER}')
_SPILL = re.compile(r'\bv(?:ld|st) \[vmem:\[#\w+_spill')
_VMEM = re.compile(r'^ *#\w+ \[.*space=vmem, size = (0x[0-9a-f]+)', re.M)
_CORE_INDEX = re.compile(r'^ *(#\w+) \[.*core index', re.M)


def parse(schedule: str, allocations: str) -> Program:
  """Reads a program from two files of a dump.

  Args:
    schedule: Of `*-packed-bundles-post-ra.txt`. Later files lack the empty
      bundles in which results are awaited.
    allocations: Of `*-original.txt`.
  """
  text = _COMMENT.sub('', schedule)
  heads = list(_HEAD.finditer(text))
  ends = [head.start() for head in heads[1:]] + [len(text)]
  core_index = _CORE_INDEX.search(allocations)
  return Program(
    tuple(
      _parse_bundle(i, text[head.end() : end].rpartition('}')[0])
      for i, (head, end) in enumerate(zip(heads, ends))
    ),
    sum(int(size, 16) for size in _VMEM.findall(allocations)),
    core_index and core_index[1],
  )


def _parse_bundle(place: int, text: str) -> Bundle:
  found = [_OP.match(part.strip()) for part in text.split(' ;; ')]
  ops = [
    _parse_op(place, *m.groups()) for m in found if m and _is_scalar(m[1], m[2])
  ]
  return Bundle(
    ops=tuple(sorted(ops, key=lambda op: not op.name.endswith('phi'))),
    matmuls=tuple(m[2] for m in found if m and m[2].startswith('vmatmul')),
    num_spills=len(_SPILL.findall(text)),
  )


def _is_scalar(result: str | None, name: str) -> bool:
  if name == 'sst' or name.startswith(('dma.', 'sbr.')):
    return not name.startswith('dma.done')
  return result is not None and result.startswith(('%s', '%p'))


def _parse_op(place: int, result: str | None, name: str, rest: str) -> Op:
  rest = _NOTE.sub('', rest)
  guard = _GUARD.search(rest)
  rest = _GUARD.sub('', rest, count=1)
  numbers = {
    key: re.search(rf'{key}(?: =|:) (\d+)', rest)
    for key in ('bundleno', 'index')
  }
  target, index = (m and int(m[1]) for m in numbers.values())
  if name.startswith('inlined_call_operand'):
    # A scalar comes by value, an array by address.
    name, rest = 'by_value' if 'no memory' in rest else 'by_address', ''
  return Op(
    name,
    result,
    guard and guard[2],
    bool(guard and guard[1]),
    tuple(_parse_operand(*m.groups()) for m in _OPERAND.finditer(rest)),
    target,
    index,
    place,
  )


def _parse_operand(address: str | None, plain: str | None) -> Operand:
  if plain is not None:
    return _parse_term(plain)
  return tuple(map(_parse_term, _TERM.findall(address)))


def _parse_term(text: str) -> str | int:
  if text[0] in '%#':
    return text
  return int(text, 16 if 'x' in text else 10)


@dataclasses.dataclass(frozen=True)
class Pointer:
  """An address: a place in an allocation or parameter, in its own unit."""

  region: str
  offset: int


# What a register holds; None is unknown.
Value = int | bool | Pointer | None


def _signed(x: int) -> int:
  return (x + 2**31) % 2**32 - 2**31


def _unsigned(x: int) -> int:
  return x % 2**32


_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
  'sadd': lambda a, b: a + b,
  'ssub': lambda a, b: a - b,
  'smul': lambda a, b: a * b,
  'smulhi': lambda a, b: a * b >> 32,
  'sand': lambda a, b: a & b,
  'sor': lambda a, b: a | b,
  'sxor': lambda a, b: a ^ b,
  'smin': min,
  'smax': max,
  'sshll': lambda a, b: a << b if b < 32 else 0,
  # Ones come in from the right.
  'sshllo': lambda a, b: ((a + 1) << b) - 1 if b < 32 else -1,
  'sshrl': lambda a, b: _unsigned(a) >> b,
  'sshra': lambda a, b: a >> min(b, 31),
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
  'eq': lambda a, b: a == b,
  'ne': lambda a, b: a != b,
  'lt': lambda a, b: a < b,
  'le': lambda a, b: a <= b,
  'gt': lambda a, b: a > b,
  'ge': lambda a, b: a >= b,
}
# Of each: whether one operand decides, and if it is this one, with what.
_LOGIC: dict[str, tuple[bool | None, Callable[[bool, bool], bool]]] = {
  'pand': (False, lambda a, b: a and b),
  'pnand': (False, lambda a, b: not (a and b)),
  'por': (True, lambda a, b: a or b),
  'pnor': (True, lambda a, b: not (a or b)),
  'pxor': (None, lambda a, b: a != b),
}


def pack(array: np.typing.ArrayLike) -> list[int]:
  """An array's words as they lie in SMEM: rows padded to 128 words.

  Integers of 8 or 16 bits lie four or two rows to a word, the first lowest.
  """
  x = np.asarray(array)
  if x.dtype.itemsize > 4:
    x = x.astype(np.int32)
  if x.ndim < 2:
    return [int(value) for value in x.reshape(-1)]
  per_word, bits = 4 // x.dtype.itemsize, 8 * x.dtype.itemsize
  widths = [(0, 0)] * x.ndim
  widths[-2:] = (0, -x.shape[-2] % per_word), (0, -x.shape[-1] % _LANES)
  x = np.pad(x.astype(np.int64) % 2**bits, widths)
  x = x.reshape(-1, per_word, x.shape[-1])
  words = sum(x[:, i] << bits * i for i in range(per_word))
  return [_signed(int(word)) for word in words.reshape(-1)]


@dataclasses.dataclass(frozen=True)
class Counts:
  """What a program did on one core.

  Attributes:
    cycles: Bundles issued.
    dma_bytes: By the DMA's kind, such as 'hbm_to_vmem'.
    matmuls: MXU operations executed, by name.
    spills: Vector registers spilled and filled.
    unknown: Branches and DMAs, by their bundle, that depend on what scalar code
      does not know, and how often: regions ran, loops ran once, and a DMA of
      unknown size moved nothing.
  """

  cycles: int
  dma_bytes: dict[str, int]
  matmuls: dict[str, int]
  spills: int
  unknown: dict[int, int]


def run(
  program: Program,
  generation: str,
  scalars: Mapping[int, np.typing.ArrayLike],
  core: int = 0,
) -> Counts:
  """Executes a program's scalar code.

  Args:
    program: That is run.
    generation: Of GENERATIONS.
    scalars: Values of parameters that scalar code reads, by their place.
    core: Of a device that has several.

  Raises:
    RuntimeError: A loop does not end.
  """
  machine = _Machine(program, generation, scalars, core)
  machine.run()
  visited = [(n, b) for n, b in zip(machine.visits(), program.bundles) if n]
  matmuls = collections.Counter()
  for n, bundle in visited:
    for name in bundle.matmuls:
      matmuls[name] += n
  return Counts(
    sum(n for n, _ in visited),
    dict(machine.dma_bytes),
    dict(matmuls),
    sum(n * bundle.num_spills for n, bundle in visited),
    dict(machine.unknown),
  )


def matmul_flops(generation: str, matmuls: Mapping[str, int]) -> int:
  """FLOPs of MXU operations, each of one vector register of rows."""
  edge = GENERATIONS[generation].mxu_edge
  return sum(n * 2 * _rows(name) * edge**2 for name, n in matmuls.items())


def _rows(name: str) -> int:
  """Rows in a register: 8 of 32 bits, 16 of bfloat16, 32 of 8 bits."""
  bits = re.search(r'\.[a-z]+(\d+)', name)
  return _SUBLANES * 32 // int(bits[1])


_MOST_BLOCKS = 5_000_000


@dataclasses.dataclass(frozen=True)
class _Block:
  """Bundles that issue one after the other.

  Attributes:
    end: The bundle behind them.
    branch: The one with a branch, if there is one.
    before: Operations up to the branch.
    behind: Those in its delay slots.
  """

  end: int
  branch: int | None
  before: list[Op]
  behind: list[Op]


class _Machine:
  """The scalar unit of a core."""

  def __init__(self, program, generation, scalars, core):
    self._bundles = program.bundles
    self._num_delay_slots = GENERATIONS[generation].num_delay_slots
    self._scalars = {i: pack(x) for i, x in scalars.items()}
    branches = {
      place: op
      for place, bundle in enumerate(program.bundles)
      for op in bundle.ops
      if op.target is not None
    }
    self._branches = branches
    self._labels = {op.target for op in branches.values()}
    self._blocks: dict[int, _Block] = {}
    self._values: dict[str, Value] = {}  # By name; each has one definition,
    self._registers: dict[str, Value] = {}  # but for phis, which share one.
    self._memory: dict[str | None, dict[int, Value]] = {
      program.core_index: {0: core}
    }
    self._num_visits: collections.Counter[tuple[int, int]] = (
      collections.Counter()
    )
    self.dma_bytes: collections.Counter[str] = collections.Counter()
    self.unknown: collections.Counter[int] = collections.Counter()

  def run(self) -> None:
    """Runs to the end of the program."""
    place = 0
    for _ in range(_MOST_BLOCKS):
      if place >= len(self._bundles):
        return
      place = self._run_block(place)
    raise RuntimeError(f'no end after {_MOST_BLOCKS} branches')

  def visits(self) -> list[int]:
    """How often each bundle issued."""
    steps = [0] * (len(self._bundles) + 1)
    for (first, end), n in self._num_visits.items():
      steps[first] += n
      steps[end] -= n
    return np.cumsum(steps[:-1]).tolist()

  def _run_block(self, first: int) -> int:
    """Runs to the next branch or label, and says where it goes on."""
    if first not in self._blocks:
      self._blocks[first] = self._find_block(first)
    block = self._blocks[first]
    self._num_visits[first, block.end] += 1
    for op in block.before:
      self._execute(op)
    next_place = block.end
    if block.branch is not None and self._is_taken(block.branch):
      next_place = self._branches[block.branch].target
    for op in block.behind:
      self._execute(op)
    return next_place

  def _find_block(self, first: int) -> _Block:
    last = first
    while last + 1 < len(self._bundles) and not (
      last in self._branches or last + 1 in self._labels
    ):
      last += 1
    ops_of = lambda bundles: [
      op for b in bundles for op in b.ops if op.target is None
    ]
    before = ops_of(self._bundles[first : last + 1])
    if last not in self._branches:
      return _Block(last + 1, None, before, [])
    end = min(last + 1 + self._num_delay_slots, len(self._bundles))
    return _Block(end, last, before, ops_of(self._bundles[last + 1 : end]))

  def _is_taken(self, place: int) -> bool:
    taken = self._happens(self._branches[place])
    if taken is None:
      self.unknown[place] += 1
    return bool(taken)

  def _happens(self, op: Op) -> bool | None:
    if op.guard is None:
      return True
    value = self._values.get(op.guard)
    return None if value is None else bool(value) != op.is_negated

  def _execute(self, op: Op) -> None:
    happens = self._happens(op)
    if op.name.startswith('dma.'):
      if happens is not False:
        self._copy(op)
    elif op.name == 'sst':
      if happens is not False:
        self._store(op, known=bool(happens))
    else:
      register = op.result.rpartition('_')[2]
      if happens:
        value = self._evaluate(op, register)
      else:  # The register keeps what it holds.
        value = None if happens is None else self._registers.get(register)
      self._values[op.result] = self._registers[register] = value

  def _evaluate(self, op: Op, register: str) -> Value:
    kind, _, variant = op.name.partition('.')
    match kind:
      case 'sphi' | 'pphi':  # All its operands live in its register.
        return self._registers.get(register)
      case 'by_value':
        return (self._scalars.get(op.index) or [None])[0]
      case 'by_address':
        return Pointer(f'operand{op.index}', 0)
      case 'sld':
        return self._load(self._value(op.operands[0]))
    operands = [self._value(operand) for operand in op.operands]
    match kind, operands:
      case (('smov' | 'pmov' | 'int_to_ptr'), [value]):
        return value
      case (('sshll' | 'sshrl'), [Pointer() as pointer, _]):
        return pointer  # Another unit of the same address.
      case (('scalar_lea' | 'sadd'), [a, b]):
        return _add(a, b)
      case 'scalar_select', [choice, a, b]:
        return None if choice is None else a if choice else b
      case 'pneg', [value]:
        return None if value is None else not value
    if kind in _LOGIC and len(operands) == 2:
      return _decide(kind, *operands)
    if len(operands) != 2 or not all(isinstance(x, int) for x in operands):
      return None
    to_int = _unsigned if '.u32' in op.name else _signed
    a, b = map(to_int, operands)
    if kind == 'scmp':
      return _COMPARE[variant.partition('.')[0]](a, b)
    # What is not an integer's operation, such as smul.f32, is unknown.
    if kind not in _ARITHMETIC or variant.startswith('f'):
      return None
    return _signed(_ARITHMETIC[kind](a, b))

  def _value(self, operand: Operand) -> Value:
    if isinstance(operand, tuple):
      terms = [self._value(term) for term in operand]
      return functools.reduce(_add, terms) if terms else None
    if isinstance(operand, int):
      return _signed(operand)
    if operand.startswith('#'):
      return Pointer(operand, 0)
    return self._values.get(operand)

  def _load(self, address: Value) -> Value:
    if not isinstance(address, Pointer):
      return None
    return self._memory.get(address.region, {}).get(address.offset)

  def _store(self, op: Op, *, known: bool) -> None:
    address = self._value(op.operands[0])
    if isinstance(address, Pointer):
      value = self._value(op.operands[1]) if known else None
      self._memory.setdefault(address.region, {})[address.offset] = value

  def _copy(self, op: Op) -> None:
    """Counts a DMA, and brings a parameter into SMEM."""
    kind = op.name.removeprefix('dma.')
    source, size, target = (self._value(x) for x in op.operands[:3])
    if self._happens(op) is None or not isinstance(size, int):
      self.unknown[op.place] += 1
    self.dma_bytes[kind] += size * _GRANULE if isinstance(size, int) else 0
    if not (kind.endswith('to_smem') and isinstance(target, Pointer)):
      return
    words = None
    if isinstance(source, Pointer) and source.offset == target.offset == 0:
      words = self._scalars.get(int(source.region.removeprefix('operand')))
    # What came from elsewhere is unknown.
    self._memory[target.region] = dict(enumerate(words or ()))


def _add(a: Value, b: Value) -> Value:
  if isinstance(b, Pointer):
    a, b = b, a
  if not isinstance(b, int):
    return None
  if isinstance(a, Pointer):
    return Pointer(a.region, _signed(a.offset + b))
  return _signed(a + b) if isinstance(a, int) else None


def _decide(kind: str, a: Value, b: Value) -> bool | None:
  decisive, operation = _LOGIC[kind]
  known = [bool(x) for x in (a, b) if isinstance(x, int)]
  if decisive in known:
    return operation(decisive, decisive)
  return operation(*known) if len(known) == 2 else None
