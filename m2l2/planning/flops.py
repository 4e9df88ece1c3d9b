"""Counting a program's matrix products from its jaxpr.

XLA's own cost analysis counts the body of a loop once, a scan over 12 layers as one layer; here trips are counted.
"""

import dataclasses
import math

import jax.extend


@dataclasses.dataclass
class Flops:
  """FLOPs of matrix products by kind; `padded_...` includes the padding of a matrix unit of that width."""
  products: float = 0.0
  convolutions: float = 0.0
  attention: float = 0.0
  padded_products: float = 0.0
  padded_convolutions: float = 0.0
  padded_attention: float = 0.0

  @classmethod
  def of(cls, kind: str, nominal: float, padded: float):
    return cls(**{kind: nominal, f'padded_{kind}': padded})

  @property
  def total(self) -> float:
    return self.products + self.convolutions + self.attention

  @property
  def padded(self) -> float:
    return self.padded_products + self.padded_convolutions + self.padded_attention

  def add(self, other, times=1.0):
    for field in dataclasses.fields(self):
      setattr(self, field.name, getattr(self, field.name) + times * getattr(other, field.name))


def count_flops(jaxpr, *, unit: int = 128, attention: bool = False) -> Flops:
  """FLOPs of all matrix products and convolutions of a jaxpr, branches at their most expensive.

  Args:
    jaxpr: a ClosedJaxpr's `jaxpr`, traced without rematerialisation to leave that out.
    unit: width of the matrix unit: contracted and output features are padded to it in `padded`.
    attention: whether all of it belongs to attention, as the body of a kernel does.
  """
  total = Flops()
  for eqn in jaxpr.eqns:
    named = 'chunk_causal_attention' in str(eqn.source_info.name_stack)
    inside_attention = attention or named
    if eqn.primitive.name == 'dot_general':
      total.add(_dot(eqn, unit, attention=inside_attention))
    elif eqn.primitive.name == 'conv_general_dilated':
      total.add(_conv(eqn, unit))
    else:
      inner = [count_flops(sub, unit=unit, attention=inside_attention)
               for sub in jax.extend.core.jaxprs_in_params(eqn.params)]
      if inner and eqn.primitive.name == 'cond':
        inner = [max(inner, key=lambda flops: flops.total)]
      for flops in inner:
        total.add(flops, _times(eqn))
  return total


def _times(eqn) -> int:
  """The number of times that the jaxpr inside an equation runs."""
  if eqn.primitive.name == 'scan':
    return eqn.params['length']
  if eqn.primitive.name == 'pallas_call':
    return math.prod(eqn.params['grid_mapping'].grid)
  if eqn.primitive.name == 'shard_map':
    return eqn.params['mesh'].size
  return 1


def _dot(eqn, unit, *, attention) -> Flops:
  (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = eqn.params['dimension_numbers']
  lhs, rhs = (var.aval.shape for var in eqn.invars)

  def size(shape, axes):
    return math.prod(shape[axis] for axis in axes)

  k, batch = size(lhs, lhs_contracted), size(lhs, lhs_batch)
  m = math.prod(lhs) // (k * batch)
  n = math.prod(rhs) // (k * batch)
  flops = 2.0 * batch * m * n * k
  # The wider of the two free sides streams through the unit; the other and the contraction fill it.
  padded = 2.0 * batch * max(m, n) * _pad(min(m, n), unit) * _pad(k, unit)
  return Flops.of('attention' if attention else 'products', flops, padded)


def _conv(eqn, unit) -> Flops:
  dims = eqn.params['dimension_numbers']
  kernel, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
  features_out, features_in = (kernel[dims.rhs_spec[i]] for i in (0, 1))
  taps = math.prod(kernel) / (features_out * features_in) / eqn.params['batch_group_count']
  taps /= math.prod(eqn.params['lhs_dilation'])  # a strided one's gradient: zeros in between
  places = math.prod(out) / out[dims.out_spec[1]]
  flops = 2.0 * places * taps * features_in * out[dims.out_spec[1]]
  channels, batch = out[dims.out_spec[1]], out[dims.out_spec[0]]
  spots = places / batch
  if taps > spots:  # a kernel's gradient: the map is the window; of the two channel axes one streams through the unit
    padded = 2.0 * spots * max(batch, channels) * _pad(min(batch, channels), unit) * _pad(features_in * taps, unit)
  else:
    padded = 2.0 * places * taps * _pad(features_in, unit) * _pad(channels, unit)
  return Flops.of('convolutions', flops, padded)


def _pad(size, unit):
  return math.ceil(size / unit) * unit
