"""Counting what a compiled program does: cycles, memory traffic, FLOPs and collectives, from the text of its HLO.

XLA's own cost analysis counts the body of a loop once, so a scan over 12 layers counts as one; here trips count. They
are printed with the loop by XLA's CPU compiler; the TPU's prints none, and they are read from the loop's condition.
"""

import collections
import dataclasses
import functools
import math
import operator
import re

from m2l2.errors import UserError

MAX_TRIPS = 100_000  # of a loop whose condition has to be run
SCOPE_DEPTH = 3      # named scopes that are told apart: 'student/denoiser/level0_block0'
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id')
_OWN_KIND = ('sort', 'gather', 'scatter', 'reduce-window', 'select-and-scatter', 'fft', 'rng-bit-generator')
_CONTROL = ('while', 'body', 'cond', 'closed_call', 'checkpoint', 'rematted_computation')  # in the names of scopes
# Calls of the TPU compiler that move nothing.
_NO_WORK = ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound')
_BYTES = {'pred': 1, 's4': .5, 'u4': .5, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4,
          'f32': 4, 's64': 8, 'u64': 8, 'f64': 8, 'c64': 8, 'c128': 16}


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  type: str
  opcode: str
  operands: tuple
  attributes: str
  root: bool


@dataclasses.dataclass
class Cost:
  """What some operations take together: how often one of them runs, cycles by the TPU compiler's own estimate (0 where
  it has none), bytes read and written, FLOPs of products and convolutions as they are executed."""
  count: float = 0.0
  cycles: float = 0.0
  accessed: float = 0.0
  flops: float = 0.0

  def add(self, other: 'Cost', times: float = 1.0):
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


def _costs():
  return dataclasses.field(default_factory=lambda: collections.defaultdict(Cost))


@dataclasses.dataclass
class Traffic:
  """Of one device and one run.

  Attributes:
    accessed: bytes read and written.
    cycles: the TPU compiler's own estimate; nothing is in it of what it has none for.
    collectives: bytes of their results, by kind.
    parts: {(named scope, kind of operation): Cost} of all operations. Pallas kernels are the kind 'kernel'; their FLOPs
      are those that they say of themselves (`cost_estimate`).
    unestimated: {kind of operation: Cost} of those without an estimate, but for kernels that tell their FLOPs.
  """
  accessed: float = 0.0
  cycles: float = 0.0
  collectives: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
  parts: dict = _costs()
  unestimated: dict = _costs()


def count_traffic(hlo_text: str) -> Traffic:
  """Walks the text of a compiled HLO module; bodies of loops count as often as they run.

  Each instruction outside of a fusion reads its operands and writes its output. A fusion that takes a slice of an
  operand, or updates a slice of its output in place, is charged for the slice.

  Raises:
    UserError: a loop whose trips the text does not tell.
    ValueError: no text of an HLO module.
  """
  computations, entry = parse_hlo(hlo_text)
  traffic = Traffic()

  def visit(name, times, given):
    types = {i.name: i.type for i in computations[name]}
    numbers = _Numbers(computations, name, given)
    for instruction in computations[name]:
      opcode = instruction.opcode
      if opcode == 'while':
        trips, fixed = count_trips(instruction, computations, numbers)
        visit(_called(instruction, 'body'), times * trips, [fixed])
      elif opcode in ('call', 'async-start'):
        visit(_called(instruction, 'to_apply') or _called(instruction, 'calls'), times, ())
      elif opcode == 'conditional':
        for branch in re.findall(r'%?([\w.\-]+)', _attribute(instruction, 'branch_computations')):
          visit(branch, times, ())
      elif opcode not in _FREE and not opcode.endswith(('-done', '-update')):
        _charge(traffic, instruction, times, types, computations)
      for kind, size in _collectives(instruction, computations):
        traffic.collectives[kind] += times * size

  visit(entry, 1, ())
  return traffic


def _charge(traffic, instruction, times, types, computations):
  cost = Cost(count=1, cycles=_cycles(instruction), accessed=_accessed(instruction, types, computations),
              flops=_flops(instruction, types, computations))
  kind = _kind(instruction, computations)
  if not cost.cycles and cost.accessed and not (kind == 'kernel' and cost.flops):
    traffic.unestimated[kind].add(cost, times)
  traffic.accessed += times * cost.accessed
  traffic.cycles += times * cost.cycles
  traffic.parts[find_scope(instruction.attributes), kind].add(cost, times)


def parse_hlo(text: str):
  """-> ({computation: [Instruction]}, name of the entry)."""
  computations, entry, current = {}, None, None
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


_TYPE = re.compile(r'\b([a-z]+\d+|pred)\[([\d,]*)\](?:\{([^}]*)\})?')


def type_bytes(kind: str, *, anywhere: bool = False) -> float:
  """Bytes in a device's main memory of an HLO type, tuples summed, with the padding to tiles that its layout tells.

  bf16[8,64]{1,0:T(8,128)} takes 8 x 128 places: the last of its dimensions, in the layout's order, fill whole tiles.
  What lies in on-chip memory (S(1) and the like) counts only with `anywhere`.
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


def _elements(kind: str) -> list:
  """The arrays of a (nested) tuple type, in order."""
  return [found[0] for found in _TYPE.finditer(kind)]


def _attribute(instruction, name) -> str:
  found = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', instruction.attributes)
  return found[1] if found else ''


def _called(instruction, name) -> str:
  return _attribute(instruction, name).lstrip('%')


def count_trips(loop: Instruction, computations: dict, numbers: '_Numbers') -> tuple[int, dict]:
  """How often a `while` runs, and {place: number} of what it carries along unchanged.

  Printed with the loop, or found by running what its condition reads: whole numbers that are told where it begins, and
  that its body counts up or down.

  Args:
    numbers: of the computation that the loop stands in.

  Raises:
    UserError: neither tells.
  """
  condition, body = _called(loop, 'condition'), _called(loop, 'body')
  printed = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if printed:
    return int(printed[1]), {}
  state = fixed = numbers.elements(loop.operands[0])
  for trips in range(MAX_TRIPS):
    goes_on = _Numbers(computations, condition, [state]).root()
    if goes_on is None:
      break
    if not goes_on:
      return trips, fixed
    before, state = state, _Numbers(computations, body, [state]).elements()
    if state == before:
      break
    fixed = {place: number for place, number in fixed.items() if state.get(place) == number}
  raise UserError(f'%{loop.name}, a loop of the compiled program ({find_scope(loop.attributes, whole=True)}): its text '
                  f'has no known_trip_count, and its condition %{condition} does not tell how often it runs either, so '
                  'nothing can be counted; a scan of fixed length tells')


class _Numbers:
  """The whole numbers and truth values of a computation that its text tells; None for all others.

  given: what its parameters are: a number, {place: number} of a tuple, or None.
  """
  _SAME = ('copy', 'bitcast', 'convert', 'reshape', 'opt-barrier')
  _OF_TWO = {'add': operator.add, 'subtract': operator.sub, 'multiply': operator.mul, 'minimum': min, 'maximum': max,
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
      self._found[name] = None  # should it ever lead back to itself
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
      return self.elements(instruction.operands[0]).get(int(_attribute(instruction, 'index')))
    if opcode in ('fusion', 'call'):
      return self._enter(instruction).root()
    values = [self.number(name) for name in instruction.operands]
    if None in values:
      return None
    if opcode in self._SAME:
      return values[0]
    if opcode == 'compare':
      return self._COMPARED[_attribute(instruction, 'direction')](*values)
    return self._OF_TWO[opcode](*values) if opcode in self._OF_TWO else None

  def _enter(self, instruction):
    called = _called(instruction, 'calls') or _called(instruction, 'to_apply')
    return _Numbers(self._computations, called, [self.number(name) for name in instruction.operands])

  def elements(self, name=None) -> dict:
    """{place: number} of a tuple, the root if no name is given; only of the numbers that are told."""
    instruction = self._inner.get(self._root if name is None else name)
    if instruction is None:
      return {}
    if instruction.opcode == 'tuple':
      found = enumerate(map(self.number, instruction.operands))
      return {place: number for place, number in found if number is not None}
    if instruction.opcode == 'parameter':
      place = int(instruction.operands[0])
      return (self._given[place] if place < len(self._given) else None) or {}
    if instruction.opcode in self._SAME:
      return self.elements(instruction.operands[0])
    return self._enter(instruction).elements() if instruction.opcode in ('fusion', 'call') else {}


def _cycles(instruction) -> int:
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  return int(found[1]) if found else 0


def _kind(instruction, computations) -> str:
  """'convolution', 'product', 'kernel', 'collective', 'copy', one of _OWN_KIND, or 'element-wise' (reductions too)."""
  if instruction.opcode == 'custom-call':
    target = _attribute(instruction, 'custom_call_target').strip('"')
    return 'kernel' if target == 'tpu_custom_call' else f'custom-call {target}'
  within = [instruction, *_within(instruction, computations)]
  multiplying = [i for i in within if i.opcode in ('convolution', 'dot')]
  if multiplying:
    # The TPU's compiler writes products as convolutions; where they come from tells.
    names = [i.attributes for i in multiplying] + [instruction.attributes]
    return 'convolution' if any('/conv_general_dilated"' in name for name in names) else 'product'
  if any(i.opcode.removesuffix('-start') in COLLECTIVES for i in within):
    return 'collective'
  if instruction.opcode.removesuffix('-start') in ('copy', 'slice', 'dynamic-slice', 'dynamic-update-slice'):
    return 'copy'
  return instruction.opcode if instruction.opcode in _OWN_KIND else 'element-wise'


def _within(instruction, computations) -> list:
  """The instructions inside a fusion, and inside those in it."""
  if instruction.opcode != 'fusion':
    return []
  body = computations.get(_called(instruction, 'calls'), [])
  return [found for inner in body for found in (inner, *_within(inner, computations))]


def _flops(instruction, types, computations) -> float:
  if instruction.opcode == 'fusion':
    body = computations.get(_called(instruction, 'calls'), [])
    types = {i.name: i.type for i in body}
    return sum(_flops(inner, types, computations) for inner in body)
  if instruction.opcode == 'dot':
    left = _shape(types.get(instruction.operands[0], ''))
    contracted = re.findall(r'\d+', _attribute(instruction, 'lhs_contracting_dims'))
    return 2.0 * math.prod(_shape(instruction.type)) * math.prod(left[int(axis)] for axis in contracted)
  if instruction.opcode == 'custom-call':  # what a kernel says of itself, if it does
    told = re.search(r'"flops":"?(\d+)', instruction.attributes)
    return float(told[1]) if told else 0.0
  return _convolution_flops(instruction, types) if instruction.opcode == 'convolution' else 0.0


def _convolution_flops(instruction, types) -> float:
  """Only taps that meet an element count: not padding, and not the zeros between those of a dilated map. (The TPU's
  compiler writes the batch of a product as a dimension that is dilated so that each place has one tap.)"""
  labels = re.match(r'(\w+)_(\w+)->(\w+)', _attribute(instruction, 'dim_labels'))
  left, right = (_shape(types.get(name, '')) for name in instruction.operands[:2])
  out = _shape(instruction.type)
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', _attribute(instruction, 'window')))

  def of_window(name, default):
    return [int(n) for n in window[name].split('x')] if name in window else [default] * len(out)

  strides, dilated, spread = of_window('stride', 1), of_window('lhs_dilate', 1), of_window('rhs_dilate', 1)
  before = [int(pair.split('_')[0]) for pair in window.get('pad', 'x'.join(['0_0'] * len(out))).split('x')]
  taps = 1
  for n in range(len(out) - 2):
    sizes = (shape[names.index(str(n))] for shape, names in zip((left, right, out), labels.groups()))
    taps *= _taps(*sizes, before[n], strides[n], dilated[n], spread[n])
  features = out[labels[3].index('b')] * out[labels[3].index('f')] * right[labels[2].index('i')]
  return 2.0 * taps * features


@functools.lru_cache(maxsize=4096)
def _taps(size, window, places, before, stride, dilated, spread) -> int:
  """Along one dimension, over all places of the output: the taps that meet an element of the input."""
  starts = (place * stride - before for place in range(places))
  reached = (start + tap * spread for start in starts for tap in range(window))
  return sum(0 <= place <= (size - 1) * dilated and place % dilated == 0 for place in reached)


def _shape(kind: str) -> list:
  """Sizes of the first array of a type."""
  found = _TYPE.search(kind)
  return [int(n) for n in found[2].split(',') if n] if found else []


def find_scope(attributes: str, *, whole: bool = False) -> str:
  """'student/denoiser' of an operation traced in nested named scopes; a gradient's is that of what it is of.

  whole: with the rest of its name, which tells more than a table has room for.
  """
  found = re.search(r'op_name="([^"]*)"', attributes)
  parts = []
  for part in (found[1] if found else '').split('/')[1:None if whole else -1]:
    part = '' if part.startswith('jit(') or part in _CONTROL else re.sub(r'^(?:\w+\()+|\)+$', '', part)
    if re.fullmatch(r'[a-z]\w*', part) and part not in parts:
      parts.append(part)
  return '/'.join(parts if whole else parts[:SCOPE_DEPTH]) or 'no named scope'


def _accessed(instruction, types, computations) -> float:
  opcode, outer = instruction.opcode, [types.get(name, '') for name in instruction.operands]
  if opcode == 'custom-call' and _attribute(instruction, 'custom_call_target').strip('"') in _NO_WORK:
    return 0.0
  if opcode == 'slice-start':  # -> ((source), destination, context)
    source, destination = _elements(instruction.type)[0], _elements(instruction.type)[-2]
    return (type_bytes(destination, anywhere=True) if type_bytes(source) else 0.0) + type_bytes(destination)
  if opcode == 'copy-start':   # -> (destination, source, context)
    return type_bytes(instruction.type)
  if opcode == 'dynamic-slice':
    return (type_bytes(instruction.type, anywhere=True) if type_bytes(outer[0]) else 0.0) + type_bytes(instruction.type)
  if opcode == 'dynamic-update-slice':
    return type_bytes(outer[1]) + (type_bytes(outer[1], anywhere=True) if type_bytes(instruction.type) else 0.0)
  if opcode != 'fusion':
    return type_bytes(instruction.type) + sum(map(type_bytes, outer))

  body = computations.get(_called(instruction, 'calls'), [])
  inner = {i.name: i for i in body}
  root = next((i for i in body if i.root), None)
  parts = [inner[name] for name in root.operands] if root is not None and root.opcode == 'tuple' else [root]
  written, updated = 0.0, set()
  for part, kind in zip(parts, _elements(instruction.type)):
    update, buffer = _update_in_place(part, inner, computations)
    if buffer:  # only what is new is written; where it comes from is read as other operands are
      written += type_bytes(update, anywhere=True) if type_bytes(kind) else 0.0
      updated.add(buffer)
    else:
      written += type_bytes(kind)
  parameters = _parameters(body)
  read = 0.0
  for position, kind in enumerate(outer):
    parameter = parameters.get(position, '')
    if type_bytes(kind) and parameter not in updated:
      read += _sliced(parameter, body, computations) or type_bytes(kind)
  return read + written


def _parameters(body) -> dict:
  """{number: name} of a computation's parameters."""
  return {int(i.operands[0]): i.name for i in body if i.opcode == 'parameter'}


def _sliced(name, body, computations) -> float:
  """Bytes that a fusion's body reads of `name` if it takes nothing but slices of it, in nested fusions too; else 0."""
  total = 0.0
  for user in body:
    if name not in user.operands:
      continue
    if user.opcode == 'dynamic-slice':
      size = type_bytes(user.type, anywhere=True)
    elif user.opcode == 'bitcast':
      size = _sliced(user.name, body, computations)
    elif user.opcode == 'fusion':
      within = computations.get(_called(user, 'calls'), [])
      size = _sliced(_parameters(within).get(user.operands.index(name), ''), within, computations)
    else:
      return 0.0
    if not size:
      return 0.0
    total += size
  return total


def _update_in_place(part, inner, computations) -> tuple[str, str]:
  """-> (type of what is new, name of the parameter that it goes into) of a dynamic-update-slice; ('', '') of others."""
  source = _through_bitcasts(part, inner)
  if source is None:
    return '', ''
  if source.opcode == 'dynamic-update-slice':
    update, buffer = inner.get(source.operands[1]), source.operands[0]
    kind = update.type if update else ''
  elif source.opcode == 'fusion':
    body = computations.get(_called(source, 'calls'), [])
    root = next((i for i in body if i.root), None)
    kind, place = _update_in_place(root, {i.name: i for i in body}, computations)
    buffer = next((source.operands[n] for n, name in _parameters(body).items() if name == place), '')
  else:
    return '', ''
  found = _through_bitcasts(inner.get(buffer), inner)
  return (kind, found.name) if found is not None and found.opcode == 'parameter' else ('', '')


def _through_bitcasts(instruction, inner):
  while instruction is not None and instruction.opcode in ('bitcast', 'convert', 'copy') and instruction.operands:
    instruction = inner.get(instruction.operands[0])
  return instruction


def _collectives(instruction, computations):
  """(kind, bytes of the output) of an instruction that is a collective, or of those inside a fusion."""
  kind = instruction.opcode.removesuffix('-start')
  if kind in COLLECTIVES:
    output = instruction.type
    if instruction.opcode.endswith('-start') and output.startswith('('):  # (operands, outputs, ...): the larger half
      sizes = [type_bytes(part, anywhere=True) for part in _elements(output)]
      return [(kind, max(sizes, default=0.0))]
    return [(kind, type_bytes(output, anywhere=True))]
  if instruction.opcode == 'fusion':
    body = computations.get(_called(instruction, 'calls'), [])
    return [found for inner in body for found in _collectives(inner, computations)]
  return []
