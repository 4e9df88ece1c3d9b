"""Counting what a compiled program moves: memory traffic and collectives, from the text of its HLO.

XLA's own cost analysis counts the body of a loop once, so a scan over 12 layers counts as one; here trips count.
"""

import collections
import dataclasses
import math
import re


COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id')
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
class Traffic:
  """Of one device and one run: bytes read and written; cycles by the TPU compiler's own estimate (custom kernels left
  out; 0 where it has none); bytes of the results of collectives, by kind."""
  accessed: float = 0.0
  cycles: float = 0.0
  collectives: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(float))


def count_traffic(hlo_text: str) -> Traffic:
  """Walks the text of a compiled HLO module; bodies of loops count as often as they run.

  Each instruction outside of a fusion reads its operands and writes its output. A fusion that takes a slice of an
  operand, or updates a slice of its output in place, is charged for the slice.
  """
  computations, entry = parse_hlo(hlo_text)
  traffic = Traffic()

  def visit(name, times):
    types = {i.name: i.type for i in computations[name]}
    for instruction in computations[name]:
      opcode = instruction.opcode
      if opcode == 'while':
        visit(_called(instruction, 'body'), times * _trips(instruction))
      elif opcode in ('call', 'async-start'):
        visit(_called(instruction, 'to_apply') or _called(instruction, 'calls'), times)
      elif opcode == 'conditional':
        for branch in re.findall(r'%?([\w.\-]+)', _attribute(instruction, 'branch_computations')):
          visit(branch, times)
      elif opcode not in _FREE and not opcode.endswith(('-done', '-update')):
        traffic.accessed += times * _accessed(instruction, types, computations)
      traffic.cycles += times * _cycles(instruction)
      for kind, size in _collectives(instruction, computations):
        traffic.collectives[kind] += times * size

  visit(entry, 1)
  return traffic


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
  # A parameter's operand is its number.
  operands = (inside,) if opcode == 'parameter' else tuple(re.findall(r'%([\w.\-]+)', inside))
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


def _trips(instruction) -> int:
  found = re.search(r'"known_trip_count":\{"n":"(\d+)"', instruction.attributes)
  return int(found[1]) if found else 1


def _cycles(instruction) -> int:
  found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  return int(found[1]) if found else 0


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
  parameters = {int(i.operands[0]): i for i in body if i.opcode == 'parameter'}
  root = next((i for i in body if i.root), None)
  parts = [inner[name] for name in root.operands] if root is not None and root.opcode == 'tuple' else [root]
  written, updated = 0.0, set()
  for part, kind in zip(parts, _elements(instruction.type)):
    source = _through_bitcasts(part, inner)
    if source is not None and source.opcode == 'dynamic-update-slice':  # in place: what is new is read and written
      update = inner.get(source.operands[1])
      written += 2 * type_bytes(update.type if update else '') if type_bytes(kind) else 0.0
      buffer = _through_bitcasts(inner.get(source.operands[0]), inner)
      updated.add(buffer.name if buffer else '')
    else:
      written += type_bytes(kind)
  read = 0.0
  for position, kind in enumerate(outer):
    parameter = parameters.get(position)
    if not type_bytes(kind) or (parameter is not None and parameter.name in updated):
      continue
    users = [i for i in body if parameter is not None and parameter.name in i.operands]
    sliced = users and all(user.opcode == 'dynamic-slice' for user in users)
    read += sum(type_bytes(user.type) for user in users) if sliced else type_bytes(kind)
  return read + written


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
