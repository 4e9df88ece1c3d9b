"""Encoding: the parts that `codec` (one file) and `bulk` (a corpus) share.

A signal in blocks of any size is resampled and cut into windows of whole chunks. Encoding is
chunk-local, so a window's latents do not depend on which other windows are encoded with it.
"""

from collections.abc import Iterable, Iterator

import jax.numpy as jnp
import numpy as np

from m2l2.data.audio_io import StreamResampler
from m2l2.errors import UserError
from m2l2.representation import Representation, SignalLayout

MOST_CHANNELS = 64  # an array of more is probably transposed


class Windows:
  """The windows of a signal in blocks [channels, any number of samples]; to be iterated once.

  Each is (audio float32 [channels, crop_samples(chunks)] at the model's rate, frames): its first `frames` frames are
  signal, the others padding.

  Memory grows with the blocks and the windows, not with the signal. All windows have `width` chunks, except that the
  last has two if that is enough: two shapes, two compilations.

  Attributes, once iterated:
    num_samples: the signal's length at its own rate.
    layout: representation.SignalLayout at the model's rate; layout.chunks of the windows' chunks contain the signal.

  Raises UserError, while iterating: no samples, NaN or infinity among them, integers, or blocks of another shape.
  """

  layout: SignalLayout

  def __init__(self, blocks: Iterable, *, representation: Representation, from_rate: int, to_rate: int, channels: int,
               width: int):
    self.num_samples = 0
    self._blocks, self._representation, self._channels, self._width = blocks, representation, channels, width
    self._resampler = StreamResampler(from_rate=from_rate, to_rate=to_rate, channels=channels)

  def _counted(self):
    for block in self._blocks:
      block = as_samples(block)
      block = block[None] if block.ndim == self._channels == 1 else block
      if block.ndim != 2 or len(block) != self._channels:
        raise UserError(f'blocks of audio must be [{self._channels} channels, samples], not of shape '
                        f'{list(block.shape)}')
      self.num_samples += block.shape[1]
      yield block

  def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
    rep, width = self._representation, self._width
    step = width * rep.chunk_samples
    pending = np.zeros((self._channels, rep.layout(1).lead), np.float32)
    received = taken = 0
    for piece in self._resampler.stream(self._counted()):
      if not np.isfinite(piece).all():
        raise UserError('the audio holds NaN or infinite samples')
      received += piece.shape[1]
      pending = np.concatenate([pending, piece], axis=1)
      while pending.shape[1] >= step + rep.overlap:  # then all frames of the window hold signal
        yield pending[:, :step + rep.overlap], width * rep.frames
        pending, taken = pending[:, step:], taken + width
    if not received:
      raise UserError('the audio holds no samples')
    self.layout = layout = rep.layout(received)
    while taken < layout.chunks:
      chunks = min(width, 2) if layout.chunks - taken <= 2 else width
      missing = chunks * rep.chunk_samples + rep.overlap - pending.shape[1]
      pending = np.pad(pending, ((0, 0), (0, max(missing, 0))))
      frames = min(layout.frames - taken * rep.frames, chunks * rep.frames)
      yield pending[:, :chunks * rep.chunk_samples + rep.overlap], frames
      pending, taken = pending[:, chunks * rep.chunk_samples:], taken + chunks


def as_samples(audio) -> np.ndarray:
  """Audio of any floating type -> float32 of the same shape.

  Raises UserError: integers, whose full scale is unknown, or no numbers.
  """
  audio = np.asarray(audio)
  if audio.dtype.kind != 'f' and audio.dtype.name != 'bfloat16':
    raise UserError(f'audio is {audio.dtype}: give float32 in [-1, 1] (int16: audio / 32768)')
  return audio.astype(np.float32, copy=False)


def whole_rate(sample_rate) -> int:
  """A sample rate in Hz of any type of number as an int. Raises UserError: not a whole number."""
  try:
    rate = int(sample_rate)
  except (TypeError, ValueError, OverflowError):
    rate = None
  if rate is None or rate != sample_rate:
    raise UserError(f'sample_rate is {sample_rate!r}: give a whole number of Hz, as 44100')
  return rate


def check_channels(channels: int, *, most: int):
  """Raises UserError if a model of `most` channels cannot encode a signal of `channels`."""
  if channels > MOST_CHANNELS:
    raise UserError(f'the audio has {channels} channels: is it [samples, channels]? Give its transpose')
  if channels > most > 1:
    raise UserError(f'the audio has {channels} channels, this model takes at most {most}: mix it down first')


def to_streams(audio: np.ndarray, *, channels: int) -> np.ndarray:
  """[source's channels, N] -> [streams, the model's channels, N]: a mono model's streams are the channels."""
  if channels == 1:
    return audio[:, None]
  return np.broadcast_to(audio, (channels, audio.shape[1]))[None]


def encode_chunks(params, audio, frames, *, representation, network, bottleneck):
  """audio [B, C, crop_samples(S)] -> z float32 [B, S, K, d]; frames past `frames` (int, or int [B]) are silence."""
  spec = representation.analyse(audio)
  s, _, t = spec.shape[1:4]
  frame = jnp.arange(s * t).reshape(1, s, 1, t, 1)
  spec = jnp.where(frame < jnp.reshape(frames, (-1, 1, 1, 1, 1)), spec, 0.0)
  return bottleneck(network.encode(params, spec))


def check_finite(z: np.ndarray) -> np.ndarray:
  """Returns the latents. Raises UserError: NaN or infinity among them."""
  if not np.isfinite(z).all():
    raise UserError('encoding gave NaN or infinite latents: the audio goes far beyond [-1, 1], '
                    'or the weights are broken')
  return z
