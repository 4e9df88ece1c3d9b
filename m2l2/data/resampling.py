"""Resampling by soxr, at once or in pieces, without delay."""

from collections.abc import Iterable, Iterator
import math

import numpy as np
import soxr

from m2l2.errors import UserError

_MAX_RATE = 2**31 - 1


def resampled_length(samples: int, *, from_rate: int, to_rate: int) -> int:
  """The number of samples that `resample` and `StreamResampler` return: ceil(samples * to_rate / from_rate).

  It rounds up, so that resampling and resampling back loses no sample: cut the result at the source's length.
  """
  return -(-samples * to_rate // from_rate)


class StreamResampler:
  """Resamples a signal in pieces, by soxr HQ, without delay: sample 0 stays at time 0.

  The results of `push` and that of `finish`, concatenated, equal those of `resample` for the whole signal:
  `resampled_length` samples. The signal counts as zero beyond its ends. Memory does not grow with the signal. If the
  rates are equal, samples pass unchanged.
  """

  def __init__(self, *, from_rate: int, to_rate: int, channels: int):
    for rate in (from_rate, to_rate):
      if not 0 < rate <= _MAX_RATE:
        raise UserError(f'cannot resample from {from_rate} Hz to {to_rate} Hz')
    self._from_rate = from_rate
    self._to_rate = to_rate
    self._channels = channels
    self._taken = 0
    self._given = 0
    self._soxr = None
    if from_rate != to_rate:
      try:
        self._soxr = soxr.ResampleStream(from_rate, to_rate, channels, dtype='float32',
                                         quality='HQ')
      except (RuntimeError, ValueError) as e:
        raise UserError(f'cannot resample from {from_rate} Hz to {to_rate} Hz: {e}') from e

  def push(self, audio: np.ndarray) -> np.ndarray:
    """Takes [channels, samples]; returns what is ready, float32 [channels, any number]."""
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 2 or audio.shape[0] != self._channels:
      raise UserError(
          f'audio must be [{self._channels} channels, samples], not of shape {list(audio.shape)}')
    self._taken += audio.shape[1]
    return self._run(audio, last=False)

  def finish(self) -> np.ndarray:
    """Returns the rest, float32 [channels, samples]. Call it once, at the end."""
    total = resampled_length(self._taken, from_rate=self._from_rate, to_rate=self._to_rate)
    # soxr by itself ends at the nearest sample; zeros worth one output sample carry it to the next.
    zeros = np.zeros((self._channels, math.ceil(self._from_rate / self._to_rate)), np.float32)
    given = self._given
    return self._run(zeros, last=True)[:, :total - given]

  def stream(self, blocks: Iterable) -> Iterator[np.ndarray]:
    """Resamples an iterable of blocks: yields `push` of each, then `finish`."""
    for block in blocks:
      yield self.push(block)
    yield self.finish()

  def _run(self, audio: np.ndarray, *, last: bool) -> np.ndarray:
    if self._soxr is not None:
      out = self._soxr.resample_chunk(np.ascontiguousarray(audio.T), last=last)
      audio = np.ascontiguousarray(out.T)
    self._given += audio.shape[1]
    return audio


def resample(audio: np.ndarray, *, from_rate: int, to_rate: int) -> np.ndarray:
  """Resamples [channels, samples] with soxr HQ; float32 [channels, resampled_length(samples)].

  Raises UserError for rates that are not positive, or too far apart for soxr.
  """
  audio = np.asarray(audio, np.float32)
  if audio.ndim != 2 or not audio.shape[0]:
    raise UserError(f'audio must be [channels, samples], not of shape {list(audio.shape)}')
  stream = StreamResampler(from_rate=from_rate, to_rate=to_rate, channels=audio.shape[0])
  return np.concatenate([stream.push(audio), stream.finish()], axis=1)
