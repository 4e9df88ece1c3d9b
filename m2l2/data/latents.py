"""Latents of a corpus, as `m2l2 encode-dataset` stores them, read back to train generative models on.

  from m2l2.data import latents
  import grain

  source = latents.latent_source('music-latents', window=64)       # 64 chunks: 47 s of 44.1 kHz
  batches = grain.MapDataset.source(source).seed(0).shuffle().repeat().batch(32, drop_remainder=True)
  for batch in batches.to_iter_dataset():                          # .mp_prefetch(...) reads in several processes
    batch['z']                                                     # float32 [32, 64, K, d], or int32 [32, 64, K]

In JAX, with the state and a `step(state, z) -> state` that is jitted:

  for batch in batches.to_iter_dataset():
    state = step(state, jax.device_put(batch['z'], sharding))      # or m2l2/examples/generate.py: a whole run

In torch the source is a data set of its own, or any loader's rows are:

  torch.utils.data.DataLoader(source, batch_size=32, shuffle=True)

  class Windows(torch.utils.data.IterableDataset):
    def __iter__(self): return iter(batches.to_iter_dataset())
  torch.utils.data.DataLoader(Windows(), batch_size=None)

`codec.decode` wants a whole record as `m2l2.Latents(z=row['z'], sample_rate=row['rate'],
num_samples=row['num_samples'], channels=row['channels'], model=source.model)`. No TensorFlow is needed, neither here
nor for TFDS's own
`tfds.builder_from_directory(DIR).as_data_source('train')`.
"""

import json
import os
import threading

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds

from m2l2.data import storage
from m2l2.data.audio_io import shown
from m2l2.errors import UserError, in_one_line

NAME, FORMAT, VERSION = 'latents', 'm2l2-latents-dataset', 1
MANIFEST = 'manifest.json'
MEMORY = 2 ** 29
DTYPES = {'float16': np.dtype(np.float16), 'bfloat16': np.dtype(ml_dtypes.bfloat16), 'float32': np.dtype(np.float32),
          'int32': np.dtype(np.int32)}


def features(*, shape: tuple, dtype: str) -> tfds.features.FeaturesDict:
  """The fields of a record: one signal, a whole file or a segment of prepared data.

  z               [streams, chunks, *shape], shape being (K, d), or (K,) of tokens
  source          name of the file, as one printable line
  rate, channels, num_samples: the signal's own, before any resampling; streams, chunks: z's
  offset, starts  where in the file the signal begins, and how many samples are not the next segment's too, at `rate`
  """
  f = tfds.features
  numbers = {name: f.Scalar(np.int64) for name in ('num_samples', 'offset', 'starts')}
  numbers |= {name: f.Scalar(np.int32) for name in ('rate', 'channels', 'streams', 'chunks')}
  # As bytes, since tf.train.Example would store float16 as float32.
  return f.FeaturesDict({
      'z': f.Tensor(shape=(None, None, *shape), dtype=DTYPES[dtype], encoding='bytes'), 'source': f.Text(), **numbers})


def index_name(split: str) -> str:
  """The file with an int32 [records, 2] of each record's streams and chunks."""
  return f'index-{split}.npy'


def read_manifest(directory) -> dict | None:
  """The manifest of a directory of latents, or None. Raises UserError: it is one of other data."""
  try:
    with open(os.path.join(directory, MANIFEST), encoding='utf-8') as file:
      manifest = json.load(file)
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f'{shown(directory)}: {MANIFEST} cannot be read ({in_one_line(error)})') from error
  if not isinstance(manifest, dict) or manifest.get('format') != FORMAT:
    raise UserError(f'{shown(directory)}: is not of latents: its {MANIFEST} is of something else')
  if manifest.get('version') != VERSION:
    raise UserError(f'{shown(directory)}: holds latents of version {manifest.get("version")}, this m2l2 reads '
                    f'version {VERSION}: encode again, or update m2l2')
  return manifest


class LatentSource:
  """Random access to windows of the latents that `m2l2 encode-dataset` wrote: `len(source)`, `source[i]`; what Grain
  calls a data source.

  A window is part of one stream of one record; the last window of a record ends with it, so no chunk is left out.
  Records shorter than the window are skipped; no window crosses from file to file. Reading a window reads its record.

  A row, `source[i]`, is a dict:

    z         float32 [window, K, d], or int32 [window, K] of tokens; of whole records [streams, chunks, ...]
    stream    int32, of z's signal: a mono model has one for each channel
    start     int32, the window's first chunk in it
    source    str, the file's name in the corpus; further fields as of `features`: rate, channels, streams, chunks,
              num_samples, offset, starts

  Args:
    directory: that of --output.
    window: chunks per row; None returns whole records.
    hop: chunks between the starts of windows, `window` by default; with 1, a window starts at every chunk.
    split: 'train', or 'validation' of a prepared source.
    memory: bytes of records that each process keeps once read: parsing one takes milliseconds.

  Attributes:
    manifest: facts about the corpus; model: the fingerprint of the model.

  Raises UserError: no such data, not finished, no such split, or no record as long as the window.
  """

  def __init__(self, directory, *, window=None, hop=None, split='train', memory=MEMORY):
    hop = window if hop is None else hop
    if window is not None and min(window, hop) < 1 or window is None and hop is not None:
      raise UserError(f'window={window}, hop={hop}: chunks, 1 or more; a hop needs a window')
    name = shown(directory)
    self.manifest = read_manifest(directory)
    if self.manifest is None:
      raise UserError(f'{name}: there are no latents there (make them with m2l2 encode-dataset)')
    if not os.path.isfile(os.path.join(directory, storage.METADATA)):
      raise UserError(f'{name}: is not finished: run the same m2l2 encode-dataset again')
    builder = tfds.builder_from_directory(os.fspath(directory))
    if split not in builder.info.splits:
      raise UserError(f'{name}: has no split {split!r}, but {", ".join(builder.info.splits)}')
    self.model = self.manifest['model']
    self._records = builder.as_data_source(split=split)
    self._window, self._hop = window, hop
    self._memory = memory
    self._forget()
    streams, chunks = np.load(os.path.join(directory, index_name(split))).astype(np.int64).T
    if window is None:
      self._per_stream = rows = np.ones_like(chunks)
    else:
      self._per_stream = np.where(chunks < window, 0, -(-(chunks - window) // hop) + 1)
      rows = streams * self._per_stream
    self._ends = np.cumsum(rows)
    if not len(self):
      raise UserError(f'{name}: no record is as long as a window of {window} chunks; the longest has {chunks.max()}')

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index) -> dict:
    """Row `index`: 'z' float32 [window, K, d] or int32 [window, K], 'stream' and 'start' (its first chunk), and the
    record's other fields as of `features`. Without a window 'z' is [streams, chunks, ...] and these two are 0."""
    index = int(index)
    if not 0 <= index < len(self):
      raise IndexError(f'row {index} of {len(self)}')
    number = int(np.searchsorted(self._ends, index, side='right'))
    row = self._record(number)
    z, stream, start = row['z'], 0, 0
    if self._window:
      before = self._ends[number - 1] if number else 0
      stream, step = map(int, divmod(index - before, self._per_stream[number]))
      start = min(step * self._hop, z.shape[1] - self._window)
      z = z[stream, start:start + self._window]
    z = np.array(z) if z.dtype == np.int32 else z.astype(np.float32)
    return {**row, 'z': z, 'source': row['source'].decode('utf-8'), 'stream': np.int32(stream),
            'start': np.int32(start)}

  def _record(self, number):
    """Record `number`, out of memory if it has been read lately."""
    with self._lock:
      record = self._kept.pop(number, None)
      if record is not None:
        self._kept[number] = record  # last, as the one asked for most lately
        return record
    record = self._records[number]
    with self._lock:
      self._room -= record['z'].nbytes if number not in self._kept else 0
      self._kept[number] = record
      while self._room < 0:
        self._room += self._kept.pop(next(iter(self._kept)))['z'].nbytes
    return record

  def __getstate__(self):
    """For worker processes: what was read stays behind."""
    return {name: value for name, value in self.__dict__.items() if name not in ('_kept', '_lock', '_room')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._forget()

  def _forget(self):
    self._kept: dict[int, dict] = {}
    self._room, self._lock = self._memory, threading.Lock()


latent_source = LatentSource
