"""Sound as libsndfile decodes it: one stream of a file, with seeks that are exact, and files that lie in memory.

Where libsndfile errs (chains, lengths, seeks), `containers` knows better; a `Stream` reads the pieces that it names.
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
  """libsndfile's own words without the path, on one line."""
  text = getattr(error, 'error_string', None) or str(error) or type(error).__name__
  return ' '.join(text.split()).rstrip('.')


def texts(file) -> dict[str, str]:
  """Text by name. What is not UTF-8 is read as Windows' Latin 1, which its programs write; soundfile would lose it."""
  metadata = file.copy_metadata()
  for name, text in metadata.items():
    if '\ufffd' in text:
      with contextlib.suppress(AttributeError, KeyError):  # soundfile's own, which another version may call otherwise
        raw = soundfile._ffi.string(soundfile._snd.sf_get_string(file._file, soundfile._str_types[name]))
        metadata[name] = text if raw.decode('utf-8', 'replace').encode() == raw else raw.decode('cp1252', 'replace')
  return metadata


class _Sound(soundfile.SoundFile):
  """Reads on without a seek: after each read soundfile seeks to where it stands anyway, and an MP3 then lacks the bits
  of frames before."""

  def seekable(self) -> bool:
    return False


class Stream:
  """One stream of a file, as libsndfile reads it, but for its seeks.

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
    """At most `frames` samples [n, channels] from where it stands."""
    if self._position < 0:
      self._skip_to(0)
    frames = max(0, min(frames, self.frames - self._position))
    audio = self._read(frames)
    if len(audio) < frames and not self._is_whole:  # libsndfile took the end of a piece for that of the stream
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
    self._position = position  # beyond the end there is nothing to read


def read_bytes(data: bytes, *, start: int, frames: int, name: str) -> np.ndarray:
  """The samples [start, start + frames) of an audio file in memory, float32 [channels, frames].

  Seeks, so that little else is decoded. `name` is what errors call it. Raises UserError: not audio,
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

  `name` is what errors call it. Raises UserError: not audio, damaged, or shorter than that.
  """
  try:
    with _Sound(io.BytesIO(data)) as file:
      audio = file.read(skip + frames, dtype='float32', always_2d=True)
  except FILE_ERRORS as e:
    raise UserError(f'{name}: is damaged ({reason(e)})') from e
  if len(audio) != skip + frames:
    raise UserError(f'{name}: is damaged (ends after {len(audio)} of {skip + frames} samples)')
  return audio[skip:].T
