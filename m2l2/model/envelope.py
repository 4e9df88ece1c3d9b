"""The magnitude envelope: a head start for the latents in short runs (off in the paper's recipe).

The decoder also predicts the log-magnitude of every bin. That loss reaches the latents from the first
step, and the prediction can scale the consistency model's preconditioning (consistency.local).

Log-magnitudes here are (log(1 + 100 |c|) - 2) / 1.5 of compressed magnitudes |c|: logarithmic above about
0.01 (-100 dB of a full-scale sine), linear below, with mean near 0 and deviation near 1 on music.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.model.layers import ZEROS, normal, param
from m2l2.model.packing import PLAIN
from m2l2.model.patchify import OutputHead

SLOPE, CENTRE, UNIT = 100.0, 2.0, 1.5
# The loss aims at this quantile of the magnitude. Where the prediction cannot resolve partials, few bins
# hold most of the energy: aimed at the median (0.5) it came out 5 to 7 dB too quiet, at 0.7 2 to 4 dB.
QUANTILE = 0.7
BIAS_RATE = 10.0  # the bias learns ten times as fast as the rest: it is the music's mean spectrum


def log_magnitude(spec):
  """Compressed spectrogram [..., 2C] -> log-magnitudes [..., C]; the gradient at 0 is 0."""
  parts = spec.reshape(*spec.shape[:-1], -1, 2)
  square = jnp.sum(jnp.square(parts), axis=-1)
  positive = square > 1e-30
  magnitude = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
  return (jnp.log1p(SLOPE * magnitude) - CENTRE) / UNIT


def deviation(log_mag, *, floor: float):
  """Predicted log-magnitudes [..., C] -> standard deviation of each real and imaginary part [..., 2C].

  The QUANTILE of a complex Gaussian's magnitude is s sqrt(-2 ln(1 - QUANTILE)) for deviation s per part.
  """
  # 8: magnitudes of 30, half as much again as a full-scale sine's 19.6.
  magnitude = jnp.expm1(jnp.clip(log_mag * UNIT + CENTRE, 0.0, 8.0)) / SLOPE
  return jnp.repeat(jnp.maximum(magnitude / math.sqrt(-2 * math.log(1 - QUANTILE)), floor), 2, axis=-1)


class EnvelopeHead(nnx.Module):
  """Finest decoder map [N, F', T', C] -> log-magnitudes [N, F, T, channels] float32."""

  def __init__(self, dim, channels, *, bins, stem, pack=PLAIN, rngs):
    self.head = OutputHead(dim, channels, stem=stem, pack=pack, init=normal(0.02), rngs=rngs)
    self.bias = param(rngs, (bins, 1, channels), ('freq', None, None), ZEROS)

  def __call__(self, x):
    return self.head(x).astype(jnp.float32) + BIAS_RATE * self.bias[...][None]


def envelope_loss(predicted, spec):
  """Mean quantile loss of the log-magnitudes per chunk: [B, S, F, T, C], [B, S, F, T, 2C] -> [B, S].

  Twice the pinball loss, so that at QUANTILE 0.5 it would be the mean absolute error.
  """
  error = jax.lax.stop_gradient(log_magnitude(spec)) - predicted
  return 2 * jnp.mean(jnp.maximum(QUANTILE * error, (QUANTILE - 1) * error), axis=(2, 3, 4))
