"""Waveform <-> compressed complex spectrogram, in chunks.

A chunk is `frames` STFT frames. Spectrograms are `[B, S, F, T, C]`: batch, chunk, frequency bin, frame,
and the real and imaginary parts of each audio channel in the order L_re, L_im, R_re, R_im. Magnitudes are
compressed by beta * |c|^alpha (Music2Latent, section 3), either of the complex number (`polar`: the phase
stays) or of its two parts apart (`component`: as CoDiCodec does).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float
import numpy as np

from m2l2.kernels.stft import istft, stft

Arrays = jax.Array | np.ndarray
TRANSFORMS = ('polar', 'component')
EDGES = ('pad', 'none')


@dataclasses.dataclass(frozen=True)
class SignalLayout:
  """How a signal of `num_samples` lies in frames and chunks."""
  num_samples: int
  lead: int    # zeros put before the first sample
  frames: int  # frames that hold signal
  chunks: int  # ceil(frames / frames per chunk)


@dataclasses.dataclass(frozen=True)
class Representation:
  """STFT settings; one instance is shared by training and inference.

  Attributes:
    channels: audio channels (1 or 2).
    window: samples of the periodic Hann window (= FFT size).
    hop: samples between frames; divides `window`, at most half of it.
    bins: frequency bins kept, from DC up (window // 2 drops just the Nyquist bin).
    frames: frames per chunk.
    transform: 'polar' or 'component'.
    alpha, beta: exponent and gain of the compression.
    edges: 'pad' puts window - hop zeros before the signal and frames over its end, so that no sample is
      faded by a half-covered frame; 'none' frames just what is there (the ancestors' way).
  """
  channels: int = 1
  window: int = 2048
  hop: int = 512
  bins: int = 1024
  frames: int = 64
  transform: str = 'polar'
  alpha: float = 0.65
  beta: float = 0.34
  edges: str = 'pad'

  def __post_init__(self):
    if self.transform not in TRANSFORMS:
      raise ValueError(f'transform is {self.transform!r}; choose from {TRANSFORMS}')
    if self.edges not in EDGES:
      raise ValueError(f'edges is {self.edges!r}; choose from {EDGES}')
    if self.channels not in (1, 2):
      raise ValueError(f'channels is {self.channels}; it is 1 (mono) or 2 (stereo)')
    if self.frames < 1:
      raise ValueError(f'frames is {self.frames}; a chunk needs at least one frame')
    if self.hop < 1 or self.window % self.hop or self.window < 2 * self.hop:
      raise ValueError(f'hop {self.hop} must divide window {self.window} at least twice')
    if not 0 < self.bins <= self.window // 2:
      raise ValueError(f'bins {self.bins} must be in 1..{self.window // 2}')

  @property
  def overlap(self) -> int:
    """Samples of a frame that the next frame covers too."""
    return self.window - self.hop

  @property
  def chunk_samples(self) -> int:
    """Samples from the start of one chunk to the start of the next."""
    return self.frames * self.hop

  @property
  def spec_channels(self) -> int:
    return 2 * self.channels

  @property
  def chunk_shape(self) -> tuple:
    """(F, T, 2C) of a chunk's spectrogram."""
    return self.bins, self.frames, self.spec_channels

  def crop_samples(self, chunks: int) -> int:
    """Samples that make exactly `chunks` chunks without padding: 2 chunks of 64 x 512 take 67072."""
    return chunks * self.chunk_samples + self.overlap

  def layout(self, num_samples: int) -> SignalLayout:
    """Frames and chunks of a signal of `num_samples` >= 1 samples."""
    if num_samples < 1:
      raise ValueError('a signal needs at least one sample')
    lead = self.overlap if self.edges == 'pad' else 0
    frames = -(-(num_samples + lead) // self.hop) if lead else max(1, (num_samples - self.window) // self.hop + 1)
    return SignalLayout(num_samples, lead, frames, -(-frames // self.frames))

  def analyse(self, audio: Float[Arrays, '*lead C N']) -> Float[Arrays, '*lead S F T 2*C']:
    """[..., C, N] float32 with N = crop_samples(S) -> spectrogram [..., S, F, T, 2C] float32."""
    chunks, rest = divmod(audio.shape[-1] - self.overlap, self.chunk_samples)
    if rest or chunks < 1:
      raise ValueError(f'analyse takes crop_samples(S) samples; {audio.shape[-1]} is not a whole number of chunks')
    spec = stft(audio, window=self.window, hop=self.hop)[..., :self.bins]   # [..., C, S*T, F]
    spec = self.compress(jnp.stack([spec.real, spec.imag], axis=-1))        # [..., C, S*T, F, 2]
    spec = spec.reshape(*spec.shape[:-3], chunks, self.frames, self.bins, 2)
    # [..., C, S, T, F, 2] -> [..., S, F, T, C, 2]
    spec = jnp.moveaxis(spec, (-5, -3), (-2, -3))
    return spec.reshape(*spec.shape[:-2], self.spec_channels)

  def synthesise(self, spec: Float[Arrays, '*lead S F T D'], tail: Float[Arrays, '*lead C overlap'] | None = None
                 ) -> tuple[Float[Arrays, '*lead C N'], Float[Arrays, '*lead C overlap']]:
    """Spectrogram [..., S, F, T, 2C] -> audio [..., C, S*T*hop] and the tail [..., C, overlap].

    The tail is what the last frames add beyond the block: give it to the next block's call, or append it
    to the last block. Samples that all window/hop frames cover are exact but for the Nyquist bin.
    """
    *lead, chunks, bins, frames, _ = spec.shape
    spec = spec.reshape(*lead, chunks, bins, frames, self.channels, 2)
    spec = jnp.moveaxis(spec, (-2, -4), (-5, -2))      # [..., C, S, T, F, 2]
    spec = spec.reshape(*lead, self.channels, chunks * frames, bins, 2)
    spec = self.expand(spec)
    audio = istft(jax.lax.complex(spec[..., 0], spec[..., 1]), window=self.window, hop=self.hop)
    if tail is not None:
      audio = jnp.asarray(audio).at[..., :self.overlap].add(tail)
    return audio[..., :-self.overlap], audio[..., -self.overlap:]

  def compress(self, parts: Float[Arrays, '*shape 2']) -> Float[Arrays, '*shape 2']:
    """Real and imaginary parts [..., 2] -> compressed parts: |c| -> beta |c|^alpha."""
    if self.transform == 'polar':
      return parts * _safe_power(_square_sum(parts), (self.alpha - 1) / 2) * self.beta
    return jnp.sign(parts) * _safe_power(jnp.square(parts), self.alpha / 2) * self.beta

  def expand(self, parts: Float[Arrays, '*shape 2']) -> Float[Arrays, '*shape 2']:
    """The inverse of `compress`."""
    gain = self.beta ** (-1 / self.alpha)
    if self.transform == 'polar':
      return parts * _safe_power(_square_sum(parts), (1 / self.alpha - 1) / 2) * gain
    return jnp.sign(parts) * _safe_power(jnp.square(parts), 0.5 / self.alpha) * gain


def _square_sum(parts):
  return jnp.sum(jnp.square(parts), axis=-1, keepdims=True)


def _safe_power(square, exponent: float):
  """square ** exponent where square > 0, else 0, with a zero gradient there instead of nan."""
  positive = square > 1e-30  # below, float32 squares of the parts have lost their digits
  return jnp.where(positive, jnp.where(positive, square, 1.0) ** exponent, 0.0)
