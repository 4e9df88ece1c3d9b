"""The index of prepared data: byte positions of audio within shards, so that a crop takes one short read.

A record holds some 20 s as one FLAC, of which a crop needs a second or two. FLAC is a sequence of frames (4096 samples,
as libsndfile writes it) that decode independently. `m2l2 prepare` writes an index beside the shards of a split: for
each record the facts that a crop needs, and the position in the shard of every fourth frame. It is read once, some 300
bytes per record (half a GB for 10,000 hours); then a crop reads the bytes between two such positions.

The index is made from the finished shard (`index_shard`), so older prepared data can be indexed later. It is a
safetensors file; without it whole records are read.
"""

from array import array
from collections.abc import Iterable, Sequence
import functools
import json
import mmap
import os

from array_record.python.array_record_module import ArrayRecordReader
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tensorflow_datasets.proto import tf_example_pb2

from m2l2.data import audio_io, containers
from m2l2.errors import UserError, in_one_line

VERSION = 1
_APART = 4  # frames between indexed positions: a crop of 1.5 s then reads a quarter more than it needs

# ArrayRecord is a Riegeli file: a header of 24 bytes is inserted at every 64 KiB, also within records.
_BLOCK, _HEADER = 2**16, 24
_SLACK = 2**17  # bytes before a record's audio: the file's own fields, and the first fields of the record
_FIELDS = {'begin': np.int64, 'samples': np.int32, 'starts': np.int32, 'rate': np.int32, 'channels': np.uint8,
           'block': np.int32, 'source': np.int32}
_MOST_OPEN = 256  # open shards; the usual limit of open files is 1024


def index_name(shard: str) -> str:
  """'audio-train.array_record-00000-of-00010' -> 'audio-train.index'."""
  return shard.rpartition('.array_record')[0] + '.index'


# ---- making it -----------------------------------------------------------------------------------


def index_shard(path, name: str) -> bytes:
  """The index of one shard of segments (`segments.features`), called `name` there. Raises UserError: no such shard."""
  try:
    return _index_shard(os.fspath(path), name)
  except (OSError, RuntimeError, ValueError, KeyError, IndexError) as e:
    raise UserError(f'{name}: cannot be indexed ({in_one_line(e)})') from e


def _index_shard(path, name) -> bytes:
  rows: dict[str, list[int]] = {field: [] for field in _FIELDS}
  points, names = array('I'), dict[bytes, int]()
  reader = ArrayRecordReader(path)
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b''
    at = 0  # in bytes without the headers of blocks
    for number in range(reader.num_records()):
      features = tf_example_pb2.Example.FromString(reader.read([number])[0]).features.feature
      integer = lambda key: features[key].int64_list.value[0]
      flac, = features['audio'].bytes_list.value
      at = _find(buffer, flac, at)
      block, offsets = _frames(flac, samples=integer('samples'), channels=integer('channels'))
      begin = _outer(at)
      points.extend(_outer(at + offset) - begin for offset in (*offsets[::_APART], len(flac)))
      source = names.setdefault(features['source'].bytes_list.value[0], len(names))
      for field, value in {'begin': begin, 'block': block, 'source': source}.items():
        rows[field].append(value)
      for field in ('samples', 'starts', 'rate', 'channels'):
        rows[field].append(integer(field))
      at += len(flac)
  finally:
    reader.close()
  arrays = {field: np.array(values, _FIELDS[field]) for field, values in rows.items()}
  return _save(arrays, points=np.array(points, np.uint32), names=list(names), shards=[[name, size, len(rows['begin'])]])


def join(parts: Iterable[bytes]) -> bytes:
  """Joins the indices of several shards, in their order."""
  fields: dict[str, list] = {field: [] for field in _FIELDS}
  points, names, shards = [], list[bytes](), []
  for part in parts:
    meta, arrays = _load(part)
    arrays['source'] = np.add(arrays['source'], len(names), dtype=np.int32)
    for field, values in fields.items():
      values.append(arrays[field])
    points.append(arrays['points'])
    names += _lines(arrays['names'])
    shards += meta['shards']
  return _save({field: np.concatenate(values) for field, values in fields.items()}, points=np.concatenate(points),
               names=names, shards=shards)


def _save(arrays, *, points, names, shards) -> bytes:
  meta = json.dumps({'version': VERSION, 'apart': _APART, 'shards': shards})
  text = np.frombuffer(b'\n'.join(names), np.uint8)
  return save({**arrays, 'points': points, 'names': text}, metadata={'index': meta})  # one entry: equal bytes


def _load(data: bytes) -> tuple[dict, dict[str, np.ndarray]]:
  length = int.from_bytes(data[:8], 'little')
  meta = json.loads(json.loads(data[8:8 + length])['__metadata__']['index'])
  if meta['version'] != VERSION:
    raise ValueError(f'it is of version {meta["version"]}, this m2l2 reads {VERSION}')
  return meta, load(data)


def _lines(text) -> list[bytes]:
  return text.tobytes().split(b'\n') if text.size else []


def _find(buffer, flac: bytes, at: int) -> int:
  """The position of some bytes in a shard, searched from `at` on; positions do not count the headers of blocks."""
  window = _inner(buffer, _outer(at), _outer(at + len(flac) + _SLACK))
  head = flac[:64]  # quick to search, and unique by the checksum in it
  start = window.find(head)
  while start >= 0 and not window.startswith(flac, start):
    start = window.find(head, start + 1)
  if start < 0:
    raise ValueError('a record does not lie in it as it is; is the shard compressed?')
  return at + start


def _outer(at: int) -> int:
  """Converts a position that does not count the headers of blocks to one in the file."""
  return at + _HEADER * (at // (_BLOCK - _HEADER) + 1)


def _inner(data, begin: int, end: int, origin: int = 0) -> bytes:
  """The bytes [begin, end) of a file without the headers of blocks; `data` is the file from `origin` on."""
  if begin // _BLOCK == (end - 1) // _BLOCK and begin % _BLOCK >= _HEADER:
    return data[begin - origin:end - origin]
  pieces = []
  while begin < end:
    stop = min(end, (begin // _BLOCK + 1) * _BLOCK)
    pieces.append(data[max(begin, begin // _BLOCK * _BLOCK + _HEADER) - origin:stop - origin])
    begin = stop
  return b''.join(pieces)


def _frames(flac: bytes, *, samples: int, channels: int) -> tuple[int, list[int]]:
  """(samples per frame, position of each frame) of a FLAC written by m2l2."""
  block, offsets = containers.flac_frames(flac, channels=channels)
  if len(offsets) != -(-samples // block):
    raise ValueError(f'a segment of {samples} samples has {len(offsets)} frames of {block}')
  return block, offsets


# ---- reading with the index -------------------------------------------------------------------------------


class Index:
  """The index of the records of some shards.

  Args:
    path: the index of a split.
    shards: paths of its shards whose records are wanted, in order.

  Attributes:
    sizes: of the shards, in bytes.

  Raises UserError: it cannot be read, or is not of these shards.
  """

  def __init__(self, path, shards: Sequence[str]):
    try:
      with open(path, 'rb') as file:
        meta, arrays = _load(file.read())
      known = {name: (number, size, count) for number, (name, size, count) in enumerate(meta['shards'])}
      entries = [known[os.path.basename(shard)] for shard in shards]
      counts = [count for *_, count in known.values()]
      ends = np.cumsum(counts)
      rows = np.concatenate([np.arange(ends[number] - counts[number], ends[number]) for number, *_ in entries])
      span = arrays['block'] * np.int32(meta['apart'])
      lengths = -(-arrays['samples'] // span) + 1
      self._first = (np.cumsum(lengths) - lengths)[rows]
      self._span, self._points = span[rows], arrays['points']
      self._rows = {field: arrays[field][rows] for field in _FIELDS}
      self._names = [name.decode() for name in _lines(arrays['names'])]
      self._shard = np.repeat(np.arange(len(entries)), [count for *_, count in entries])
      self._paths, self.sizes = list(shards), [size for _, size, _ in entries]
    except KeyError as e:
      raise UserError(f'{audio_io.shown(path)}: is not of the shards beside it (it lacks {e}); {_MEND}') from e
    except (OSError, ValueError, TypeError, IndexError, SafetensorError) as e:
      raise UserError(f'{audio_io.shown(path)}: cannot be read ({in_one_line(e)}); {_MEND}') from e

  def __len__(self) -> int:
    return len(self._shard)

  def open(self, number: int, place: str) -> 'Segment':
    """Opens the segment in a record; `place` is the name of the record in errors."""
    facts = {field: int(values[number]) for field, values in self._rows.items()}
    first, span = int(self._first[number]), int(self._span[number])
    points = self._points[first:first - (-facts['samples'] // span) + 1]
    shard = self._shard[number]
    name = f'{place} ({self._names[facts["source"]]})'
    return Segment(self._paths[shard], self.sizes[shard], name, points, span, **facts)


_MEND = 'run the same m2l2 prepare again, or remove it to have whole records read'


class Segment:
  """A segment in a shard, of which only what is needed is read; same methods as `audio_io.AudioReader`."""

  def __init__(self, path, size, name, points, span, *, begin, samples, starts, rate, channels, block, source):
    self._path, self._size, self._points, self._span, self._begin, self._block = path, size, points, span, begin, block
    self.starts = starts
    self.info = audio_io.AudioInfo(
        path=name, sample_rate=rate, channels=channels, frames=samples, format='FLAC', subtype='PCM_16')

  def read(self, *, start: int, frames: int, check_finite: bool = False) -> np.ndarray:
    """The samples [start, start + frames), float32 [channels, frames]: multiples of 2**-15. Raises UserError."""
    del check_finite  # integers are
    info, first = self.info, start // self._span
    last = min(-(-(start + frames) // self._span), len(self._points) - 1)
    begin, end = self._begin + int(self._points[first]), self._begin + int(self._points[last])
    try:
      data = read_shard(self._path, self._size, begin, end)
    except OSError as e:
      raise UserError(f'{info.path}: cannot be read ({e.strerror or e})') from e
    held = min(last * self._span, info.frames) - first * self._span
    header = containers.flac_header(
        block=self._block, rate=info.sample_rate, channels=info.channels, samples=held)
    return audio_io.decode_bytes(
        header + _inner(data, begin, end, begin), skip=start - first * self._span, frames=frames, name=info.path)

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass


def read_shard(path: str, size: int, begin: int, end: int) -> bytes:
  """The bytes [begin, end) of a file whose size must be `size`. Raises OSError."""
  data = _opened(path, size).read(begin, end)
  if len(data) != end - begin:
    raise OSError('it ends early')
  return data


class _File:
  """An open file, closed when nothing refers to it: a thread may still read one that another has dropped."""

  def __init__(self, path, size):
    self._number = os.open(path, os.O_RDONLY)
    if os.fstat(self._number).st_size != size:
      raise OSError(f'it has another size than when it was indexed; {_MEND}')
    if hasattr(os, 'posix_fadvise'):  # else the system reads ahead data that no crop needs
      os.posix_fadvise(self._number, 0, 0, os.POSIX_FADV_RANDOM)

  def read(self, begin, end) -> bytes:
    return os.pread(self._number, end - begin, begin)

  def __del__(self):
    if hasattr(self, '_number'):
      os.close(self._number)


_opened = functools.lru_cache(maxsize=_MOST_OPEN)(_File)
