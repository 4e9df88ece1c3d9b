"""Short-time Fourier transform and its inverse by weighted overlap-add."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Complex, Float
import numpy as np

Arrays = jax.Array | np.ndarray


def stft(audio: Float[Arrays, '*lead N'], *, window: int, hop: int) -> Complex[Arrays, '*lead frames bins']:
  """[..., N] float32 -> complex64 [..., frames, window // 2 + 1]; frames by plain unfolding, no padding.

  Periodic Hann window, no normalisation: a unit sine on a bin's centre has magnitude window / 4.
  """
  blocks = (audio.shape[-1] - window) // hop + window // hop
  hops = audio[..., :blocks * hop].reshape(*audio.shape[:-1], blocks, hop)
  shifts = window // hop
  frames = jnp.concatenate([hops[..., i:blocks - shifts + 1 + i, :] for i in range(shifts)], axis=-1)
  return jnp.fft.rfft(frames * _as_last(_hann(window), frames))


def istft(spec: Complex[Arrays, '*lead frames bins'], *, window: int, hop: int) -> Float[Arrays, '*lead N']:
  """complex64 [..., frames, bins] -> [..., frames * hop + window - hop] float32; missing bins are zero.

  Each frame is weighted by the Hann window over the sum of squared windows at its hop phase, so what all
  window / hop frames cover is exact; the outer window - hop samples come out faded.
  """
  shifts = window // hop
  hann = _hann(window)
  # Per hop phase, not per sample of the signal: the fade at the edges stays, as in every overlap-add.
  norm = np.tile(np.square(hann).reshape(shifts, hop).sum(0), shifts)
  missing = window // 2 + 1 - spec.shape[-1]
  spec = jnp.pad(spec, [(0, 0)] * (spec.ndim - 1) + [(0, missing)])
  frames = jnp.fft.irfft(spec, n=window)
  frames = frames * _as_last((hann / norm).astype(np.float32), frames)
  frames = frames.reshape(*frames.shape[:-1], shifts, hop)
  count = frames.shape[-3]
  lead = [(0, 0)] * (frames.ndim - 3)
  hops = functools.reduce(
      jnp.add, [jnp.pad(frames[..., i, :], lead + [(i, shifts - 1 - i), (0, 0)]) for i in range(shifts)])
  return hops.reshape(*hops.shape[:-2], (count + shifts - 1) * hop)


@functools.cache
def _hann(window: int):
  return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)).astype(np.float32)


def _as_last(vector, x):
  """[W] -> [1, ..., 1, W] of x's rank: the tests refuse silent rank promotion."""
  return vector.reshape((1,) * (x.ndim - 1) + vector.shape)
