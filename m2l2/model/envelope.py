"""The magnitude envelope: a head start for the latents in short runs (off in the paper's recipe).

The decoder also predicts log(1 + 10 |c|) of every bin. That loss reaches the latents from the first step,
and the prediction can scale the consistency model's preconditioning (consistency.local).
"""

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.model.layers import ZEROS, normal, param
from m2l2.model.patchify import OutputHead

SLOPE = 10.0  # log(1 + 10 |c|): linear below a tenth of a typical compressed magnitude, logarithmic above


def log_magnitude(spec):
  """Compressed spectrogram [..., 2C] -> log(1 + 10 |c|) [..., C]; zero gradient at 0."""
  parts = spec.reshape(*spec.shape[:-1], -1, 2)
  square = jnp.sum(jnp.square(parts), axis=-1)
  positive = square > 1e-30
  return jnp.log1p(SLOPE * jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0))


def deviation(log_mag, *, floor: float):
  """Predicted log-magnitudes [..., C] -> standard deviation of each real and imaginary part [..., 2C].

  A complex Gaussian with deviation s per part has median magnitude 1.177 s; an L1 fit gives medians.
  """
  magnitude = jnp.expm1(jnp.clip(log_mag, 0.0, 7.0)) / SLOPE
  return jnp.repeat(jnp.maximum(magnitude / 1.1774, floor), 2, axis=-1)


class EnvelopeHead(nnx.Module):
  """Finest decoder map [N, F', T', C] -> log(1 + 10 |c|) [N, F, T, channels] float32."""

  def __init__(self, dim, channels, *, bins, stem, rngs):
    self.head = OutputHead(dim, channels, stem=stem, init=normal(0.02), rngs=rngs)
    self.bias = param(rngs, (bins, 1, channels), ('freq', None, None), ZEROS)

  def __call__(self, x):
    return self.head(x).astype(jnp.float32) + self.bias[...][None]


def envelope_loss(predicted, spec):
  """Mean |log-magnitude error| per chunk: [B, S, F, T, C] and [B, S, F, T, 2C] -> [B, S]."""
  return jnp.mean(jnp.abs(predicted - jax.lax.stop_gradient(log_magnitude(spec))), axis=(2, 3, 4))
