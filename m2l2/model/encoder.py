"""Clean chunk -> K summary embeddings (figure 1, "Encoder")."""

from flax import nnx
import jax.numpy as jnp
from jaxtyping import Array, Float

from m2l2.model.layers import Linear
from m2l2.model.parameters import ONES, ZEROS, normal, param


class Encoder(nnx.Module):
  """Patchify, append K learned queries and the registers, attend, keep the queries' outputs.

  Chunk-local: S is folded into the batch. The output projection starts at 0, so all latents are exactly 0 at init.
  """

  def __init__(self, arch, *, rngs):
    num_tokens, num_latents = arch.sequence
    self.gain = param(rngs, (arch.rows,), ('freq',), ONES)
    self.patchifier = arch.patchifier(arch.encoder_channels, rngs=rngs)
    self.queries = param(rngs, (num_latents, arch.dim), ('latents', 'embed'), normal(arch.dim ** -0.5))
    self.registers = param(rngs, (arch.registers, arch.dim), ('registers', 'embed'), normal(arch.dim ** -0.5))
    self.transformer = arch.transformer(num_tokens + num_latents + arch.registers, rngs=rngs)
    self.head = Linear(arch.dim, arch.latent_dim, axes=('embed', 'latent_dim'), init=ZEROS, rngs=rngs)
    self.dtype = jnp.dtype(arch.dtype)

  def __call__(self, spec: Float[Array, 'B S F T C']) -> Float[Array, 'B S L Z']:
    """spec [B, S, F, T, 2C] float32 -> the bottleneck's input [B, S, L, Z] float32."""
    b, s = spec.shape[:2]
    latents = self.summarise(self.tokens(spec.reshape(b * s, *spec.shape[2:])))
    return latents.reshape(b, s, *latents.shape[1:])

  def tokens(self, x) -> Float[Array, 'N P D']:
    """[N, F, T, C] -> tokens [N, P, D]."""
    return self.patchifier(jnp.asarray(x, self.dtype), gain=self.gain[...])[0]

  def summarise(self, tokens: Float[Array, 'N P D']) -> Float[Array, 'N L Z']:
    """Tokens [N, P, D] -> [N, L, Z] float32."""
    learned = jnp.concatenate([self.queries[...], self.registers[...]]).astype(self.dtype)
    learned = jnp.broadcast_to(learned, (tokens.shape[0], *learned.shape))
    x = self.transformer(jnp.concatenate([tokens, learned], axis=1)[:, None])
    latents = x[:, :, tokens.shape[1]:tokens.shape[1] + self.queries.shape[0]]
    return self.head(self.transformer.norm_output(latents).astype(jnp.float32))[:, 0]
