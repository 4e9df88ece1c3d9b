"""Warnings about known failures of training, early and with a likely cure, one line in the log for each.

  latents differ little from chunk to chunk, or in few dimensions: they hold too little information for the decoder
  latents grow before tanh and saturate: tanh passes no gradient any more (stereo runs collapse this way)
  features at the cross connections grow without bound, or are the same for all chunks
  the denoiser does not use the latents
"""

from collections.abc import Mapping
import dataclasses

from absl import logging


@dataclasses.dataclass(frozen=True)
class Symptom:
  """A figure of the log on the wrong side of a limit.

  Attributes:
    name: of the figure. limit: bad below it, or above it with `above`.
    since: steps before which there is no warning. cure: advice for the log.
  """
  name: str
  limit: float
  cure: str
  above: bool = False
  since: int = 100

  def is_present(self, scalars: Mapping[str, float]) -> bool:
    value = scalars.get(self.name)
    return value is not None and (value > self.limit if self.above else value < self.limit)


SYMPTOMS = (
    Symptom('latent/spread', 0.03, 'the latents of all chunks are nearly equal; set variants.flow_skip.on '
            'or variants.shortcut.width, or begin with a head start, variants.head_start.share'),
    Symptom('latent/rank', 0.05, 'the latents differ in very few directions; set variants.shortcut.width, or lower '
            'train.learning_rate'),
    # At an RMS of 1.2 some 3 % of normal numbers saturate; a healthy run stays below 1.
    Symptom('latent/pre_rms', 1.2, 'the latents grow to where tanh saturates; set variants.latent_norm.on (not '
            'with variants.sketch), or lower train.learning_rate', above=True),
    Symptom('latent/saturated', 0.05, 'the latents saturate; set variants.latent_norm.on (not with variants.sketch), '
            'or lower train.learning_rate or lengthen train.warmup_steps', above=True),
    Symptom('feature/rms', 10.0, "the decoder's features grow without bound; lower train.learning_rate", above=True),
    Symptom('feature/varying', 0.03, "the decoder's features are nearly the same for all chunks; begin with a head "
            'start, variants.head_start.share'),
    Symptom('probe_ema/swap', 0.01, 'decoding does not use the latents yet; if this lasts, begin with a head start, '
            'variants.head_start.share', since=500))
LASTING = 3  # logged steps in a row


class Guard:
  """A metrics writer that warns when a symptom lasts, and again only after it has disappeared."""

  def __init__(self, symptoms=SYMPTOMS):
    self._lasted = dict.fromkeys(symptoms, 0)

  def write(self, step: int, scalars: Mapping[str, float]):
    for symptom, lasted in self._lasted.items():
      if symptom.name not in scalars or step < symptom.since:
        continue
      self._lasted[symptom] = lasted + 1 if symptom.is_present(scalars) else 0
      if self._lasted[symptom] == LASTING:
        logging.warning('step %d: %s is %.3g: %s', step, symptom.name, float(scalars[symptom.name]), symptom.cure)

  def close(self):
    pass
