"""Summary embeddings -> a pyramid of features for the consistency model (figure 1, "Decoder")."""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m2l2.model.layers import Linear
from m2l2.model.parameters import normal, param


class Decoder(nnx.Module):
  """Mask tokens, latents and registers attend; the mask positions are de-patchified; every block's map is kept."""

  def __init__(self, arch, *, rngs):
    num_tokens, num_latents = arch.sequence
    # One mask embedding a frequency row, shared by the frames: positions tell the frames apart.
    self.mask = param(rngs, (arch.grid[0], 1, arch.dim), ('freq', None, 'embed'), normal(arch.dim ** -0.5))
    self.latents_in = Linear(arch.latent_dim, arch.dim, axes=('latent_dim', 'embed'), rngs=rngs)
    self.registers = param(rngs, (arch.registers, arch.dim), ('registers', 'embed'), normal(arch.dim ** -0.5))
    self.transformer = arch.transformer(num_tokens + num_latents + arch.registers, output_norm=False, rngs=rngs)
    self.depatchifier = arch.depatchifier(rngs=rngs)
    self.frames = num_tokens // arch.grid[0]
    self.dtype = jnp.dtype(arch.dtype)

  def __call__(self, z: Float[Array, 'B S L Z']) -> dict:
    """z [B, S, L, Z] float32 -> {'maps': tuple of [B, S, F_l, T_l, C_l], finest first}."""
    b, s = z.shape[:2]
    _, maps = self.depatchifier(self.tokens(z.reshape(b * s, *z.shape[2:])))
    return jax.tree.map(lambda x: x.reshape(b, s, *x.shape[1:]), {'maps': tuple(maps)})

  def tokens(self, z: Float[Array, 'N L Z'], extra: Float[Array, 'N P D'] | None = None) -> Float[Array, 'N P D']:
    """z [N, L, Z] -> tokens [N, P, D]. extra [N, P, D] is added to the mask tokens."""
    mask = jnp.broadcast_to(self.mask[...], (self.mask.shape[0], self.frames, self.mask.shape[-1]))
    mask = mask.reshape(-1, mask.shape[-1]).astype(self.dtype)
    mask = jnp.broadcast_to(mask, (z.shape[0], *mask.shape))
    registers = jnp.broadcast_to(self.registers[...].astype(self.dtype), (z.shape[0], *self.registers.shape))
    mask = mask if extra is None else mask + extra.astype(self.dtype)
    x = jnp.concatenate([mask, self.latents_in(z.astype(self.dtype)), registers], axis=1)
    return self.transformer(x[:, None])[:, 0, :mask.shape[1]].astype(self.dtype)
