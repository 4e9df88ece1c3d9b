"""ArrayRecord datasets as sources of crops: prepared ones, and other TFDS datasets.

It reads, without TensorFlow, TFDS datasets in the file format array_record whose features are

  - an audio file as bytes (Text, a string Tensor, or Audio with lazy_decode): any format that
    audio_io reads; or
  - samples: a Tensor or Audio of shape [samples] or [samples, channels] (or of a fixed length), of
    float32 in [-1, 1] or of an integer type with 16-bit values, not encoded, and beside it the rate
    in Hz: Audio's sample_rate, or an integer feature of a name in RATES.

The audio is the feature named 'audio'; else the only one with samples; else the only one with bytes.
With integers [start, starts) of crops belong to an item if it has a feature 'starts', as segments do.

Data of `m2l2 prepare` have an index (index.py), with which a crop is read without its whole record.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
from typing import Any

import grain
import numpy as np
from tensorflow_datasets.core.naming import ShardedFileTemplate
from tensorflow_datasets.core.utils.version import Version
from tensorflow_datasets.proto import tf_example_pb2

from m2l2.data import audio_io
from m2l2.data.index import Index, Segment, index_name
from m2l2.errors import UserError, in_one_line

RATES = ('rate', 'sample_rate', 'sampling_rate', 'samplerate', 'sr')

_INTEGERS = ('int8', 'int16', 'int32', 'int64')
_PREPARE = 'or prepare its audio with m2l2 prepare'


@dataclasses.dataclass(frozen=True)
class RecordFields:
  """The fields of a record that hold its audio.

  Attributes:
    audio: name of the feature.
    kind: 'file' (bytes of an audio file), 'integers' or 'floats' (samples).
    channels: of samples, 1 or more; 0 for files.
    rate: Hz, or the name of the feature that states it; 0 for files.
    starts: whether there is a feature 'starts'.
    source: whether there is a feature 'source', the name of what the item was cut from.
  """

  audio: str
  kind: str
  channels: int = 0
  rate: int | str = 0
  starts: bool = False
  source: bool = False


SEGMENTS = RecordFields(audio='audio', kind='file', starts=True, source=True)


class Records:
  """Items in ArrayRecord shards, in the order of the shards' names; a source (`sources.Source`)."""

  def __init__(self, paths: list[str], fields: RecordFields):
    self._paths = sorted(paths, key=os.path.basename)
    self._fields = fields
    self._index = _find_index(self._paths) if fields == SEGMENTS else None
    if not len(self):
      raise UserError(f'{_shards(self._paths)}: hold no records')

  @functools.cached_property
  def _records(self):  # with an index it is rarely used, and it opens every shard
    try:
      return grain.sources.ArrayRecordDataSource(self._paths)
    except (OSError, RuntimeError, ValueError) as e:
      raise UserError(f'{_shards(self._paths)}: cannot be read as ArrayRecord ({in_one_line(e, most=200)})') from e

  def __len__(self) -> int:
    return len(self._records if self._index is None else self._index)

  @property
  def fingerprint(self) -> str:
    """16 hex digits of the shards' names and sizes and of their numbers of records."""
    sizes = map(os.path.getsize, self._paths) if self._index is None else self._index.sizes
    lines = [f'{os.path.basename(path)} {size}' for path, size in zip(self._paths, sizes, strict=True)]
    return hashlib.sha256('\n'.join([*lines, str(len(self))]).encode('utf-8', 'surrogateescape')).hexdigest()[:16]

  @functools.cached_property
  def place(self) -> str:
    return _shards(self._paths)

  def name(self, number: int) -> str:
    return f'{self.place}: record {number}'

  def open(self, number: int) -> 'audio_io.AudioReader | Samples | Segment':
    """The audio of a record: `info`, `starts` and `read`, as a context manager. Raises UserError."""
    name, fields = self.name(number), self._fields
    if self._index is not None:
      return self._index.open(number, name)
    try:
      features = self._features(number)
      if fields.source:
        name += f' ({audio_io.shown(_values(features, "source")[0])})'
      audio = _values(features, fields.audio)
      starts = int(_values(features, 'starts')[0]) if fields.starts else None
      rate = fields.rate if isinstance(fields.rate, int) else int(_values(features, fields.rate)[0])
    except Exception as e:  # any exception that a damaged shard causes in the libraries
      raise UserError(f'{name}: cannot be read ({in_one_line(e, most=200)})') from e
    item: audio_io.AudioReader | Samples
    if fields.kind == 'file':
      item = audio_io.AudioReader(name, data=audio[0])
    else:
      item = Samples(audio, channels=fields.channels, rate=rate, name=name)
    item.starts = starts
    return item

  def file_bytes(self, number: int) -> bytes:
    """The audio file in a record, for records that hold files."""
    return _values(self._features(number), self._fields.audio)[0]

  def _features(self, number: int):
    return tf_example_pb2.Example.FromString(self._records[number]).features.feature


class Samples:
  """An item with interleaved samples in memory; same methods as `audio_io.AudioReader`."""

  starts: int | None = None

  def __init__(self, values: Any, *, channels: int, rate: int, name: str):
    self._values, self._name = values, name
    self.info = audio_io.AudioInfo(
        path=name, sample_rate=rate, channels=channels, frames=len(values) // channels, format='samples', subtype='')
    if rate <= 0 or not self.info.frames:
      raise UserError(f'{audio_io.shown(name)}: holds {self.info.frames} samples at {rate} Hz')

  def read(self, *, start: int, frames: int, check_finite: bool = False) -> np.ndarray:
    """The samples [start, start + frames), float32 [channels, frames]; 16-bit integers become [-1, 1)."""
    channels = self.info.channels
    values = np.array(self._values[start * channels:(start + frames) * channels])
    audio = values.astype(np.float32)
    if values.dtype.kind in 'iu':
      audio /= 2**15
    if check_finite and not np.isfinite(audio).all():
      raise UserError(f'{audio_io.shown(self._name)}: holds NaN or infinite samples')
    return audio.reshape(frames, channels).T

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    pass


def find_dataset(folder: str) -> str | None:
  """The directory with a TFDS dataset's metadata: the folder, or the newest version in it; else None."""
  if os.path.isfile(os.path.join(folder, 'dataset_info.json')):
    return folder
  versions = [os.path.dirname(path) for path in glob.glob(os.path.join(glob.escape(folder), '*', 'dataset_info.json'))]
  versions = [path for path in versions if Version.is_valid(os.path.basename(path))]
  return max(versions, key=lambda path: Version(os.path.basename(path)), default=None)


def named_dataset(name: str) -> str:
  """The directory of a TFDS dataset NAME[/CONFIG][:VERSION] under TFDS_DATA_DIR. Raises UserError."""
  base = os.path.expanduser(os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')
  name, _, version = name.partition(':')
  folder = os.path.join(base, *name.split('/'), *([version] if version else []))
  directory = find_dataset(folder) if name else None
  if not directory:
    raise UserError(
        f'tfds:{name}: there is no such dataset with its metadata under {audio_io.shown(folder)}; write '
        'tfds:NAME/CONFIG:VERSION, set TFDS_DATA_DIR, or give its directory')
  return directory


def open_dataset(folder: str, *, split: str) -> Records:
  """A split of the TFDS dataset in a directory. Raises UserError: another format, or incomplete."""
  shown = audio_io.shown(folder)
  info = _read_json(os.path.join(folder, 'dataset_info.json'))
  if info.get('fileFormat', 'tfrecord') != 'array_record':
    raise UserError(
        f'{shown}: is stored as {info.get("fileFormat", "tfrecord")}; only array_record can be read at random: '
        f'convert it with TFDS (convert_format), {_PREPARE}')
  splits = {entry.get('name'): entry for entry in info.get('splits', ())}
  if split not in splits:
    raise UserError(f'{shown}: has no split {split!r}, but {", ".join(map(repr, splits)) or "none"}: see data.split')
  fields = find_fields(os.path.join(folder, 'features.json'))
  count = len(splits[split].get('shardLengths', ()))
  template = ShardedFileTemplate(
      data_dir=folder, template=splits[split].get('filepathTemplate') or '', dataset_name=info.get('name'),
      split=split, filetype_suffix='array_record')
  paths = [os.fspath(path) for path in template.sharded_filepaths(count)] if count else []
  there = set(os.listdir(folder))  # one call for all shards
  missing = [name for name in map(os.path.basename, paths) if name not in there]
  if missing or not paths:
    raise UserError(f'{shown}: {len(missing)} of the {count} shards of {split!r} are missing'
                    f'{f", the first is {missing[0]}" if missing else ""}: is it complete?')
  return Records(paths, fields)


def open_shards(paths: list[str]) -> Records:
  """Opens shards by name, in the format of the features.json beside them, else in that of m2l2 prepare."""
  beside = os.path.join(os.path.dirname(paths[0]), 'features.json')
  return Records(paths, find_fields(beside) if os.path.isfile(beside) else SEGMENTS)


def _find_index(paths: list[str]) -> Index | None:
  """The index beside the shards; None: there is none, or the shards are of several datasets."""
  index_files = {index_name(path) for path in paths}
  path = index_files.pop()
  return Index(path, paths) if not index_files and os.path.isfile(path) else None


def find_fields(path: str) -> RecordFields:
  """Finds the fields of a features.json that hold audio. Raises UserError: there are none in a known format."""
  whole = _read_json(path)
  content = whole.get('featuresDict') or whole.get('content')  # the latter before TFDS 4.9
  features = content.get('features', {}) if isinstance(content, dict) else {}
  described = {name: _describe(feature) for name, feature in features.items()}
  samples = [name for name, kind in described.items() if kind in ('integers', 'floats')]
  files = [name for name, kind in described.items() if kind == 'file']
  if described.get('audio'):
    audio = 'audio'
  elif len(samples or files) == 1:
    audio, = samples or files
  else:
    raise UserError(
        f'{audio_io.shown(path)}: none of the features {", ".join(features) or "(none)"} is audio that is understood '
        f"(bytes of audio files or samples, named 'audio' if there are several); convert it, {_PREPARE}")
  extras = {name: name in features for name in ('starts', 'source')}
  if described[audio] == 'file':
    return RecordFields(audio=audio, kind='file', starts=extras['starts'], source=extras['source'])
  body = features[audio].get('audio') or features[audio]['tensor']
  rate = int(body.get('sampleRate', 0)) or next((name for name in RATES if name in features), 0)
  if not rate:
    raise UserError(f'{audio_io.shown(path)}: no feature states the rate of {audio!r} in Hz '
                    f'(looked for {", ".join(RATES)}); convert it, {_PREPARE}')
  dimensions = body['shape']['dimensions']
  return RecordFields(audio=audio, kind=described[audio], channels=int(dimensions[1]) if len(dimensions) > 1 else 1,
                      rate=rate, starts=extras['starts'], source=extras['source'])


def _describe(feature: dict) -> str:
  """'file', 'integers' or 'floats' for a feature (as JSON) that could be audio, else ''."""
  if 'text' in feature or feature.get('audio', {}).get('lazyDecode'):
    return 'file'
  body = feature.get('audio') or feature.get('tensor') or {}
  dimensions, dtype = body.get('shape', {}).get('dimensions', []), body.get('dtype')
  if dtype in ('string', 'object') and not dimensions:
    return 'file'
  plain = body.get('encoding', 'none').lower() == 'none'
  if not plain or len(dimensions) not in (1, 2) or (len(dimensions) == 2 and not 1 <= int(dimensions[1]) <= 255):
    return ''
  return 'integers' if dtype in _INTEGERS else 'floats' if dtype == 'float32' else ''


def _values(features, key: str):
  """The values of one feature of an example."""
  kind = features[key].WhichOneof('kind') if key in features else None
  values = getattr(features[key], kind).value if kind else ()
  if not len(values):
    raise ValueError(f'no {key!r} in it')
  return values


def _read_json(path: str) -> dict:
  try:
    with open(path, encoding='utf-8') as file:
      content = json.load(file)
    if not isinstance(content, dict):
      raise ValueError('not an object')
  except (OSError, ValueError) as e:
    raise UserError(f'{audio_io.shown(path)}: cannot be read as JSON ({in_one_line(e, most=200)})') from e
  return content


def _shards(paths: list[str]) -> str:
  """The shards in words, for messages."""
  more = f' and {len(paths) - 1} more' if len(paths) > 1 else ''
  return audio_io.shown(paths[0]) + more
