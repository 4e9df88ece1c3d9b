"""Consistency model: noise levels, step schedule, preconditioning, loss and samplers.

Follows Music2Latent (sections 3 and 4) with the noise level of each chunk of a pair drawn independently, as
Music2Latent2's decoding needs. All of it takes the network as a callable and knows no audio: data are arrays
[B, S, ...] with one sigma per chunk, [B, S]. Everything is float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

SAMPLINGS = ('index', 'lognormal')
SKIPS = ('edm', 'flow')
RENOISES = ('add', 'variance')
NOISES = ('bins', 'signal')
_GRID = 9999  # points of the official index grid


@dataclasses.dataclass(frozen=True)
class Consistency:
  """Hyperparameters; the defaults are the paper's recipe.

  Attributes:
    sigma_min, sigma_max, rho: noise range and the warp of sigma(i).
    sigma_data: assumed deviation of the data.
    p_mean, p_std: of ln sigma in training.
    sampling: 'index' weighs a uniform index grid by the normal density, without the Jacobian of ln sigma
      (the official code; ln sigma then has mean -0.55, std 1.93); 'lognormal' is a true clipped log-normal.
    sigma_cond: noise put back on a finished chunk in decoding.
    step_start, step_exponent: dt = step_start ** (1 + progress (step_exponent - 1)).
    easy: part of training in which dt comes down from 1, where the lower level is sigma_min and the target the data, as
      in plain denoising, to that schedule (easy consistency tuning, arXiv 2406.14548); 0 is the paper's.
    huber: c = huber * sqrt(D) of the pseudo-Huber loss.
    skip: 'edm' is the paper's; 'flow' lets a zero-output network be the exact consistency function of
      Gaussian data of deviation sigma_data: the probability flow scales x by
      sqrt((sigma_data^2 + sigma_min^2) / (sigma_data^2 + sigma^2)).
    local: sigma_data is given per element by the decoder's predicted envelope instead.
    noise: what is added to the data, see Representation.noise: 'bins' (the paper's) or 'signal'.
    renoise: 'add' is x + sigma eps (paper, figure 2), 'variance' x + sqrt(sigma^2 - sigma_min^2) eps (CoDiCodec).
    refine, steps: of autoregressive decoding, unless its caller says otherwise: whether a chunk is denoised
      again as the next one's left neighbour, and in how many steps it is sampled before that.
    parallel_steps: of parallel decoding, likewise.
  """
  sigma_min: float = 0.002
  sigma_max: float = 80.0
  rho: float = 7.0
  sigma_data: float = 0.5
  p_mean: float = -1.1
  p_std: float = 2.0
  sampling: str = 'index'
  sigma_cond: float = 0.965
  step_start: float = 0.1
  step_exponent: float = 3.0
  easy: float = 0.0
  huber: float = 0.00054
  skip: str = 'edm'
  local: bool = False
  local_floor: float = 0.02
  noise: str = 'bins'
  renoise: str = 'add'
  refine: bool = True
  steps: int = 1
  parallel_steps: int = 4

  def __post_init__(self):
    for field, choices in (('sampling', SAMPLINGS), ('skip', SKIPS), ('noise', NOISES), ('renoise', RENOISES)):
      if getattr(self, field) not in choices:
        raise ValueError(f'consistency.{field} is {getattr(self, field)!r}; choose from {choices}')
    if not 0 < self.sigma_min < self.sigma_max:
      raise ValueError('consistency needs 0 < sigma_min < sigma_max')
    for field in ('rho', 'sigma_data', 'p_std', 'step_start', 'huber', 'local_floor'):
      if not getattr(self, field) > 0:
        raise ValueError(f'consistency.{field} is {getattr(self, field)}; it must be above 0')
    if min(self.steps, self.parallel_steps) < 1:
      raise ValueError('consistency.steps and consistency.parallel_steps must be at least 1')
    if not 0 <= self.easy <= 1:
      raise ValueError(f'consistency.easy is {self.easy}; it is a fraction, 0 to 1')
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
    if self.sampling == 'lognormal':
      log_sigma = self.p_mean + self.p_std * jax.random.normal(key, shape)
      return jnp.clip(self.index(jnp.clip(jnp.exp(log_sigma), self.sigma_min, self.sigma_max)), 0.0, 1.0)
    cell_key, jitter_key = jax.random.split(key)
    cell = jnp.searchsorted(self._cumulative(), jax.random.uniform(cell_key, shape), side='right')
    cell = jnp.minimum(cell, _GRID - 1)  # float32 uniforms can reach the last edge
    return (cell.astype(jnp.float32) + jax.random.uniform(jitter_key, shape)) / _GRID

  def _cumulative(self):
    return _index_cumulative(self.sigma_min, self.sigma_max, self.rho, self.p_mean, self.p_std)

  def step(self, progress):
    """Index step dt at a fraction of training in [0, 1]: 0.1 at the start, 0.001 at the end by default."""
    progress = jnp.clip(progress, 0.0, 1.0)
    exponent = 1 + progress * (self.step_exponent - 1)
    if self.easy:
      exponent *= jnp.minimum(progress / self.easy, 1.0)
    return jnp.float32(self.step_start) ** exponent

  def sample_levels(self, key, *, chunks: int, progress):
    """One item's upper and lower noise levels (high [S], low [S])."""
    index = self.sample_index(key, (chunks,))
    return self.sigma(index), self.sigma(jnp.maximum(index - self.step(progress), 0.0))

  # Preconditioning.

  def scalings(self, sigma, sigma_data=None):
    """(c_skip, c_out, c_in) at `sigma`; at sigma_min exactly (1, 0, ...)."""
    data = self.sigma_data if sigma_data is None else sigma_data
    total = jnp.square(sigma) + jnp.square(data)
    if self.skip == 'edm':
      c_skip = jnp.square(data) / (jnp.square(sigma - self.sigma_min) + jnp.square(data))
    else:
      c_skip = jnp.sqrt((jnp.square(data) + self.sigma_min ** 2) / total)
    c_skip = jnp.where(sigma <= self.sigma_min, 1.0, c_skip)
    return c_skip, data * (sigma - self.sigma_min) * jax.lax.rsqrt(total), jax.lax.rsqrt(total)

  def denoise(self, network, x, sigma, *, sigma_data=None):
    """c_skip x + c_out network(c_in x, sigma): the consistency function, x exactly at sigma_min.

    Args:
      network: (x [B, S, ...], sigma [B, S]) -> [B, S, ...] float32.
      x: [B, S, ...] float32; sigma: [B, S] float32.
      sigma_data: deviation of the data per element, [B, S, ...], where `local`.
    """
    level = sigma.reshape(*sigma.shape, *[1] * (x.ndim - sigma.ndim))
    c_skip, c_out, c_in = self.scalings(level, sigma_data)
    return c_skip * x + c_out * network(c_in * x, sigma)

  # Loss.

  def distance(self, estimate, target):
    """Pseudo-Huber distance of whole chunks, [B, S, ...] -> [B, S]; `target` gets no gradient.

    sqrt(||a - b||^2 + c^2) - c with c = huber sqrt(D), D the size of one chunk.
    """
    axes = tuple(range(2, estimate.ndim))
    square = jnp.sum(jnp.square(estimate - jax.lax.stop_gradient(target)), axis=axes)
    c = self.huber * float(np.prod(estimate.shape[2:])) ** 0.5
    return jnp.sqrt(square + c * c) - c

  def loss(self, student, teacher, *, high, low):
    """`distance` over the noise gap: [B, S, ...] -> [B, S]; weight 1 / (high - low), 0 where the gap is 0 (both levels
    at sigma_min: both sides equal the data)."""
    gap = high - low
    weight = jnp.where(gap > 0, 1 / jnp.maximum(gap, 1e-12), 0.0)
    return weight * self.distance(student, teacher)

  # Samplers: `denoise(x, sigma)` is bound to the network and the features by the caller.

  def add_noise(self, x, noise, sigma):
    """Puts a finished x back to level `sigma` by the config's rule."""
    if self.renoise == 'add':
      return x + sigma * noise
    return x + (sigma ** 2 - self.sigma_min ** 2) ** 0.5 * noise

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

  def sample_staggered(self, denoiser, features, noises, sigmas, *, carried, first):
    """A block of parallel decoding (CoDiCodec): chunks change between the left and the right of a pair.

    At even steps the pairs are (0, 1)(2, 3)..., at odd steps 0 stands alone and the pairs are (1, 2)(3, 4)...
    The signal comes in blocks of an even number M of chunks. In the block that starts at chunk a, step k
    takes the chunks a - k ... a - k + M - 1: each step runs one chunk behind the step before, so no pair is cut
    by a block's border and nothing is computed twice.

    Args:
      denoiser: features -> bound consistency function over [N, 2, ...].
      features: of the chunks from a - (steps - 1) on; leaves [B, M + steps - 1, ...].
      noises: one [B, M, ...] per level, of the chunks of its step.
      carried: steps - 1 arrays [B, ...] from the block before; anything finite in the first block.
      first: whether this is the first block (bool, or a traced one): chunk 0 then has no left neighbour. What
        is computed for negative chunks means nothing.

    Returns:
      (x [B, M, ...] of the chunks from a - (steps - 1) on, carried for the next block).
    """
    lag, chunks = len(sigmas) - 1, noises[0].shape[1]
    carry = []

    def denoise(x, sigma):
      k = len(carry)
      window = jax.tree.map(lambda leaf: leaf[:, lag - k:lag - k + chunks], features)
      order = np.arange(chunks)
      if k % 2:  # chunk 0 would be right of chunk -1, which is none: they change places
        swapped = order.copy()
        swapped[[k - 1, k]] = k, k - 1
        order = jnp.where(first, swapped, order)
      paired = jax.tree.map(
          lambda leaf: jnp.take(leaf, order, axis=1).reshape(-1, 2, *leaf.shape[2:]), (x, sigma, window))
      out = denoiser(paired[2])(*paired[:2]).reshape(x.shape)
      out = jnp.take(out, order, axis=1)
      carry.append(out[:, -1])
      if k == lag:
        return out
      return jnp.concatenate([carried[k][:, None], out[:, :-1]], axis=1)  # one chunk back, for the next step

    x = self.sample(denoise, noises, sigmas)
    return x, tuple(carry[:-1])


@functools.cache
def _index_cumulative(sigma_min, sigma_max, rho, p_mean, p_std):
  """Cumulative weights [9999] of the official index grid, summed in float64."""
  index = np.linspace(0, 1, _GRID)
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  log_sigma = rho * np.log(low + index * (high - low))
  weights = np.exp(-0.5 * np.square((log_sigma - p_mean) / p_std))
  return (np.cumsum(weights) / np.sum(weights)).astype(np.float32)
