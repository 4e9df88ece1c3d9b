"""The consistency model's network: a noisy pair of chunks -> its raw output (figure 1, "Consistency Model").

Preconditioning lives in consistency.py; here the input is already scaled.
"""

import math

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.model.layers import ZEROS, Linear, as_last, normal, param
from m2l2.model.patchify import DePatchifier, OutputHead, Patchifier
from m2l2.model.transformer import Transformer


def noise_features(sigma, *, width: int):
  """sigma [...] -> [..., width]: sines, then cosines, of ln(sigma)/4 at frequencies 1 ... 1e-4."""
  frequencies = 1e-4 ** (jnp.arange(width // 2, dtype=jnp.float32) / (width // 2 - 1))
  logs = jnp.log(sigma.astype(jnp.float32))[..., None] / 4
  angles = logs * as_last(frequencies, logs)
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class NoiseEmbedding(nnx.Module):
  """Sinusoid -> three times (Linear, SiLU): the condition of every norm."""

  def __init__(self, width, *, rngs):
    for i in range(3):
      setattr(self, f'linear{i}', Linear(width, width, axes=('cond', None), rngs=rngs))

  def __call__(self, x):
    for i in range(3):
      x = jax.nn.silu(getattr(self, f'linear{i}')(x))
    return x


class NoiseGains(nnx.Module):
  """Raw sinusoid -> 1 + Linear_zero(...): a gain per frequency row for the input and for the output."""

  def __init__(self, width, rows, *, rngs):
    for i in range(2):
      setattr(self, f'linear{i}', Linear(width, width, axes=('cond', None), rngs=rngs))
    self.head = Linear(width, (2, rows), axes=('cond', None, 'freq'), init=ZEROS, rngs=rngs)

  def __call__(self, x):
    for i in range(2):
      x = jax.nn.silu(getattr(self, f'linear{i}')(x))
    return 1 + self.head(x)


class Denoiser(nnx.Module):
  """Patchify each chunk with the decoder's features, attend chunk-causally over S chunks, de-patchify.

  Cross connections (where the features have 'maps') go into the patchifier, one per conv block; skips from each of its
  blocks into the de-patchifier; both merge as (a + b) / sqrt 2. `latents` adds the summary embeddings to the tokens.

  Products read `dtype`; all else is float32, because the loss compares two outputs that late in training differ by a
  thousandth, which is less than roundings to bfloat16 on the way would move them.
  """

  def __init__(self, *, channels, bins, stem, grid, widths, blocks, strides, transformer, chunks, num_latents,
               latent_dim, registers, latents, envelope_input, cond_dim, remat, tile, dtype, rngs):
    dim = widths[-1]
    num_tokens = grid[0] * grid[1]
    rows = bins // stem[0]
    self.embedding = NoiseEmbedding(cond_dim, rngs=rngs)
    self.gains = NoiseGains(cond_dim, rows, rngs=rngs)
    in_channels = channels * (3 if envelope_input else 2)
    ladder = dict(widths=widths, blocks=blocks, strides=strides, cond_dim=cond_dim, remat=remat, tile=tile,
                  dtype=dtype)
    self.patchifier = Patchifier(in_channels, stem=stem, rngs=rngs, **ladder)
    self.latents_in = Linear(latent_dim, dim, axes=('latent_dim', 'embed'), rngs=rngs) if latents else None
    self.registers = (
        param(rngs, (registers, dim), ('registers', 'embed'), normal(dim ** -0.5)) if registers else None)
    extra = registers + (num_latents if latents else 0)
    self.transformer = Transformer(dim, tokens=num_tokens + extra, chunks=chunks, cond_dim=cond_dim, remat=remat,
                                   rngs=rngs, **transformer)
    self.depatchifier = DePatchifier(grid=grid, rngs=rngs, **ladder)
    self.output = OutputHead(widths[0], 2 * channels, stem=stem, pack=self.patchifier.packs[0], cond_dim=cond_dim,
                             dtype=dtype, rngs=rngs)
    self.envelope_input = envelope_input
    self.cond_dim = cond_dim
    self.dtype = dtype

  def __call__(self, x, sigma, features):
    """x [B, S, F, T, 2C] scaled noisy chunks, sigma [B, S], the decoder's features (plus 'z' where latents
    enter) -> [B, S, F, T, 2C] float32. S is 1 or up to the `chunks` the positions were made for."""
    b, s = x.shape[:2]
    sinusoid = noise_features(sigma, width=self.cond_dim)
    cond = self.embedding(sinusoid)
    gains = self.gains(sinusoid).reshape(b * s, 2, -1)
    flat_cond = cond.reshape(b * s, -1)

    if self.envelope_input:
      x = jnp.concatenate([x, jax.lax.stop_gradient(features['log_magnitude'])], axis=-1)
    x = x.reshape(b * s, *x.shape[2:])
    maps = [m.reshape(b * s, *m.shape[2:]) for m in features['maps']] if 'maps' in features else None
    tokens, skips = self.patchifier(x, gain=gains[:, 0], features=maps, cond=flat_cond)

    num_tokens, dim = tokens.shape[1:]
    parts = [tokens.reshape(b, s, num_tokens, dim)]
    if self.latents_in is not None:
      parts.append(self.latents_in(features['z'].astype(self.dtype), jnp.float32))
    if self.registers is not None:
      parts.append(jnp.broadcast_to(self.registers[...], (b, s, *self.registers.shape)))
    h = self.transformer(jnp.concatenate(parts, axis=2), cond, self.dtype)
    h = self.transformer.norm_output(h[:, :, :num_tokens], cond)

    h, _ = self.depatchifier(h.reshape(b * s, num_tokens, dim), features=skips, cond=flat_cond)
    out = self.output(h, gain=gains[:, 1], cond=flat_cond)
    return out.reshape(b, s, *out.shape[1:])


def token_grid(bins, frames, stem, strides):
  """(F, T) of the deepest map; raises ValueError where the strides do not divide."""
  total = [stem[i] * math.prod(stride[i] for stride in strides) for i in (0, 1)]
  if bins % total[0] or frames % total[1]:
    raise ValueError(f'stem and strides reduce by {total[0]} x {total[1]}, which does not divide {bins} x {frames}')
  return bins // total[0], frames // total[1]
