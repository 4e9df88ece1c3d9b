"""Summary embeddings -> a pyramid of features for the consistency model (figure 1, "Decoder")."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.kernels.contraction import contract
from m2l2.model.envelope import EnvelopeHead, spread_bands
from m2l2.model.layers import ZEROS, Linear, normal, param
from m2l2.model.patchify import DePatchifier, join_slots
from m2l2.model.transformer import Transformer

LARGEST = 0.999  # |z| that the linear sketch still tells apart: 9.5 times the RMS it begins with


class TokenShortcut(nnx.Module):
  """Latents [N, L, Z] -> tokens [N, P, D]: a projection per latent, spread over positions."""

  def __init__(self, latents, tokens, *, rngs):
    (l, z), (p, d) = latents, tokens
    self.spread = param(rngs, (l, p), ('latents', 'tokens'), normal(1.0))
    self.project = param(rngs, (l, z, d), ('latents', 'latent_dim', 'embed'), normal((l * z) ** -0.5))

  def __call__(self, z):
    return jnp.einsum('nlz,lp,lzd->npd', z, self.spread[...], self.project[...])


class DenseTokenShortcut(nnx.Module):
  """Latents [N, L, Z] -> tokens [N, P, D]: one linear map to `width` numbers a token, and these to its channels."""

  def __init__(self, latents, tokens, *, width, rngs):
    (l, z), (p, d) = latents, tokens
    self.mix = param(rngs, (l, z, p, width), ('latents', 'latent_dim', 'tokens', None), normal(1.0))
    self.expand = param(rngs, (width, d), (None, 'embed'), normal(width ** -0.5))

  def __call__(self, z):
    l, size = self.mix.shape[:2]
    return contract(z * (l * size) ** -0.5, self.mix[...], 2) @ self.expand[...]


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


class Decoder(nnx.Module):
  """Mask tokens, latents and registers attend; the mask positions are de-patchified; every block's map is kept.

  With `slots` above 1 each slot of frames has mask tokens and embeddings of its own, as in the encoder.
  """

  def __init__(self, *, channels, bins, stem, grid, slots, widths, blocks, strides, transformer,
               num_latents, latent_dim, registers, shortcut, shortcut_width, sketch_grid, envelope, feature_norm, remat,
               tile, dtype, rngs):
    dim = widths[-1]
    num_tokens, num_latents = grid[0] * grid[1] // slots, num_latents // slots
    # One mask embedding a frequency row, shared by the frames: positions tell the frames apart.
    self.mask = param(rngs, (grid[0], 1, dim), ('freq', None, 'embed'), normal(dim ** -0.5))
    self.latents_in = Linear(latent_dim, dim, axes=('latent_dim', 'embed'), rngs=rngs)
    self.registers = param(rngs, (registers, dim), ('registers', 'embed'), normal(dim ** -0.5))
    self.transformer = Transformer(dim, tokens=num_tokens + num_latents + registers, output_norm=False, remat=remat,
                                   rngs=rngs, **transformer)
    self.depatchifier = DePatchifier(grid=grid, widths=widths, blocks=blocks, strides=strides, remat=remat, tile=tile,
                                      dtype=dtype, rngs=rngs)
    kind = functools.partial(DenseTokenShortcut, width=shortcut_width) if shortcut_width else TokenShortcut
    self.shortcut = kind((num_latents, latent_dim), (num_tokens, dim), rngs=rngs) if shortcut else None
    self.envelope = (
        EnvelopeHead(widths[0], channels, bins=bins, stem=stem, pack=self.depatchifier.packs[0], dtype=dtype,
                     rngs=rngs)
        if envelope else None)
    self.sketch = (
        EnvelopeSketch((num_latents, latent_dim), sketch_grid, bins=bins, frames=grid[1] * math.prod(
            stride[1] for stride in strides) * stem[1], rngs=rngs) if sketch_grid else None)
    self.grid, self.slots = grid, slots
    self.feature_norm = feature_norm
    self.dtype = dtype

  def __call__(self, z):
    """z [B, S, L, Z] float32 -> {'maps': tuple of [B, S, F_l, T_l, C_l], finest first, and, with the
    envelope head, 'log_magnitude': [B, S, F, T, C] float32}."""
    b, s = z.shape[:2]
    z = z.reshape(b * s * self.slots, z.shape[2] // self.slots, z.shape[3])
    rows, frames = self.grid[0], self.grid[1] // self.slots
    mask = jnp.broadcast_to(self.mask[...], (rows, frames, self.mask.shape[-1])).reshape(-1, self.mask.shape[-1])
    mask = jnp.broadcast_to(mask.astype(self.dtype), (z.shape[0], *mask.shape))
    registers = jnp.broadcast_to(self.registers[...].astype(self.dtype), (z.shape[0], *self.registers.shape))
    if self.shortcut is not None:
      mask = mask + self.shortcut(z).astype(self.dtype)
    x = jnp.concatenate([mask, self.latents_in(z.astype(self.dtype)), registers], axis=1)
    x = self.transformer(x[:, None])[:, 0, :mask.shape[1]]
    if self.slots > 1:
      x = join_slots(x, self.grid, self.slots)
    finest, maps = self.depatchifier(x.astype(self.dtype))
    features = {}
    if self.envelope is not None:
      features['log_magnitude'] = self.envelope(finest) + (0 if self.sketch is None else self.sketch(z))
    features['maps'] = tuple(rms_normalise(m) for m in maps) if self.feature_norm else tuple(maps)
    return jax.tree.map(lambda x: x.reshape(b, s, *x.shape[1:]), features)


def rms_normalise(x, eps=1e-4):
  """[N, F, T, C] scaled to unit mean square per item, so that no feature can grow without bound."""
  y = x.astype(jnp.float32)
  square = jnp.mean(jnp.square(y), axis=(1, 2, 3), keepdims=True)
  return (y * jax.lax.rsqrt(square + eps)).astype(x.dtype)
