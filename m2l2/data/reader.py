"""Reading audio files: all of one, blocks or any samples; missing audio is reported once."""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import io
import mmap
import os
import stat
import tempfile

from absl import logging
import numpy as np

from m2l2.data import containers, ffmpeg
from m2l2.data.paths import extension, shown
from m2l2.data.streams import FILE_ERRORS, Stream, reason, texts
from m2l2.errors import UserError

READABLE = 'WAV, FLAC, OGG, Opus, MP3 and AIFF'

# The tags of libsndfile that describe the music and not the file.
TAGS = ('title', 'artist', 'album', 'date', 'tracknumber', 'genre', 'comment', 'copyright', 'license')

RATES = (4000, 768_000)  # Hz; rates beyond are false headers, and resampling would turn a small file into a huge one
_READ_VALUES = 2**21  # most values (samples x channels) decoded at once: 8 MB
_UNKNOWN_LENGTH = 2**62  # libsndfile's value if the header states no length


@dataclasses.dataclass(frozen=True)
class AudioInfo:
  """The facts that a file's header states.

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


@functools.lru_cache(maxsize=2**14)
def _inspected(path, size: int, changed: int, whole: bool) -> containers.Contents:
  """Caches the inspection of a file: crops are cut from the same files again and again."""
  del size, changed
  try:
    with open(path, 'rb') as file:
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except (OSError, ValueError, MemoryError, OverflowError):  # not enough memory: libsndfile may still read it
    return containers.Contents()
  with buffer:
    return containers.inspect(buffer, whole=whole)


def _contents(path, whole: bool) -> containers.Contents:
  status = os.stat(path)
  return _inspected(os.path.abspath(os.fsdecode(path)), status.st_size, status.st_mtime_ns, whole)


_told: set[tuple[str, str]] = set()
_MOST_TOLD = 10_000


def _ends_early(streams, what: str) -> str:
  seconds = sum(stream.frames for stream in streams) / streams[0].file.samplerate
  return f'goes on after {seconds:.1f} s with {what}; only what comes before that is read'


class AudioReader:
  """An open audio file: `info`, and `read` anywhere in it. A context manager.

  Args:
    path: of the file.
    data: the bytes of a file in memory; `path` is then only its name in errors.
    whole: search for all chained streams, even if that takes reading all of a FLAC; without it, a stream as long as
      the first may be missed.

  Attributes:
    info: the `AudioInfo`.
    note: what is missing of the file, as known so far: one line without its name; None: nothing.
    starts: the number of crops that may start in the file, if its end overlaps the next segment of a longer
      one; None: all that fit.

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
    self._name, self._path, foreign = name, path, None
    self.note: str | None = None
    self._buffer: containers.Buffer | None = data
    contents = containers.inspect(data) if data is not None else _contents(path, whole)
    try:
      self._streams = self._open_streams(contents)
    except FILE_ERRORS as e:
      if data is not None or extension(path) not in ffmpeg.EXTENSIONS:
        raise UserError(
            f'{name}: is not audio that can be read here ({reason(e)}); give {READABLE}, or convert '
            'it to WAV first') from e
      foreign = self._decode_foreign(path)
    self._current, file = 0, self._streams[0].file
    self.info = AudioInfo(
        path=os.fsdecode(path), sample_rate=file.samplerate, channels=file.channels,
        frames=sum(stream.frames for stream in self._streams),
        format=file.format if not foreign else extension(path)[1:].upper(),
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

    Memory grows with the audio that exists, not with what the header claims. The array may be a strided view (samples
    of a file are interleaved).

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
    """The whole file in blocks, float32 [channels, block_samples] (the last may be shorter).

    Raises UserError as `read` does. A file that ends up to `missing` samples before its stated
    length, and any MP3 (whose length may be an estimate), is accepted, with a warning in the log.
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
    self._streams, self._buffer = [], None  # which hold files open, and in a circle, until Python looks for those

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()

  def _open_streams(self, contents) -> list[Stream]:
    """Opens every chained stream with the rate and channels of the first; the log reports the others."""
    parts: tuple[containers.Part, ...] = contents.parts
    streams: list[Stream] = []
    if parts and self._buffer is None:
      with open(self._path, 'rb') as file:
        self._buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(parts) < 2 and (not parts or self._is_whole(parts[0].pieces)):
      return [Stream(self._source, parts[0] if parts else None)]
    for part in parts:
      try:
        stream = Stream(self._source, part)
      except FILE_ERRORS as e:
        if not streams:
          raise
        self._tell(_ends_early(streams, f'what cannot be read ({reason(e)})'))
        break
      if streams and stream.kind != streams[0].kind:
        self._tell(_ends_early(streams, '{} channels at {} Hz'.format(*stream.kind)))
        break
      streams.append(stream)
    return streams

  def _is_whole(self, pieces) -> bool:
    return self._buffer is not None and pieces == ((0, len(self._buffer)),)

  def _source(self, pieces):
    """The source that soundfile opens for pieces of the file; for all of it the path, which is faster."""
    if pieces and not self._is_whole(pieces):
      assert self._buffer is not None
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
    except FILE_ERRORS as e:
      raise self._truncated(position, e) from e

  def _decode_foreign(self, path) -> ffmpeg.Decoded:
    """Opens the raw samples that FFmpeg decodes a file to."""
    decoded = tempfile.TemporaryFile()
    foreign = ffmpeg.decode(os.fsdecode(path), decoded, name=self._name)
    if not decoded.tell():
      raise UserError(f'{self._name}: holds no samples')
    decoded.seek(0)
    self._streams = [Stream(lambda pieces: decoded, samplerate=foreign.sample_rate, channels=foreign.channels,
                             format='RAW', subtype='FLOAT')]
    return foreign

  def _tags(self, foreign) -> dict[str, str]:
    tags = foreign.tags if foreign else texts(self._streams[0].file)
    return {name: tags[name] for name in TAGS if tags.get(name)}

  def _most(self) -> int:
    return max(1, _READ_VALUES // self.info.channels)

  def _read_on(self, position: int, frames: int) -> np.ndarray:
    """At most `frames` samples [channels, n] from the current position."""
    try:
      audio = self._streams[self._current].read(frames)
      while not len(audio) and frames and self._current < len(self._streams) - 1:
        self._current += 1
        self._streams[self._current].seek(0)
        audio = self._streams[self._current].read(frames)
    except FILE_ERRORS as e:
      raise self._truncated(position, e) from e
    return audio.T

  def _truncated(self, position: int, error: Exception | None = None) -> UserError:
    why = f' ({reason(error)})' if error and reason(error) else ''
    return UserError(
        f'{self._name}: is truncated or damaged: cannot be read at sample {position} of '
        f'{self.info.frames}{why}')

  def _check_finite(self, audio: np.ndarray, start: int):
    finite = np.isfinite(audio)
    if not finite.all():
      first = start + int(np.argmin(finite.all(axis=0)))
      raise UserError(f'{self._name}: holds NaN or infinite samples, the first at sample {first}')


def info(path) -> AudioInfo:
  """The AudioInfo of an audio file. Raises UserError as `AudioReader` does."""
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

  Every block has `block_samples` samples; the last may have fewer. Errors (UserError, as of `AudioReader` and
  `AudioReader.blocks`) are raised at the first `next`: call `info` to check the header before the work. Count the
  samples: an MP3 may hold fewer than `info` states.
  """
  if block_samples < 1:
    raise UserError(f'{shown(path)}: cannot be read in blocks of {block_samples} samples')
  with AudioReader(path) as reader:
    yield from reader.blocks(block_samples=block_samples, check_finite=check_finite)
