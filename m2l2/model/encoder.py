"""Clean chunk -> K summary embeddings (figure 1, "Encoder")."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.kernels.contraction import contract
from m2l2.model.envelope import band_means, log_magnitude
from m2l2.model.layers import ONES, ZEROS, LayerNorm, Linear, normal, param
from m2l2.model.patchify import Patchifier, split_slots
from m2l2.model.transformer import Transformer


class LatentShortcut(nnx.Module):
  """Tokens [N, P, D] -> latents [N, L, Z]: a learned pooling over positions and a projection per latent."""

  def __init__(self, tokens, latents, *, rngs):
    (p, d), (l, z) = tokens, latents
    self.norm = LayerNorm(d, rngs=rngs)
    self.pool = param(rngs, (l, p), ('latents', 'tokens'), normal(p ** -0.5))
    self.project = param(rngs, (l, d, z), ('latents', 'embed', 'latent_dim'), normal(d ** -0.5))

  def __call__(self, tokens):
    return jnp.einsum('npd,lp,ldz->nlz', self.norm(tokens[:, None])[:, 0], self.pool[...], self.project[...])


class DenseLatentShortcut(nnx.Module):
  """Tokens [N, P, D] -> latents [N, L, Z]: each token as `width` numbers, then one affine map of all of them.

  Any latent can so depend on any place from the first step on, as in a linear autoencoder. No norm before it: how
  strong a token is counts. The bias keeps that through the norm of the latents. The large matrix is kept with unit
  variance and scaled in use, so that Adam's steps, equal for all parameters, are small for it.
  """

  def __init__(self, tokens, latents, *, width, rngs):
    (p, d), (l, z) = tokens, latents
    self.reduce = param(rngs, (d, width), ('embed', None), normal(d ** -0.5))
    self.mix = param(rngs, (p, width, l, z), ('tokens', None, 'latents', 'latent_dim'), normal(1.0))
    self.bias = param(rngs, (l, z), ('latents', 'latent_dim'), normal(1.0))

  def __call__(self, tokens):
    p, width = self.mix.shape[:2]
    narrow = tokens @ self.reduce[...] * (p * width) ** -0.5
    return contract(narrow, self.mix[...], 2) + self.bias[...][None]


class LatentSketch(nnx.Module):
  """Log-magnitudes [N, F, T, C], averaged over `grid`'s bands and stretches of frames -> latents [N, L, Z], affine.

  With decoder.EnvelopeSketch a linear autoencoder of the envelope. It can begin as the music's principal components
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


class Encoder(nnx.Module):
  """Patchify, append K learned queries and the registers, attend, keep the queries' outputs.

  Chunk-local: S is folded into the batch. The output projection starts at 0, so all latents are exactly 0
  at init; `shortcut` adds a linear path (pooled tokens -> latents) that does not.

  With `slots` above 1 the embeddings are local: each slot of the chunk's frames goes through the transformer by itself
  and has its share of the embeddings, in order.
  """

  def __init__(self, *, channels, bins, stem, grid, slots, widths, blocks, strides, transformer,
               num_latents, latent_dim, registers, magnitude_input, shortcut, shortcut_width, sketch_grid, latent_norm,
               remat, tile, dtype, rngs):
    dim = widths[-1]
    num_tokens, num_latents = grid[0] * grid[1] // slots, num_latents // slots
    in_channels = channels * (3 if magnitude_input else 2)
    self.gain = param(rngs, (bins // stem[0],), ('freq',), ONES)
    self.patchifier = Patchifier(in_channels, stem=stem, widths=widths, blocks=blocks, strides=strides,
                                 remat=remat, tile=tile, dtype=dtype, rngs=rngs)
    self.queries = param(rngs, (num_latents, dim), ('latents', 'embed'), normal(dim ** -0.5))
    self.registers = param(rngs, (registers, dim), ('registers', 'embed'), normal(dim ** -0.5))
    self.transformer = Transformer(dim, tokens=num_tokens + num_latents + registers, remat=remat, rngs=rngs,
                                   **transformer)
    self.head = Linear(dim, latent_dim, axes=('embed', 'latent_dim'), init=ZEROS, rngs=rngs)
    kind = functools.partial(DenseLatentShortcut, width=shortcut_width) if shortcut_width else LatentShortcut
    self.shortcut = kind((num_tokens, dim), (num_latents, latent_dim), rngs=rngs) if shortcut else None
    self.sketch = LatentSketch(sketch_grid, (num_latents, latent_dim), rngs=rngs) if sketch_grid else None
    self.grid, self.slots = grid, slots
    self.magnitude_input = magnitude_input
    self.latent_norm = latent_norm
    self.dtype = dtype

  def __call__(self, spec):
    """spec [B, S, F, T, 2C] float32 -> the bottleneck's input [B, S, L, Z] float32."""
    b, s = spec.shape[:2]
    x = spec.reshape(b * s, *spec.shape[2:])
    if self.magnitude_input:
      x = jnp.concatenate([x, log_magnitude(x)], axis=-1)
    tokens, _ = self.patchifier(x.astype(self.dtype), gain=self.gain[...])
    if self.slots > 1:
      tokens = split_slots(tokens, self.grid, self.slots)
    learned = jnp.concatenate([self.queries[...], self.registers[...]]).astype(self.dtype)
    learned = jnp.broadcast_to(learned, (tokens.shape[0], *learned.shape))
    x = jnp.concatenate([tokens, learned], axis=1)
    x = self.transformer(x[:, None])
    latents = x[:, :, tokens.shape[1]:tokens.shape[1] + self.queries.shape[0]]
    latents = self.head(self.transformer.norm_output(latents).astype(jnp.float32))[:, 0]
    if self.shortcut is not None:
      latents = latents + self.shortcut(tokens.astype(jnp.float32))
    if self.sketch is not None:
      latents = latents + self.sketch(log_magnitude(spec.reshape(b * s, *spec.shape[2:])))
    if self.latent_norm:
      # RMS 0.4 of each embedding: |z| > 0.99 would take two thirds of its energy in one number of 64.
      square = jnp.mean(jnp.square(latents), axis=2, keepdims=True)
      latents = 0.4 * latents * jax.lax.rsqrt(square + 1e-4)
    return latents.reshape(b, s, self.slots * latents.shape[1], latents.shape[2])
