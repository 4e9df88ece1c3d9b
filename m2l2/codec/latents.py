"""Latents: the summary embeddings of one signal, in memory and as a file."""

from collections.abc import Mapping
import dataclasses
import json
import numbers
import os

import numpy as np
import safetensors

from m2l2 import files
from m2l2.data import audio_io
from m2l2.errors import UserError, in_one_line

_FORMAT = 'm2l2-latents'
_VERSION = 1


@dataclasses.dataclass(frozen=True, repr=False)
class Latents:
  """Summary embeddings of one signal, with its rate, length and channels.

  Attributes:
    z: float32 [streams, chunks, K, d] in [-1, 1], the bottleneck's own output; or int32
      [streams, chunks, K] tokens. One stream, or one per channel if a mono model encodes several
      channels.
    sample_rate, num_samples, channels: the source's.
    model: fingerprint of the model that made them.
    version: of the file format.
    tags: the source's title, artist and so on, as text by name.
    padding: how many of num_samples are beyond the source, as its chunks decode to no less (`Codec.cut`).
  """
  z: np.ndarray
  sample_rate: int
  num_samples: int
  channels: int
  model: str
  version: int = _VERSION
  tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
  padding: int = 0

  def __post_init__(self):
    """Whole numbers of any type (numpy's, for one) become int."""
    for name in ('sample_rate', 'num_samples', 'channels', 'padding'):
      object.__setattr__(self, name, _whole(getattr(self, name)))

  def __repr__(self):
    try:
      return f'<Latents: {self.words()}; model {self.model}>'
    except (TypeError, ValueError, ZeroDivisionError):  # fields that make no sense: `save` and `decode` report them
      return object.__repr__(self)

  @property
  def seconds(self) -> float:
    """The length of the source in seconds."""
    return self.num_samples / self.sample_rate

  @property
  def numbers_per_second(self) -> float:
    """Numbers (or tokens) per second of the source, over all streams."""
    return np.size(self.z) / self.seconds

  @property
  def kbit_per_second(self) -> float:
    """The bit rate of the numbers as they are stored: 32 bits each."""
    return self.numbers_per_second * 32 / 1000

  @property
  def samples_per_number(self) -> float:
    """The ratio of the source's samples to the numbers."""
    return self.num_samples * self.channels / np.size(self.z)

  def words(self) -> str:
    """One line of text: length, channels, numbers per second, bit rate."""
    what = 'numbers' if np.ndim(self.z) == 4 else 'tokens'
    return (f'{spoken_seconds(self.seconds)}, {self.channels} channel{"s" * (self.channels != 1)}: '
            f'{np.size(self.z):,} {what}, {self.numbers_per_second:,.0f} a second ({self.kbit_per_second:.3g} kbit/s), '
            f'{self.samples_per_number:.3g}x fewer than samples')

  def to_array(self) -> np.ndarray:
    """A plain array [time, dim] with one row per chunk: [chunks, streams * K * d], or [chunks, streams * K] of
    tokens."""
    return np.moveaxis(self.z, 0, 1).reshape(self.z.shape[1], -1)

  def with_array(self, array) -> 'Latents':
    """These latents with other numbers, from an array as returned by `to_array`. Raises UserError: another shape."""
    array, shape = np.asarray(array), self.z.shape
    if array.shape != self.to_array().shape:
      raise UserError(f'the array must be {list(self.to_array().shape)}, as to_array gives it, not {list(array.shape)}')
    z = np.moveaxis(array.reshape(shape[1], shape[0], *shape[2:]), 1, 0)
    return dataclasses.replace(self, z=z.astype(self.z.dtype))

  def save(self, path):
    """Writes a safetensors file, the fields as metadata; the same latents give the same bytes.

    Floating numbers are written as float32, integers as int32. If path is a link, the file it points to is replaced.

    Raises UserError: it cannot be written, or `load` would refuse it.
    """
    name = audio_io.shown(path)
    audio_io.check_writable(path, extensions=None)
    stored = dataclasses.replace(self, z=_storable(self.z), tags=dict(self.tags))
    _check(stored, name)
    fields = {'sample_rate': stored.sample_rate, 'num_samples': stored.num_samples, 'channels': stored.channels,
              'model': stored.model, 'tags': stored.tags}
    if stored.padding:  # absent in files of an older m2l2
      fields['padding'] = stored.padding
    metadata = {'format': _FORMAT, 'version': str(stored.version), 'latents': json.dumps(fields, sort_keys=True)}
    with files.whole(path) as aside, open(aside, 'wb') as file:
      file.writelines(_safetensors(stored.z, metadata))

  @classmethod
  def load(cls, path) -> 'Latents':
    """Reads what `save` wrote. Raises UserError: missing, not latents, damaged, another version."""
    name = audio_io.shown(path)
    if not os.path.isfile(path):
      raise UserError(f'{name}: there is no such file of latents')
    try:
      with safetensors.safe_open(path, framework='numpy') as file:
        metadata = file.metadata() or {}
        if metadata.get('format') != _FORMAT:
          raise UserError(f'{name}: is a safetensors file, but not of m2l2 latents (make one with '
                          'm2l2 encode)')
        if metadata.get('version') != str(_VERSION):
          raise UserError(f'{name}: holds latents of version {metadata.get("version")}, this m2l2 '
                          f'reads version {_VERSION}: encode the audio again, or update m2l2')
        z = file.get_tensor('z')
        fields = json.loads(metadata['latents'])
      latents = cls(z=z, **fields)
      latents = dataclasses.replace(latents, tags=dict(latents.tags))
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
      if isinstance(error, UserError):
        raise
      reason = in_one_line(error)
      raise UserError(f'{name}: is not a file of latents, or a damaged one ({reason})') from error
    _check(latents, name)
    return latents


def spoken_seconds(seconds: float) -> str:
  """'5.03 s', '3:08 min' or '1:02:03 h'."""
  if seconds < 59.995:
    return f'{seconds:.2f} s'
  minutes, seconds = divmod(round(seconds), 60)
  return f'{minutes // 60}:{minutes % 60:02}:{seconds:02} h' if minutes >= 60 else f'{minutes}:{seconds:02} min'


def _check(latents, name):
  """Raises UserError for fields that are not valid in a file of latents."""
  z, counts = latents.z, (latents.sample_rate, latents.num_samples, latents.channels)
  if ((z.dtype, z.ndim) not in ((np.float32, 4), (np.int32, 3)) or not z.size
      or not all(type(count) is int and count > 0 for count in counts)
      or type(latents.padding) is not int or latents.padding < 0 or not isinstance(latents.model, str)
      or latents.version != _VERSION
      or not all(isinstance(text, str) for pair in latents.tags.items() for text in pair)):
    raise UserError(f'{name}: its latents or its metadata make no sense (z is {z.dtype} {list(z.shape)}, sample_rate '
                    f'{latents.sample_rate!r}, num_samples {latents.num_samples!r}, channels {latents.channels!r})')


def _storable(z) -> np.ndarray:
  """Floats as float32 and integers that fit as int32; anything else unchanged."""
  z = np.asarray(z)
  if z.dtype.kind == 'f' or z.dtype.name == 'bfloat16':
    return z.astype(np.float32)
  if z.dtype.kind in 'iu' and z.size and -2 ** 31 <= z.min() and z.max() < 2 ** 31:
    return z.astype(np.int32)
  return z


def _whole(count):
  """A whole number of any type as an int; anything else unchanged, for `_check` to report."""
  if isinstance(count, (bool, np.bool_)):
    return count
  if isinstance(count, numbers.Real) and count == count // 1:
    return int(count)  # type: ignore[call-overload]  # typeshed's Real lacks __int__
  return count


def _safetensors(z, metadata) -> tuple[bytes, ...]:
  """The bytes of a safetensors file, in pieces. (The library writes metadata in a different order each time.)"""
  kind = {'float32': 'F32', 'int32': 'I32'}[z.dtype.name]
  data = np.ascontiguousarray(z, z.dtype.newbyteorder('<')).tobytes()
  header = json.dumps({'__metadata__': metadata,
                       'z': {'dtype': kind, 'shape': list(z.shape), 'data_offsets': [0, len(data)]}}).encode()
  header += b' ' * (-len(header) % 8)  # data start at a multiple of 8 bytes
  return len(header).to_bytes(8, 'little'), header, data


def is_safetensors(path) -> bool:
  """Whether a file is safetensors, by its name or its first bytes (a length of 8 bytes, then JSON)."""
  if os.fspath(path).lower().endswith('.safetensors'):
    return True
  try:
    with open(path, 'rb') as file:
      return file.read(10)[8:] == b'{"'
  except OSError:
    return False
