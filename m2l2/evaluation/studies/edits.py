"""Edits of latents: interpolation, exchanging and removing embeddings, and what each embedding contributes.

Embeddings are numbered 0 ... K - 1. Tokens are refused: they cannot be mixed.
"""

import dataclasses

import numpy as np

from m2l2.codec.codec import Codec
from m2l2.codec.latents import Latents
from m2l2.errors import UserError
from m2l2.evaluation.metrics.pairs import log_mel_db

FILLS = ('zero', 'mean')
GAP_FILLS = ('line', 'zero')


def interpolate(first: Latents, second: Latents, weight: float) -> Latents:
  """(1 - weight) first + weight second, as long as the shorter of both.

  Args:
    first, second: of one model, sample rate and number of channels.
    weight: 0 (first) to 1 (second).

  Raises UserError: latents that do not match, tokens, or another weight.
  """
  if not 0 <= weight <= 1:
    raise UserError(f'weight is {weight}; it must lie in 0..1')
  first, second = _paired(first, second)
  z = ((1 - weight) * first.z + weight * second.z).astype(np.float32)
  return dataclasses.replace(first, z=z)


def swap(first: Latents, second: Latents, embeddings) -> tuple[Latents, Latents]:
  """Both, cut to the shorter, with the given embeddings of every chunk exchanged.

  Args:
    first, second: of one model, sample rate and number of channels.
    embeddings: numbers of embeddings, each in 0 ... K - 1.

  Raises UserError: latents that do not match, tokens, or no such embedding.
  """
  first, second = _paired(first, second)
  chosen = np.isin(np.arange(first.z.shape[2]), _checked(first, embeddings))[:, None]
  return (dataclasses.replace(first, z=np.where(chosen, second.z, first.z)),
          dataclasses.replace(second, z=np.where(chosen, first.z, second.z)))


def without(latents: Latents, embeddings, *, fill: str = 'zero') -> Latents:
  """Sets the given embeddings of every chunk to 0, or to their mean over the chunks.

  The mean removes what an embedding says about a single chunk and keeps what it says about the whole signal.

  Raises UserError: tokens, no such embedding, or another fill than zero and mean.
  """
  if fill not in FILLS:
    raise UserError(f'fill {fill!r} is not known: choose from {", ".join(FILLS)}')
  _check_continuous(latents)
  chosen = _checked(latents, embeddings)
  z = latents.z.copy()
  z[:, :, chosen] = 0.0 if fill == 'zero' else z[:, :, chosen].mean(axis=1, keepdims=True)
  return dataclasses.replace(latents, z=z)


def inpaint(latents: Latents, start: int, stop: int, *, fill: str = 'line') -> Latents:
  """The same latents with the chunks start ... stop - 1 made up, for a gap in the sound.

  Args:
    fill: 'line': they lie on the straight line from the chunk before the gap to the chunk after it, at an end they are
      the one neighbour's again; 'zero': they tell nothing. Either way the denoiser, which hears each chunk's left
      neighbour, joins them to what is there.

  Raises UserError: tokens, no such chunks, all of them, or another fill.
  """
  if fill not in GAP_FILLS:
    raise UserError(f'fill {fill!r} is not known: choose from {", ".join(GAP_FILLS)}')
  _check_continuous(latents)
  chunks = latents.z.shape[1]
  if not 0 <= start < stop <= chunks or stop - start == chunks:
    raise UserError(f'chunks {start} to {stop} cannot be made up in latents of {chunks}: some must be left')
  z = latents.z.copy()
  if fill == 'zero':
    z[:, start:stop] = 0.0
  else:
    left = z[:, start - 1] if start else z[:, stop]
    right = z[:, stop] if stop < chunks else left
    weight = (np.arange(1, stop - start + 1, dtype=np.float32) / (stop - start + 1))[:, None, None]
    z[:, start:stop] = (1 - weight) * left[:, None] + weight * right[:, None]
  return dataclasses.replace(latents, z=z)


def carried(codec: Codec, latents: Latents, *, fill: str = 'zero', seed: int = 0) -> np.ndarray:
  """What each embedding contributes: the change of the sound without it, decoded in one step from the same noise.

  Returns:
    float64 [K, 128, frames]: log-mel spectrogram (`pairs.log_mel_db`) without the embedding, minus that of
    the whole, in dB.

  Raises UserError: tokens, latents of another model, or another fill than zero and mean.
  """
  def log_mel(changed):
    return log_mel_db(codec.decode(changed, seed, refine=False), sample_rate=latents.sample_rate)
  whole = log_mel(latents)
  return np.stack([log_mel(without(latents, [k], fill=fill)) - whole for k in range(latents.z.shape[2])])


def _paired(first, second):
  """Both, cut to the shorter."""
  for latents in (first, second):
    _check_continuous(latents)
  for what in ('model', 'sample_rate', 'channels'):
    values = [getattr(latents, what) for latents in (first, second)]
    if values[0] != values[1]:
      raise UserError(f'these latents do not go together: {what.replace("_", " ")} is {values[0]} and {values[1]}')
  chunks = min(first.z.shape[1], second.z.shape[1])
  samples = min(first.num_samples, second.num_samples)
  return tuple(dataclasses.replace(latents, z=latents.z[:, :chunks], num_samples=samples)
               for latents in (first, second))


def _check_continuous(latents):
  if latents.z.ndim != 4:
    raise UserError('these latents are tokens: encode without discrete to mix or change them')


def _checked(latents, embeddings):
  chosen, count = [int(k) for k in embeddings], latents.z.shape[2]
  for k in chosen:
    if not 0 <= k < count:
      raise UserError(f'there is no embedding {k}: these latents have 0..{count - 1}')
  return chosen
