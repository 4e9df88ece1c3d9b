"""Finite scalar quantisation, CoDiCodec's bottleneck (`variants.fsq`): latents that are also tokens.

It takes the encoder's raw output [..., L, Z] float32 and gives latents in [-1, 1], as the paper's tanh does.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class FSQ:
  """Finite scalar quantisation with an odd number of levels a dimension, and FSQ-dropout.

  Attributes:
    levels: steps per latent dimension (11: codes -1, -.8, ... 1).
    dropout: chance, per item, that training skips the rounding, so that the decoder learns both the
      continuous and the rounded latents (CoDiCodec, "FSQ-dropout").
  """
  levels: int = 11
  dropout: float = 0.75

  def __post_init__(self):
    if self.levels % 2 == 0 or self.levels < 3:
      raise ValueError(f'fsq_levels is {self.levels}; it must be odd and at least 3')
    if not 0 <= self.dropout <= 1:
      raise ValueError(f'fsq_dropout is {self.dropout}; it is a chance, 0 to 1')

  def __call__(self, pre, *, keys=None):
    """Continuous latents (levels - 1)(1 - 1e-3)/2 tanh(pre) / half; rounded for some items with `keys` [B]."""
    continuous = self.continuous(pre)
    if keys is None:
      return continuous
    skip = jax.vmap(lambda key: jax.random.bernoulli(key, self.dropout))(keys)
    skip = skip.reshape(-1, *[1] * (pre.ndim - 1))
    rounded = continuous + jax.lax.stop_gradient(self.quantise(continuous) - continuous)  # straight through
    return jnp.where(skip, continuous, rounded)

  @property
  def half(self) -> int:
    return (self.levels - 1) // 2

  def continuous(self, pre):
    return jnp.tanh(pre) * (1 - 1e-3)

  def quantise(self, z):
    """Latents in [-1, 1] -> the nearest code in {-1, ..., 1}."""
    return jnp.round(z * self.half) / self.half

  def tokens(self, z):
    """[..., Z] -> int32 [...], of numpy or of JAX: the index of the code, first dimension least significant."""
    digits = (z * self.half).round().astype(np.int32) + self.half
    basis = self._basis(z.shape[-1]).reshape((1,) * (z.ndim - 1) + (-1,))
    return (digits * basis).sum(-1, dtype=np.int32)

  def codes(self, tokens, *, width: int):
    """int32 [...] -> float32 [..., width]: the inverse of `tokens`."""
    digits = tokens[..., None] // self._basis(width).reshape((1,) * tokens.ndim + (width,)) % self.levels
    return (digits - self.half).astype(np.float32) / np.float32(self.half)

  def _basis(self, width):
    return np.asarray([self.levels ** i for i in range(width)], np.int32)
