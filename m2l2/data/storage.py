"""Atomic writing of shards that TFDS reads without TensorFlow; equal records give equal bytes.

  with ShardWriter(path) as shard:
    shard.write(serialise(features, example))
  write_metadata(directory, name=, features=, splits={'train': [records of each shard]}, ...)
"""

from collections.abc import Mapping, Sequence
import contextlib
import glob
import os
import shutil
import tempfile

from array_record.python.array_record_module import ArrayRecordWriter
import tensorflow_datasets as tfds
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from m2l2 import files
from m2l2.data.audio_io import shown
from m2l2.errors import UserError, in_one_line, unwritten

METADATA = 'dataset_info.json'  # is written last: if it exists, the dataset is complete


def shard_name(name: str, *, split: str, number: int, count: int) -> str:
  """The name that TFDS gives a shard."""
  return f'{name}-{split}.array_record-{number:05d}-of-{count:05d}'


def serialise(features: tfds.features.FeaturesDict, example: Mapping) -> bytes:
  """The bytes of a record; TFDS's own `serialize_example` puts the fields in another order in each process."""
  serializer = ExampleSerializer(features.get_serialized_info())
  return serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)


class ShardWriter:
  """An ArrayRecord file that gets its name when the `with` block ends without an error, and is deleted otherwise.

  Raises UserError: a full disk, a path that cannot be written.
  """

  def __init__(self, path):
    self._path = os.fspath(path)
    files.remove_leftovers(self._path)
    self._temporary = files.temporary(self._path)
    self._writer = self._try(ArrayRecordWriter, self._temporary, 'group_size:1')  # random access, record by record

  def _try(self, act, *args):
    try:
      return act(*args)
    except (OSError, RuntimeError, ValueError) as error:  # array_record's errors are of these two
      reason = in_one_line(error).split('; ')[0]
      raise UserError(f'{shown(self._path)}: could not be written ({reason})') from error

  def write(self, record: bytes):
    self._try(self._writer.write, record)

  def __enter__(self):
    return self

  def __exit__(self, error, *unused):
    try:
      if error is None:
        self._try(self._writer.close)
        self._try(_replace, self._temporary, self._path)
      elif self._writer.is_open():
        with contextlib.suppress(RuntimeError):  # the disk is full, most likely, and `error` says so
          self._writer.close()
    finally:
      with contextlib.suppress(FileNotFoundError):
        os.unlink(self._temporary)


def remove_leftovers(folder):
  """Deletes what killed processes of any machine left; to be called when no process writes there any more."""
  for leftover in glob.glob(os.path.join(glob.escape(folder), '.*.part')):
    shutil.rmtree(leftover) if os.path.isdir(leftover) else os.unlink(leftover)


def _replace(source, target):
  """Renames a file after its data are on the disk, so that a crash leaves no half-written file of that name."""
  files.sync(source)
  os.replace(source, target)


def write_metadata(directory, *, name: str, features: tfds.features.FeaturesDict, description: str,
                   splits: Mapping[str, Sequence[int]], num_bytes: Mapping[str, int]):
  """Writes the files that `tfds.builder_from_directory` reads: features.json, then dataset_info.json.

  splits: for each split the number of records of each shard. num_bytes: for each split.
  """
  directory = os.fspath(directory)
  info = tfds.core.DatasetInfo(
      builder=tfds.core.dataset_info.DatasetIdentity(
          name=name, version=tfds.core.Version('1.0.0'), data_dir=directory, module_name='m2l2'),
      features=features, description=description)
  info.set_file_format('array_record')
  info.set_splits(tfds.core.SplitDict([
      tfds.core.SplitInfo(name=split, shard_lengths=list(lengths), num_bytes=num_bytes[split],
                          filename_template=tfds.core.ShardedFileTemplate(
                              data_dir=directory, dataset_name=name, split=split, filetype_suffix='array_record'))
      for split, lengths in splits.items()]))
  try:
    with tempfile.TemporaryDirectory(prefix='.metadata.', suffix='.part', dir=directory) as aside:
      info.write_to_directory(aside)
      for file in ('features.json', METADATA):
        _replace(os.path.join(aside, file), os.path.join(directory, file))
  except OSError as error:
    raise unwritten(directory, error) from error
