"""Linear paths tokens -> latents -> tokens beside the transformers, and a norm of the latents (`variants.shortcut`,
`variants.latent_norm`).

By themselves the latents of all chunks stay alike for hundreds of steps on music: the output projection starts at 0,
and what a decoder cannot read yet is noise to the loss. Linear paths cure that from the first step on
(launch/research/learning.md). The norm keeps the tanh from saturating, which it does in stereo.
"""

from flax import nnx
import jax
import jax.numpy as jnp

from m2l2.kernels.contraction import contract
from m2l2.model.parameters import normal, param


class LatentShortcut(nnx.Module):
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


class TokenShortcut(nnx.Module):
  """Latents [N, L, Z] -> tokens [N, P, D]: one linear map to `width` numbers a token, and these to its channels."""

  def __init__(self, latents, tokens, *, width, rngs):
    (l, z), (p, d) = latents, tokens
    self.mix = param(rngs, (l, z, p, width), ('latents', 'latent_dim', 'tokens', None), normal(1.0))
    self.expand = param(rngs, (width, d), (None, 'embed'), normal(width ** -0.5))

  def __call__(self, z):
    l, size = self.mix.shape[:2]
    return contract(z * (l * size) ** -0.5, self.mix[...], 2) @ self.expand[...]


def latent_norm(latents):
  """[N, L, Z], each embedding scaled to RMS 0.4: |z| > 0.99 would take two thirds of its energy in one number of 64."""
  square = jnp.mean(jnp.square(latents), axis=2, keepdims=True)
  return 0.4 * latents * jax.lax.rsqrt(square + 1e-4)


def rms_normalise(x, eps=1e-4):
  """[N, F, T, C] scaled to unit mean square per item, so that no feature can grow without bound."""
  y = x.astype(jnp.float32)
  square = jnp.mean(jnp.square(y), axis=(1, 2, 3), keepdims=True)
  return (y * jax.lax.rsqrt(square + eps)).astype(x.dtype)
