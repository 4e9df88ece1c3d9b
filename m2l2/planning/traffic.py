"""Counting the cycles, memory traffic, FLOPs and collectives of a compiled program, from the text of its HLO.

XLA's own cost analysis counts the body of a loop once, a scan over 12 layers as one layer; here trips are counted.
"""

import collections
import dataclasses
import functools
import math
import re

from m2l2.planning.hlo import (
  Numbers,
  arrays_of,
  attribute,
  callee,
  count_trips,
  find_scope,
  parameters_of,
  parse_hlo,
  shape_of,
  type_bytes,
)

COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_FREE = ('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id', 'replica-id')
_OWN_KIND = ('sort', 'gather', 'scatter', 'reduce-window', 'select-and-scatter', 'fft', 'rng-bit-generator')
# Calls of the TPU compiler without memory traffic.
_NO_WORK = ('AllocateBuffer', 'ConcatBitcast', 'AssumeGatherIndicesInBound')


@dataclasses.dataclass
class OperationCost:
  """The cost of some operations together: number of executions, cycles by the TPU compiler's own estimate (0 without
  one), bytes read and written, FLOPs of products and convolutions as executed."""
  count: float = 0.0
  cycles: float = 0.0
  accessed: float = 0.0
  flops: float = 0.0

  def add(self, other: 'OperationCost', times: float = 1.0):
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


def _costs():
  return dataclasses.field(default_factory=lambda: collections.defaultdict(OperationCost))


@dataclasses.dataclass
class Traffic:
  """The traffic of one device in one execution.

  Attributes:
    accessed: bytes read and written.
    cycles: the TPU compiler's own estimate, without operations that it has none for.
    collectives: bytes of their results, by kind.
    parts: {(named scope, kind of operation): OperationCost} of all operations. Pallas kernels are the kind 'kernel';
      their FLOPs are those of their `cost_estimate`.
    unestimated: {kind of operation: OperationCost} of those without an estimate, except kernels with a `cost_estimate`.
  """
  accessed: float = 0.0
  cycles: float = 0.0
  collectives: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
  parts: dict = _costs()
  unestimated: dict = _costs()


def count_traffic(hlo_text: str) -> Traffic:
  """Counts over the text of a compiled HLO module; bodies of loops count as often as they run.

  Each instruction outside of a fusion reads its operands and writes its output. A fusion that takes a slice of an
  operand, or updates a slice of its output in place, is charged for the slice.

  Raises:
    UserError: a loop without a known trip count.
    ValueError: not the text of an HLO module.
  """
  computations, entry = parse_hlo(hlo_text)
  traffic = Traffic()

  def visit(name, times, given):
    types = {i.name: i.type for i in computations[name]}
    numbers = Numbers(computations, name, given)
    for instruction in computations[name]:
      opcode = instruction.opcode
      if opcode == 'while':
        trips, fixed = count_trips(instruction, computations, numbers)
        visit(callee(instruction, 'body'), times * trips, [fixed])
      elif opcode in ('call', 'async-start'):
        visit(callee(instruction, 'to_apply') or callee(instruction, 'calls'), times, ())
      elif opcode == 'conditional':
        for branch in re.findall(r'%?([\w.\-]+)', attribute(instruction, 'branch_computations')):
          visit(branch, times, ())
      elif opcode not in _FREE and not opcode.endswith(('-done', '-update')):
        _charge(traffic, instruction, times, types, computations)
      for kind, size in _collectives(instruction, computations):
        traffic.collectives[kind] += times * size

  visit(entry, 1, ())
  return traffic


def _charge(traffic, instruction, times, types, computations):
  cost = OperationCost(count=1, cycles=_cycles(instruction), accessed=_accessed(instruction, types, computations),
                       flops=_flops(instruction, types, computations))
  kind = _kind(instruction, computations)
  if not cost.cycles and cost.accessed and not (kind == 'kernel' and cost.flops):
    traffic.unestimated[kind].add(cost, times)
  traffic.accessed += times * cost.accessed
  traffic.cycles += times * cost.cycles
  traffic.parts[find_scope(instruction.attributes), kind].add(cost, times)


def _cycles(instruction) -> int:
  match = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
  return int(match[1]) if match else 0


def _kind(instruction, computations) -> str:
  """'convolution', 'product', 'kernel', 'collective', 'copy', one of _OWN_KIND, or 'element-wise' (reductions too)."""
  if instruction.opcode == 'custom-call':
    target = attribute(instruction, 'custom_call_target').strip('"')
    return 'kernel' if target == 'tpu_custom_call' else f'custom-call {target}'
  within = [instruction, *_within(instruction, computations)]
  multiplying = [i for i in within if i.opcode in ('convolution', 'dot')]
  if multiplying:
    # The TPU's compiler writes products as convolutions; the name of their source distinguishes them.
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
  body = computations.get(callee(instruction, 'calls'), [])
  return [nested for inner in body for nested in (inner, *_within(inner, computations))]


def _flops(instruction, types, computations) -> float:
  if instruction.opcode == 'fusion':
    body = computations.get(callee(instruction, 'calls'), [])
    types = {i.name: i.type for i in body}
    return sum(_flops(inner, types, computations) for inner in body)
  if instruction.opcode == 'dot':
    left = shape_of(types.get(instruction.operands[0], ''))
    contracted = re.findall(r'\d+', attribute(instruction, 'lhs_contracting_dims'))
    return 2.0 * math.prod(shape_of(instruction.type)) * math.prod(left[int(axis)] for axis in contracted)
  if instruction.opcode == 'custom-call':  # the kernel's own estimate, if given
    told = re.search(r'"flops":"?(\d+)', instruction.attributes)
    return float(told[1]) if told else 0.0
  return _convolution_flops(instruction, types) if instruction.opcode == 'convolution' else 0.0


def _convolution_flops(instruction, types) -> float:
  """Only taps that meet an element count: not padding, and not the zeros between those of a dilated map. (The TPU's
  compiler writes the batch of a product as a dimension that is dilated so that each place has one tap.)"""
  labels = re.match(r'(\w+)_(\w+)->(\w+)', attribute(instruction, 'dim_labels'))
  assert labels, 'HLO prints them for every convolution'
  left, right = (shape_of(types.get(name, '')) for name in instruction.operands[:2])
  out = shape_of(instruction.type)
  window = dict(re.findall(r'(\w+)=([\dx_\-]+)', attribute(instruction, 'window')))

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


def _accessed(instruction, types, computations) -> float:
  opcode, outer = instruction.opcode, [types.get(name, '') for name in instruction.operands]
  if opcode == 'custom-call' and attribute(instruction, 'custom_call_target').strip('"') in _NO_WORK:
    return 0.0
  if opcode == 'slice-start':  # -> ((source), destination, context)
    source, destination = arrays_of(instruction.type)[0], arrays_of(instruction.type)[-2]
    return (type_bytes(destination, anywhere=True) if type_bytes(source) else 0.0) + type_bytes(destination)
  if opcode == 'copy-start':   # -> (destination, source, context)
    return type_bytes(instruction.type)
  if opcode == 'dynamic-slice':
    return (type_bytes(instruction.type, anywhere=True) if type_bytes(outer[0]) else 0.0) + type_bytes(instruction.type)
  if opcode == 'dynamic-update-slice':
    return type_bytes(outer[1]) + (type_bytes(outer[1], anywhere=True) if type_bytes(instruction.type) else 0.0)
  if opcode != 'fusion':
    return type_bytes(instruction.type) + sum(map(type_bytes, outer))

  body = computations.get(callee(instruction, 'calls'), [])
  inner = {i.name: i for i in body}
  root = next((i for i in body if i.root), None)
  parts = [inner[name] for name in root.operands] if root is not None and root.opcode == 'tuple' else [root]
  written, updated = 0.0, set()
  for part, kind in zip(parts, arrays_of(instruction.type)):
    update, buffer = _update_in_place(part, inner, computations)
    if buffer:  # only the new slice is written; its source is read like other operands
      written += type_bytes(update, anywhere=True) if type_bytes(kind) else 0.0
      updated.add(buffer)
    else:
      written += type_bytes(kind)
  parameters = parameters_of(body)
  read = 0.0
  for position, kind in enumerate(outer):
    parameter = parameters.get(position, '')
    if type_bytes(kind) and parameter not in updated:
      read += _sliced(parameter, body, computations) or type_bytes(kind)
  return read + written


def _sliced(name, body, computations) -> float:
  """Bytes that a fusion's body reads of `name` if it uses only slices of it, in nested fusions too; else 0."""
  total = 0.0
  for user in body:
    if name not in user.operands:
      continue
    if user.opcode == 'dynamic-slice':
      size = type_bytes(user.type, anywhere=True)
    elif user.opcode == 'bitcast':
      size = _sliced(user.name, body, computations)
    elif user.opcode == 'fusion':
      within = computations.get(callee(user, 'calls'), [])
      size = _sliced(parameters_of(within).get(user.operands.index(name), ''), within, computations)
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
    body = computations.get(callee(source, 'calls'), [])
    root = next((i for i in body if i.root), None)
    kind, place = _update_in_place(root, {i.name: i for i in body}, computations)
    buffer = next((source.operands[n] for n, name in parameters_of(body).items() if name == place), '')
  else:
    return '', ''
  producer = _through_bitcasts(inner.get(buffer), inner)
  return (kind, producer.name) if producer is not None and producer.opcode == 'parameter' else ('', '')


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
      sizes = [type_bytes(part, anywhere=True) for part in arrays_of(output)]
      return [(kind, max(sizes, default=0.0))]
    return [(kind, type_bytes(output, anywhere=True))]
  if instruction.opcode == 'fusion':
    body = computations.get(callee(instruction, 'calls'), [])
    return [collective for inner in body for collective in _collectives(inner, computations)]
  return []
