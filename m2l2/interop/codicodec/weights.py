"""The table of CoDiCodec's tensors: shapes, and the parameters they become here."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from m2l2.errors import UserError
from m2l2.interop.codicodec.reading import shown_name


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of the state dict and its parameter here.

  Attributes:
    shape: in the state dict.
    path: of the parameter here; empty without one.
    layer: its place in a stack of layers, or None.
    convert: from the stored layout to ours (without the layers' axis).
    value: the constant value of an untrained tensor; None for others.
  """
  shape: tuple
  path: tuple = ()
  layer: int | None = None
  convert: Callable = np.asarray
  value: Any = None


def state_dict_table(arch) -> dict[str, Tensor]:
  """Every tensor of CoDiCodec's state dict, by name, for an Architecture of its kind."""
  table = _Table(arch)
  table.add_encoder()
  table.add_decoder()
  table.add_denoiser()
  table.add_quantiser()
  return table.tensors


class _Table:
  """Collects `tensors` {name: Tensor}. Methods take the original's name first, then sizes, then the path here."""

  def __init__(self, arch):
    self.tensors, self._arch = {}, arch
    self._dim, self._channels = arch.widths[-1], 2 * arch.channels
    self._rows, columns = arch.grid
    self._patches = self._rows * columns

  # One tensor, or two that belong together.

  def _add(self, name, shape, path, convert, layer=None):
    self.tensors[name] = Tensor(shape=tuple(shape), path=tuple(path.split('/')), layer=layer, convert=convert)

  def _unused(self, name, shape):
    self.tensors[name] = Tensor(shape=tuple(shape))

  def _constant(self, name, shape, value):
    self.tensors[name] = Tensor(shape=tuple(shape), value=value)

  def _vector(self, name, size, path, layer=None):
    self._add(name, (size,), path, lambda x: x, layer)

  def _registers(self, name, count, path):
    self._add(name, (1, count, self._dim), path, lambda x: x[0])

  def _linear(self, name, inputs, outputs, path, *, bias=True, shape=None, layer=None):
    """[out, in] -> [in, *shape]."""
    shape = shape or (outputs,)
    self._add(f'{name}.weight', (outputs, inputs), f'{path}/kernel', lambda x: x.T.reshape(inputs, *shape), layer)
    if bias:
      self._add(f'{name}.bias', (outputs,), f'{path}/bias', lambda x: x.reshape(shape), layer)

  def _conv(self, name, inputs, outputs, path, *, bias=False):
    """[out, in, F, T] -> [F, T, in, out]."""
    self._add(f'{name}.weight', (outputs, inputs, 3, 3), f'{path}/kernel', lambda x: x.transpose(2, 3, 1, 0))
    if bias:
      self._vector(f'{name}.bias', outputs, f'{path}/bias')

  def _norm(self, name, size, path, *, conditioned, gain, layer=None):
    if conditioned:
      self._linear(f'{name}.cond_proj', self._arch.cond_dim, size, f'{path}/scale/cond', layer=layer)
    else:
      self._vector(f'{name}.{gain}', size, f'{path}/scale/gain', layer)

  # Parts that networks share.

  def _ladder(self, name, path, *, up, conditioned):
    arch = self._arch
    levels = list(range(len(arch.widths)))
    order = levels[::-1] if up else levels
    index = 0
    for level, after in zip(order, [*order[1:], None]):
      width = arch.widths[level]
      for i in range(arch.blocks[level]):
        block, place = f'{name}.{index}', f'{path}/level{level}_block{i}'
        self._conv(f'{block}.ff.ff1', width, width, f'{place}/conv1')
        self._conv(f'{block}.ff.ff2', width, width, f'{place}/conv2')
        self._norm(f'{block}.norm', width, f'{place}/norm', conditioned=conditioned, gain='weight')
        index += 1
      if after is not None:
        self._rung(f'{name}.{index}', f'{path}/level{level}_{"up" if up else "down"}', level, after)
        index += 1

  def _rung(self, block, place, level, after):
    """The resampling from one level to the next."""
    (a, b), width, other = self._arch.strides[min(level, after)], self._arch.widths[level], self._arch.widths[after]
    self._vector(f'{block}.norm.weight', width, f'{place}/norm/scale/gain')
    if after < level:  # up: a transposed convolution is stored [in, out, F, T]
      self._constant(f'{block}.up.weight', (width, 1, a, b), other / width)
      self._add(f'{block}.c.weight', (width, other, a, b), f'{place}/kernel', lambda x: x.transpose(2, 3, 0, 1))
    else:
      self._constant(f'{block}.down.weight', (other, 1, a, b), 1 / (a * b))
      self._add(f'{block}.c.weight', (other, width, a, b), f'{place}/kernel', lambda x: x.transpose(2, 3, 1, 0))

  def _transformer(self, name, path, *, tokens, chunks=1, conditioned=False, outputs=None):
    """`outputs`: width of the output layer where it is used."""
    dim = self._dim
    self._add(f'{name}.pe', (1, chunks * tokens, dim), f'{path}/positions', lambda x: x.reshape(chunks, tokens, dim))
    self._unused(f'{name}.linear_input.weight', (dim, dim))
    self._unused(f'{name}.linear_input.bias', (dim,))
    self._norm(f'{name}.norm_input', dim, f'{path}/norm_input', conditioned=conditioned, gain='norm.g')
    if outputs or conditioned:
      self._norm(f'{name}.norm_output', dim, f'{path}/norm_output', conditioned=conditioned, gain='norm.g')
    else:
      self._unused(f'{name}.norm_output.norm.g', (dim,))
    if not outputs:
      self._unused(f'{name}.linear_output.weight', (dim, dim))
      self._unused(f'{name}.linear_output.bias', (dim,))
    for i in range(self._arch.layers):
      self._layer(f'{name}.layers.{i}', f'{path}/layers', i, conditioned=conditioned)

  def _layer(self, layer, place, i, *, conditioned):
    dim, size = self._dim, self._arch.head_dim
    heads, hidden = dim // size, dim * self._arch.mlp_mult // 2
    self._norm(f'{layer}.attn.norm', dim, f'{place}/attention_norm', conditioned=conditioned, gain='norm.g', layer=i)
    self._linear(f'{layer}.attn.mha.to_qkv', dim, 3 * dim, f'{place}/attention/qkv', bias=False,
                 shape=(3, heads, size), layer=i)
    self._vector(f'{layer}.attn.mha.q_norm.g', size, f'{place}/attention/q_norm/gain', i)
    self._vector(f'{layer}.attn.mha.k_norm.g', size, f'{place}/attention/k_norm/gain', i)
    self._add(f'{layer}.attn.mha.to_out.weight', (dim, dim), f'{place}/attention/out',
              lambda x: x.T.reshape(heads, size, dim), i)
    self._norm(f'{layer}.mlp.norm', dim, f'{place}/mlp_norm', conditioned=conditioned, gain='norm.g', layer=i)
    self._linear(f'{layer}.mlp.ff.to_mlp', dim, 2 * hidden, f'{place}/mlp/inner', bias=False, shape=(2, hidden),
                 layer=i)
    self._linear(f'{layer}.mlp.ff.to_out', hidden, dim, f'{place}/mlp/out', bias=False, layer=i)

  # The networks, and what the quantiser keeps.

  def add_encoder(self):
    arch = self._arch
    self._add('gain_encoder', (1, 1, arch.bins, 1), 'encoder/gain', lambda x: x.reshape(-1))
    self._conv('frontend_encoder_down.conv_inp', self._channels, arch.widths[0], 'encoder/patchifier/conv_in',
               bias=True)
    self._ladder('frontend_encoder_down.down_layers', 'encoder/patchifier', up=False, conditioned=False)
    self._registers('latents', arch.num_latents, 'encoder/queries')
    self._registers('more_latents_encoder', arch.registers, 'encoder/registers')
    self._transformer('encoder', 'encoder/transformer', tokens=self._patches + arch.num_latents + arch.registers,
                      outputs=arch.latent_dim)
    self._linear('encoder.linear_output', self._dim, arch.latent_dim, 'encoder/head')

  def add_decoder(self):
    """Theirs: pre-decoder."""
    arch, width = self._arch, self._arch.widths[0]
    self._add('mask_embedding', (1, self._rows, 1, self._dim), 'decoder/mask', lambda x: x[0])
    self._linear('lat2patch_pre_decoder', arch.latent_dim, self._dim, 'decoder/latents_in')
    self._registers('more_latents_pre_decoder', arch.registers, 'decoder/registers')
    self._transformer('pre_decoder', 'decoder/transformer', tokens=self._patches + arch.num_latents + arch.registers)
    self._ladder('frontend_pre_decoder_up.up_layers', 'decoder/depatchifier', up=True, conditioned=False)
    self._unused('frontend_pre_decoder_up.norm_out.weight', (width,))
    self._unused('frontend_pre_decoder_up.conv_out.weight', (self._channels, width, 3, 3))
    self._unused('frontend_pre_decoder_up.conv_out.bias', (self._channels,))

  def add_denoiser(self):
    """Theirs: decoder."""
    arch, width, cond = self._arch, self._arch.widths[0], self._arch.cond_dim
    for i in range(3):
      self._linear(f'emb_proj.{2 * i}', cond, cond, f'denoiser/embedding/linear{i}')
    for i in range(2):
      self._linear(f'gain_decoder.{2 * i}', cond, cond, f'denoiser/gains/linear{i}')
    self._linear('gain_decoder.4', cond, 2 * arch.bins, 'denoiser/gains/head', shape=(2, arch.bins))
    self._conv('frontend_decoder_down.conv_inp', self._channels, width, 'denoiser/patchifier/conv_in', bias=True)
    self._ladder('frontend_decoder_down.down_layers', 'denoiser/patchifier', up=False, conditioned=True)
    self._linear('lat2patch', arch.latent_dim, self._dim, 'denoiser/latents_in')
    self._registers('more_latents_decoder', arch.denoiser_registers, 'denoiser/registers')
    self._transformer('decoder', 'denoiser/transformer', chunks=arch.chunks, conditioned=True,
                      tokens=self._patches + arch.num_latents + arch.denoiser_registers)
    self._ladder('frontend_decoder_up.up_layers', 'denoiser/depatchifier', up=True, conditioned=True)
    self._norm('frontend_decoder_up.norm_out', width, 'denoiser/output/norm', conditioned=True, gain='weight')
    self._conv('frontend_decoder_up.conv_out', width, self._channels, 'denoiser/output/conv_out', bias=True)

  def add_quantiser(self):
    """Its buffers, which are no parameters."""
    levels = np.full(self._arch.latent_dim, self._arch.fsq_levels)
    self._constant('fsq._levels_tensor', levels.shape, levels)
    self._constant('fsq._basis_tensor', levels.shape, np.cumprod(levels) // levels)


def convert_weights(state: Mapping[str, np.ndarray], arch) -> dict:
  """CoDiCodec's state dict -> m2l2's nested dict of float32 parameters.

  Raises UserError: names that are missing or superfluous, wrong shapes, other constants, NaN; each by name.
  """
  table = state_dict_table(arch)
  missing, extra = sorted(table.keys() - state.keys()), sorted(state.keys() - table.keys())
  if missing:
    raise UserError(f'of {len(table)} tensors {_listed(missing)} missing: not a whole state dict of CoDiCodec')
  if extra:
    raise UserError(f'{_listed(extra)} superfluous: CoDiCodec has no such tensor')
  shapes = [f'{name} is {list(state[name].shape)}, should be {list(tensor.shape)}'
            for name, tensor in table.items() if state[name].shape != tensor.shape]
  if shapes:
    raise UserError(f'wrong shape: {"; ".join(shapes[:3])}{_more(shapes)}')
  params, layers = dict[str, Any](), dict[tuple, Any]()
  for name, tensor in table.items():
    array = np.asarray(state[name])
    if array.dtype.kind not in 'fiu' and array.dtype.name != 'bfloat16':
      raise UserError(f'{name} holds {array.dtype}, not numbers')
    with np.errstate(over='ignore', invalid='ignore'):
      array = array.astype(np.float32)
    if tensor.value is not None and not np.allclose(array, np.float32(tensor.value), rtol=1e-3):
      value = np.asarray(tensor.value).tolist()
      raise UserError(f'{name} should hold {value}: CoDiCodec never trains it, and m2l2 has it built in')
    if not np.isfinite(array).all():
      raise UserError(f'{name} holds NaN or infinite numbers')
    if not tensor.path:
      continue
    array = tensor.convert(array)
    if tensor.layer is None:
      _put(params, tensor.path, array)
    else:
      layers.setdefault(tensor.path, []).append(array)
  for path, stack in layers.items():
    _put(params, path, np.stack(stack))
  return params


def _put(tree, path, array):
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = np.ascontiguousarray(array)


def _listed(names) -> str:
  return f'{", ".join(map(shown_name, names[:3]))}{_more(names)} {"is" if len(names) == 1 else "are"}'


def _more(items) -> str:
  return f' and {len(items) - 3} more' if len(items) > 3 else ''
