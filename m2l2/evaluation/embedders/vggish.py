"""VGGish (Hershey et al., 2017) as in the published Frechet audio distances: 128 numbers per .96 s, no PCA, no
activation after the last layer.

The user provides the weights: the state dict of torchvggish (vggish-10086976.pth, or its tensors as .safetensors),
which holds Google's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from m2l2.compiling import Told
from m2l2.errors import UserError
from m2l2.evaluation.metrics import pairs

SAMPLE_RATE = 16000
WIDTH = 128
WINDOW, HOP, N_FFT = 400, 160, 512  # 25 ms every 10 ms
BANDS, MIN_HZ, MAX_HZ = 64, 125., 7500.
LOG_OFFSET = .01
FRAMES = 96  # of an example; they do not overlap
BATCH = 4
# torchvggish's indices of the convolutions, and 'M' for 2 x 2 max pooling.
_LAYERS = (0, 'M', 3, 'M', 6, 8, 'M', 11, 13, 'M')
_CHANNELS = {0: (1, 64), 3: (64, 128), 6: (128, 256), 8: (256, 256), 11: (256, 512), 13: (512, 512)}
_DENSE = {0: (512 * 4 * 6, 4096), 2: (4096, 4096), 4: (4096, WIDTH)}
SHAPES = {
    **{f'features.{i}.weight': (out, into, 3, 3) for i, (into, out) in _CHANNELS.items()},
    **{f'features.{i}.bias': (out,) for i, (_, out) in _CHANNELS.items()},
    **{f'embeddings.{i}.weight': (out, into) for i, (into, out) in _DENSE.items()},
    **{f'embeddings.{i}.bias': (out,) for i, (_, out) in _DENSE.items()},
}


def load(path) -> dict[str, jax.Array]:
  """The weights, float32 by torchvggish's names.

  Raises UserError: no such file, damaged, or not VGGish's tensors.
  """
  from m2l2.interop import codicodec
  state = codicodec.read_state_dict(path, nested='state_dict', of='VGGish', published='vggish-10086976.pth')
  return check_shapes(state, SHAPES, path=path, of='VGGish')


def check_shapes(state, shapes, *, path, of: str) -> dict[str, jax.Array]:
  """The tensors named in `shapes` as float32. Raises UserError: one is missing or has another shape."""
  for name, shape in shapes.items():
    if name not in state:
      raise UserError(f'{path}: holds no tensor {name}: not the weights of {of}')
    if state[name].shape != shape:
      raise UserError(f'{path}: {name} is {list(state[name].shape)}, and in {of} it is {list(shape)}')
  return {name: jnp.asarray(state[name], jnp.float32) for name in shapes}


def embed(params, audio, *, sample_rate: int) -> np.ndarray:
  """float [channels, samples] or [samples] in [-1, 1] at `sample_rate` (Hz) -> float32 [examples, 128], one every .96
  s.

  Raises UserError: shorter than an example.
  """
  frames = log_mel(audio, sample_rate=sample_rate)
  count = len(frames) // FRAMES
  if not count:
    raise UserError('VGGish needs clips of .98 s or more, and this one is shorter: leave it out')
  examples = frames[:count * FRAMES].reshape(count, FRAMES, BANDS)
  examples = np.pad(examples, ((0, -count % BATCH), (0, 0), (0, 0)))
  return np.concatenate([network(params, examples[i:i + BATCH]) for i in range(0, len(examples), BATCH)])[:count]


def log_mel(audio, *, sample_rate: int) -> np.ndarray:
  """ln(.01 + mel magnitudes), float32 [1 + (samples - 400) // 160, 64], samples counted at 16 kHz; frames are not
  centred."""
  mono = pairs.prepared(audio, sample_rate=sample_rate, to_rate=SAMPLE_RATE, what='audio')
  if len(mono) < WINDOW:
    return np.zeros((0, BANDS), np.float32)
  frames = np.lib.stride_tricks.sliding_window_view(mono, WINDOW)[::HOP]
  hann = .5 - .5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
  return np.log(np.abs(np.fft.rfft(frames * hann, N_FFT)) @ mel_filterbank() + LOG_OFFSET).astype(np.float32)


@functools.cache
def mel_filterbank() -> np.ndarray:
  """Triangles in mel (not in Hz), of height 1, on the scale 1127 ln(1 + f / 700): float64 [257, 64]."""
  def mel(hz):
    return 1127 * np.log(1 + hz / 700)
  edges = np.linspace(mel(MIN_HZ), mel(MAX_HZ), BANDS + 2)
  bins = mel(np.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1))[:, None]
  rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
  falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
  return np.maximum(0, np.minimum(rising, falling))


def network(params, examples: jax.Array | np.ndarray) -> jax.Array:
  """Log-mel examples [B, 96, 64] -> [B, 128]."""
  # Compiled apart: as one, XLA on CPUs computes the last pooling anew for each of the 4096 outputs, and takes 50 times
  # as long.
  return _dense_layers(params, _features(params, examples))


@Told
@jax.jit
def _features(params, examples):
  x = examples[..., None]
  for layer in _LAYERS:
    if layer == 'M':
      x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), 'VALID')
    else:
      kernel = params[f'features.{layer}.weight'].transpose(2, 3, 1, 0)
      x = jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
      x = jax.nn.relu(x + jnp.broadcast_to(params[f'features.{layer}.bias'], x.shape))
  return x.reshape(len(x), -1)


@Told
@jax.jit
def _dense_layers(params, x):
  for layer in (0, 2, 4):
    x = x @ params[f'embeddings.{layer}.weight'].T + params[f'embeddings.{layer}.bias'][None]
    x = jax.nn.relu(x) if layer < 4 else x
  return x
