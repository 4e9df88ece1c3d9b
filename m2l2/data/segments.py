"""The records of prepared data: one segment of one source, as FLAC, with its place in the source.

A prepared dataset is a directory that `m2l2 prepare` writes and TFDS reads without TensorFlow:
`tfds.builder_from_directory(DIR).as_data_source()`. Its examples are dicts with the keys of
`features()`; the sources' names come as UTF-8 bytes.
"""

from collections.abc import Mapping

import numpy as np
import tensorflow_datasets as tfds

from m2l2.data import audio_io, storage


def features() -> tfds.features.FeaturesDict:
  """The fields of a record. Audio is Text, since tfds.features.Audio needs TensorFlow.

  audio           FLAC of the segment, 16 bits; `read_audio` decodes it, or a part
  source          name of the file, relative to the input; bytes that are no UTF-8 as backslash escapes
  offset          the segment's first sample within the source at `rate`
  starts          number of crop starts in this segment: samples to the offset of the source's next
                  segment; the rest is overlap. In the last segment it is all its samples
  samples         length of the segment
  rate            Hz
  channels        count, the source's
  loudness        dBFS: RMS over all samples and channels, full scale 1; at least -120
  source_rate, source_samples, source_channels: of the file, before resampling
  """
  f = tfds.features
  return f.FeaturesDict({
    'audio': f.Text(), 'source': f.Text(), 'offset': f.Scalar(np.int64), 'starts': f.Scalar(np.int64),
    'samples': f.Scalar(np.int64), 'rate': f.Scalar(np.int32), 'channels': f.Scalar(np.int32),
    'loudness': f.Scalar(np.float32), 'source_rate': f.Scalar(np.int32), 'source_samples': f.Scalar(np.int64),
    'source_channels': f.Scalar(np.int32)})


def encode(record: Mapping) -> bytes:
  """A dict with the keys of `features()` -> the serialised example; equal records give equal bytes."""
  return storage.serialise(features(), dict(record))


def decode(example: bytes) -> dict:
  """The inverse of `encode`, as TFDS's own data source does it: 'audio' and 'source' are bytes."""
  return features().deserialize_example_np(example)


def read_audio(record: Mapping, *, start: int = 0, frames: int | None = None) -> np.ndarray:
  """The samples [start, start + frames) of a record, all by default: float32 [channels, frames].

  Decodes only the FLAC frames that contain them. The values are multiples of 2**-15, exactly the stored 16-bit
  integers.

  Raises UserError: the samples are out of range, or damaged.
  """
  frames = int(record['samples']) - start if frames is None else frames
  return audio_io.read_bytes(record['audio'], start=start, frames=frames, name=_name(record))


def _name(record: Mapping) -> str:
  source = record['source']
  source = source.decode('utf-8', 'backslashreplace') if isinstance(source, bytes) else source
  return f'{source} at sample {record["offset"]}'
