"""CoDiCodec's published weights as an m2l2 snapshot, and its public form of latents.

CoDiCodec (PyPI `codicodec`, by the authors of Music2Latent2; its code and weights are CC BY-NC 4.0) is a point of
m2l2's config space: configs/codicodec.py. Here its state dict is read, checked tensor by tensor and renamed; the
numbers stay as they are. tests/conformance holds the result against the original's outputs.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
import pickle
import re
import warnings

import numpy as np
import safetensors
import safetensors.numpy

from m2l2 import build
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.codec.latents import Latents, is_safetensors
from m2l2.codec.snapshot import check_place, save_snapshot

STATE_DICT = 'gen_state_dict'  # its place in the published checkpoint
LATENT_SCALE = 0.8             # public latents are atanh(z) / 0.8
LATENT_WIDTH = 64              # and 16 embeddings of 4 numbers make one of 64


# ---- latents and tokens -----------------------------------------------------------------------------------------


def to_public(latents: Latents, *, width: int = LATENT_WIDTH) -> np.ndarray:
  """Latents -> what `EncoderDecoder.encode` of the torch package returns and its `decode` takes.

  Args:
    latents: one stream: continuous z [1, chunks, K, d], or tokens [1, chunks, K].
    width: numbers that one public latent holds; a multiple of d.

  Returns:
    float32 [chunks, K d / width, width]: atanh(z) / 0.8, neighbouring embeddings side by side; tokens come back as
    they are, int32 [chunks, K].

  Raises UserError: several streams, or a width that does not fit.
  """
  if latents.z.shape[0] != 1:
    raise UserError(f'CoDiCodec has one stream of latents, these have {latents.z.shape[0]}')
  z = latents.z[0]
  if np.issubdtype(z.dtype, np.integer):
    return z.astype(np.int32)
  chunks, count, dim = z.shape
  if width < 1 or width % dim or count * dim % width:
    raise UserError(f'width is {width}; it must be a multiple of {dim} that divides {count * dim}')
  return (np.arctanh(z) / np.float32(LATENT_SCALE)).reshape(chunks, -1, width)


def from_public(public, codec, *, sample_rate: int, num_samples: int | None = None) -> Latents:
  """The inverse of `to_public`, for a Codec with CoDiCodec's weights.

  Args:
    public: float [chunks, any, any] as `to_public` makes it, or int tokens [chunks, K].
    sample_rate, num_samples: of the signal. Without num_samples, at a native rate, all that the chunks decode to is
      the signal, as in the torch package: chunks * 32768 + 1024 samples.

  Raises UserError: numbers that do not make up chunks of this model's latents, NaN, tokens out of range, a length
    that is not these chunks', or a foreign rate without a length.
  """
  arch, rep = codec.network.arch, codec.representation
  public = np.asarray(public)
  tokens = np.issubdtype(public.dtype, np.integer)
  size = arch.num_latents * (1 if tokens else arch.latent_dim)
  if public.ndim != (2 if tokens else 3) or not public.size or public[0].size != size:
    numbers = arch.num_latents * arch.latent_dim
    raise UserError(f'CoDiCodec latents are [chunks, a, b] with a * b = {numbers}, or tokens [chunks, '
                    f'{arch.num_latents}]; these are {list(public.shape)}')
  if tokens:
    codes = arch.fsq_levels ** arch.latent_dim
    if public.min() < 0 or public.max() >= codes:
      raise UserError(f'the tokens reach beyond 0..{codes - 1}')
    z = public.astype(np.int32)[None]
  else:
    z = np.tanh(public.astype(np.float32) * np.float32(LATENT_SCALE))
    z = z.reshape(1, len(public), arch.num_latents, arch.latent_dim)
  if not np.isfinite(z).all():
    raise UserError('the latents hold NaN or infinite numbers')
  if num_samples is None and sample_rate not in codec.native_rates:
    raise UserError(f'sample_rate is {sample_rate}; say num_samples too, or take one of {codec.native_rates}')
  num_samples = rep.crop_samples(len(public)) if num_samples is None else num_samples
  if min(num_samples, sample_rate) < 1 or codec.layout(num_samples, sample_rate).chunks != len(public):
    raise UserError(f'{num_samples} samples at {sample_rate} Hz are not what {len(public)} chunks hold')
  return Latents(z=z, sample_rate=int(sample_rate), num_samples=int(num_samples), channels=rep.channels,
                 model=codec.fingerprint)


# ---- weights ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of the state dict and what becomes of it.

  Attributes:
    shape: in the state dict.
    path: of the parameter here; empty where there is none.
    layer: its place in a stack of layers, or None.
    convert: from the stored layout to ours (without the layers' axis).
    value: what a tensor that was never trained holds throughout; None for others.
  """
  shape: tuple
  path: tuple = ()
  layer: int | None = None
  convert: Callable | None = None
  value: object = None


def state_dict_table(arch) -> dict[str, Tensor]:
  """Every tensor of CoDiCodec's state dict, by name, for an Architecture of its kind."""
  table = {}
  dim, heads = arch.widths[-1], arch.widths[-1] // arch.head_dim
  hidden = dim * arch.mlp_mult // 2
  rows, columns = arch.grid
  cond = arch.cond_dim

  def add(name, shape, path, convert, layer=None):
    table[name] = Tensor(shape=tuple(shape), path=tuple(path.split('/')), layer=layer, convert=convert)

  def unused(name, shape):
    table[name] = Tensor(shape=tuple(shape))

  def constant(name, shape, value):
    table[name] = Tensor(shape=tuple(shape), value=value)

  def vector(name, size, path, layer=None):
    add(name, (size,), path, lambda x: x, layer)

  def linear(name, inputs, outputs, path, *, bias=True, shape=None, layer=None):
    """[out, in] -> [in, *shape]."""
    shape = shape or (outputs,)
    add(f'{name}.weight', (outputs, inputs), f'{path}/kernel', lambda x: x.T.reshape(inputs, *shape), layer)
    if bias:
      add(f'{name}.bias', (outputs,), f'{path}/bias', lambda x: x.reshape(shape), layer)

  def conv(name, inputs, outputs, path, *, bias=False):
    """[out, in, F, T] -> [F, T, in, out]."""
    add(f'{name}.weight', (outputs, inputs, 3, 3), f'{path}/kernel', lambda x: x.transpose(2, 3, 1, 0))
    if bias:
      vector(f'{name}.bias', outputs, f'{path}/bias')

  def norm(name, size, path, *, conditioned, gain, layer=None):
    if conditioned:
      linear(f'{name}.cond_proj', cond, size, f'{path}/scale/cond', layer=layer)
    else:
      vector(f'{name}.{gain}', size, f'{path}/scale/gain', layer)

  def ladder(name, path, *, up, conditioned):
    levels = list(range(len(arch.widths)))
    order = levels[::-1] if up else levels
    index = 0
    for level, after in zip(order, [*order[1:], None]):
      width = arch.widths[level]
      for i in range(arch.blocks[level]):
        block, place = f'{name}.{index}', f'{path}/level{level}_block{i}'
        conv(f'{block}.ff.ff1', width, width, f'{place}/conv1')
        conv(f'{block}.ff.ff2', width, width, f'{place}/conv2')
        norm(f'{block}.norm', width, f'{place}/norm', conditioned=conditioned, gain='weight')
        index += 1
      if after is None:
        continue
      block, place = f'{name}.{index}', f'{path}/level{level}_{"up" if up else "down"}'
      (a, b), other = arch.strides[min(level, after)], arch.widths[after]
      vector(f'{block}.norm.weight', width, f'{place}/norm/scale/gain')
      if up:  # a transposed convolution is stored [in, out, F, T]
        constant(f'{block}.up.weight', (width, 1, a, b), other / width)
        add(f'{block}.c.weight', (width, other, a, b), f'{place}/kernel', lambda x: x.transpose(2, 3, 0, 1))
      else:
        constant(f'{block}.down.weight', (other, 1, a, b), 1 / (a * b))
        add(f'{block}.c.weight', (other, width, a, b), f'{place}/kernel', lambda x: x.transpose(2, 3, 1, 0))
      index += 1

  def transformer(name, path, *, tokens, chunks=1, conditioned=False, outputs=None):
    """`outputs`: width of the output layer where it is used."""
    add(f'{name}.pe', (1, chunks * tokens, dim), f'{path}/positions', lambda x: x.reshape(chunks, tokens, dim))
    unused(f'{name}.linear_input.weight', (dim, dim))
    unused(f'{name}.linear_input.bias', (dim,))
    norm(f'{name}.norm_input', dim, f'{path}/norm_input', conditioned=conditioned, gain='norm.g')
    if outputs or conditioned:
      norm(f'{name}.norm_output', dim, f'{path}/norm_output', conditioned=conditioned, gain='norm.g')
    else:
      unused(f'{name}.norm_output.norm.g', (dim,))
    if not outputs:
      unused(f'{name}.linear_output.weight', (dim, dim))
      unused(f'{name}.linear_output.bias', (dim,))
    for i in range(arch.layers):
      layer, place = f'{name}.layers.{i}', f'{path}/layers'
      norm(f'{layer}.attn.norm', dim, f'{place}/attention_norm', conditioned=conditioned, gain='norm.g', layer=i)
      linear(f'{layer}.attn.mha.to_qkv', dim, 3 * dim, f'{place}/attention/qkv', bias=False,
             shape=(3, heads, arch.head_dim), layer=i)
      vector(f'{layer}.attn.mha.q_norm.g', arch.head_dim, f'{place}/attention/q_norm/gain', i)
      vector(f'{layer}.attn.mha.k_norm.g', arch.head_dim, f'{place}/attention/k_norm/gain', i)
      add(f'{layer}.attn.mha.to_out.weight', (dim, dim), f'{place}/attention/out',
          lambda x: x.T.reshape(heads, arch.head_dim, dim), i)
      norm(f'{layer}.mlp.norm', dim, f'{place}/mlp_norm', conditioned=conditioned, gain='norm.g', layer=i)
      linear(f'{layer}.mlp.ff.to_mlp', dim, 2 * hidden, f'{place}/mlp/inner', bias=False, shape=(2, hidden), layer=i)
      linear(f'{layer}.mlp.ff.to_out', hidden, dim, f'{place}/mlp/out', bias=False, layer=i)

  def registers(name, count, path):
    add(name, (1, count, dim), path, lambda x: x[0])

  channels, tokens = 2 * arch.channels, rows * columns
  # Encoder.
  add('gain_encoder', (1, 1, arch.bins, 1), 'encoder/gain', lambda x: x.reshape(-1))
  conv('frontend_encoder_down.conv_inp', channels, arch.widths[0], 'encoder/patchifier/conv_in', bias=True)
  ladder('frontend_encoder_down.down_layers', 'encoder/patchifier', up=False, conditioned=False)
  registers('latents', arch.num_latents, 'encoder/queries')
  registers('more_latents_encoder', arch.registers, 'encoder/registers')
  transformer('encoder', 'encoder/transformer', tokens=tokens + arch.num_latents + arch.registers,
              outputs=arch.latent_dim)
  linear('encoder.linear_output', dim, arch.latent_dim, 'encoder/head')
  # Decoder (theirs: pre-decoder).
  add('mask_embedding', (1, rows, 1, dim), 'decoder/mask', lambda x: x[0])
  linear('lat2patch_pre_decoder', arch.latent_dim, dim, 'decoder/latents_in')
  registers('more_latents_pre_decoder', arch.registers, 'decoder/registers')
  transformer('pre_decoder', 'decoder/transformer', tokens=tokens + arch.num_latents + arch.registers)
  ladder('frontend_pre_decoder_up.up_layers', 'decoder/depatchifier', up=True, conditioned=False)
  unused('frontend_pre_decoder_up.norm_out.weight', (arch.widths[0],))
  unused('frontend_pre_decoder_up.conv_out.weight', (channels, arch.widths[0], 3, 3))
  unused('frontend_pre_decoder_up.conv_out.bias', (channels,))
  # Denoiser (theirs: decoder).
  for i in range(3):
    linear(f'emb_proj.{2 * i}', cond, cond, f'denoiser/embedding/linear{i}')
  for i in range(2):
    linear(f'gain_decoder.{2 * i}', cond, cond, f'denoiser/gains/linear{i}')
  linear('gain_decoder.4', cond, 2 * arch.bins, 'denoiser/gains/head', shape=(2, arch.bins))
  conv('frontend_decoder_down.conv_inp', channels, arch.widths[0], 'denoiser/patchifier/conv_in', bias=True)
  ladder('frontend_decoder_down.down_layers', 'denoiser/patchifier', up=False, conditioned=True)
  linear('lat2patch', arch.latent_dim, dim, 'denoiser/latents_in')
  registers('more_latents_decoder', arch.denoiser_registers, 'denoiser/registers')
  transformer('decoder', 'denoiser/transformer', chunks=arch.chunks, conditioned=True,
              tokens=tokens + arch.num_latents + arch.denoiser_registers)
  ladder('frontend_decoder_up.up_layers', 'denoiser/depatchifier', up=True, conditioned=True)
  norm('frontend_decoder_up.norm_out', arch.widths[0], 'denoiser/output/norm', conditioned=True, gain='weight')
  conv('frontend_decoder_up.conv_out', arch.widths[0], channels, 'denoiser/output/conv_out', bias=True)
  # The quantiser's buffers.
  levels = np.full(arch.latent_dim, arch.fsq_levels)
  constant('fsq._levels_tensor', levels.shape, levels)
  constant('fsq._basis_tensor', levels.shape, np.cumprod(levels) // levels)
  return table


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
  params, layers = {}, {}
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
  return f'{", ".join(map(_shown, names[:3]))}{_more(names)} {"is" if len(names) == 1 else "are"}'


def _shown(name) -> str:
  """A name out of somebody's file, fit for a terminal."""
  return audio_io.shown(name if len(name) <= 80 else f'{name[:77]}...')


def _more(items) -> str:
  return f' and {len(items) - 3} more' if len(items) > 3 else ''


# ---- files ------------------------------------------------------------------------------------------------------


def read_state_dict(path, *, nested: str = STATE_DICT, of: str = 'CoDiCodec',
                    published: str = 'codicodec.pt') -> dict[str, np.ndarray]:
  """Tensors by name from a .safetensors file, or from a torch checkpoint; nothing in the file is executed.

  Args:
    nested: the state dict's place in a torch checkpoint that holds more. of, published: the model and its file, for
      messages.
  Raises UserError: no such file, damaged, not a checkpoint of the model, or torch is needed and not installed.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise UserError(f'{audio_io.shown(path)}: there is no such file (the published one is {published})')
  try:
    open(path, 'rb').close()
  except OSError as error:
    raise UserError(f'{audio_io.shown(path)}: cannot be read ({error.strerror})') from error
  return _read_safetensors(path) if is_safetensors(path) else _read_torch(path, nested, of)


def _read_safetensors(path):
  try:
    return safetensors.numpy.load_file(path)
  except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{audio_io.shown(path)}: is damaged, cut short or not a safetensors file of floats '
                    f'({_first_line(error)})') from error


def _read_torch(path, nested, of):
  shown = audio_io.shown(path)
  try:
    import torch
  except ModuleNotFoundError as error:
    raise UserError(f"{shown}: reading a torch checkpoint needs torch: pip install 'm2l2[codicodec]', or give a "
                    '.safetensors file of the same tensors') from error
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # torch's own, about odd pickles
      # weights_only: tensors and plain containers are rebuilt by torch's own unpickler, anything else is refused.
      checkpoint = torch.load(path, map_location='cpu', weights_only=True)
  except pickle.UnpicklingError as error:
    refused = _refused_global(str(error))
    if refused:
      raise UserError(f'{shown}: holds more than tensors ({refused}), which could run code; nothing of it was '
                      'executed. If you trust its source, save its tensors as .safetensors and import those') from error
    raise UserError(f'{shown}: is damaged, cut short or not a torch checkpoint; nothing of it was executed') from error
  except Exception as error:  # whatever a damaged archive makes torch raise
    raise UserError(f'{shown}: is damaged, cut short or not a torch checkpoint ({_first_line(error)})') from error
  if isinstance(checkpoint, Mapping) and nested in checkpoint:
    checkpoint = checkpoint[nested]
  if not isinstance(checkpoint, Mapping) or not checkpoint or not all(
      isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in checkpoint.items()):
    raise UserError(f'{shown}: has no {nested!r} and is not a state dict itself: not a checkpoint of {of}')
  for name, tensor in checkpoint.items():
    if not _is_plain(torch, tensor):
      raise UserError(f'{shown}: {_shown(name)} is not a plain tensor with all its numbers in the file')
  return {name: _as_numpy(tensor) for name, tensor in checkpoint.items()}


def _is_plain(torch, tensor) -> bool:
  """Dense numbers, all of them there: an expanded tensor of a few bytes can claim terabytes."""
  if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type != 'cpu':
    return False
  return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _as_numpy(tensor):
  tensor = tensor.detach()
  return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


def _refused_global(message) -> str:
  """The name that torch's loader refused, from its message; '' where it refused none."""
  found = re.search(r'[Uu]nsupported (?:global: GLOBAL|GLOBAL|class) ([\w.]+)', message)
  return found[1] if found else ''


def _first_line(error) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0][:200]


def import_codicodec(source, target, *, verify: bool = False) -> dict:
  """Writes CoDiCodec's weights as an m2l2 snapshot.

  Args:
    source: codicodec.pt, or a .safetensors file of its state dict.
    target: the snapshot's directory.
    verify: first run both implementations on one input (needs torch and codicodec); see `verify_against_torch`.

  Returns:
    {'fingerprint', 'parameters', 'unused': names of tensors that nothing uses, 'errors'?: of `verify`}

  Raises UserError: the source is not what it should be, the two implementations differ, or the target cannot be
  written. Nothing is written then.
  """
  from m2l2.configs import codicodec as recipe

  check_place(target)
  config = json.loads(json.dumps(recipe.get_config().to_dict()))
  arch = build.network(config['model']).arch
  if verify:
    _require_package()
  state = read_state_dict(source)
  try:
    params = convert_weights(state, arch)
  except UserError as error:
    raise UserError(f'{audio_io.shown(source)}: {error}') from error
  report = {'unused': sorted(name for name, tensor in state_dict_table(arch).items()
                             if not tensor.path and tensor.value is None)}
  if verify:
    report['errors'] = verify_against_torch(state, config, params)
  extra = {'source': 'CoDiCodec', 'licence': 'CC BY-NC 4.0 (the licence of the published weights)',
           'latent_scale': LATENT_SCALE}
  report['fingerprint'] = save_snapshot(target, params=params, config=config, step=0, extra=extra)
  report['parameters'] = sum(array.size for array in _leaves(params))
  return report


def _leaves(tree):
  for value in tree.values():
    yield from _leaves(value) if isinstance(value, dict) else (value,)


def _require_package():
  try:
    import codicodec.models  # noqa: F401
  except ImportError as error:
    missing = (error.name or 'a part of it').partition('.')[0]
    raise UserError(f'verifying runs the original beside m2l2, and {missing} is not installed: '
                    "pip install 'm2l2[codicodec]' codicodec") from error


def verify_against_torch(state, config, params, *, tolerance: float = 1e-4) -> dict:
  """Runs one input through the original and through m2l2, float32, on the CPU.

  Args:
    state: the state dict; config, params: what was made of it.
    tolerance: largest relative error ||a - b|| / ||b||.

  Returns:
    {'latents', 'features', 'denoiser'}: relative errors (of features the worst level's).

  Raises UserError: an error beyond the tolerance.
  """
  from codicodec.models import UNet
  import jax
  import torch

  net, process = build.network(config['model']), build.consistency(config['consistency'])
  rep = build.representation(config['model'])
  rng = np.random.default_rng(0)
  shape = (1, 2, rep.bins, rep.frames, rep.spec_channels)
  spec, noise = (rng.standard_normal(shape, np.float32) for _ in range(2))
  spec *= np.float32(0.3)
  levels = np.float32([[process.sigma_cond, process.sigma_max]])
  noisy = spec + levels[:, :, None, None, None] * noise

  original = UNet().eval()
  original.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
  with torch.no_grad():
    z = original.encoder_forward(_to_torch(torch, spec), dont_quantize=True)
    features = original.pre_decoder_forward(z)
    out = original.decoder_forward(_to_torch(torch, noisy), z, features=features, sigma_left=float(levels[0, 0]),
                                   sigma_right=float(levels[0, 1]))
  z = z.numpy().reshape(1, 2, -1, z.shape[-1])

  @jax.jit
  def run(params, spec, z, noisy, levels):
    pre = net.encode(params, spec)
    features = net.decode(params, z)
    return net.arch.make_bottleneck()(pre), features['maps'], process.denoise(
        lambda x, sigma: net.denoise(params, x, sigma, features), noisy, levels)

  try:
    cpu = jax.devices('cpu')[0]
  except RuntimeError as error:
    raise UserError('verifying runs on the CPU, which JAX_PLATFORMS leaves out: add ,cpu to it') from error
  with jax.default_device(cpu):
    ours = run(params, spec, z, noisy, levels)
  errors = {'latents': _relative_error(ours[0], z),
            'features': float(np.max([_relative_error(_join_chunks(a), _from_torch(b))
                                      for a, b in zip(ours[1], features)])),
            'denoiser': _relative_error(_join_chunks(ours[2]), _from_torch(out))}
  for name, error in errors.items():
    if not error <= tolerance:  # nan neither
      raise UserError(f'm2l2 and the original differ: relative error {error:.2g} of {name}, at most {tolerance:g} is '
                      'right; nothing was written')
  return errors


def _to_torch(torch, spec):
  """[1, S, F, T, C] -> tensor [1, C, F, S T]."""
  return torch.from_numpy(np.ascontiguousarray(np.moveaxis(_join_chunks(spec), -1, 1)))


def _from_torch(tensor):
  """[1, C, F, T] -> [1, F, T, C]."""
  return np.moveaxis(tensor.numpy(), 1, -1)


def _join_chunks(x):
  """[1, S, F, T, C] -> [1, F, S T, C]."""
  return np.concatenate(list(np.moveaxis(np.asarray(x), 1, 0)), axis=2)


def _relative_error(a, b) -> float:
  return float(np.linalg.norm(np.ravel(a) - np.ravel(b)) / np.linalg.norm(np.ravel(b)))
