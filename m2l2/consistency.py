"""Consistency model: noise levels, step schedule, preconditioning, loss and sampling.

Follows Music2Latent (sections 3 and 4) with the noise level of each chunk of a pair drawn independently, as
Music2Latent2's decoding needs (figure 2). It knows no audio: data are arrays [B, S, ...] with one sigma per chunk,
[B, S]. Everything is float32.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

_GRID = 9999  # points of the official index grid


@dataclasses.dataclass(frozen=True)
class Consistency:
  """Hyperparameters; the defaults are the paper's recipe.

  Attributes:
    sigma_min, sigma_max, rho: noise range and the warp of sigma(i).
    sigma_data: assumed deviation of the data.
    p_mean, p_std: of ln sigma in training, by which a uniform index grid is weighed, without the Jacobian of ln sigma
      (as the official code does; ln sigma then has mean -0.55, std 1.93).
    sigma_cond: noise put back on a finished chunk in decoding.
    step_start, step_exponent: dt = step_start ** (1 + progress (step_exponent - 1)).
    huber: c = huber * sqrt(D) of the pseudo-Huber loss.
    refine, steps: of autoregressive decoding, unless its caller says otherwise: whether a chunk is denoised
      again as the next one's left neighbour, and in how many steps it is sampled before that.
  """
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  sigma_data: float = 0.5
  p_mean: float = -1.1
  p_std: float = 2.0
  sigma_cond: float = 0.965
  step_start: float = 0.1
  step_exponent: float = 3.0
  huber: float = 0.00054
  refine: bool = True
  steps: int = 1

  def __post_init__(self):
    if not 0 < self.sigma_min < self.sigma_max:
      raise ValueError('consistency needs 0 < sigma_min < sigma_max')
    for field in ('rho', 'sigma_data', 'p_std', 'step_start', 'huber'):
      if not getattr(self, field) > 0:
        raise ValueError(f'consistency.{field} is {getattr(self, field)}; it must be above 0')
    if self.steps < 1:
      raise ValueError(f'consistency.steps is {self.steps}; it must be at least 1')
    if not self.sigma_min <= self.sigma_cond <= self.sigma_max:
      raise ValueError(f'consistency.sigma_cond is {self.sigma_cond}; it lies in sigma_min..sigma_max')

  # Noise levels.

  def sigma(self, index):
    """Noise level at index in [0, 1]: exactly sigma_min at 0, sigma_max at 1."""
    low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
    index = jnp.asarray(index, jnp.float32)
    sigma = (low + index * (high - low)) ** self.rho
    # Powers round: unless the ends are set, sigma(0) misses sigma_min and the boundary condition is not exact.
    sigma = jnp.clip(sigma, self.sigma_min, self.sigma_max)
    return jnp.where(index <= 0, self.sigma_min, jnp.where(index >= 1, self.sigma_max, sigma))

  def index(self, sigma):
    """The inverse of `sigma`."""
    low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
    return (jnp.float32(sigma) ** (1 / self.rho) - low) / (high - low)

  def sample_index(self, key, shape=()):
    """Indices of training's upper noise levels, [*shape] in [0, 1]."""
    cell_key, jitter_key = jax.random.split(key)
    cumulative = _index_cumulative(self.sigma_min, self.sigma_max, self.rho, self.p_mean, self.p_std)
    cell = jnp.searchsorted(cumulative, jax.random.uniform(cell_key, shape), side='right')
    cell = jnp.minimum(cell, _GRID - 1)  # float32 uniforms can reach the last edge
    return (cell.astype(jnp.float32) + jax.random.uniform(jitter_key, shape)) / _GRID

  def step(self, progress):
    """Index step dt at a fraction of training in [0, 1]: 0.1 at the start, 0.001 at the end by default."""
    return jnp.float32(self.step_start) ** (1 + jnp.clip(progress, 0.0, 1.0) * (self.step_exponent - 1))

  def sample_levels(self, key, *, chunks: int, progress):
    """One item's upper and lower noise levels (high [S], low [S])."""
    index = self.sample_index(key, (chunks,))
    return self.sigma(index), self.sigma(jnp.maximum(index - self.step(progress), 0.0))

  def unit_noise(self, key, representation, chunks: int):
    """Noise of unit variance for `chunks` chunks, float32 [chunks, F, T, 2C]: every number by itself."""
    return jax.random.normal(key, (chunks, *representation.chunk_shape))

  # Preconditioning.

  def scalings(self, sigma, sigma_data=None):
    """(c_skip, c_out, c_in) at `sigma`; at sigma_min exactly (1, 0, ...). sigma_data: this process's by default."""
    data = self.sigma_data if sigma_data is None else sigma_data
    total = jnp.square(sigma) + jnp.square(data)
    c_skip = jnp.where(sigma <= self.sigma_min, 1.0, self.skip_scaling(sigma, data))
    return c_skip, data * (sigma - self.sigma_min) * jax.lax.rsqrt(total), jax.lax.rsqrt(total)

  def skip_scaling(self, sigma, data):
    """c_skip above sigma_min."""
    return jnp.square(data) / (jnp.square(sigma - self.sigma_min) + jnp.square(data))

  def bind(self, network, params, features) -> Callable:
    """(x [B, S, ...], sigma [B, S]) -> the consistency function of x: of the network's weights, given the decoder's
    features, leaves [B, S, ...]."""
    return lambda x, sigma: self.denoise(lambda x, s: network.denoise(params, x, s, features), x, sigma)

  def denoise(self, network, x, sigma, *, sigma_data=None):
    """c_skip x + c_out network(c_in x, sigma): the consistency function, x exactly at sigma_min.

    Args:
      network: (x [B, S, ...], sigma [B, S]) -> [B, S, ...] float32.
      x: [B, S, ...] float32; sigma: [B, S] float32.
      sigma_data: deviation of the data, a number or per element, [B, S, ...].
    """
    level = sigma.reshape(*sigma.shape, *[1] * (x.ndim - sigma.ndim))
    c_skip, c_out, c_in = self.scalings(level, sigma_data)
    return c_skip * x + c_out * network(c_in * x, sigma)

  # Loss.

  def distance(self, estimate: Float[Array, 'B S *d'], target: Float[Array, 'B S *d']) -> Float[Array, 'B S']:
    """Pseudo-Huber distance of whole chunks, [B, S, ...] -> [B, S]; `target` gets no gradient.

    sqrt(||a - b||^2 + c^2) - c with c = huber sqrt(D), D the size of one chunk.
    """
    axes = tuple(range(2, estimate.ndim))
    square = jnp.sum(jnp.square(estimate - jax.lax.stop_gradient(target)), axis=axes)
    c = self.huber * float(np.prod(estimate.shape[2:])) ** 0.5
    return jnp.sqrt(square + c * c) - c

  def loss(self, student, teacher, *, high: Float[Array, 'B S'], low: Float[Array, 'B S']) -> Float[Array, 'B S']:
    """`distance` over the noise gap: [B, S, ...] -> [B, S]; weight 1 / (high - low), 0 where the gap is 0 (both levels
    at sigma_min: both sides equal the data)."""
    gap = high - low
    weight = jnp.where(gap > 0, 1 / jnp.maximum(gap, 1e-12), 0.0)
    return weight * self.distance(student, teacher)

  # Sampling: `denoise(x, sigma)` is what `bind` gives.

  def add_noise(self, x, noise, sigma):
    """Puts a finished x back to level `sigma`."""
    return x + sigma * noise

  def schedule(self, steps: int) -> tuple:
    """Noise levels that `steps` denoisings start from: sigma(1 - k / steps), from sigma_max down."""
    low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
    lower = ((low + (1 - k / steps) * (high - low)) ** self.rho for k in range(1, steps))
    return (self.sigma_max, *lower)

  def sample(self, denoise, noises, sigmas):
    """Multi-step sampling of [B, S, ...]: from pure noise at sigmas[0], re-noised to each next level.

    noises: one array per level; one step is sigmas = (sigma_max,).
    """
    x = None
    for noise, sigma in zip(noises, sigmas, strict=True):
      noisy = sigma * noise if x is None else self.add_noise(x, noise, sigma)
      x = denoise(noisy, jnp.full(noisy.shape[:2], sigma, jnp.float32))
    return x

  def sample_pair(self, denoise, previous, *, left_noise, right_noises, sigma_cond, sigmas, first=False):
    """The next chunk of autoregressive decoding.

    The chunk before, re-noised once to sigma_cond, stands left of the chunk that is sampled at `sigmas`. With
    one level, and the left outputs kept, this is Music2Latent2's two-step decoding (figure 2); with more
    levels and the left outputs dropped it is CoDiCodec's.

    Args:
      denoise: bound consistency function over [B, 2, ...].
      previous, left_noise: [B, ...]; right_noises: one [B, ...] per level.
      first: whether there is no chunk before (bool, or a traced one). The chunk is then sampled on the left as well,
        which sees nothing but itself, and is taken from there; `refined` means nothing.

    Returns:
      (refined [B, ...]: `previous` denoised again, current [B, ...]).
    """
    left = self.add_noise(previous, left_noise, sigma_cond)[:, None]
    refined = None

    def denoise_right(x, sigma):
      nonlocal refined
      pair = jnp.concatenate([jnp.where(first, x, left), x], axis=1)
      out = denoise(pair, jnp.concatenate([jnp.where(first, sigma, sigma_cond), sigma], axis=1))
      refined = out[:, 0]  # the same in every call: left never sees right
      return jnp.where(first, out[:, :1], out[:, 1:])

    current = self.sample(denoise_right, [noise[:, None] for noise in right_noises], sigmas)
    return refined, current[:, 0]


@functools.cache
def _index_cumulative(sigma_min, sigma_max, rho, p_mean, p_std):
  """Cumulative weights [9999] of the official index grid, summed in float64."""
  index = np.linspace(0, 1, _GRID)
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  log_sigma = rho * np.log(low + index * (high - low))
  weights = np.exp(-0.5 * np.square((log_sigma - p_mean) / p_std))
  return (np.cumsum(weights) / np.sum(weights)).astype(np.float32)
