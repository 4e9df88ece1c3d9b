"""Decoding in a child process, bounded in time and in memory: a codec that hangs or crashes costs one file.

A `DecodingProcess` is the parent's side of one child, which decodes many files (starting one takes longer than decoding
a song). Requests and replies are lines of JSON through pipes; segments are passed through an unlinked file, so that
those of a file count only when all of it is decoded, memory does not grow, and a kill leaves no file. The child runs
this module, so it imports no more than decoding needs.
"""

from collections.abc import Callable, Iterable, Iterator
import hashlib
import json
import os
import pathlib
import resource
import select
import signal
import subprocess
import sys
import tempfile

import numpy as np

from m2l2.data import audio_io
from m2l2.errors import UserError, in_one_line

_BLOCK = 2**18  # samples decoded at once: 6 s
_HEAD = 2**16  # samples that are compared in the search for possible duplicates
_MAX_PEAK = 100.0  # as in training: a float file scaled to integers is refused
_MISSING = 1.  # seconds that a file may be shorter than its stated length, as many Ogg files are
_CHANNELS = 8  # the limit of FLAC
_READY = 60.  # seconds for a child to start


class FileFault(UserError):
  """The reason why one file cannot be used."""


# ---- in the child: files to numbers and segments ----------------------------------------------


def headers(path) -> dict:
  """Cheap facts: 'seconds' by the header, 'format', and 'head', a hash of the rate, the channels and the first block
  that is not all zero. Files of equal audio have equal heads."""
  with _open(path) as reader:
    digest = hashlib.sha256(f'{reader.info.sample_rate} {reader.info.channels}'.encode())
    for number, block in enumerate(reader.blocks(block_samples=_HEAD, missing=_missing(reader))):
      _alive()
      if block.any():
        digest.update(f' {number}'.encode() + block.tobytes())
        break
    return {'seconds': reader.info.seconds, 'format': reader.info.format, 'head': digest.hexdigest()[:16]}


def content_hash(path) -> dict:
  """'content': a hash of the rate, the channels and every decoded sample."""
  with _open(path) as reader:
    digest = hashlib.sha256(f'{reader.info.sample_rate} {reader.info.channels}'.encode())
    for block in reader.blocks(block_samples=_BLOCK, missing=_missing(reader)):
      _alive()
      digest.update(np.ascontiguousarray(block.T).data)  # interleaved: blocks of any size give the same bytes
    return {'content': digest.hexdigest()}


def segment(path, *, spool, rates: tuple[int, ...], seconds: float, overlap: float) -> dict:
  """Decodes, resamples (to the first of `rates`, unless the file has one of them), cuts and encodes a file.

  Writes the FLACs of the segments to the file descriptor `spool`; returns the source's facts, for each segment
  [offset, starts, samples, loudness, bytes], and as 'note' what is missing of the file, or None.
  """
  with _open(path) as reader:
    info, taken, segments = reader.info, 0, []
    rate = info.sample_rate if info.sample_rate in rates else rates[0]
    stream = audio_io.StreamResampler(from_rate=info.sample_rate, to_rate=rate, channels=info.channels)

    def resampled():
      nonlocal taken
      for block in reader.blocks(block_samples=_BLOCK, check_finite=True, missing=_missing(reader)):
        _alive()
        taken += block.shape[1]
        if (peak := np.abs(block).max()) > _MAX_PEAK:
          raise UserError(f'reaches {peak:.4g}; float samples must be scaled to [-1, 1]')
        yield stream.push(block)
      yield stream.finish()

    stated = audio_io.resampled_length(info.frames, from_rate=info.sample_rate, to_rate=rate)
    length = even_length(stated, longest=round(seconds * rate), overlap=round(overlap * rate))
    for offset, starts, audio in split(resampled(), length=length, overlap=round(overlap * rate)):
      audio = to_int16(audio)
      data = audio_io.file_bytes(audio, rate)
      _write_all(spool, data)
      segments.append([offset, starts, audio.shape[1], loudness(audio), len(data)])
  return {'rate': rate, 'channels': info.channels, 'source_rate': info.sample_rate, 'source_samples': taken,
          'segments': segments, 'note': reader.note}


def even_length(samples: int, *, longest: int, overlap: int) -> int:
  """The length of segments that cut `samples` evenly: training draws segments equally often, so none should be
  short."""
  count = max(1, -(-(samples - overlap) // (longest - overlap)))
  return min(longest, overlap + max(1, -(-(samples - overlap) // count)))


def split(blocks: Iterable[np.ndarray], *, length: int, overlap: int) -> Iterator[tuple[int, int, np.ndarray]]:
  """Blocks [channels, any] of one signal -> (offset, starts, segment [channels, length]), all in samples.

  Segments begin every length - overlap samples; the crop starts of each end at the next one's offset, so that every
  piece of up to `overlap` samples is wholly inside the segment that has its start. In the last segment crops may start
  anywhere; it may be shorter, but is longer than `overlap` unless it is the only one.
  """
  held, offset, step = None, 0, length - overlap
  for block in blocks:
    held = block if held is None else np.concatenate([held, block], axis=1)
    while held.shape[1] > length:
      yield offset, step, held[:, :length]
      held, offset = held[:, step:], offset + step
  if held is not None and held.shape[1]:
    yield offset, held.shape[1], held


def to_int16(audio: np.ndarray) -> np.ndarray:
  """Float audio -> 16 bits: rounded, clipped at full scale; the samples of 16-bit sources are unchanged."""
  scaled = audio * np.float32(2**15)
  return np.clip(np.rint(scaled, out=scaled), -2**15, 2**15 - 1, out=scaled).astype(np.int16)


def loudness(audio: np.ndarray) -> float:
  """dBFS of int16 audio: RMS over all samples and channels, -120 at least. A sum of integers: exact."""
  power = int(np.square(audio, dtype=np.int64).sum()) / (audio.size * 2**30)
  return round(10 * float(np.log10(max(power, 1e-12))), 4)


def _open(path) -> audio_io.AudioReader:
  reader = audio_io.AudioReader(path)
  rate, channels = reader.info.sample_rate, reader.info.channels
  if audio_io.RATES[0] <= rate <= audio_io.RATES[1] and channels <= _CHANNELS:
    return reader
  reader.close()
  if channels > _CHANNELS:
    raise UserError(f'has {channels} channels, more than {_CHANNELS}')
  raise UserError(f'states a sample rate of {rate} Hz, not within {audio_io.RATES[0]} to {audio_io.RATES[1]}')


def _missing(reader) -> int:
  return round(_MISSING * reader.info.sample_rate)


_replies = None  # the child's pipe to its parent


def _alive():
  if _replies is not None:
    os.write(_replies, b'\n')


def _write_all(number: int, data: bytes):
  while data:
    data = data[os.write(number, data):]


def _serve(spool: int, memory: int):
  """The main loop of the child: answers one request per line until its parent ends."""
  global _replies
  _replies = os.dup(1)
  os.dup2(2, 1)  # so that prints of codecs are not taken for replies
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
  signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without a parent there is no work
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then an error like that of a full disk
  resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
  calls: dict[str, Callable] = {'headers': headers, 'content_hash': content_hash, 'segment': segment}
  _write_all(_replies, b'{}\n')
  for line in sys.stdin:
    request = json.loads(line)
    path, options = request['path'], request['options']
    if request['call'] == 'segment':
      os.ftruncate(spool, 0)
      os.lseek(spool, 0, os.SEEK_SET)
      options['spool'] = spool
    try:
      reply = calls[request['call']](path, **options)
    except UserError as e:
      reply = {'error': str(e).removeprefix(f'{audio_io.shown(path)}: ')}
    except MemoryError:
      reply = {'error': f'needs more than {memory >> 20} MiB to decode'}
    except OSError as e:  # not an error of the file: audio_io raises UserError for those
      reply = {'fatal': e.strerror or str(e)}
    except Exception as e:  # a bug in m2l2 or a library: it skips one file, and is reported
      reply = {'error': f'cannot be decoded ({type(e).__name__}: {in_one_line(e)})'}
    _write_all(_replies, json.dumps(reply).encode() + b'\n')


# ---- in the parent -------------------------------------------------------------------------------


class DecodingProcess:
  """One child process, started at first use and restarted after it died. Not thread-safe.

  Args:
    timeout: seconds within which the next block of audio (6 s of it) must come.
    memory: limit of the child's address space in bytes.
    folder: folder of the unnamed file that holds the encoded segments of the current file.
  """

  def __init__(self, *, timeout: float, memory: int, folder=None):
    self._timeout, self._memory, self._folder = timeout, memory, os.fspath(folder or tempfile.gettempdir())
    self._spool = tempfile.TemporaryFile(dir=folder, buffering=0)
    self._child: subprocess.Popen | None = None
    self._closed = False

  def call(self, name: str, path, **options) -> dict:
    """Calls the function `name` of this module in the child. After 'segment' see `audio`.

    Raises FileFault: the file cannot be used, or hangs or crashes the decoder (twice: the first crash might have
    another cause). UserError: the job cannot continue (no child, a full disk).
    """
    request = json.dumps({'call': name, 'path': os.fsdecode(path), 'options': options}).encode() + b'\n'
    for _ in range(2):
      child = self._child or self._start()
      assert child.stdin
      try:
        child.stdin.write(request)
        child.stdin.flush()
      except BrokenPipeError:
        pass  # `_receive` reports it
      reply = self._receive(child, self._timeout)
      if 'died' not in reply:
        break
    if 'fatal' in reply:
      raise UserError(f'{audio_io.shown(self._folder)}: cannot be written: {reply["fatal"]}')
    if 'died' in reply:
      raise FileFault(f'crashes the decoder ({reply["died"]})')
    if 'error' in reply:
      raise FileFault(reply['error'])
    return reply

  def audio(self, sizes: Iterable[int]) -> Iterator[bytes]:
    """The FLAC of each segment of the last file, of these sizes in bytes."""
    place = 0
    for size in sizes:
      data = os.pread(self._spool.fileno(), size, place)
      if len(data) != size:
        raise UserError('the decoded audio on the disk is cut short')
      place += size
      yield data

  def close(self):
    """Ends the child. May be called from another thread; a running call then raises."""
    self._closed = True
    self._kill()

  def _start(self) -> subprocess.Popen:
    if self._closed:
      raise UserError('stopped')
    package = pathlib.Path(__file__).absolute().parents[3]
    paths = [str(package), *filter(None, [os.environ.get('PYTHONPATH')])]
    self._child = child = subprocess.Popen(
        [sys.executable, '-P', '-m', 'm2l2.data.prepare.child', str(self._spool.fileno()), str(self._memory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, pass_fds=[self._spool.fileno()],
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(paths), 'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'})
    reply = self._receive(child, _READY)
    if reply:
      raise UserError(f'the process that decodes does not start ({reply.get("died") or reply.get("error")})')
    return child

  def _receive(self, child, timeout: float) -> dict:
    """The next reply, or {'died': how} or {'error': ...} without one."""
    text = b''
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    while not text.strip().endswith(b'}') or not text.endswith(b'\n'):
      if not poll.poll(timeout * 1000):
        self._kill()
        return {'error': f'hangs: no audio for {timeout:g} s'}
      data = os.read(child.stdout.fileno(), 2**16)
      if not data:
        child.wait()
        self._kill()
        code = child.returncode
        return {'died': f'signal {-code}' if code < 0 else f'exit status {code}'}
      text = (text + data).lstrip()
    return json.loads(text)

  def _kill(self):
    child, self._child = self._child, None
    if child and child.stdin:
      child.kill()
      child.stdin.close()
      try:
        child.wait(10)
      except subprocess.TimeoutExpired:
        pass  # blocked in the kernel, on a file system that does not answer


if __name__ == '__main__':
  _serve(int(sys.argv[1]), int(sys.argv[2]))
