"""Audio files in and out, and resampling: the only file that knows soundfile and soxr.

Audio is float32 `[channels, samples]`, nominally in [-1, 1] (lossy and float files may exceed it); the channels are in
WAV's order (5.1: left, right, centre, LFE, back left, back right), whatever the format's own is.
Readable: what libsndfile reads (WAV, FLAC, OGG Vorbis, Opus, MP3, AIFF, ...), and FLAC inside OGG. Every failure that a
user can mend is a `UserError` of one line that begins with the path.

Seeking is exact: a read at `start` gives the very samples of the whole file's read, bit for bit
(MP3 here and there: within 1e-7; Opus: as a rule within 1e-7, in a file of three channels 2e-3 was seen), for every
format above, whoever wrote it. Streams one after the other in a file
(`cat a.ogg b.ogg`) are read as one, as far as rate and channels stay. What a file lacks of what its
header promises, or what of it cannot be read, is named once in the log, with seconds.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import math
import mmap
import os
import secrets
import shutil
import socket
import stat
import tempfile

from absl import logging
import numpy as np
import soundfile
import soxr

from m2l2.data import containers, ffmpeg
from m2l2.errors import UserError

READABLE = 'WAV, FLAC, OGG, Opus, MP3 and AIFF'

# 24 bits where there is a choice: every player reads them, and the quantisation noise (-146 dB)
# stays far below anything that is measured on a reconstruction. Vorbis is the one lossy target.
WRITE_FORMATS = {
    '.wav': ('WAV', 'PCM_24'),
    '.flac': ('FLAC', 'PCM_24'),
    '.ogg': ('OGG', 'VORBIS'),
}

# Of the text that libsndfile can keep, what belongs to the music and not to the file.
TAGS = ('title', 'artist', 'album', 'date', 'tracknumber', 'genre', 'comment', 'copyright', 'license')

RATES = (4000, 768_000)  # Hz; beyond them headers lie, and resampling would blow a small file up
_READ_VALUES = 2**21  # most values (samples x channels) decoded at once: 8 MB
_WRITE_SAMPLES = 2**14  # libvorbis keeps a block on its stack: never hand it a whole song
_WAV_TEXT = 2000  # bytes; libsndfile reads no text of a WAV where one is longer than 2045
_VORBIS_LIMITS = 200_000, 255  # Hz and channels; beyond them libsndfile crashes
_WAV_LIMIT = 2**32 - 2**16  # bytes; a WAV's sizes are 32-bit
_UNKNOWN_LENGTH = 2**62  # libsndfile says 2**63 - 1 where the header states no length
_MAX_RATE = 2**31 - 1

# An MP3 decodes to its samples only after the frames that hold their bits, at the least rate up to 86 of 576 samples
# before them, and what the filters remember.
_MP3_LEAD = 2**16
_SKIP = 2**16  # samples thrown away at once

# What soundfile raises on a bad file; TypeError is its answer to a name that ends in .raw.
_FILE_ERRORS = (soundfile.SoundFileError, RuntimeError, OSError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class AudioInfo:
  """What a file's header says.

  Attributes:
    path: as given.
    sample_rate: Hz.
    channels: count.
    frames: samples per channel, as declared. A damaged file or an MP3 may hold fewer.
    format: libsndfile's name of the container, as 'WAV'.
    subtype: libsndfile's name of the encoding, as 'PCM_16'.
    tags: text by libsndfile's names of it, as 'title' and 'artist'.
  """

  path: str
  sample_rate: int
  channels: int
  frames: int
  format: str
  subtype: str
  tags: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def seconds(self) -> float:
    return self.frames / self.sample_rate


def shown(path) -> str:
  """The path as one printable line (names of files may hold any byte)."""
  text = os.fsdecode(path).encode('utf-8', 'backslashreplace').decode('utf-8')
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _reason(error: Exception) -> str:
  """libsndfile's own words without the path, on one line."""
  text = getattr(error, 'error_string', None) or str(error) or type(error).__name__
  return ' '.join(text.split()).rstrip('.')


@functools.lru_cache(maxsize=2**14)
def _inspected(path, size: int, changed: int, whole: bool) -> containers.Contents:
  """An index at first sight: crops are cut from the same files again and again."""
  del size, changed
  try:
    with open(path, 'rb') as file:
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError, MemoryError, OverflowError):  # no room for it: libsndfile may still do
    return containers.Contents()
  with buffer:
    return containers.inspect(buffer, whole=whole)


def _contents(path, whole: bool) -> containers.Contents:
  found = os.stat(path)
  return _inspected(os.path.abspath(os.fsdecode(path)), found.st_size, found.st_mtime_ns, whole)


_told: set[tuple[str, str]] = set()
_MOST_TOLD = 10_000


def _ends_early(streams, what: str) -> str:
  seconds = sum(stream.frames for stream in streams) / streams[0].file.samplerate
  return f'goes on after {seconds:.1f} s with {what}; only what comes before that is read'


def _texts(file) -> dict[str, str]:
  """Text by name. What is not UTF-8 is read as Windows' Latin 1, which its programs write; soundfile would lose it."""
  found = file.copy_metadata()
  for name, text in found.items():
    if '\ufffd' in text:
      with contextlib.suppress(AttributeError, KeyError):  # soundfile's own, which another version may call otherwise
        raw = soundfile._ffi.string(soundfile._snd.sf_get_string(file._file, soundfile._str_types[name]))
        found[name] = text if raw.decode('utf-8', 'replace').encode() == raw else raw.decode('cp1252', 'replace')
  return found


class _Sound(soundfile.SoundFile):
  """Reads on without a seek: after each read soundfile seeks to where it stands anyway, and an MP3 then lacks the bits
  of frames before."""

  def seekable(self) -> bool:
    return False


class _Stream:
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


class AudioReader:
  """An open audio file: `info`, and `read` anywhere in it. A context manager.

  Args:
    path: of the file.
    data: the file's bytes, for one that lies in memory; `path` is then only what errors call it.
    whole: look for all of its streams, even if that takes reading all of a FLAC; without it one may be missed that is
      as long as the first.

  Attributes:
    info: the `AudioInfo`.
    note: what is missing of the file, as far as is known by now: one line without its name; None: nothing.
    starts: for whoever cuts crops: how many of them begin here, if the file's end belongs to the next
      segment of a longer one; None: all that fit.

  Raises UserError: missing, a directory, not a regular file, no permission, empty, not audio, no
  samples, or no stated length.
  """

  starts: int | None = None

  def __init__(self, path, data: bytes | None = None, *, whole: bool = True):
    name = shown(path)
    if data is None:
      self._check_file(path, name)
    elif not data:
      raise UserError(f'{name}: is empty (0 bytes)')
    self._name, self._path, self.note, foreign = name, path, None, None
    self._buffer, contents = data, containers.inspect(data) if data is not None else _contents(path, whole)
    try:
      self._streams = self._open_streams(contents)
    except _FILE_ERRORS as e:
      if data is not None or _extension(path) not in ffmpeg.EXTENSIONS:
        raise UserError(
            f'{name}: is not audio that can be read here ({_reason(e)}); give {READABLE}, or convert '
            'it to WAV first') from e
      foreign = self._decode_foreign(path)
    self._current, file = 0, self._streams[0].file
    self.info = AudioInfo(
        path=os.fsdecode(path), sample_rate=file.samplerate, channels=file.channels,
        frames=sum(stream.frames for stream in self._streams),
        format=file.format if not foreign else _extension(path)[1:].upper(),
        subtype=file.subtype if not foreign else foreign.codec.upper(), tags=self._tags(foreign))
    problem = None
    if self.info.frames <= 0:
      problem = 'holds no samples'
    elif self.info.frames >= _UNKNOWN_LENGTH:
      problem = 'does not state its length (was it written to a pipe?); convert it to WAV first'
    elif self.info.sample_rate <= 0:
      problem = f'states a sample rate of {self.info.sample_rate} Hz'
    if problem:
      self.close()
      raise UserError(f'{name}: {problem}')
    if contents.stated:
      self._tell(f'is cut short: holds {self.info.seconds:.1f} of the '
                 f'{self.info.seconds + contents.stated / self.info.sample_rate:.1f} s that its header states')
    elif contents.unended:
      self._tell(f'ends after {self.info.seconds:.1f} s without an end mark: it was cut short, or recorded from a '
                 'stream')
    if contents.foreign:
      self._tell(f'holds a file of another kind, too, from byte {contents.foreign:,} on, which is not read')

  @staticmethod
  def _check_file(path, name):
    try:
      mode = os.stat(path).st_mode
      size = os.path.getsize(path)
    except (OSError, ValueError) as e:
      why = 'may not be read (permission denied)' if isinstance(e, PermissionError) else 'there is no such file'
      raise UserError(f'{name}: {why}') from e
    if stat.S_ISDIR(mode):
      raise UserError(f'{name}: is a directory, not an audio file')
    if not stat.S_ISREG(mode):
      raise UserError(f'{name}: is not a regular file')
    if size == 0:
      raise UserError(f'{name}: is empty (0 bytes)')
    if not os.access(path, os.R_OK):
      raise UserError(f'{name}: may not be read (permission denied)')

  def read(self, *, start: int, frames: int, check_finite: bool = False) -> np.ndarray:
    """Exactly `frames` samples from `start` on, float32 [channels, frames].

    Memory grows with what the file really gives, not with what its header claims. The array may be
    a strided view (samples of a file are interleaved).

    Raises UserError: the file ends earlier, cannot be decoded there, or (with check_finite) holds
    NaN or infinity.
    """
    self._seek(start)
    blocks, done = [], 0
    while done < frames:
      block = self._read_on(start + done, min(frames - done, self._most()))
      if block.shape[1] == 0:
        raise self._truncated(start + done)
      blocks.append(block)
      done += block.shape[1]
    audio = blocks[0] if len(blocks) == 1 else np.concatenate(
        blocks or [np.zeros((self.info.channels, 0), np.float32)], axis=1)
    if check_finite:
      self._check_finite(audio, start)
    return audio

  def blocks(self, *, block_samples: int, check_finite: bool = False,
             missing: int = 0) -> Iterator[np.ndarray]:
    """The whole file, float32 [channels, block_samples] a time (the last may be shorter).

    Raises UserError as `read` does. A file that ends up to `missing` samples before its stated
    length, and any MP3 (whose length may be an estimate), is taken as it is, with a warning in the log.
    """
    start = 0
    self._seek(0)
    while start < self.info.frames:
      parts, wanted, ended = [], min(block_samples, self.info.frames - start), False
      while wanted and not ended:
        part = self._read_on(start, min(wanted, self._most()))
        ended = part.shape[1] == 0
        parts.append(part)
        start += part.shape[1]
        wanted -= part.shape[1]
      block = np.ascontiguousarray(np.concatenate(parts, axis=1))
      if check_finite:
        self._check_finite(block, start - block.shape[1])
      if ended:
        if start == 0 or self.info.format != 'MP3' and not self.info.subtype.startswith('MPEG') and (
            self.info.frames - start > missing):
          raise self._truncated(start)
        self._tell(f'ends after {start} of {self.info.frames} stated samples, {start / self.info.sample_rate:.1f} of '
                   f'{self.info.seconds:.1f} s')
      if block.shape[1]:
        yield block
      if ended:
        return

  def close(self):
    for stream in self._streams:
      stream.file.close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def _open_streams(self, contents) -> list['_Stream']:
    """Every stream of the file that is like the first; of a chain's others the log tells."""
    parts, streams = contents.parts, []
    if parts and self._buffer is None:
      with open(self._path, 'rb') as file:
        self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(parts) < 2 and (not parts or parts[0].pieces == ((0, len(self._buffer)),)):  # as it is
      return [_Stream(self._source, parts[0] if parts else None)]
    for part in parts:
      try:
        stream = _Stream(self._source, part)
      except _FILE_ERRORS as e:
        if not streams:
          raise
        self._tell(_ends_early(streams, f'what cannot be read ({_reason(e)})'))
        break
      if streams and stream.kind != streams[0].kind:
        self._tell(_ends_early(streams, '{} channels at {} Hz'.format(*stream.kind)))
        break
      streams.append(stream)
    return streams

  def _source(self, pieces):
    """What soundfile opens for pieces of the file; for all of it the file itself, which is quicker."""
    if pieces and pieces != ((0, len(self._buffer)),):
      return containers.Joined(self._buffer, pieces)
    return io.BytesIO(self._buffer) if isinstance(self._buffer, bytes) else os.fsencode(self._path)

  def _tell(self, note: str):
    """Keeps the note, and logs it if it is the first of its kind for this file."""
    self.note = note if self.note is None else f'{self.note}; {note}'
    if len(_told) > _MOST_TOLD:
      _told.clear()
    if (self._name, note) not in _told:
      _told.add((self._name, note))
      logging.warning('%s: %s; taken as it is', self._name, note)

  def _seek(self, position: int):
    for number, stream in enumerate(self._streams):
      if position < stream.frames or number == len(self._streams) - 1:
        break
      position -= stream.frames
    try:
      self._current = number
      stream.seek(position)
    except _FILE_ERRORS as e:
      raise self._truncated(position, e) from e

  def _decode_foreign(self, path) -> ffmpeg.Decoded:
    """Opens, as raw samples, what FFmpeg decodes a file to."""
    decoded = tempfile.TemporaryFile()
    foreign = ffmpeg.decode(os.fsdecode(path), decoded, name=self._name)
    if not decoded.tell():
      raise UserError(f'{self._name}: holds no samples')
    decoded.seek(0)
    self._streams = [_Stream(lambda pieces: decoded, samplerate=foreign.sample_rate, channels=foreign.channels,
                             format='RAW', subtype='FLOAT')]
    return foreign

  def _tags(self, foreign) -> dict[str, str]:
    found = foreign.tags if foreign else _texts(self._streams[0].file)
    return {name: found[name] for name in TAGS if found.get(name)}

  def _most(self) -> int:
    return max(1, _READ_VALUES // self.info.channels)

  def _read_on(self, position: int, frames: int) -> np.ndarray:
    """At most `frames` samples [channels, n] from where the file stands."""
    try:
      audio = self._streams[self._current].read(frames)
      while not len(audio) and frames and self._current < len(self._streams) - 1:
        self._current += 1
        self._streams[self._current].seek(0)
        audio = self._streams[self._current].read(frames)
    except _FILE_ERRORS as e:
      raise self._truncated(position, e) from e
    return audio.T

  def _truncated(self, position: int, error: Exception | None = None) -> UserError:
    why = f' ({_reason(error)})' if error and _reason(error) else ''
    return UserError(
        f'{self._name}: is truncated or damaged: cannot be read at sample {position} of '
        f'{self.info.frames}{why}')

  def _check_finite(self, audio: np.ndarray, start: int):
    finite = np.isfinite(audio)
    if not finite.all():
      first = start + int(np.argmin(finite.all(axis=0)))
      raise UserError(f'{self._name}: holds NaN or infinite samples, the first at sample {first}')


def probe(path) -> AudioInfo:
  """What the header of an audio file says. Raises UserError as `AudioReader` does."""
  with AudioReader(path) as reader:
    return reader.info


def read(path, *, start: int = 0, frames: int | None = None,
         check_finite: bool = False) -> tuple[np.ndarray, int]:
  """Reads an audio file, or `frames` samples from `start` on by seeking.

  Returns (audio float32 [channels, samples], sample rate in Hz). Raises UserError as `AudioReader`
  and `AudioReader.read` do; when the file is shorter than start + frames; and for NaN or infinite
  samples with `check_finite`.
  """
  with AudioReader(path) as reader:
    info = reader.info
    if start < 0 or (frames is not None and frames < 0):
      raise UserError(f'{shown(path)}: cannot read {frames} samples from sample {start} on')
    if start + (frames or 0) > info.frames:
      raise UserError(
          f'{shown(path)}: holds {info.frames} samples, too few for {frames} from {start} on')
    if start == 0 and frames is None:
      blocks = list(reader.blocks(block_samples=_READ_VALUES, check_finite=check_finite))
      return np.ascontiguousarray(np.concatenate(blocks, axis=1)), info.sample_rate
    frames = info.frames - start if frames is None else frames
    audio = reader.read(start=start, frames=frames, check_finite=check_finite)
    return np.ascontiguousarray(audio), info.sample_rate


def read_blocks(path, *, block_samples: int, check_finite: bool = False) -> Iterator[np.ndarray]:
  """The whole file as float32 [channels, block_samples] blocks in bounded memory.

  Every block has `block_samples` samples but the last, which may have fewer. Failures (UserError,
  as `AudioReader` and `AudioReader.blocks`) come at the first `next`: call `probe` to meet those of
  the header before work starts. Count the samples: an MP3 may hold fewer than `probe` says.
  """
  if block_samples < 1:
    raise UserError(f'{shown(path)}: cannot be read in blocks of {block_samples} samples')
  with AudioReader(path) as reader:
    yield from reader.blocks(block_samples=block_samples, check_finite=check_finite)


def check_writable(path, *, extensions: tuple[str, ...] | None = tuple(WRITE_FORMATS)):
  """Raises UserError when `path` could not be written later: call it before the work starts.

  By default the path must name audio that can be written (.wav, .flac, .ogg); give the allowed
  `extensions` for another kind of file, or None for any. A file or directory without any write
  bit counts as read-only for root too. The test itself leaves nothing behind, and takes away what processes of this
  machine that were killed have left beside `path`.
  """
  name = shown(path)
  if extensions is not None and _extension(path) not in extensions:
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
  remove_leftovers(target)
  trial = temporary(target)
  try:
    with contextlib.suppress(FileNotFoundError):
      os.lstat(target)  # says so of a name that is too long; the temporary one is not
    os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    os.unlink(trial)
  except OSError as e:
    raise UserError(f'{name}: cannot be written: {e.strerror or e}') from e


def flac_bytes(audio: np.ndarray, sample_rate: int) -> bytes:
  """int16 [channels, samples] as a FLAC file in memory. Raises UserError: more than 8 channels, or a
  rate that FLAC cannot state."""
  file = io.BytesIO()
  try:
    soundfile.write(file, np.ascontiguousarray(audio.T), sample_rate, format='FLAC', subtype='PCM_16')
  except (*_FILE_ERRORS, OverflowError) as e:
    raise UserError(f'{audio.shape[0]} channels at {sample_rate} Hz cannot be stored as FLAC ({_reason(e)})') from e
  return file.getvalue()


def read_bytes(data: bytes, *, start: int, frames: int, name: str) -> np.ndarray:
  """The samples [start, start + frames) of an audio file in memory, float32 [channels, frames].

  Seeks, so that little else is decoded. `name` is what errors call it. Raises UserError: not audio,
  damaged, or shorter than that.
  """
  try:
    with soundfile.SoundFile(io.BytesIO(data)) as file:
      file.seek(start)
      audio = file.read(frames, dtype='float32', always_2d=True) if frames > 0 else np.zeros((0, file.channels))
  except _FILE_ERRORS as e:
    raise UserError(f'{shown(name)}: cannot be decoded ({_reason(e)})') from e
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
  except _FILE_ERRORS as e:
    raise UserError(f'{name}: is damaged ({_reason(e)})') from e
  if len(audio) != skip + frames:
    raise UserError(f'{name}: is damaged (ends after {len(audio)} of {skip + frames} samples)')
  return audio[skip:].T


def _extension(path) -> str:
  return os.path.splitext(os.fsdecode(path))[1].lower()


def temporary(target: str) -> str:
  """A free name beside the target; hidden, so that no scan takes it for music. It tells who made it."""
  folder, base = os.path.split(target)
  return os.path.join(folder, f'.{_short(base)}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.part')


def _short(base: str) -> str:
  """What fits into 255 bytes with more behind it."""
  return os.fsdecode(os.fsencode(base)[:16])


def _machine() -> str:
  """A word for this machine, and this container on it: process numbers mean something there."""
  return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove_leftovers(target: str):
  """Takes away the temporary files and folders of a target (`temporary`) whose makers are no more."""
  folder, base = os.path.split(target)
  for path in glob.iglob(os.path.join(glob.escape(folder), f'.{glob.escape(_short(base))}.{_machine()}.*.part')):
    number = path.split('.')[-3]
    if number.isdecimal() and not _is_alive(int(number)):
      with contextlib.suppress(OSError):
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:  # somebody else's
    pass
  return True


class AudioWriter:
  """Writes audio piece by piece; the file appears under its name when the `with` block ends well.

  24-bit PCM for .wav and .flac, Vorbis for .ogg. Channels come in WAV's order. Samples outside [-1, 1] are clipped,
  counted in `clipped`, and named once in the log; or, with `normalize`, all of the audio is scaled down until
  none lies outside. After an exception nothing is left behind.

  Args:
    path, sample_rate, channels: of the file.
    tags: text to keep in it by libsndfile's names, as far as the format has a place for it; a WAV has it for 2000 bytes
      each, and the log says what is cut.
    normalize: as above; the audio is held in a temporary file until its peak is known.

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
    self._temporary = temporary(self._target)
    self._format, subtype = WRITE_FORMATS[_extension(path)]
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
    except (*_FILE_ERRORS, OverflowError) as e:
      self._remove()
      raise UserError(
          f'{self._name}: {self._format} cannot be written with {channels} channels at '
          f'{sample_rate} Hz ({_reason(e)})') from e
    for name, text in (tags or {}).items():
      if self._format == 'WAV' and len(text.encode()) > _WAV_TEXT:
        text = text.encode()[:_WAV_TEXT].decode('utf-8', 'ignore')
        logging.warning('%s: the %s is cut to %d bytes, a WAV holds no more (FLAC does)', self._name, name, _WAV_TEXT)
      with contextlib.suppress(*_FILE_ERRORS):  # a format without a place for it
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

  def _write_held(self):
    self._held.seek(0)
    while data := self._held.read(4 * self._channels * _WRITE_SAMPLES):
      self._write(np.frombuffer(data, np.float32).reshape(-1, self._channels).T / np.float32(self._peak))

  def _write(self, audio):
    self.clipped += int(np.count_nonzero(np.abs(audio) > 1))
    samples = np.clip(audio, -1, 1).T
    samples = samples[:, self._order] if self._order else samples
    try:
      for start in range(0, len(samples), _WRITE_SAMPLES):
        self._file.write(np.ascontiguousarray(samples[start:start + _WRITE_SAMPLES]))
    except _FILE_ERRORS as e:
      raise UserError(f'{self._name}: could not be written ({_reason(e)})') from e

  def __enter__(self):
    return self

  def __exit__(self, error, *unused):
    try:
      try:
        if self._held and error is None:
          self._write_held()
        self._file.close()
        if error is None:
          os.replace(self._temporary, self._target)
      except _FILE_ERRORS as e:
        raise UserError(f'{self._name}: could not be written ({_reason(e)})') from e
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


def resampled_length(samples: int, *, from_rate: int, to_rate: int) -> int:
  """How many samples `resample` and `StreamResampler` give: ceil(samples * to_rate / from_rate).

  Rounding up, there and back never loses a sample: cut the way back at the source's own length.
  """
  return -(-samples * to_rate // from_rate)


class StreamResampler:
  """Resamples a signal that comes in pieces, soxr HQ, without delay: sample 0 stays at time 0.

  The pieces of `process` and the one of `finish`, put together, are exactly what `resample` gives
  for the whole signal: `resampled_length` samples. Beyond its ends the signal counts as zero. The
  memory held does not grow with the signal. Equal rates pass through untouched.
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

  def process(self, audio: np.ndarray) -> np.ndarray:
    """Takes [channels, samples]; returns what is ready, float32 [channels, any number]."""
    audio = np.asarray(audio, np.float32)
    if audio.ndim != 2 or audio.shape[0] != self._channels:
      raise UserError(
          f'audio must be [{self._channels} channels, samples], not of shape {list(audio.shape)}')
    self._taken += audio.shape[1]
    return self._run(audio, last=False)

  def finish(self) -> np.ndarray:
    """The rest, float32 [channels, samples]. To be called once, at the end."""
    total = resampled_length(self._taken, from_rate=self._from_rate, to_rate=self._to_rate)
    # soxr by itself ends at the nearest sample; zeros worth one output sample carry it to the next.
    zeros = np.zeros((self._channels, math.ceil(self._from_rate / self._to_rate)), np.float32)
    given = self._given
    return self._run(zeros, last=True)[:, :total - given]

  def stream(self, blocks: Iterable) -> Iterator[np.ndarray]:
    """The whole signal, block by block: `process` of each, then `finish`."""
    for block in blocks:
      yield self.process(block)
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
  return np.concatenate([stream.process(audio), stream.finish()], axis=1)
