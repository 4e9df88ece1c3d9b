"""LAION-CLAP's audio embedding (Wu et al., 2023), without fusion, as in the published CLAP distances: 512 numbers of
unit length a clip.

The user provides the weights: 630k-audioset-best.pt of laion_clap, or its tensors as .safetensors. The audio encoder of
that file is HTS-AT "tiny" (width 96, depths 2 2 6 2); the music checkpoints hold "base" (width 128, depths 2 2 12 2).
The shapes tell which one it is.

A clip is 10 s at 48 kHz. Longer ones are cropped in their middle (the original crops at random), shorter ones repeated
as often as they fit and filled with zeros.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from m2l2.compiling import Told
from m2l2.errors import UserError
from m2l2.evaluation.embedders.vggish import check_shapes
from m2l2.evaluation.metrics import pairs

SAMPLE_RATE = 48000
SAMPLES = 10 * SAMPLE_RATE
WIDTH = 512
N_FFT, HOP, BANDS = 1024, 480, 64
FLOOR = 1e-10
SIZE, PATCH, WINDOW = 256, 4, 8  # the spectrogram folded to 256 x 256; patches of 4 x 4; windows of 8 x 8 patches
HEADS = (4, 8, 16, 32)
_MOST_BLOCKS = 64
_BATCH_NORM_EPSILON = _LAYER_NORM_EPSILON = 1e-5


def load(path) -> dict[str, jax.Array]:
  """The audio encoder's weights, float32 by laion_clap's names.

  Raises UserError: no such file, damaged, or not the tensors of CLAP without fusion.
  """
  from m2l2.interop import codicodec
  state = codicodec.read_state_dict(path, nested='state_dict', of='LAION-CLAP', published='630k-audioset-best.pt')
  state = {name.removeprefix('module.'): tensor for name, tensor in state.items()}
  if any('fusion_model' in name or 'mel_conv2d' in name for name in state):
    raise UserError(f'{path}: is a CLAP with fusion; the published distances take the one without')
  first = state.get('audio_branch.patch_embed.proj.weight')
  if first is None:
    raise UserError(f'{path}: holds no tensor audio_branch.patch_embed.proj.weight: not the weights of LAION-CLAP')
  depths = [sum(f'audio_branch.layers.{layer}.blocks.{block}.norm1.weight' in state for block in range(_MOST_BLOCKS))
            for layer in range(len(HEADS))]
  return check_shapes(state, shapes(width=first.shape[0], depths=depths), path=path, of='LAION-CLAP')


def shapes(*, width: int = 96, depths=(2, 2, 6, 2)) -> dict[str, tuple[int, ...]]:
  """Shapes of all tensors behind the audio embedding, by laion_clap's names; the defaults are 630k-audioset's."""
  shape_of = {'logmel_extractor.melW': (N_FFT // 2 + 1, BANDS),
              **{f'bn0.{name}': (BANDS,) for name in ('weight', 'bias', 'running_mean', 'running_var')},
              'patch_embed.proj.weight': (width, 1, PATCH, PATCH), 'patch_embed.proj.bias': (width,),
              **_norm('patch_embed.norm', width)}
  for layer, (depth, heads) in enumerate(zip(depths, HEADS)):
    d = width * 2 ** layer
    for block in range(depth):
      at = f'layers.{layer}.blocks.{block}'
      shape_of |= {**_norm(f'{at}.norm1', d), **_norm(f'{at}.norm2', d),
                   f'{at}.attn.relative_position_bias_table': ((2 * WINDOW - 1) ** 2, heads),
                   **_linear(f'{at}.attn.qkv', d, 3 * d), **_linear(f'{at}.attn.proj', d, d),
                   **_linear(f'{at}.mlp.fc1', d, 4 * d), **_linear(f'{at}.mlp.fc2', 4 * d, d)}
    if layer < len(HEADS) - 1:
      shape_of |= {**_norm(f'layers.{layer}.downsample.norm', 4 * d),
                   f'layers.{layer}.downsample.reduction.weight': (2 * d, 4 * d)}
  shape_of |= _norm('norm', 8 * width)
  return {**{f'audio_branch.{name}': shape for name, shape in shape_of.items()},
          **_linear('audio_projection.0', 8 * width, WIDTH), **_linear('audio_projection.2', WIDTH, WIDTH)}


def _norm(name, width):
  return {f'{name}.weight': (width,), f'{name}.bias': (width,)}


def _linear(name, into, out):
  return {f'{name}.weight': (out, into), f'{name}.bias': (out,)}


def embed(params, audio, *, sample_rate: int) -> np.ndarray:
  """float [channels, samples] or [samples] in [-1, 1] at `sample_rate` (Hz) -> float32 [1, 512], of unit length."""
  return np.asarray(network(params, ten_seconds(audio, sample_rate=sample_rate)[None]))


def ten_seconds(audio, *, sample_rate: int) -> np.ndarray:
  """float32 [480000], mono: the middle of the clip, or the clip repeated."""
  mono = pairs.prepared(audio, sample_rate=sample_rate, to_rate=SAMPLE_RATE, what='audio').astype(np.float32)
  start = max(0, len(mono) - SAMPLES) // 2
  mono = np.tile(mono[start:start + SAMPLES], max(1, SAMPLES // len(mono)))
  return np.pad(mono, (0, SAMPLES - len(mono)))


@Told
@jax.jit
def network(params, audio: jax.Array) -> jax.Array:
  """[B, 480000] at 48 kHz -> [B, 512]."""
  branch = {name.removeprefix('audio_branch.'): value for name, value in params.items()}
  x = _patches(branch, _image(branch, audio))
  for layer, heads in enumerate(HEADS):
    depth = sum(f'layers.{layer}.blocks.{block}.norm1.weight' in branch for block in range(_MOST_BLOCKS))
    for block in range(depth):
      x = _block(branch, f'layers.{layer}.blocks.{block}', x, heads=heads, shift=WINDOW // 2 * (block % 2))
    if layer < len(HEADS) - 1:
      x = _merge(branch, f'layers.{layer}.downsample', x)
  x = _layer_norm(branch, 'norm', x).mean(axis=(1, 2))
  x = _dense(params, 'audio_projection.2', jax.nn.relu(_dense(params, 'audio_projection.0', x)))
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _image(params, audio):
  """Log-mel spectrogram in dB, normalised, stretched to 1024 frames, as four strips one under another: [B, 256,
  256]."""
  padded = jnp.pad(audio, ((0, 0), (N_FFT // 2, N_FFT // 2)), mode='reflect')
  starts = HOP * np.arange(1 + SAMPLES // HOP)
  frames = padded[:, starts[:, None] + np.arange(N_FFT)]
  hann = .5 - .5 * np.cos(2 * np.pi * np.arange(N_FFT) / N_FFT)
  power = jnp.abs(jnp.fft.rfft(frames * hann[None, None].astype(np.float32))) ** 2
  x = 10 * jnp.log10(jnp.maximum(power @ params['logmel_extractor.melW'], FLOOR))
  scale = params['bn0.weight'] / jnp.sqrt(params['bn0.running_var'] + _BATCH_NORM_EPSILON)
  x = _affine(x, scale, params['bn0.bias'] - params['bn0.running_mean'] * scale)
  strips = SIZE // BANDS
  x = jnp.einsum('ts,bsf->btf', _stretch(x.shape[1], SIZE * strips), x)
  return x.reshape(-1, strips, SIZE, BANDS).transpose(0, 1, 3, 2).reshape(-1, SIZE, SIZE)


@functools.cache
def _stretch(size: int, target: int) -> np.ndarray:
  """Bicubic interpolation (a = -.75, ends kept, edges repeated) as a matrix: float32 [target, size]."""
  place = np.arange(target) * (size - 1) / (target - 1)
  first = np.floor(place).astype(int)
  matrix = np.zeros((target, size))
  for offset in (-1, 0, 1, 2):
    far = np.abs(place - first - offset)
    a = -.75
    near_weight = (a + 2) * far ** 3 - (a + 3) * far ** 2 + 1
    far_weight = a * far ** 3 - 5 * a * far ** 2 + 8 * a * far - 4 * a
    weight = np.where(far <= 1, near_weight, far_weight)
    np.add.at(matrix, (np.arange(target), np.clip(first + offset, 0, size - 1)), weight)
  return matrix.astype(np.float32)


def _patches(params, image):
  """[B, 256, 256] -> [B, 64, 64, D]."""
  kernel = params['patch_embed.proj.weight'].transpose(2, 3, 1, 0)
  x = jax.lax.conv_general_dilated(image[..., None], kernel, (PATCH, PATCH), 'VALID',
                                   dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  return _layer_norm(params, 'patch_embed.norm', x + jnp.broadcast_to(params['patch_embed.proj.bias'], x.shape))


def _block(params, name, x, *, heads, shift):
  """Attention within windows, shifted in every other block, and an MLP: [B, H, W, D]."""
  height, width, d = x.shape[1:]
  shift = shift if height > WINDOW else 0
  y = jnp.roll(_layer_norm(params, f'{name}.norm1', x), (-shift, -shift), axis=(1, 2))
  y = y.reshape(-1, height // WINDOW, WINDOW, width // WINDOW, WINDOW, d).transpose(0, 1, 3, 2, 4, 5)
  y = y.reshape(-1, height * width // WINDOW ** 2, WINDOW ** 2, d)
  y = _attention(params, f'{name}.attn', y, heads=heads, mask=_mask(height, width, shift))
  y = y.reshape(-1, height // WINDOW, width // WINDOW, WINDOW, WINDOW, d).transpose(0, 1, 3, 2, 4, 5).reshape(x.shape)
  x = x + jnp.roll(y, (shift, shift), axis=(1, 2))
  y = jax.nn.gelu(_dense(params, f'{name}.mlp.fc1', _layer_norm(params, f'{name}.norm2', x)), approximate=False)
  return x + _dense(params, f'{name}.mlp.fc2', y)


def _attention(params, name, x, *, heads, mask):
  """Of [B, windows, 64, D]."""
  q, k, v = jnp.moveaxis(_dense(params, f'{name}.qkv', x).reshape(*x.shape[:-1], 3, heads, -1), -3, 0)
  bias = params[f'{name}.relative_position_bias_table'][_relative_positions()]  # [64, 64, heads]
  bias = bias.transpose(2, 0, 1)[None] + mask[:, None]  # [windows, heads, 64, 64]
  scores = jnp.einsum('bwqhk,bwshk->bwhqs', q * q.shape[-1] ** -.5, k) + bias[None]
  mixed = jnp.einsum('bwhqs,bwshk->bwqhk', jax.nn.softmax(scores), v)
  return _dense(params, f'{name}.proj', mixed.reshape(x.shape))


@functools.cache
def _relative_positions() -> np.ndarray:
  """Row of the bias table for each pair of places in a window: int [64, 64]."""
  places = np.stack(np.meshgrid(np.arange(WINDOW), np.arange(WINDOW), indexing='ij')).reshape(2, -1)
  down, right = places[:, :, None] - places[:, None] + WINDOW - 1
  return down * (2 * WINDOW - 1) + right


@functools.cache
def _mask(height: int, width: int, shift: int) -> np.ndarray:
  """-100 where the cyclic shift brought together what is not adjacent: float32 [windows, 64, 64]."""
  region = np.zeros((height, width))
  if shift:
    edges = (slice(0, -WINDOW), slice(-WINDOW, -shift), slice(-shift, None))
    for i, rows in enumerate(edges):
      for j, columns in enumerate(edges):
        region[rows, columns] = 3 * i + j
  blocks = region.reshape(height // WINDOW, WINDOW, width // WINDOW, WINDOW)
  windows = blocks.transpose(0, 2, 1, 3).reshape(-1, WINDOW ** 2)
  return np.where(windows[:, None] == windows[:, :, None], 0, -100).astype(np.float32)


def _merge(params, name, x):
  """Four neighbours into one of twice the width: [B, H, W, D] -> [B, H / 2, W / 2, 2 D]."""
  x = jnp.concatenate([x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))], axis=-1)
  return _layer_norm(params, f'{name}.norm', x) @ params[f'{name}.reduction.weight'].T


def _layer_norm(params, name, x):
  x = x - x.mean(axis=-1, keepdims=True)
  x = x / jnp.sqrt(jnp.mean(x ** 2, axis=-1, keepdims=True) + _LAYER_NORM_EPSILON)
  return _affine(x, params[f'{name}.weight'], params[f'{name}.bias'])


def _affine(x, scale, offset):
  """The last axis of x times [D] plus [D]."""
  return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(offset, x.shape)


def _dense(params, name, x):
  y = x @ params[f'{name}.weight'].T
  return y + jnp.broadcast_to(params[f'{name}.bias'], y.shape)
