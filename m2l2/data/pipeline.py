"""The training data path: audio files or records -> batches of random crops, through Grain.

The sample at global index g is a pure function of (seed, g, sources): `transforms.RandomCrop`.
Threads, workers, processes and restarts change which of them reads a sample, never the sample.
"""

import collections
from collections.abc import Callable
from concurrent import futures
import contextlib
import dataclasses
import gc
import math
import os
import threading
import time
import weakref

from absl import flags, logging
import grain
import numpy as np

from m2l2.data.sources import Mixture, find_mixture
from m2l2.data.transforms import CropSpec, RandomCrop
from m2l2.errors import UserError

AUTO = -1  # number of threads or workers: from the demand

_ENDLESS = 2**62
_MOST_GAIN = 60  # dB
_TRIALS = 8  # crops that are read to measure the cost of one, after one more to warm up
_THREADS = 4, 256  # least and most
_SPARE = 1.5  # threads beyond those that would do if none ever waited: reads take longer now and then
_OF_A_CORE = .5  # share of a core that a process spends on reading; above it, and on three cores or more, workers read
_OF_A_WORKER = .7
_WORKERS = 16  # upper limit; a small model stays far below the peak that the demand is computed from


class Loader:
  """An endless iterator over batches; `close()` it, or use it in a `with` block.

  Attributes:
    mixture: the `Mixture` it draws from (`mixture.fingerprint` tells whether a resumed run sees the
      same items).
  """

  def __init__(self, dataset: grain.IterDataset, reader: 'Batches'):
    self.mixture: Mixture = reader.crop.mixture
    self._crop, self._iterators = reader.crop, [iter(dataset)]
    # Also runs at the interpreter's end, before Grain's modules are unloaded.
    self._close = weakref.finalize(self, _close, self._iterators, reader)

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if not self._iterators:
      raise StopIteration
    return next(self._iterators[0])

  def check(self):
    """Raises UserError if a source has no usable sample; to be called before compiling."""
    self._crop.check()

  def origin(self, index: int) -> str:
    """The name of the item that the sample at a global index is of."""
    return self._crop.origin(index)

  def close(self):
    """Stops threads and workers. May be called again."""
    self._close()

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self.close()


class Ahead:
  """Batches of a loader, prepared ahead by a thread, in order.

  An exception of reading or `prepare` is raised in place of its batch: after the batches before it, and only if that
  batch is requested. Close it before the loader.

  Args:
    loader: an iterator.
    prepare: batch -> what `next` returns, such as a copy on the devices.
    ahead: number of batches prepared ahead; 0 prepares in `next`.
  """

  def __init__(self, loader, prepare: Callable, *, ahead: int):
    if ahead < 0:
      raise UserError(f'data.device_prefetch={ahead}: it must be 0 or more')
    self._fetch = lambda: prepare(next(loader))
    self._ahead, self._pending = ahead, collections.deque[futures.Future]()
    self._thread = futures.ThreadPoolExecutor(1, 'ahead')  # starts a thread once it gets work

  def __next__(self):
    if not self._ahead:
      return self._fetch()
    self._fill(1)  # the first time
    batch = self._pending.popleft().result()
    self._fill(self._ahead)
    return batch

  def _fill(self, count):
    while len(self._pending) < count:
      self._pending.append(self._thread.submit(self._fetch))

  def close(self):
    """Waits for the batch that is being read, and drops all."""
    self._thread.shutdown(cancel_futures=True)


def _close(iterators: list[grain.DatasetIterator], reader: 'Batches'):
  reader.crop.faults.close()
  iterators.pop().close()
  reader.close()
  # Grain's iterators are in reference cycles; at the interpreter's end their __del__ would print errors and
  # leak shared memory.
  gc.collect()


@dataclasses.dataclass(frozen=True)
class Rows:
  """`rows(k) -> global index` of the k-th sample that a process yields: its rows of batch 0, of batch 1, ..."""
  start_index: int
  batch_size: int
  blocks: tuple[int, ...]
  of_blocks: int

  def __len__(self):
    return self.batch_size // self.of_blocks * len(self.blocks)

  def __call__(self, k: int) -> int:
    batch, row = divmod(k, len(self))
    block, row = divmod(row, self.batch_size // self.of_blocks)
    return self.start_index + batch * self.batch_size + self.blocks[block] * self.batch_size // self.of_blocks + row


class Batches:
  """`batches(t)` -> the process's rows of batch t, whose crops are read side by side.

  Grain's own threads read a whole batch each, crop after crop: if a read takes 50 ms, a batch of 128 rows takes 6 s,
  and as many batches are in memory as there are threads. The threads here are shared by the batches in progress.

  Args:
    crop: index -> sample. rows: the global indices of the rows.
    threads: number of crops read at once; 0 reads one after another.
  """

  def __init__(self, crop: RandomCrop, rows: Rows, *, threads: int):
    self.crop, self._rows, self._threads = crop, rows, threads
    self._lock, self._closed = threading.Lock(), False
    self._pool: futures.ThreadPoolExecutor | None = None

  def __reduce__(self):
    return _batches, (self.crop, self._rows, self._threads)  # a worker process has threads of its own

  def __call__(self, t: int) -> dict[str, np.ndarray]:
    indices = [self._rows(k) for k in range(t * len(self._rows), (t + 1) * len(self._rows))]
    samples = list(self._started().map(self.crop, indices) if self._threads else map(self.crop, indices))
    return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

  def _started(self) -> futures.ThreadPoolExecutor:
    with self._lock:
      if self._closed:
        raise futures.CancelledError
      self._pool = self._pool or futures.ThreadPoolExecutor(self._threads, 'crops')
      return self._pool

  def close(self):
    """Running reads end, others are not started."""
    with self._lock:
      self._closed = True
    if self._pool:
      self._pool.shutdown(wait=False, cancel_futures=True)


def _batches(crop, rows, threads) -> Batches:
  return Batches(crop, rows, threads=threads)


@dataclasses.dataclass(frozen=True)
class CropCost:
  """The cost of one crop: seconds, and seconds of processor time."""
  seconds: float
  cpu: float


def measure_cost(crop: RandomCrop, *, first: int) -> CropCost:
  """Measures the mean cost of crops, read one after another from sample `first` on, unusable ones included."""
  seconds, cpu = [], []
  for index in range(first, first + _TRIALS + 1):
    began = time.perf_counter(), time.thread_time()
    with contextlib.suppress(UserError):  # reported when reading continues
      crop(index)
    seconds.append(time.perf_counter() - began[0])
    cpu.append(time.thread_time() - began[1])
  return CropCost(sum(seconds[1:]) / _TRIALS, sum(cpu[1:]) / _TRIALS)


def readers(demand: float | None, cost: CropCost, *, cores: int) -> tuple[int, int]:
  """The number of threads (in each reading process) and of worker processes that meet a demand.

  demand: crops per second needed from this process; None: as many as its own threads can read. cores: available ones.
  """
  if demand is None:  # while one thread waits, others use the cores
    return _within(cores * cost.seconds / max(cost.cpu, 1e-6)), 0
  load = demand * cost.cpu
  # On two cores a worker takes the same ones as this process's threads would, and copies every batch besides.
  workers = 0 if load <= _OF_A_CORE or cores < 3 else min(math.ceil(load / _OF_A_WORKER), _WORKERS, cores - 1)
  return _threads(demand, cost, workers), workers


def _threads(demand: float, cost: CropCost, workers: int) -> int:
  """In each reading process."""
  return _within(_SPARE * demand * cost.seconds / max(1, workers))


def _within(threads: float) -> int:
  return min(max(math.ceil(threads), _THREADS[0]), _THREADS[1])


def _chosen(crop, *, num_threads, num_workers, demand, first) -> tuple[int, int]:
  """The numbers of threads and workers, AUTO ones from the demand; logs them and the reason."""
  if AUTO not in (num_threads, num_workers):
    return num_threads, num_workers
  cost = measure_cost(crop, first=first)
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  threads, workers = readers(demand, cost, cores=cores)
  if num_workers != AUTO:
    workers = num_workers
    threads = _threads(demand, cost, workers) if demand else threads
  threads = threads if num_threads == AUTO else num_threads
  wanted = f'for {demand:.0f} crops/s ' if demand else ''
  logging.info('input: %d threads in %s %sat %.1f ms a crop, %.1f ms of them of a core', threads,
               f'each of {workers} workers' if workers else 'this process', wanted, 1e3 * cost.seconds, 1e3 * cost.cpu)
  if demand and demand * cost.cpu > cores:
    logging.warning('the input wants %.1f cores to feed these devices at their peak, and there are %d',
                    demand * cost.cpu, cores)
  return threads, workers


def make_loader(*, root, sample_rate: int, native_rates: tuple[int, ...], channels: int,
                crop_samples: int, batch_size: int, seed: int, start_index: int = 0,
                blocks: tuple[int, ...] = (0,), of_blocks: int = 1, num_workers: int = 0,
                num_threads: int = 4, prefetch: int = 4, worker_buffer: int = 1, rms_floor: float = 1e-3,
                gain_db: float = 0.0, mix: float = 0.0, source: str = 'auto', split: str = 'train',
                demand: float | None = None) -> Loader:
  """Batches of random crops from what is at `root`, from sample `start_index` on.

  Batch t holds the samples start_index + t * batch_size ..., of which one process of several yields
  its blocks of rows: of H equal ones block h is the rows h * B/H .. (h + 1) * B/H. To resume after n
  batches: start_index + n * B.

  Args:
    root: a folder, glob or file of audio, a prepared or TFDS dataset, shards, or a weighted mixture
      of these, as text (`sources.find_mixture`); or a `Mixture`.
    sample_rate: Hz, the model's; the first of native_rates.
    native_rates: Hz; files at these rates are not resampled, others are resampled to the first.
    channels: 1 (one random channel of the file) or 2 (mono doubled; of more, the first two).
    crop_samples: samples of a crop.
    batch_size: B, over all processes.
    seed: of the order and of the crops, in [0, 2**64).
    start_index: the first global index.
    blocks: the numbers h of this process's blocks, in rising order (`sharding.batch_blocks`).
    of_blocks: H.
    num_workers: reader processes, 0 for none, AUTO (-1) as many as `demand` needs, none on two cores. They help only if
      one process cannot keep up; they are spawned, so a script that uses them needs `if __name__ == '__main__':`.
    num_threads: crops read at once, in each worker (or here, without workers); 0 reads one after another in `next`;
      AUTO (-1) as many as `demand` needs, by the measured cost of some crops.
    prefetch: batches read ahead, in each worker (or here), and as many as keep the threads busy; their memory is held.
      0 reads a batch when it is asked for.
    worker_buffer: batches that each worker has ready beside those.
    rms_floor: a crop below this RMS is silent and drawn again.
    gain_db: each crop is scaled by a random gain within +-gain_db dB.
    mix: the chance that a sample is the sum of two crops, clipped to [-1, 1].
    source: what `root` is: 'auto' or 'folder' (`sources.find_mixture`).
    split: of TFDS datasets.
    demand: crops a second that this process must give, None: as many as it can; for AUTO.

  Returns:
    A `Loader` of dicts, B' the rows of this process: 'audio' float32 [B', channels, crop_samples];
    'rejected' int32 [B'], how many draws (unreadable, short, silent) were passed over for that row.

  Raises:
    UserError: bad arguments or no files, here; 64 rejected draws in a row, while iterating.
  """
  _check(sample_rate=sample_rate, native_rates=native_rates, channels=channels,
         crop_samples=crop_samples, batch_size=batch_size, seed=seed, start_index=start_index,
         blocks=blocks, of_blocks=of_blocks, num_workers=num_workers,
         num_threads=num_threads, prefetch=prefetch, worker_buffer=worker_buffer, gain_db=gain_db, mix=mix)
  mixture = root if isinstance(root, Mixture) else find_mixture(root, kind=source, split=split)
  crop = RandomCrop(
      mixture=mixture, seed=seed,
      spec=CropSpec(crop_samples=crop_samples, channels=channels, native_rates=tuple(native_rates),
                    rms_floor=rms_floor, gain_db=gain_db, mix=mix))

  rows = Rows(start_index, batch_size, blocks, of_blocks)
  num_threads, num_workers = _chosen(
      crop, num_threads=num_threads, num_workers=num_workers, demand=demand, first=start_index)
  reader = Batches(crop, rows, threads=num_threads)
  under_way = 1 + -(-num_threads // len(rows)) if num_threads and prefetch else 0  # batches, enough for all threads
  batches = grain.MapDataset.range(_ENDLESS).map(reader).to_iter_dataset(
      grain.ReadOptions(num_threads=under_way, prefetch_buffer_size=max(prefetch, under_way) if under_way else 0))
  if num_workers:
    # Grain reads absl flags when it starts workers, and these are unparsed wherever m2l2 is used
    # as a library (a notebook, a test): their defaults are what is wanted there.
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=worker_buffer)).map(_own)
  return Loader(batches, reader)


def _own(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Copies a batch out of the shared memory of Grain's workers, which must be freed before the exit."""
  return {name: np.array(value) for name, value in batch.items()}


def _check(*, sample_rate, native_rates, channels, crop_samples, batch_size, seed, start_index,
           blocks, of_blocks, num_workers, num_threads, prefetch, worker_buffer, gain_db, mix):
  """Raises UserError for an invalid argument."""
  if not native_rates or native_rates[0] != sample_rate:
    raise UserError(
        f'native_rates must begin with the sample rate {sample_rate}, not {tuple(native_rates)}')
  if channels not in (1, 2):
    raise UserError(f'channels must be 1 or 2, not {channels}')
  if crop_samples < 1:
    raise UserError(f'crop_samples must be positive, not {crop_samples}')
  if not blocks or not all(low < high for low, high in zip((-1, *blocks), (*blocks, of_blocks))):
    raise UserError(f'blocks {blocks} are not numbers in rising order, each in [0, {of_blocks})')
  if batch_size < 1 or batch_size % of_blocks:
    raise UserError(f'batch_size {batch_size} does not divide into {of_blocks} blocks, one a process or chip; make it '
                    f'a multiple of {of_blocks}')
  if not 0 <= seed < 2**64:
    raise UserError(f'seed must be in [0, 2**64), not {seed}')
  if min(start_index, num_workers - AUTO, num_threads - AUTO, prefetch) < 0:
    raise UserError('start_index and prefetch must not be negative, num_workers and num_threads not below -1')
  if worker_buffer < 1:
    raise UserError(f'worker_buffer must be 1 or more, not {worker_buffer}')
  if not 0 <= gain_db <= _MOST_GAIN:
    raise UserError(f'gain_db must be in [0, {_MOST_GAIN}], not {gain_db}')
  if not 0 <= mix <= 1:
    raise UserError(f'mix is a chance in [0, 1], not {mix}')
