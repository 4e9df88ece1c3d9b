"""The host's part of decoding: from the device's arrays to audio with the source's channels, length and rate."""

from collections.abc import Iterable, Iterator
import dataclasses

import jax
import numpy as np

from m2l2.data.audio_io import StreamResampler
from m2l2.representation import SignalLayout


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Audio on the device, of which a part is to be copied to the host: [streams, C, samples], or the first `count` of
  [streams, n, C, samples of a chunk]; less the first `skip` samples, and with the `tail` [streams, C, samples] behind
  it."""
  audio: jax.Array
  count: int | None = None
  skip: int = 0
  tail: jax.Array | None = None

  def __array__(self, dtype=None, copy=None):
    audio = np.asarray(self.audio)
    if self.count is not None:
      audio = np.moveaxis(audio[:, :self.count], 1, 2).reshape(len(audio), audio.shape[2], -1)
    audio = audio[:, :, self.skip:]
    return audio if self.tail is None else np.concatenate([audio, np.asarray(self.tail)], axis=2)


def on_host(pieces: Iterable) -> Iterator[np.ndarray]:
  """Copies arrays from the device to numpy, each after the next has been started, so that the device does not wait."""
  before = None
  for piece in pieces:
    if before is not None:
      yield np.asarray(before)
    before = piece
  if before is not None:
    yield np.asarray(before)


class Cut:
  """Cuts the samples start .. start + length (None: to the end) out of a signal that arrives in pieces [channels, n].

  With edges 'none' the last `missing` samples, up to hop - 1, are past the last frame.
  """

  def __init__(self, *, start, length=None):
    self._start, self._position = start, 0
    self._end = float('inf') if length is None else start + length

  def take(self, piece):
    low, high = max(self._start - self._position, 0), min(self._end - self._position, piece.shape[1])
    self._position += piece.shape[1]
    return piece[:, low:max(low, high)]

  @property
  def missing(self):
    return max(0, self._end - max(self._position, self._start))


class Output:
  """Turns the decoded pieces of one signal's streams into audio with the source's channels, length and rate."""

  def __init__(self, *, layout: SignalLayout, model_channels: int, model_rate: int, channels: int, sample_rate: int,
               num_samples: int, clip: bool):
    self._mono_model, self._channels, self._clip = model_channels == 1, channels, clip
    self._signal = Cut(start=layout.lead, length=layout.num_samples)
    self._resampler = StreamResampler(from_rate=model_rate, to_rate=sample_rate, channels=channels)
    self._source = Cut(start=0, length=num_samples)

  def take(self, streams):
    """[streams, model channels, n] -> [channels, m]; mono stays mono through a stereo model."""
    if self._mono_model:
      audio = streams[:, 0]
    else:
      audio = streams[0] if self._channels > 1 else streams[0].mean(axis=0, keepdims=True)
    return self._done(self._resampler.push(self._signal.take(audio)))

  def finish(self):
    silence = np.zeros((self._channels, self._signal.missing), np.float32)
    return self._done(np.concatenate([self._resampler.push(silence), self._resampler.finish()], axis=1))

  def _done(self, audio):
    audio = self._source.take(audio)
    return np.clip(audio, -1.0, 1.0) if self._clip else audio
