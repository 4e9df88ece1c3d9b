"""Atomic writing of audio files: WAV, FLAC and Ogg Vorbis."""

from collections.abc import Mapping
import contextlib
import io
import os
import stat
import tempfile

from absl import logging
import numpy as np
import soundfile

from m2l2 import files
from m2l2.data import containers
from m2l2.data.paths import extension, shown
from m2l2.data.streams import FILE_ERRORS, reason
from m2l2.errors import UserError

# 24 bits if the format allows: every player reads them, and the quantisation noise (-146 dB)
# stays far below anything that is measured on a reconstruction. Vorbis is the one lossy target.
WRITE_FORMATS = {
    '.wav': ('WAV', 'PCM_24'),
    '.flac': ('FLAC', 'PCM_24'),
    '.ogg': ('OGG', 'VORBIS'),
}

_WRITE_SAMPLES = 2**14  # libvorbis keeps a block on its stack, so blocks must be short
_WAV_TEXT = 2000  # bytes; libsndfile reads no tags of a WAV if one is longer than 2045
_VORBIS_LIMITS = 200_000, 255  # Hz and channels; beyond them libsndfile crashes
_WAV_LIMIT = 2**32 - 2**16  # bytes; a WAV's sizes are 32-bit


def check_writable(path, *, extensions: tuple[str, ...] | None = tuple(WRITE_FORMATS)):
  """Raises UserError when `path` could not be written later: call it before the work starts.

  By default the path must name audio that can be written (.wav, .flac, .ogg); give the allowed
  `extensions` for another kind of file, or None for any. A file or directory without any write
  bit counts as read-only for root too. The test leaves no file behind, and deletes temporary files that killed
  processes of this machine left beside `path`.
  """
  name = shown(path)
  if extensions is not None and extension(path) not in extensions:
    raise UserError(f'{name}: cannot write this kind of file; name it *{" or *".join(extensions)}')
  target = os.path.realpath(path)
  folder = os.path.dirname(target)
  if os.path.isdir(target):
    raise UserError(f'{name}: is a directory; name a file')
  if not os.path.isdir(folder):
    raise UserError(f'{name}: cannot be written: there is no directory {shown(folder)}')
  if os.path.exists(target) and not stat.S_ISREG(os.stat(target).st_mode):
    raise UserError(f'{name}: cannot be written: it is not a regular file')
  for place in (folder, target):
    if os.path.exists(place) and not (os.stat(place).st_mode & 0o222 and os.access(place, os.W_OK)):
      raise UserError(f'{name}: cannot be written: {shown(place)} is read-only')
  files.remove_leftovers(target)
  trial = files.temporary(target)
  try:
    with contextlib.suppress(FileNotFoundError):
      os.lstat(target)  # fails for a name that is too long; the temporary name is shorter
    os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.unlink(trial)
  except OSError as e:
    raise UserError(f'{name}: cannot be written: {e.strerror or e}') from e


class AudioWriter:
  """Writes audio in pieces; the file gets its name when the `with` block ends without an error.

  24-bit PCM for .wav and .flac, Vorbis for .ogg. Channels come in WAV's order. Samples outside [-1, 1] are clipped,
  counted in `clipped`, and reported once in the log; or, with `normalize`, all of the audio is scaled down so that
  none is outside. After an exception no file is left.

  Args:
    path, sample_rate, channels: of the file.
    tags: text by libsndfile's names; those that the format cannot store are dropped. A WAV stores 2000 bytes of each,
      and the log reports what is cut.
    normalize: as above; the audio is in a temporary file until its peak is known.

  Raises UserError: as `check_writable`; a rate or a channel count that the format does not take;
  pieces that are not [channels, samples] or not finite; a WAV of more than 4 GiB; a full disk.
  """

  def __init__(self, path, sample_rate: int, channels: int, *, tags: Mapping[str, str] | None = None,
               normalize: bool = False):
    check_writable(path)
    self.clipped = 0
    self._peak = 1.0
    self._name = shown(path)
    self._channels = channels
    self._target = os.path.realpath(path)
    self._temporary = files.temporary(self._target)
    self._format, subtype = WRITE_FORMATS[extension(path)]
    if self._format == 'OGG' and (sample_rate > _VORBIS_LIMITS[0] or channels > _VORBIS_LIMITS[1]):
      raise UserError(f'{self._name}: OGG Vorbis ends at {_VORBIS_LIMITS[0]} Hz and {_VORBIS_LIMITS[1]} channels, and '
                      f'here are {channels} at {sample_rate} Hz; name it *.wav')
    self._order = containers.XIPH_ORDER.get(channels) if self._format == 'OGG' else None
    self._held = tempfile.TemporaryFile() if normalize else None
    self._bytes = 0
    try:
      self._file = soundfile.SoundFile(
          os.fsencode(self._temporary), 'w', samplerate=sample_rate, channels=channels,
          format=self._format, subtype=subtype)
    except (*FILE_ERRORS, OverflowError) as e:
      self._remove()
      raise UserError(
          f'{self._name}: {self._format} cannot be written with {channels} channels at '
          f'{sample_rate} Hz ({reason(e)})') from e
    for name, text in (tags or {}).items():
      if self._format == 'WAV' and len(text.encode()) > _WAV_TEXT:
        text = text.encode()[:_WAV_TEXT].decode('utf-8', 'ignore')
        logging.warning('%s: the %s is cut to %d bytes, a WAV holds no more (FLAC does)', self._name, name, _WAV_TEXT)
      with contextlib.suppress(*FILE_ERRORS):  # the format cannot store it
        setattr(self._file, name, text)

  def write(self, audio: np.ndarray):
    """Appends float audio [channels, samples]."""
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 2 or audio.shape[0] != self._channels:
      raise UserError(
          f'{self._name}: audio must be [{self._channels} channels, samples], not of shape '
          f'{list(audio.shape)}')
    if not np.isfinite(audio).all():
      raise UserError(f'{self._name}: the audio to write holds NaN or infinite samples')
    self._bytes += 3 * audio.size
    if self._format == 'WAV' and self._bytes > _WAV_LIMIT:
      raise UserError(f'{self._name}: a WAV file ends at 4 GiB; name it *.flac')
    if self._held:
      self._peak = max(self._peak, float(np.abs(audio).max(initial=0)))
      try:
        self._held.write(np.ascontiguousarray(audio.T).data)
      except OSError as e:
        raise UserError(f'{self._name}: the temporary file for --normalize could not be written ({e.strerror})') from e
    else:
      self._write(audio)

  def _write_held(self, held):
    held.seek(0)
    while data := held.read(4 * self._channels * _WRITE_SAMPLES):
      self._write(np.frombuffer(data, np.float32).reshape(-1, self._channels).T / np.float32(self._peak))

  def _write(self, audio):
    self.clipped += int(np.count_nonzero(np.abs(audio) > 1))
    samples = np.clip(audio, -1, 1).T
    samples = samples[:, self._order] if self._order else samples
    try:
      for start in range(0, len(samples), _WRITE_SAMPLES):
        self._file.write(np.ascontiguousarray(samples[start:start + _WRITE_SAMPLES]))
    except FILE_ERRORS as e:
      raise UserError(f'{self._name}: could not be written ({reason(e)})') from e

  def __enter__(self):
    return self

  def __exit__(self, error, *unused):
    try:
      try:
        if self._held and error is None:
          self._write_held(self._held)
        self._file.close()
        if error is None:
          os.replace(self._temporary, self._target)
      except FILE_ERRORS as e:
        raise UserError(f'{self._name}: could not be written ({reason(e)})') from e
    finally:
      if self._held:
        self._held.close()
      self._remove()
    if error is None and self.clipped:
      logging.warning('%s: %d samples beyond [-1, 1] were clipped (--normalize scales instead)', self._name,
                      self.clipped)

  def _remove(self):
    try:
      os.unlink(self._temporary)
    except FileNotFoundError:
      pass


def write(path, audio: np.ndarray, sample_rate: int) -> int:
  """Writes float audio [channels, samples] at once; returns how many samples were clipped.

  Raises UserError as `AudioWriter` does.
  """
  audio = np.asarray(audio)
  if audio.ndim != 2 or not audio.shape[0]:
    raise UserError(
        f'{shown(path)}: audio must be [channels, samples], not of shape {list(audio.shape)}')
  with AudioWriter(path, sample_rate, audio.shape[0]) as writer:
    writer.write(audio)
  return writer.clipped


_IN_MEMORY: dict[str, dict] = {
    'FLAC': {'subtype': 'PCM_16'}, 'MP3': {'bitrate_mode': 'VARIABLE', 'compression_level': 0.0}}


def file_bytes(audio: np.ndarray, sample_rate: int, *, kind: str = 'FLAC') -> bytes:
  """int16 or float32 [channels, samples] as a file in memory: 'FLAC' of 16 bits, or 'MP3' in its best quality.

  Raises UserError: more channels than that has (8 and 2), or a rate that it cannot state.
  """
  file = io.BytesIO()
  try:
    soundfile.write(file, np.ascontiguousarray(audio.T), sample_rate, format=kind, **_IN_MEMORY[kind])
  except (*FILE_ERRORS, OverflowError) as e:
    raise UserError(f'{audio.shape[0]} channels at {sample_rate} Hz cannot be stored as {kind} ({reason(e)})') from e
  return file.getvalue()
