"""The paper's consistency model with what departs from it, each off by default."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from m2l2.consistency import Consistency
from m2l2.representation import Representation
from m2l2.variants import envelope


@dataclasses.dataclass(frozen=True)
class VariantConsistency(Consistency):
  """A Consistency and its departures.

  Attributes:
    flow_skip: c_skip lets a zero-output network be the exact consistency function of Gaussian data of deviation
      sigma_data: the probability flow scales x by sqrt((sigma_data^2 + sigma_min^2) / (sigma_data^2 + sigma^2)).
    local_scale: sigma_data is given per element by the decoder's predicted envelope.
    signal_noise: noise is the spectrogram of white noise, see the function of that name.
    variance_renoise: x + sqrt(sigma^2 - sigma_min^2) eps (CoDiCodec), not x + sigma eps (paper, figure 2).
    staggered_steps: denoisings of parallel decoding (CoDiCodec, staggered.py), unless its caller says otherwise.
  """
  flow_skip: bool = False
  local_scale: bool = False
  signal_noise: bool = False
  variance_renoise: bool = False
  staggered_steps: int = 4

  def __post_init__(self):
    super().__post_init__()
    if self.staggered_steps < 1:
      raise ValueError(f'variants.staggered.steps is {self.staggered_steps}; it must be at least 1')

  def unit_noise(self, key, representation, chunks):
    if not self.signal_noise:
      return super().unit_noise(key, representation, chunks)
    return signal_noise(key, representation, chunks)

  def skip_scaling(self, sigma, data):
    if not self.flow_skip:
      return super().skip_scaling(sigma, data)
    return jnp.sqrt((jnp.square(data) + self.sigma_min ** 2) / (jnp.square(sigma) + jnp.square(data)))

  def bind(self, network, params, features):
    if not self.local_scale:
      return super().bind(network, params, features)
    data = jax.lax.stop_gradient(envelope.deviation(features['log_magnitude']))
    return lambda x, sigma: self.denoise(
        lambda x, s: network.denoise(params, x, s, features), x, sigma, sigma_data=data)

  def add_noise(self, x, noise, sigma):
    if not self.variance_renoise:
      return super().add_noise(x, noise, sigma)
    return x + (sigma ** 2 - self.sigma_min ** 2) ** 0.5 * noise


def signal_noise(key, representation: Representation, chunks: int):
  """The spectrogram of white noise, each chunk's its own, of unit variance: float32 [chunks, F, T, 2C].

  Overlapping frames of it agree with each other, so what is made of it by a smooth gain is a signal's spectrogram, too:
  synthesis keeps its level and its magnitudes, where of independent numbers three quarters cancel out (at
  window / hop = 4).
  """
  rep = representation
  white = jax.random.normal(key, (chunks, rep.channels, rep.crop_samples(1)))
  return rep.analyse(white)[:, 0] / noise_deviation(rep)


def noise_deviation(rep: Representation) -> float:
  """Of each part of the compressed spectrum of white noise of variance 1."""
  hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(rep.window) / rep.window)
  variance = np.sum(np.square(hann.astype(np.float32))) / 2  # of each part, before the compression
  # E r^(2 alpha) of a Rayleigh magnitude, shared by two parts; of a Gaussian part.
  moment = math.gamma(1 + rep.alpha) / 2 if rep.transform == 'polar' else (
      math.gamma(rep.alpha + .5) / math.sqrt(math.pi))
  return rep.beta * math.sqrt((2 * variance) ** rep.alpha * moment)
