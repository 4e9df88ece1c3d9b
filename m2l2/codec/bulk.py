"""Bulk encoding: a corpus -> ArrayRecord shards of latents, on all devices of all hosts.

Reader threads turn files into rows of one chunk each. `rows` of them make a group, one device's share of a call, so
that there is one shape and one compilation for all files. A group holds rows of one shard only, in the order of the
names: the bytes of a shard depend on the names, the number of shards and `rows`, not on hosts, devices, threads or
interruptions.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import dataclasses
import itertools
import json
import os
import queue
import threading

from absl import logging
import jax
from jax.sharding import PartitionSpec as P
import numpy as np

from m2l2 import compiling, files, sharding
from m2l2.codec import encoding
from m2l2.codec.codec import Codec
from m2l2.data import audio_io, latents, storage
from m2l2.data.signals import find_signals
from m2l2.errors import UserError, in_one_line
from m2l2.training import hosts

REPORT = 'report.json'
_SIDECARS = 'shards'  # a JSON file for each complete shard
_AHEAD = 16  # chunks that a reader thread reads ahead
_IN_FLIGHT = 2  # calls that are queued for the devices
_MOST_NAMED = 20  # skipped files named in the log; the report names all
_DAYS = 7  # that hosts wait for the slowest host
# Errors that skip one file without ending the run. A file may vanish at any moment and may claim any size.
_FILE_FAULTS = (UserError, OSError, MemoryError)


@dataclasses.dataclass(frozen=True)
class Shard:
  """The signals first ... end - 1 of a split."""
  split: str
  number: int
  count: int
  first: int
  end: int

  @property
  def name(self) -> str:
    return storage.shard_name(latents.NAME, split=self.split, number=self.number, count=self.count)

  @property
  def sidecar(self) -> str:
    return os.path.join(_SIDECARS, f'{self.split}-{self.number:05d}-of-{self.count:05d}.json')


@dataclasses.dataclass
class Item:
  """One signal in progress: the contents of its record, or the reason why it is skipped."""
  name: str
  facts: dict = dataclasses.field(default_factory=dict)
  streams: int = 0
  parts: list = dataclasses.field(default_factory=list)  # of z, in order
  finite: bool = True
  fault: str | None = None


class Group:
  """At most `rows` rows for one device, and the signals that are complete once these are encoded."""

  def __init__(self, shape, rows: int):
    self.audio = np.zeros((rows, *shape), np.float32)
    self.frames = np.zeros(rows, np.int32)
    self.owners: list[Item] = []  # of each row
    self.done: list[Item] = []
    self.closes: Shard | None = None

  @property
  def full(self) -> bool:
    return len(self.owners) == len(self.audio)

  def add(self, item, audio, frames):
    row = len(self.owners)
    self.audio[row], self.frames[row] = audio, frames
    self.owners.append(item)


def encode_dataset(codec: Codec, *, source, output, dtype: str = 'float16', discrete: bool = False,
                   batch: int | None = None, shards: int | None = None, threads: int = 4,
                   process_index: int | None = None, process_count: int | None = None, devices=None,
                   progress: Callable = lambda total: lambda seconds: None) -> dict:
  """Encodes a corpus; the same call continues an interrupted one.

  Args:
    codec: the model.
    source: directory, glob or file of audio, or a directory that `m2l2 prepare` wrote.
    output: the directory to write; all hosts share it.
    dtype: 'float16', 'bfloat16' or 'float32'.
    discrete: int32 tokens instead.
    batch: chunks per device and call; by default 8 on CPUs, else 64, or what `output` was begun with.
    shards: files of each split; by default one per 64 signals, at most 1024, or what `output` was begun with.
    threads: files read at once.
    process_index, process_count: which share of the shards is encoded here; JAX's by default.
    devices: this process's by default.
    progress: a function of the number of signals to encode here, which returns a function called with the seconds of
      each.

  Returns:
    The report: 'signals', 'encoded', 'seconds', 'chunks', 'bytes', 'skipped' ([{'source', 'reason'}, ...]); {} if
    other hosts are not done (a multi-host run waits for them) or write the report.

  Raises UserError: nothing to encode, `output` is of another job, a full disk.
  """
  process_index = jax.process_index() if process_index is None else process_index
  process_count = jax.process_count() if process_count is None else process_count
  signals = find_signals(source)
  manifest = _manifest(codec, signals, source=source, dtype=dtype, discrete=discrete, batch=batch, shards=shards,
                       begun=latents.read_manifest(output))
  _begin(output, manifest)
  # Of this share: another process with the same share would delete the temporary files of this one.
  with files.locked(os.path.join(output, f'.lock-{process_index}'), command='m2l2 encode-dataset',
                 place=audio_io.shown(output)):
    return _encode_share(codec, signals, manifest, output=output, discrete=discrete, threads=threads,
                         process_index=process_index, process_count=process_count, devices=devices, progress=progress)


def _encode_share(codec, signals, manifest, *, output, discrete, threads, process_index, process_count, devices,
                  progress) -> dict:
  plan = _plan(manifest)
  if len(plan) < process_count:
    logging.warning('%d shards keep only as many of the %d hosts busy: give --shards', len(plan), process_count)
  todo = [shard for shard in plan[process_index::process_count] if not _is_done(output, shard)]
  if todo:
    told = progress(sum(shard.end - shard.first for shard in todo))
    features = _features(manifest)
    encoder = GroupEncoder(codec, rows=manifest['batch'], discrete=discrete, devices=devices)
    with Readers(codec, signals, threads=threads) as readers:
      groups = _groups(todo, readers, encoder, name=signals.name)
      _write(encoder.run(groups), todo, output=output, features=features, manifest=manifest, told=told)
  hosts.meet('encode-dataset', seconds=_DAYS * 86400)
  if jax.process_index() or not all(_is_done(output, shard) for shard in plan):
    return {}
  return _finish(output, plan, manifest)


# ---- the job -----------------------------------------------------------------------------


def _manifest(codec, signals, *, source, dtype, discrete, batch, shards, begun):
  """Everything that the bytes depend on: equal for all hosts and restarts of a job."""
  if dtype not in latents.DTYPES or dtype == 'int32':
    raise UserError(f'dtype is {dtype!r}; choose from float16, bfloat16, float32')
  if batch is not None and batch < 1 or shards is not None and shards < 1:
    raise UserError(f'batch is {batch}, shards is {shards}; both must be 1 or more')
  codec.check_source(channels=1, discrete=discrete)
  arch = codec.network.arch
  if batch is None:
    batch = begun['batch'] if begun else 8 if jax.default_backend() == 'cpu' else 64

  def count(split, length):
    if shards is None and begun and split in begun['splits']:
      return begun['splits'][split]['shards']
    return min(length, shards or min(-(-length // 64), 1024))

  return {
      'format': latents.FORMAT, 'version': latents.VERSION, 'model': codec.fingerprint,
      'source': audio_io.shown(source), 'names': signals.fingerprint,
      'splits': {split: {'signals': length, 'shards': count(split, length)}
                 for split, length in signals.lengths.items()},
      'dtype': 'int32' if discrete else dtype,
      'shape': [arch.num_latents] if discrete else [arch.num_latents, arch.latent_dim], 'batch': batch,
      'native_rates': list(codec.native_rates), 'chunk_samples': codec.representation.chunk_samples}


def _begin(output, manifest):
  """Makes the directory, or checks that an existing one is of the same job."""
  name = audio_io.shown(output)
  # Listed first: another host may be writing the manifest now.
  others = {entry for entry in os.listdir(output) if entry[0] != '.'} - {_SIDECARS} if os.path.isdir(output) else ()
  begun = latents.read_manifest(output)
  if begun is None:
    if others:
      raise UserError(f'{name}: the directory holds other things; name a new one')
    try:
      os.makedirs(os.path.join(output, _SIDECARS), exist_ok=True)
    except OSError as error:
      raise UserError(f'{name}: cannot be made ({error.strerror})') from error
    files.write_json(os.path.join(output, latents.MANIFEST), manifest, indent=1, durable=True)
    return
  for field, now in manifest.items():
    if field != 'source' and begun.get(field) != now:  # the path of the music may have changed
      raise UserError(f'{name}: was begun with {field} {begun.get(field)}, now it is {now}: '
                      'name a new directory, or give what it was begun with')


def _plan(manifest) -> list[Shard]:
  plan = []
  for split, sizes in sorted(manifest['splits'].items()):
    length, count = sizes['signals'], sizes['shards']
    plan += [Shard(split, i, count, i * length // count, (i + 1) * length // count) for i in range(count)]
  return plan


def _features(manifest):
  return latents.features(shape=tuple(manifest['shape']), dtype=manifest['dtype'])


def _is_done(output, shard) -> bool:
  return os.path.isfile(os.path.join(output, shard.sidecar))


# ---- reading -------------------------------------------------------------------------------------


class Readers:
  """Threads that read signals ahead of the devices, in order, each with a limited number of chunks in memory."""

  def __init__(self, codec, signals, *, threads: int):
    if threads < 1:
      raise UserError(f'threads is {threads}; it must be 1 or more')
    self._codec, self._signals, self._threads = codec, signals, threads
    self._stop = threading.Event()
    self._pool = futures.ThreadPoolExecutor(threads, 'reader')

  def __enter__(self):
    return self

  def __exit__(self, *unused):
    self._stop.set()
    self._pool.shutdown(cancel_futures=True)

  def read(self, places: Iterable) -> Iterator[Iterator]:
    """(split, number) of each signal -> for each, in order, what `_rows` yields; errors are raised to the consumer."""
    places, waiting = iter(places), collections.deque[queue.Queue]()
    for place in itertools.chain(places, [None] * self._threads):
      if place:
        waiting.append(queue.Queue(_AHEAD))
        self._pool.submit(self._fill, waiting[-1], place)
      if waiting and (not place or len(waiting) > self._threads):
        yield self._drain(waiting.popleft())

  def _fill(self, out, place):
    try:
      for value in self._rows(*place):
        self._put(out, value)
        if self._stop.is_set():
          return
      self._put(out, None)
    except BaseException as error:  # of any type: raised where the rows are consumed
      self._put(out, error)

  def _put(self, out, value):
    while not self._stop.is_set():
      try:
        return out.put(value, timeout=0.2)
      except queue.Full:
        pass

  def _drain(self, out):
    while (value := out.get()) is not None:
      if isinstance(value, BaseException):
        raise value
      yield value

  def _rows(self, split, number):
    """Yields the number of streams, then (audio [streams, C, N], frames) of each chunk, then the fields of the
    record."""
    codec = self._codec
    with self._signals.open(split, number) as signal:
      codec.check_source(channels=signal.channels)
      yield signal.channels if codec.representation.channels == 1 else 1
      windows = encoding.Windows(
          signal.blocks, representation=codec.representation, from_rate=signal.rate,
          to_rate=codec.model_rate(signal.rate), channels=signal.channels, width=1)
      for audio, frames in windows:
        yield encoding.to_streams(audio, channels=codec.representation.channels), frames
      yield dict(source=signal.source, rate=signal.rate, channels=signal.channels, num_samples=windows.num_samples,
                 offset=signal.offset, starts=windows.num_samples if signal.starts is None else signal.starts)


def _groups(shards, readers, encoder, *, name) -> Iterator[Group]:
  """The rows of all signals of all shards; each shard begins a new group."""
  signals = readers.read((shard.split, number) for shard in shards for number in range(shard.first, shard.end))
  for shard in shards:
    group = encoder.group()
    for number in range(shard.first, shard.end):
      item = Item(name(shard.split, number))
      values = next(signals)
      try:
        item.streams = next(values)
        for value in values:
          if isinstance(value, dict):
            item.facts = value
            break
          audio, frames = value
          for stream in audio:
            if group.full:
              yield group
              group = encoder.group()
            group.add(item, stream, frames)
      except _FILE_FAULTS as error:
        item.fault = in_one_line(error)
      group.done.append(item)
    group.closes = shard
    yield group


# ---- encoding ------------------------------------------------------------------------------------


class GroupEncoder:
  """Groups -> latents, one group for each device at a time."""

  def __init__(self, codec, *, rows: int, discrete: bool, devices=None):
    rep = codec.representation
    self._shape, self._rows = (rep.channels, rep.crop_samples(1)), rows
    mesh = sharding.make_mesh(devices=devices or jax.local_devices())
    self._devices = list(mesh.devices.flat)
    self._batch = sharding.batch_sharding(mesh)
    self._params = jax.device_put(codec.params, sharding.replicated(mesh))

    def encode(params, audio, frames):
      z = codec.encode_fn(params, audio, frames)[:, 0]
      finite = jax.numpy.isfinite(z).all(axis=(1, 2))
      return codec.tokens(z) if discrete else z, finite

    # Each device runs the program for a single device, so that latents do not depend on the number of devices.
    rows_of = P(sharding.BATCH_AXES)
    each = jax.shard_map(encode, mesh=mesh, in_specs=(P(), rows_of, rows_of), out_specs=rows_of, check_vma=False)
    self.compiled = compiling.Told(jax.jit(each, compiler_options=compiling.optimised(1)))

  def group(self) -> Group:
    return Group(self._shape, self._rows)

  def run(self, groups: Iterable[Group]) -> Iterator[tuple[Group, np.ndarray, np.ndarray]]:
    """Yields each group with its latents [rows, K, d] or tokens [rows, K], and whether each row is finite [rows].

    The devices compute one call while the host prepares the next.
    """
    waiting = collections.deque[tuple]()
    groups = iter(groups)
    while batch := list(itertools.islice(groups, len(self._devices))):
      waiting.append((batch, self._start(batch)))
      if len(waiting) > _IN_FLIGHT:
        yield from self._results(*waiting.popleft())
    while waiting:
      yield from self._results(*waiting.popleft())

  def _start(self, batch):
    batch = batch + [self.group()] * (len(self._devices) - len(batch))
    arrays = []
    for parts in ([group.audio for group in batch], [group.frames for group in batch]):
      shape = (len(batch) * self._rows, *parts[0].shape[1:])
      parts = [jax.device_put(part, device) for part, device in zip(parts, self._devices)]
      arrays.append(jax.make_array_from_single_device_arrays(shape, self._batch, parts))
    return self.compiled(self._params, *arrays)

  def _results(self, batch, results):
    z, finite = map(np.asarray, results)
    for i, group in enumerate(batch):
      rows = slice(i * self._rows, (i + 1) * self._rows)
      yield group, z[rows], finite[rows]


# ---- writing -------------------------------------------------------------------------------------


def _write(encoded, shards, *, output, features, manifest, told):
  """Writes records as they are encoded; a shard is complete when its sidecar exists."""
  dtype, named = latents.DTYPES[manifest['dtype']], 0
  for shard in shards:
    path = os.path.join(output, shard.name)
    sizes, skipped, seconds, group = [], [], 0.0, None
    with storage.ShardWriter(path) as writer:
      while group is None or group.closes is None:
        group, z, finite = next(encoded)
        start = 0
        for item, rows in itertools.groupby(group.owners, key=id):
          end = start + len(list(rows))
          item = group.owners[start]
          item.parts.append(z[start:end].astype(dtype))
          item.finite &= bool(finite[start:end].all())
          start = end
        for item in group.done:
          record, length = _record(item), 0.0
          if record:
            writer.write(storage.serialise(features, record))
            sizes.append([record['streams'], record['chunks']])
            length = record['num_samples'] / record['rate']
          else:
            skipped.append({'source': item.name, 'reason': item.fault})
            named += 1
            if named <= _MOST_NAMED:
              more = ' (any further ones are in the report only)' if named == _MOST_NAMED else ''
              logging.warning('skipped: %s%s', item.fault, more)
          item.parts = []
          seconds += length
          told(length)
    files.write_json(os.path.join(output, shard.sidecar), {
        'sizes': sizes, 'skipped': skipped, 'seconds': seconds, 'bytes': os.path.getsize(path)}, indent=1, durable=True)


def _record(item) -> dict | None:
  """The record of a signal whose rows are all encoded; None, and the signal counts as skipped, if that fails."""
  if not item.fault and not item.finite:
    item.fault = 'encoding gave NaN or infinite latents: the audio goes far beyond [-1, 1], or the weights are broken'
  if item.fault:
    item.fault = item.fault if item.name in item.fault else f'{item.name}: {item.fault}'
    return None
  z = np.concatenate(item.parts)  # chunk by chunk, and in each stream by stream
  z = np.moveaxis(z.reshape(-1, item.streams, *z.shape[1:]), 1, 0)
  return {'z': np.ascontiguousarray(z), 'streams': z.shape[0], 'chunks': z.shape[1], **item.facts}


def _finish(output, plan, manifest) -> dict:
  """After the last shard: writes the index, the report and, last, the files that TFDS reads."""
  report = {'signals': sum(shard.end - shard.first for shard in plan), 'encoded': 0, 'seconds': 0.0, 'chunks': 0,
            'bytes': 0, 'skipped': []}
  lengths, num_bytes = collections.defaultdict(list), collections.Counter[str]()
  index: dict[str, list] = collections.defaultdict(list)
  for shard in plan:
    with open(os.path.join(output, shard.sidecar), encoding='utf-8') as file:
      done = json.load(file)
    index[shard.split] += done['sizes']
    lengths[shard.split].append(len(done['sizes']))
    num_bytes[shard.split] += done['bytes']
    report['skipped'] += done['skipped']
    report['seconds'] += done['seconds']
  splits = {split: counts for split, counts in lengths.items() if sum(counts)}
  for split in splits:
    sizes = np.asarray(index[split], np.int32)
    report['encoded'] += len(sizes)
    report['chunks'] += int(sizes[:, 1].sum())
    report['bytes'] += num_bytes[split]
    with files.whole(os.path.join(output, latents.index_name(split)), durable=True) as aside, open(aside, 'wb') as file:
      np.save(file, sizes)
  files.write_json(os.path.join(output, REPORT), report, indent=1, durable=True)
  if not splits:
    raise UserError(f'{audio_io.shown(output)}: nothing could be encoded, all {report["signals"]} files were skipped; '
                    f'{REPORT} says why')
  storage.write_metadata(output, name=latents.NAME, features=_features(manifest), splits=splits, num_bytes=num_bytes,
                         description=f'Latents of {manifest["source"]} by the m2l2 model {manifest["model"]}.')
  for folder in (output, os.path.join(output, _SIDECARS)):
    storage.remove_leftovers(folder)
  return report
