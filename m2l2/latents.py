"""Latents: the summary embeddings of one signal, in memory and as a file."""

from collections.abc import Mapping
import dataclasses
import json
import os

import numpy as np
import safetensors
import safetensors.numpy

from m2l2.data import audio_io
from m2l2.errors import UserError

_FORMAT = 'm2l2-latents'
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Latents:
  """Summary embeddings of one signal, and what it takes to give it back exactly as long as it was.

  Attributes:
    z: float32 [streams, chunks, K, d] in [-1, 1], the bottleneck's own output; or int32
      [streams, chunks, K] tokens. One stream, or one per channel where a mono model encodes several
      channels.
    sample_rate, num_samples, channels: the source's.
    model: fingerprint of the model that made them.
    version: of the file format.
    tags: the source's title, artist and so on, as text by name.
  """
  z: np.ndarray
  sample_rate: int
  num_samples: int
  channels: int
  model: str
  version: int = _VERSION
  tags: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def save(self, path):
    """Writes a safetensors file, the fields as metadata. Raises UserError where it cannot."""
    audio_io.check_writable(path, extensions=None)
    fields = {'sample_rate': self.sample_rate, 'num_samples': self.num_samples,
              'channels': self.channels, 'model': self.model, 'tags': dict(self.tags)}
    metadata = {'format': _FORMAT, 'version': str(self.version), 'latents': json.dumps(fields)}
    data = safetensors.numpy.save({'z': np.ascontiguousarray(self.z)}, metadata)
    temporary = f'{os.fspath(path)}.{os.getpid()}.part'
    try:
      with open(temporary, 'wb') as file:
        file.write(data)
      os.replace(temporary, path)
    except OSError as error:
      raise UserError(f'{path}: could not be written ({error.strerror})') from error
    finally:
      if os.path.exists(temporary):
        os.unlink(temporary)

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
      reason = ' '.join(str(error).split())
      raise UserError(f'{name}: is not a file of latents, or a damaged one ({reason})') from error
    counts = (latents.sample_rate, latents.num_samples, latents.channels)
    if ((z.dtype, z.ndim) not in ((np.float32, 4), (np.int32, 3)) or not z.size
        or not all(isinstance(count, int) and count > 0 for count in counts)
        or not all(isinstance(text, str) for pair in latents.tags.items() for text in pair)):
      raise UserError(f'{name}: its latents or its metadata make no sense (z is {z.dtype} '
                      f'{list(z.shape)})')
    return latents


def is_safetensors(path) -> bool:
  """By name, or by how such a file begins: a length of 8 bytes, then JSON. An unreadable file is none."""
  if os.fspath(path).lower().endswith('.safetensors'):
    return True
  try:
    with open(path, 'rb') as file:
      return file.read(10)[8:] == b'{"'
  except OSError:
    return False
