"""The paper's objective with what departs from it: a head start, the envelope's loss, embeddings left out."""

import dataclasses

import jax
import jax.numpy as jnp

from m2l2.training.probe import feature_metrics, latent_metrics
from m2l2.training.train_step import MAIN, Objective
from m2l2.variants.envelope import envelope_loss, log_magnitude

HEAD_STARTS = ('data', 'magnitudes', 'envelope')


@dataclasses.dataclass(frozen=True)
class VariantObjective(Objective):
  """An Objective and its departures.

  Attributes:
    head_start_share: of the run's steps, from the first on, that train on the `head_start_task`:
      'data': one step from sigma_max is to give the data itself (a regression through all three networks);
      'magnitudes': it is to give the data's log-magnitudes, with whatever phases;
      'envelope': the envelope alone; the denoiser does not even run.
      The index step shrinks over those that are left.
    envelope_weight, envelope_bands: of the envelope's loss, see envelope.py.
    nested_chance: that a chunk keeps a prefix of its embeddings alone, see `shorten`.
  """
  head_start_share: float = 0.0
  head_start_task: str = 'data'
  envelope_weight: float = 0.0
  envelope_bands: int = 0
  nested_chance: float = 0.0

  def __post_init__(self):
    for name, share in (('head_start.share', self.head_start_share), ('nested.chance', self.nested_chance)):
      if not 0 <= share <= 1:
        raise ValueError(f'variants.{name} is {share}; it lies in 0..1')
    if self.head_start_task not in HEAD_STARTS:
      raise ValueError(f'variants.head_start.task is {self.head_start_task!r}; choose from {", ".join(HEAD_STARTS)}')
    if not 0 <= self.envelope_bands <= self.representation.bins:
      raise ValueError(f'variants.envelope.bands is {self.envelope_bands}; it is a number of bands, 0 to model.bins')

  @property
  def head_start(self) -> int:
    """Steps."""
    return int(self.head_start_share * self.steps)

  @property
  def phases(self) -> tuple:
    head = (('head_start', self.head_start),) if self.head_start else ()
    return head + (super().phases if self.steps > self.head_start else ())

  def loss_fn(self, params, audio, keys, step, *, phase=MAIN, watch=lambda **seen: None):
    progress = jnp.maximum(step - self.head_start, 0) / max(self.steps - self.head_start, 1)
    draw = self.draw(audio, keys, progress, watch)
    pre, z = self.encode(params, draw)
    kept = z
    if self.nested_chance:
      kept = shorten(z, jax.vmap(lambda k: jax.random.fold_in(k, 0))(draw.keys), chance=self.nested_chance)
    features = self.network.decode(params, kept)
    watch(latents_before_bottleneck=pre, latents=z, features=features)
    metrics = {**latent_metrics(pre, z), **feature_metrics(features)}
    if phase == MAIN:
      loss, more = self.consistency_loss(params, draw, features, watch)
      metrics |= more
    elif self.head_start_task != 'envelope':
      loss = metrics['loss/head_start'] = jnp.mean(self._head_loss(params, draw, features))
    else:
      loss = jnp.float32(0)
    if 'log_magnitude' in features:
      error = jnp.mean(envelope_loss(features['log_magnitude'], draw.spec, bands=self.envelope_bands))
      metrics['loss/envelope'] = error
      loss = loss + self.envelope_weight * error
    return loss, metrics

  def _head_loss(self, params, draw, features):
    with jax.named_scope('student'):
      estimate = self.denoise(params, draw, jnp.full_like(draw.high, self.consistency.sigma_max), features)
    if self.head_start_task == 'data':
      return self.consistency.distance(estimate, draw.spec)
    return jnp.mean(jnp.abs(log_magnitude(estimate) - log_magnitude(draw.spec)), axis=(2, 3, 4))


def shorten(z, keys, *, chance: float):
  """With this chance a chunk of latents [B, S, L, Z] keeps but its first 1 to L embeddings (equally likely); the others
  become 0. So trained, any prefix can be decoded, and the first embeddings say what matters most."""
  def keep(key):
    chance_key, length_key = jax.random.split(key)
    length = jax.random.randint(length_key, z.shape[1:2], 1, z.shape[2] + 1)
    return jnp.where(jax.random.bernoulli(chance_key, chance, length.shape), length, z.shape[2])

  kept = jnp.arange(z.shape[2])[None, None] < jax.vmap(keep)(keys)[..., None]
  return jnp.where(kept[..., None], z, 0.0)
