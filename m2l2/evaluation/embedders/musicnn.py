"""musicnn (Pons and Serra, 2019): embeddings of music from a small network trained to tag it.

The weights of the PyPI package musicnn 0.1.0 (ISC licence, see m2l2/assets/musicnn) were dumped once by
tests/conformance/dump_musicnn.py; the network is written here in JAX. Two of them: 'mtt' was trained on
MagnaTagATune, 'msd' on the Million Song Dataset. Input: 3 s windows of the log-mel spectrogram at 16 kHz. Two kinds of
kernels read it: timbral ones, 7 frames wide over 40 or 70 % of the bands, and temporal ones of one band and up to 128
frames; a few layers of width 64 over time, the maximum and mean of everything over the window, and two dense layers.
"""

import functools
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np

from m2l2.compiling import Told
from m2l2.errors import UserError
from m2l2.evaluation.metrics import pairs

NAMES = ('mtt', 'msd')
SAMPLE_RATE = 16000
N_FFT, HOP, BANDS = 512, 256, 96
WINDOW_FRAMES, WINDOW_HOP = 187, 62  # 3 s of sound every second
WIDTH = 200
BATCH = 4  # windows per call: one compiled shape for clips of all lengths
_BATCH_NORM_EPSILON = 1e-3  # TensorFlow's


def embed(audio, *, sample_rate: int, name: str) -> np.ndarray:
  """Activations of the layer before the tags, after its ReLU, over the windows of a clip.

  Args:
    audio: float [channels, samples] or [samples] in [-1, 1] at `sample_rate` (Hz), at least 3 s.
    name: 'mtt' or 'msd'.
  Returns:
    float32 [windows, 200]; 1 + (frames - 187) // 62 windows, 1 + samples // 256 frames at 16 kHz.
  Raises:
    UserError: shorter than a window, not finite, or no such network.
  """
  return embed_log_mel(log_mel(audio, sample_rate=sample_rate), name=name)


def embed_log_mel(frames: np.ndarray, *, name: str) -> np.ndarray:
  """The same from the clip's `log_mel`, float32 [frames, 96]; so that two networks can share it."""
  count = 1 + (len(frames) - WINDOW_FRAMES) // WINDOW_HOP
  if count < 1:
    seconds = WINDOW_FRAMES * HOP / SAMPLE_RATE
    raise UserError(f'musicnn needs clips of {seconds:.1f} s or more, and this one is shorter: leave it out')
  starts = WINDOW_HOP * np.arange(count)
  windows = np.stack([frames[start:start + WINDOW_FRAMES] for start in starts])
  windows = np.pad(windows, ((0, -count % BATCH), (0, 0), (0, 0)))
  embedded = [penultimate(weights(name), windows[start:start + BATCH]) for start in range(0, len(windows), BATCH)]
  return np.concatenate(embedded)[:count]


def log_mel(audio, *, sample_rate: int) -> np.ndarray:
  """log10(1 + 10^4 S) of the mel power spectrogram S (librosa's: 512-point centred Hann frames every 256, 96 Slaney
  bands to 8 kHz), with S rounded to float16 as the authors do.

  Args:
    audio: float [channels, samples] or [samples] at `sample_rate` (Hz).
  Returns:
    float32 [1 + samples // 256, 96], samples counted at 16 kHz.
  """
  mono = pairs.prepared(audio, sample_rate=sample_rate, to_rate=SAMPLE_RATE, what='audio')
  filters = pairs.mel_filterbank(sample_rate=SAMPLE_RATE, n_fft=N_FFT, bands=BANDS, max_hz=SAMPLE_RATE / 2)
  blocks = pairs.magnitudes(mono, n_fft=N_FFT, hop=HOP, bins=N_FFT // 2 + 1)
  mel = np.concatenate([block ** 2 @ filters for block in blocks])
  return np.log10(1 + 1e4 * mel.astype(np.float16).astype(np.float32))


@functools.cache
def weights(name: str) -> dict[str, jax.Array]:
  """float32 arrays by TensorFlow's names, dots for slashes."""
  if name not in NAMES:
    raise UserError(f'there is no musicnn called {name!r}: pick from {", ".join(NAMES)}')
  with (resources.files('m2l2') / 'assets' / 'musicnn' / f'{name}.npz').open('rb') as file, np.load(file) as stored:
    return {key: jnp.asarray(stored[key], jnp.float32) for key in stored.files}


@Told
@jax.jit
def penultimate(params, windows: jax.Array) -> jax.Array:
  """The network up to the layer before the tags: log-mel windows float32 [B, 187, 96] -> [B, 200]."""
  normal = _batch_norm(params, 0, windows[..., None])
  # Zeros before and after in time (behind the batch norm); all places on the frequency axis, of which the strongest
  # answer counts.
  padded = jnp.pad(normal, ((0, 0), (3, 3), (0, 0), (0, 0)))
  timbral = [_convolve(params, index, padded, 'VALID').max(axis=2) for index in (0, 1)]
  temporal = [_convolve(params, index, normal, 'SAME').max(axis=2) for index in (2, 3, 4)]
  layers = [jnp.concatenate([*timbral, *temporal], axis=2)]
  x = _convolve_time(params, 5, layers[0])
  layers.append(x)
  for index in (6, 7):
    x = x + _convolve_time(params, index, x)
    layers.append(x)
  features = jnp.concatenate(layers, axis=2)
  pooled = jnp.stack([features.max(axis=1), features.mean(axis=1)], axis=2).reshape(len(features), -1)
  return jax.nn.relu(_batch_norm(params, 9, pooled) @ params['dense.kernel'] + params['dense.bias'][None])


def _convolve_time(params, index, x):
  """Seven frames of all channels: [B, T, C] -> [B, T, 64]."""
  kernel = jnp.moveaxis(_of_layer(params, 'conv2d', index, 'kernel'), 1, 2)  # [7, 1, C, 64]
  return _convolve(params, index, x[:, :, None], 'SAME', kernel)[:, :, 0]


def _convolve(params, index, x, padding, kernel=None):
  kernel = _of_layer(params, 'conv2d', index, 'kernel') if kernel is None else kernel
  y = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
  bias = jnp.broadcast_to(_of_layer(params, 'conv2d', index, 'bias'), y.shape)
  return _batch_norm(params, index + 1, jax.nn.relu(y + bias))


def _batch_norm(params, index, x):
  mean, variance, gamma, beta = (_of_layer(params, 'batch_normalization', index, name)
                                 for name in ('moving_mean', 'moving_variance', 'gamma', 'beta'))
  scale = gamma / jnp.sqrt(variance + _BATCH_NORM_EPSILON)
  return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(beta - mean * scale, x.shape)


def _of_layer(params, kind, index, name):
  return params[f'{kind}{f"_{index}" if index else ""}.{name}']
