"""Decoding by libsndfile: one stream of a file with exact seeks, and files in memory.

`containers` corrects libsndfile (chained streams, lengths, seeks); a `Stream` reads the pieces that it lists.
"""

from collections.abc import Callable
import contextlib
import io

import numpy as np
import soundfile

from m2l2.data import containers
from m2l2.data.paths import shown
from m2l2.errors import UserError

# An MP3 decodes to its samples only after the frames that hold their bits, at the least rate up to 86 of 576 samples
# before them, and what the filters remember.
_MP3_LEAD = 2**16
_SKIP = 2**16  # samples thrown away at once

# What soundfile raises on a bad file; TypeError is its answer to a name that ends in .raw.
FILE_ERRORS = (soundfile.SoundFileError, RuntimeError, OSError, TypeError, ValueError)


def reason(error: Exception) -> str:
  """The error message of libsndfile without the path, as one line."""
  text = getattr(error, 'error_string', None) or str(error) or type(error).__name__
  return ' '.join(text.split()).rstrip('.')


def texts(file) -> dict[str, str]:
  """Tags by name. Text that is not UTF-8 is read as cp1252, which Windows programs write; soundfile would drop it."""
  metadata = file.copy_metadata()
  for name, text in metadata.items():
    if '\ufffd' in text:
      # private to soundfile, so another version may name it differently
      with contextlib.suppress(AttributeError, KeyError):
        raw = soundfile._ffi.string(soundfile._snd.sf_get_string(file._file, soundfile._str_types[name]))
        metadata[name] = text if raw.decode('utf-8', 'replace').encode() == raw else raw.decode('cp1252', 'replace')
  return metadata


class _Sound(soundfile.SoundFile):
  """Reads without seeking: soundfile seeks to the current position after each read, and an MP3 then lacks the bits of
  earlier frames."""

  def seekable(self) -> bool:
    return False


class Stream:
  """One stream of a file, read by libsndfile, with exact seeks.

  Args:
    open: pieces of the file, or None for all of it -> a source for soundfile.
    part: which of the file's, None: all of it.

  Attributes: file: the open SoundFile; frames: samples per channel, as declared; kind: (channels, rate in Hz).
  """

  def __init__(self, open: Callable, part: containers.Part | None = None, **raw):
    self._open, self._raw, self._part = open, raw, part or containers.Part(())
    self.file = _Sound(open(self._part.pieces), **raw)
    self.frames = self._part.frames or self.file.frames
    self.kind = (self.file.channels, self.file.samplerate)
    self._seekable = soundfile.SoundFile.seekable(self.file)
    self._lead = _MP3_LEAD if self.file.subtype.startswith('MPEG') else 0
    self._position = -self._part.skip
    self._is_whole = True  # and no piece of the stream

  def seek(self, position: int):
    """To a sample."""
    if position == self._position:
      return
    if self._part.is_indexed:
      self._reopen(*self._part.before(position))
    elif self._seekable:
      place = max(-self._part.skip, position - self._lead)
      self.file.seek(place + self._part.skip)
      self._position = place
    elif position < self._position:
      self._reopen(-self._part.skip, self._part.pieces)
    self._skip_to(position)

  def read(self, frames: int) -> np.ndarray:
    """At most `frames` samples [n, channels] from the current position."""
    if self._position < 0:
      self._skip_to(0)
    frames = max(0, min(frames, self.frames - self._position))
    audio = self._read(frames)
    if len(audio) < frames and not self._is_whole:  # libsndfile took the end of a piece for the end of the stream
      position = self._position - len(audio)
      self._reopen(0, self._part.pieces)
      self._skip_to(position)
      audio = self._read(frames)
    return audio

  def _read(self, frames):
    audio = self.file.read(frames, dtype='float32', always_2d=True)
    self._position += len(audio)
    return audio[:, self._part.order] if self._part.order else audio

  def _reopen(self, position: int, pieces):
    self.file.close()
    self.file = _Sound(self._open(pieces), **self._raw)
    self._position, self._is_whole = position, pieces == self._part.pieces

  def _skip_to(self, position: int):
    while self._position < position and len(self._read(min(position - self._position, _SKIP))):
      pass
    self._position = position  # nothing can be read beyond the end


def read_bytes(data: bytes, *, start: int, frames: int, name: str) -> np.ndarray:
  """The samples [start, start + frames) of an audio file in memory, float32 [channels, frames].

  Seeks, so that little else is decoded. `name` is used in errors. Raises UserError: not audio,
  damaged, or shorter than that.
  """
  try:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
      file.seek(start)
      audio = file.read(frames, dtype='float32', always_2d=True) if frames > 0 else np.zeros((0, file.channels))
  except FILE_ERRORS as e:
    raise UserError(f'{shown(name)}: cannot be decoded ({reason(e)})') from e
  if len(audio) != frames:
    raise UserError(f'{shown(name)}: has no {frames} samples from {start} on')
  return np.ascontiguousarray(audio.T, np.float32)


def decode_bytes(data: bytes, *, skip: int, frames: int, name: str) -> np.ndarray:
  """`frames` samples of an audio file in memory after its first `skip`, without a seek: float32 [channels, frames].

  `name` is used in errors. Raises UserError: not audio, damaged, or shorter than that.
  """
  try:
    with _Sound(io.BytesIO(data)) as file:
      audio = file.read(skip + frames, dtype='float32', always_2d=True)
  except FILE_ERRORS as e:
    raise UserError(f'{name}: is damaged ({reason(e)})') from e
  if len(audio) != skip + frames:
    raise UserError(f'{name}: is damaged (ends after {len(audio)} of {skip + frames} samples)')
  return audio[skip:].T
