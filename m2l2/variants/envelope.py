"""The magnitude envelope: a head start for the latents in short runs (off in the paper's recipe).

The decoder also predicts the log-magnitude of every bin. That loss reaches the latents from the first
step, and the prediction can scale the consistency model's preconditioning (variants.local_scale).

Log-magnitudes here are (log(1 + 100 |c|) - 2) / 1.5 of compressed magnitudes |c|: logarithmic above about
0.01 (-100 dB of a full-scale sine), linear below, with mean near 0 and deviation near 1 on music.
"""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from m2l2.kernels.contraction import contract
from m2l2.model.parameters import ZEROS, normal, param

SLOPE, CENTRE, UNIT = 100.0, 2.0, 1.5
# The loss aims at this quantile of the magnitude. Where the prediction cannot resolve partials, few bins
# hold most of the energy: aimed at the median (0.5) it came out 5 to 7 dB too quiet, at 0.7 2 to 4 dB.
QUANTILE = 0.7
LEAST = 0.004  # deviation that scales the preconditioning: -90 dB of a full-scale sine
LARGEST = 0.999  # |z| that the linear sketch still tells apart: 9.5 times the RMS it begins with
BIAS_RATE = 10.0  # the bias learns ten times as fast as the rest: it is the music's mean spectrum


def log_magnitude(spec):
  """Compressed spectrogram [..., 2C] -> log-magnitudes [..., C]; the gradient at 0 is 0."""
  parts = spec.reshape(*spec.shape[:-1], -1, 2)
  square = jnp.sum(jnp.square(parts), axis=-1)
  positive = square > 1e-30
  magnitude = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
  return (jnp.log1p(SLOPE * magnitude) - CENTRE) / UNIT


def deviation(log_mag):
  """Predicted log-magnitudes [..., C] -> standard deviation of each real and imaginary part [..., 2C].

  The QUANTILE of a complex Gaussian's magnitude is s sqrt(-2 ln(1 - QUANTILE)) for deviation s per part.
  """
  # 8: magnitudes of 30, half as much again as a full-scale sine's 19.6.
  magnitude = jnp.expm1(jnp.clip(log_mag * UNIT + CENTRE, 0.0, 8.0)) / SLOPE
  return jnp.repeat(jnp.maximum(magnitude / math.sqrt(-2 * math.log(1 - QUANTILE)), LEAST), 2, axis=-1)


@functools.cache
def band_edges(bins: int, bands: int):
  """First bin of each band, and `bins`: int64[bands + 1].

  Bands are a bin wide at the bottom and widen exponentially, as the ear's do (from some 100 Hz on: 'log', with a linear
  start); each is at least one bin.
  """
  # The rate r at which bins (exp(r / bands) - 1) = exp(r) - 1; of two bands or more it is at most 2 ln(bins).
  low, high = 0.0, 2 * math.log(bins) + 1
  for _ in range(100):
    rate = (low + high) / 2
    low, high = (rate, high) if math.expm1(rate) < bins * math.expm1(rate / bands) else (low, rate)
  edges = [0]
  for i in range(1, bands + 1):
    ideal = round(bins * math.expm1(rate * i / bands) / math.expm1(rate)) if bands < bins else i
    edges.append(min(max(ideal, edges[-1] + 1), bins - (bands - i)))
  return np.array(edges)


def band_means(x, grid):
  """[N, F, T, C] -> its means over each of `grid`'s (bands, stretches of frames): [N, *grid]."""
  bands, times, channels = grid
  edges = band_edges(x.shape[1], bands)
  inside = np.repeat(np.eye(bands, dtype=np.float32) / np.diff(edges), np.diff(edges), axis=0)
  return jnp.einsum('nftc,fb->nbtc', x.reshape(*x.shape[:2], times, -1, channels).mean(axis=3), inside)


def spread_bands(cells, bins: int, frames: int):
  """The reverse of `band_means`: [N, bands, times, C] -> [N, bins, frames, C], each cell's value all over it."""
  bands, times = cells.shape[1:3]
  inside = np.repeat(np.eye(bands, dtype=np.float32), np.diff(band_edges(bins, bands)), axis=0)
  return jnp.repeat(jnp.einsum('nbtc,fb->nftc', cells, inside), frames // times, axis=2)


class EnvelopeHead(nnx.Module):
  """Finest decoder map [N, F', T', C] -> log-magnitudes [N, F, T, channels] float32."""

  def __init__(self, arch, *, rngs):
    self.head = arch.output_head(arch.channels, init=normal(0.02), rngs=rngs)
    self.bias = param(rngs, (arch.bins, 1, arch.channels), ('freq', None, None), ZEROS)

  def __call__(self, x):
    return self.head(x).astype(jnp.float32) + BIAS_RATE * self.bias[...][None]


def envelope_loss(predicted, spec, *, bands: int = 0):
  """Mean quantile loss of the log-magnitudes per chunk: [B, S, F, T, C], [B, S, F, T, 2C] -> [B, S].

  Twice the pinball loss, so that at QUANTILE 0.5 it would be the mean absolute error. With `bands` each of
  `band_edges` counts alike, else each bin.
  """
  error = jax.lax.stop_gradient(log_magnitude(spec)) - predicted
  # Not the maximum of both products: its gradient asks which of them the maximum equals, and where XLA computes them
  # again with another rounding, neither does.
  loss = 2 * jnp.mean(error * jnp.where(error > 0, QUANTILE, QUANTILE - 1), axis=(3, 4))
  if not bands:
    return jnp.mean(loss, axis=2)
  widths = np.diff(band_edges(loss.shape[2], bands))
  return loss @ jnp.asarray(np.repeat(1 / (bands * widths), widths), jnp.float32)


# A linear autoencoder of the envelope (`variants.sketch`), beside the networks.


class LatentSketch(nnx.Module):
  """Log-magnitudes [N, F, T, C], averaged over `grid`'s bands and stretches of frames -> latents [N, L, Z], affine.

  With EnvelopeSketch a linear autoencoder of the envelope. It can begin as the music's principal components
  (launch/research/pca_start.py); the networks then learn what it lacks. The matrix is kept 64 times its size, so that
  Adam's steps, equal for all parameters, are small for it.
  """

  def __init__(self, grid, latents, *, rngs):
    (f, t, c), (l, z) = grid, latents
    self.centre = param(rngs, (f, t, c), ('freq', None, None), ZEROS)
    self.mix = param(rngs, (f, t, c, l, z), ('freq', None, None, 'latents', 'latent_dim'), normal((f * t * c) ** -0.5))

  def __call__(self, log_mag):
    cells = band_means(log_mag, self.centre.shape) - self.centre[...][None]
    return contract(cells / 64, self.mix[...], 3)


class EnvelopeSketch(nnx.Module):
  """Latents [N, L, Z] -> log-magnitudes [N, F, T, C] by an affine map, the same over each cell of `grid`.

  The bottleneck's tanh is undone first: bent components would cost a tenth of what they say of the music.
  """

  def __init__(self, latents, grid, *, bins, frames, rngs):
    (l, z), (f, t, c) = latents, grid
    self.centre = param(rngs, (f, t, c), ('freq', None, None), ZEROS)
    self.mix = param(rngs, (l, z, f, t, c), ('latents', 'latent_dim', 'freq', None, None), normal((l * z) ** -0.5))
    self.size = bins, frames

  def __call__(self, z):
    straight = jnp.arctanh(jnp.clip(z, -LARGEST, LARGEST))
    cells = contract(straight / 32, self.mix[...], 2) + self.centre[...][None]
    return spread_bands(cells, *self.size)
