"""A corpus as a sequence of signals: the files of a folder, or the segments of prepared data."""

from collections.abc import Iterable, Iterator
import contextlib
import dataclasses
import hashlib
import os

import numpy as np
import tensorflow_datasets as tfds

from m2l2.data import audio_io, segments, storage
from m2l2.data.sources import find_audio_files
from m2l2.errors import UserError

_BLOCK_VALUES = 2**19  # samples x channels read at once: 2 MiB


@dataclasses.dataclass(frozen=True)
class Signal:
  """One signal, open.

  Attributes:
    source: name of its file, as one printable line.
    rate, channels: Hz, count.
    offset: its first sample within the file, at `rate`.
    starts: number of samples before the overlap with the next segment; None: all.
    blocks: float32 [channels, some samples], once.
  """
  source: str
  rate: int
  channels: int
  offset: int
  starts: int | None
  blocks: Iterable[np.ndarray]


class Folder:
  """The audio files under a directory, matching a glob, or one file.

  Attributes:
    lengths: {split: number of signals}; all files belong to 'train'.
    fingerprint: of their names.
  """

  def __init__(self, root):
    self._files = find_audio_files(root)
    self.lengths = {'train': len(self._files)}
    self.fingerprint = self._files.fingerprint

  def name(self, split: str, number: int) -> str:
    """The file's name as one printable line."""
    return audio_io.shown(self._files.names[number])

  @contextlib.contextmanager
  def open(self, split: str, number: int) -> Iterator[Signal]:
    """Raises UserError, here or from the blocks: not audio, damaged, NaN or infinity."""
    with audio_io.AudioReader(self._files.path(number)) as reader:
      info = reader.info
      # Resampling from 1 Hz would turn some bytes into gigabytes.
      if not audio_io.RATES[0] <= info.sample_rate <= audio_io.RATES[1]:
        raise UserError(f'{self.name(split, number)}: states a sample rate of {info.sample_rate} Hz')
      yield Signal(source=self.name(split, number), rate=info.sample_rate, channels=info.channels, offset=0,
                   starts=None,
                   blocks=reader.blocks(block_samples=max(1, _BLOCK_VALUES // info.channels), check_finite=True))


class Prepared:
  """The segments of a directory that `m2l2 prepare` wrote; attributes and methods as of `Folder`."""

  def __init__(self, directory):
    builder = tfds.builder_from_directory(directory)
    if set(builder.info.features) != set(segments.features()):
      raise UserError(f'{audio_io.shown(directory)}: is a dataset, but not one that m2l2 prepare made (it has no audio '
                      'segments)')
    self._splits = {split: builder.as_data_source(split=split) for split in sorted(builder.info.splits)}
    self.lengths = {split: len(source) for split, source in self._splits.items()}
    with open(os.path.join(directory, storage.METADATA), 'rb') as file:
      self.fingerprint = hashlib.sha256(file.read()).hexdigest()[:16]

  def name(self, split: str, number: int) -> str:
    return f'{split} record {number}'

  @contextlib.contextmanager
  def open(self, split: str, number: int) -> Iterator[Signal]:
    record = self._splits[split][number]
    yield Signal(source=record['source'].decode('utf-8'), rate=int(record['rate']), channels=int(record['channels']),
                 offset=int(record['offset']), starts=int(record['starts']), blocks=[segments.read_audio(record)])


def find_signals(source) -> Folder | Prepared:
  """A prepared dataset's directory -> its segments; another directory, a glob or a file -> the files.

  Raises UserError: there are no files, or no audio.
  """
  if os.path.isfile(os.path.join(source, storage.METADATA)):
    return Prepared(os.fspath(source))
  return Folder(source)
