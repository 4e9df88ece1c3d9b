"""The consistency model's network: a noisy pair of chunks -> its raw output (figure 1, "Consistency Model").

Preconditioning lives in consistency.py; here the input is already scaled.
"""

from flax import nnx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from m2l2.model.layers import Linear, as_last
from m2l2.model.parameters import ZEROS


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
  blocks into the de-patchifier; both merge as (a + b) / sqrt 2.

  Products read `dtype`; all else is float32, because the loss compares two outputs that late in training differ by a
  thousandth, which is less than roundings to bfloat16 on the way would move them.
  """

  def __init__(self, arch, *, rngs):
    num_tokens = arch.grid[0] * arch.grid[1]
    self.embedding = NoiseEmbedding(arch.cond_dim, rngs=rngs)
    self.gains = NoiseGains(arch.cond_dim, arch.rows, rngs=rngs)
    self.patchifier = arch.patchifier(arch.denoiser_channels, cond_dim=arch.cond_dim, rngs=rngs)
    self.transformer = arch.transformer(
        num_tokens + arch.denoiser_extra, chunks=arch.chunks, cond_dim=arch.cond_dim, rngs=rngs)
    self.depatchifier = arch.depatchifier(cond_dim=arch.cond_dim, rngs=rngs)
    self.output = arch.output_head(2 * arch.channels, cond_dim=arch.cond_dim, rngs=rngs)
    self.cond_dim = arch.cond_dim
    self.dtype = jnp.dtype(arch.dtype)

  def __call__(self, x: Float[Array, 'B S F T C'], sigma: Float[Array, 'B S'],
               features: dict) -> Float[Array, 'B S F T D']:
    """x [B, S, F, T, C] scaled noisy chunks, sigma [B, S], the decoder's features -> [B, S, F, T, 2C] float32.

    S is 1 or up to the `chunks` the positions were made for.
    """
    b, s = x.shape[:2]
    sinusoid = noise_features(sigma, width=self.cond_dim)
    cond = self.embedding(sinusoid)
    gains = self.gains(sinusoid).reshape(b * s, 2, -1)
    flat_cond = cond.reshape(b * s, -1)

    x = x.reshape(b * s, *x.shape[2:])
    maps = [m.reshape(b * s, *m.shape[2:]) for m in features['maps']] if 'maps' in features else None
    tokens, skips = self.patchifier(x, gain=gains[:, 0], features=maps, cond=flat_cond)

    num_tokens, dim = tokens.shape[1:]
    tokens = jnp.concatenate([tokens.reshape(b, s, num_tokens, dim), *self.extra_tokens(features, (b, s))], axis=2)
    h = self.transformer(tokens, cond, self.dtype)
    h = self.transformer.norm_output(h[:, :, :num_tokens], cond)

    h, _ = self.depatchifier(h.reshape(b * s, num_tokens, dim), features=skips, cond=flat_cond)
    out = self.output(h, gain=gains[:, 1], cond=flat_cond)
    return out.reshape(b, s, *out.shape[1:])

  def extra_tokens(self, features, lead) -> list:
    """Tokens [*lead, any, D] that attend beside the patches'; the paper has none."""
    return []
