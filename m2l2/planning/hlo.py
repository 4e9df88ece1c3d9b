"""The text of a compiled HLO module: its instructions, their types and attributes, and how often its loops run.

XLA's CPU compiler prints the trip counts of loops; the TPU's does not, so they are computed from the loop's condition.
"""

from collections.abc import Callable
import dataclasses
import math
import operator
import re

from m2l2.errors import UserError

MAX_TRIPS = 100_000  # limit for loops whose condition is evaluated
SCOPE_DEPTH = 3      # depth of the named scopes that are distinguished: 'student/denoiser/level0_block0'
_CONTROL = ('while', 'body', 'cond', 'closed_call', 'checkpoint', 'rematted_computation')  # in the names of scopes
_TYPE = re.compile(r'\b([a-z]+\d+|pred)\[([\d,]*)\](?:\{([^}]*)\})?')
_BYTES = {'pred': 1, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation. operands: names of others; a parameter's number, a constant's value."""
  name: str
  type: str
  opcode: str
  operands: tuple
  attributes: str
  root: bool


def parse_hlo(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """-> ({computation: [Instruction]}, name of the entry). Raises ValueError: no text of an HLO module."""
  computations: dict[str, list[Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$', line)
    if header:
      current = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif current is not None and ' = ' in line:
      current.append(_parse_instruction(line.strip()))
  if entry is None:
    raise ValueError('this is not the text of an HLO module: it has no ENTRY')
  return computations, entry


def _parse_instruction(line) -> Instruction:
  name, rest = line.split(' = ', 1)
  root = name.startswith('ROOT ')
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  kind, rest = rest[:end], rest[end:].lstrip()
  start = rest.index('(')
  stop = _closing(rest, start)
  opcode, inside = rest[:start], rest[start + 1:stop]
  # A parameter's operand is its number, a constant's its value.
  operands = (inside,) if opcode in ('parameter', 'constant') else tuple(re.findall(r'%([\w.\-]+)', inside))
  return Instruction(name=name.removeprefix('ROOT ').lstrip('%'), type=kind, opcode=opcode, operands=operands,
                     attributes=rest[stop + 1:], root=root)


def _closing(text, start) -> int:
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == '(') - (text[i] == ')')
    if not depth:
      return i
  raise ValueError(f'unbalanced brackets: {text[:80]}')


def type_bytes(kind: str, *, anywhere: bool = False) -> float:
  """Bytes of an HLO type in a device's main memory, tuples summed, including the padding to tiles of its layout.

  bf16[8,64]{1,0:T(8,128)} takes 8 x 128 places: the last of its dimensions, in the layout's order, fill whole tiles.
  Arrays in on-chip memory (S(1) and others) count only with `anywhere`.
  """
  total = 0.0
  for dtype, shape, layout in _TYPE.findall(kind):
    if 'S(' in layout and not anywhere:
      continue
    sizes = [int(n) for n in shape.split(',') if n]
    order, _, rest = layout.partition(':')
    tile = re.match(r'T\(([\d,]+)\)', rest)
    if tile and order:
      minor_first = [int(n) for n in order.split(',')]
      for axis, width in zip(minor_first, reversed([int(n) for n in tile[1].split(',')])):
        sizes[axis] = -(-sizes[axis] // width) * width
    total += _BYTES.get(dtype, 0) * math.prod(sizes)
  return total


def arrays_of(kind: str) -> list:
  """The arrays of a (nested) tuple type, in order."""
  return [match[0] for match in _TYPE.finditer(kind)]


def shape_of(kind: str) -> list:
  """Sizes of the first array of a type."""
  match = _TYPE.search(kind)
  return [int(n) for n in match[2].split(',') if n] if match else []


def attribute(instruction: Instruction, name: str) -> str:
  """The value of `name=`, including braces; empty without one."""
  match = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', instruction.attributes)
  return match[1] if match else ''


def callee(instruction: Instruction, name: str) -> str:
  """The computation that an attribute names."""
  return attribute(instruction, name).lstrip('%')


def parameters_of(body) -> dict:
  """{number: name} of a computation's parameters."""
  return {int(i.operands[0]): i.name for i in body if i.opcode == 'parameter'}


def find_scope(attributes: str, *, whole: bool = False) -> str:
  """The named scope of an operation: 'student/denoiser'. A gradient has the scope of its forward operation.

  whole: with the rest of the operation's name.
  """
  match = re.search(r'op_name="([^"]*)"', attributes)
  parts = []
  for part in (match[1] if match else '').split('/')[1:None if whole else -1]:
    part = '' if part.startswith('jit(') or part in _CONTROL else re.sub(r'^(?:\w+\()+|\)+$', '', part)
    if re.fullmatch(r'[a-z]\w*', part) and part not in parts:
      parts.append(part)
  return '/'.join(parts if whole else parts[:SCOPE_DEPTH]) or 'no named scope'


def count_trips(loop: Instruction, computations: dict, numbers: 'Numbers') -> tuple[int, dict]:
  """The trip count of a `while`, and {position: number} of its loop-invariant numbers.

  Either printed with the loop, or computed from its condition on whole numbers with known initial values that the body
  increments or decrements.

  Args:
    numbers: of the computation that contains the loop.

  Raises:
    UserError: neither is possible.
  """
  condition, body = callee(loop, 'condition'), callee(loop, 'body')
  printed = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if printed:
    return int(printed[1]), {}
  state = fixed = numbers.elements(loop.operands[0])
  for trips in range(MAX_TRIPS):
    goes_on = Numbers(computations, condition, [state]).root()
    if goes_on is None:
      break
    if not goes_on:
      return trips, fixed
    before, state = state, Numbers(computations, body, [state]).elements()
    if state == before:
      break
    fixed = {place: number for place, number in fixed.items() if state.get(place) == number}
  raise UserError(f'%{loop.name}, a loop of the compiled program ({find_scope(loop.attributes, whole=True)}): its text '
                  f'has no known_trip_count, and its condition %{condition} does not tell how often it runs either, so '
                  'nothing can be counted; a scan of fixed length tells')


class Numbers:
  """The whole numbers and booleans of a computation that are constant in its text; None for all others.

  given: its parameters: a number, {position: number} of a tuple, or None.
  """
  _SAME = ('copy', 'bitcast', 'convert', 'reshape', 'opt-barrier')
  _OF_TWO: dict[str, Callable] = {
      'add': operator.add, 'subtract': operator.sub, 'multiply': operator.mul, 'minimum': min, 'maximum': max,
      'and': operator.and_, 'or': operator.or_}
  _COMPARED = {'LT': operator.lt, 'LE': operator.le, 'GT': operator.gt, 'GE': operator.ge, 'EQ': operator.eq,
               'NE': operator.ne}

  def __init__(self, computations, name, given):
    self._computations, self._given, self._found = computations, given, {}
    self._inner = {i.name: i for i in computations.get(name, ())}
    self._root = next((i.name for i in self._inner.values() if i.root), None)

  def root(self):
    return self.number(self._root)

  def number(self, name):
    if name not in self._found:
      self._found[name] = None  # in case of a cycle
      instruction = self._inner.get(name)
      if instruction is not None and re.match(r'(?:[su]\d+|pred)\[\]', instruction.type):
        self._found[name] = self._compute(instruction)
    return self._found[name]

  def _compute(self, instruction):
    opcode = instruction.opcode
    if opcode == 'constant':
      text = instruction.operands[0].strip()
      return text == 'true' if text in ('true', 'false') else int(text)
    if opcode == 'parameter':
      place = int(instruction.operands[0])
      return self._given[place] if place < len(self._given) else None
    if opcode == 'get-tuple-element':
      return self.elements(instruction.operands[0]).get(int(attribute(instruction, 'index')))
    if opcode in ('fusion', 'call'):
      return self._enter(instruction).root()
    values = [self.number(name) for name in instruction.operands]
    if None in values:
      return None
    if opcode in self._SAME:
      return values[0]
    if opcode == 'compare':
      return self._COMPARED[attribute(instruction, 'direction')](*values)
    return self._OF_TWO[opcode](*values) if opcode in self._OF_TWO else None

  def _enter(self, instruction):
    called = callee(instruction, 'calls') or callee(instruction, 'to_apply')
    return Numbers(self._computations, called, [self.number(name) for name in instruction.operands])

  def elements(self, name=None) -> dict:
    """{position: number} of a tuple, by default the root; only known numbers."""
    instruction = self._inner.get(self._root if name is None else name)
    if instruction is None:
      return {}
    if instruction.opcode == 'tuple':
      numbers = enumerate(map(self.number, instruction.operands))
      return {place: number for place, number in numbers if number is not None}
    if instruction.opcode == 'parameter':
      place = int(instruction.operands[0])
      return (self._given[place] if place < len(self._given) else None) or {}
    if instruction.opcode in self._SAME:
      return self.elements(instruction.operands[0])
    return self._enter(instruction).elements() if instruction.opcode in ('fusion', 'call') else {}
