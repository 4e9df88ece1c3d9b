"""`m2l2 prepare`: a directory of audio files -> ArrayRecord shards of segments that TFDS reads, by Apache Beam.

Three stages, each a Beam pipeline over small work items (names of files, never audio):

  probe   a block of files: what their headers say, and a hash of the first samples
  hash    a block of files whose first samples are not theirs alone: a hash of all samples
  write   one shard: decode, resample, cut, encode and store its files; its index (index.py)

An item ends by writing one JSON file under DIR/.prepare, so a job that was stopped at any moment goes on
with the items that lack theirs, and its output is the same bytes. What is planned between the stages is a
pure function of the files found and of these JSON files. manifest.json comes last: with it, DIR is done.
Data of format 1, which had no index, get one when they are prepared again; their shards stay as they are.

Beam's own parallel local modes hand out items beforehand and start a gRPC service for each process (3 s
more, and the slowest share decides). Here the embedded runner's one worker puts the items of its bundle to
a pool of threads, each with a child process that decodes (`decoder`): whoever is free takes the next item.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import logging
import os
import queue
import shutil
import tempfile
import threading

from absl import logging as absl_logging
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from array_record.python import array_record_module
import tensorflow_datasets as tfds
import tqdm

from m2l2 import files
from m2l2.data import segments, sources
from m2l2.data.audio_io import shown
from m2l2.data.decoder import Decoder, FileFault
from m2l2.data.index import index_name, index_shard, join
from m2l2.data.order import digest, split_of, SPLITS
from m2l2.errors import UserError

FORMAT = 2  # 1 lacked the index
NAME = 'audio'  # of the dataset, as TFDS says it
WORK = '.prepare'
MANIFEST, REPORT, JOB = 'manifest.json', 'report.json', f'{WORK}/job.json'

_HEAD_BYTES = 2**22  # of a remote file, for the probe
_SIZED = ('WAV', 'AIFF', 'OGG')  # formats whose length libsndfile takes from the bytes that are there
_LEAST_BYTES = 500  # a second, for planning: a header that states more samples is not believed


@dataclasses.dataclass(frozen=True)
class Options:
  """What decides the bytes of the output, beside the files.

  Attributes:
    segment_seconds: length of a segment, at its rate.
    overlap_seconds: the longest crop that lies in one segment wherever it begins.
    rates: Hz; files at these are stored as they are, others resampled to the first.
    validation_fraction: of the files, by a hash of their names.
    silence_dbfs: segments below are left out. At -72, nothing that training's rms_floor of 1e-3 takes is
      lost: a crop of 1.5 s at -60 dBFS raises 20 s of silence to -71.3.
    shard_minutes: of audio, about.
  """

  segment_seconds: float = 20.
  overlap_seconds: float = 2.
  rates: tuple[int, ...] = (44100, 48000)
  validation_fraction: float = 0.05
  silence_dbfs: float = -72.
  shard_minutes: float = 30.

  def __post_init__(self):
    if not 0 <= self.overlap_seconds < self.segment_seconds <= 600:
      raise UserError(f'--segment-seconds={self.segment_seconds:g} --overlap-seconds={self.overlap_seconds:g}: '
                      'segments must be longer than their overlap, and at most 600 s')
    if not self.rates or not all(8000 <= rate <= 192_000 for rate in self.rates):
      raise UserError(f'--rates={",".join(map(str, self.rates))}: give one or more from 8000 to 192000')
    if not 0 <= self.validation_fraction <= 1:
      raise UserError(f'--validation-fraction={self.validation_fraction:g}: it must be from 0 to 1')
    if not self.shard_minutes > 0:
      raise UserError(f'--shard-minutes={self.shard_minutes:g}: it must be positive')


@dataclasses.dataclass(frozen=True)
class Limits:
  """Of decoding: seconds without a block of audio; bytes of address space."""

  timeout: float = 60.
  memory: int = 2**30


@dataclasses.dataclass(frozen=True)
class _Job:
  """What a work item needs beside itself; it travels to the workers."""

  base: str
  output: str
  options: Options
  limits: Limits


# ---- the command ---------------------------------------------------------------------------------


def prepare(source: str, output: str, *, options: Options = Options(), limits: Limits = Limits(),
            runner: str | None = None, processes: int | None = None, beam_arguments: tuple[str, ...] = (),
            quiet: bool = False) -> dict:
  """Prepares the audio under `source` (a directory, a glob or a file; local, or a URL of fsspec's) in `output`.

  Args:
    source, output: `output` is a new, an empty or a half-prepared directory.
    options: what to make.
    limits: of decoding one file.
    runner: Beam's name of one; by default the embedded runner.
    processes: that decode at once, in each worker of the runner; default: one a core for the embedded
      runner, else one (the runner has workers of its own).
    beam_arguments: further options for the runner.
    quiet: no progress bar.

  Returns:
    The manifest. A directory that was prepared from the same files with the same options is left as it is, but for
    an index that it lacks.

  Raises:
    UserError: nothing to prepare; `output` holds something else; it cannot be written; the pipeline failed.
  """
  if processes is not None and processes < 1:
    raise UserError(f'--processes={processes}: it must be 1 or more')
  processes = processes or (1 if runner else os.cpu_count())
  output = output if '://' in output else os.path.expanduser(output)
  base, names, sizes = _find(source)
  place = Place(output)
  job = _Job(base=base, output=output, options=options, limits=limits)
  run = lambda stage, items, total, unit: _run_stage(
      place, job, stage, items, total=total, unit=unit, runner=runner, processes=processes,
      beam_arguments=beam_arguments, quiet=quiet)
  identity = {'format': FORMAT, 'options': dataclasses.asdict(options) | {'rates': list(options.rates)},
              'files': len(names), 'input': _fingerprint(names, sizes)}
  if done := place.read_json(MANIFEST):
    has_index = done.get('format') != 1
    _refuse_other(place, done, identity if has_index else identity | {'format': 1})
    if not has_index:
      done = _add_index(place, done, run)
    place.clear_work()
    return done
  _refuse_foreign(place)
  place.make()
  with place.locked():
    _begin(place, identity)
    probed, skipped = _merge(run('probe', list(_blocks(names)), len(names), 'file'))
    suspects = list(_suspects(probed))
    hashed, faults = _merge(run('hash', list(_blocks(suspects)), len(suspects), 'file'))
    skipped |= faults
    skipped |= _duplicates(hashed)
    weights = {name: min(facts['seconds'], size / _LEAST_BYTES)
               for name, size in zip(names, sizes) if (facts := probed.get(name)) and name not in skipped}
    shards = plan_shards(weights, options)
    written = run('write', shards, sum(weights.values()), 's')
    return _finish(place, identity, shards, written, skipped)


def _refuse_foreign(place):
  others = [name for name in place.names() if name != WORK]
  if others and not place.read_json(JOB):
    raise UserError(f'{shown(place.root)}: is not empty and holds no prepared data ({shown(others[0])} ...); '
                    'choose another --output')


def _begin(place, identity):
  """Goes on with what a stopped run of this job left, refuses that of another, or notes what is being made."""
  if begun := place.read_json(JOB):
    _refuse_other(place, begun, identity)
    place.clear_parts()
  else:
    place.write_json(JOB, identity)


def _refuse_other(place, known, identity):
  for key, told in (('format', 'by another version of m2l2'), ('options', 'with other options'),
                    ('files', 'from other input'), ('input', 'from other input')):
    if known.get(key) == identity[key]:
      continue
    if key == 'options':
      differing = [f'{name} {known[key].get(name)} there, {value} here' for name, value in identity[key].items()
                   if known[key].get(name) != value]
      told += f' ({"; ".join(differing)})'
    raise UserError(f'{shown(place.root)}: was prepared {told}; choose another --output, or remove it first')


def _finish(place, identity, shards, written, skipped) -> dict:
  """Metadata, report and, last of all, the manifest."""
  silent, splits = {}, {}
  for shard, result in zip(shards, written):
    skipped |= result['faults']
    silent |= result['silent']
    splits.setdefault(shard['split'], []).append({'file': shard['file'], **result['counts']})
  for split in list(splits):
    if not any(shard['records'] for shard in splits[split]):  # nothing in it could be decoded
      for shard in splits.pop(split):
        place.remove(shard['file'])
  place.write(REPORT, _report(identity['files'], skipped, silent))
  if not splits:
    first = next(((name, skipped[name]) for name in sorted(skipped)), ('all of it', 'is silent'))
    raise UserError(f'none of the {identity["files"]} files gives audio to train on ({shown(first[0])}: {first[1]}; '
                    f'{shown(place.root)}/{REPORT} names all)')
  if 'train' not in splits:
    absl_logging.warning('all files fell to validation; lower --validation-fraction to train on them')
  _write_indices(place, shards, splits)
  _write_metadata(place, splits)
  counts = {split: {'sources': sum(shard['sources'] for shard in of), 'records': sum(shard['records'] for shard in of),
                    'seconds': round(sum(shard['seconds'] for shard in of), 3),
                    'bytes': sum(shard['bytes'] for shard in of), 'shards': of} for split, of in splits.items()}
  manifest = {**identity, 'skipped': len(skipped), 'silent_segments': sum(silent.values()), 'splits': counts}
  place.write_json(MANIFEST, manifest)
  place.clear_work()
  return manifest


def _add_index(place, manifest, run) -> dict:
  """Gives data of format 1 their index; returns the new manifest."""
  shards = [{'number': f'{split}-{number:05d}', 'split': split, 'file': shard['file']}
            for split, of in manifest['splits'].items() for number, shard in enumerate(of['shards'])]
  place.make()
  with place.locked():
    place.clear_parts()
    run('index', shards, len(shards), 'shard')
    _write_indices(place, shards, manifest['splits'])
    manifest = manifest | {'format': FORMAT}
    place.write_json(MANIFEST, manifest)
  return manifest


def _write_indices(place, shards, splits):
  for split in splits:
    own = [shard for shard in shards if shard['split'] == split]
    place.write(index_name(own[0]['file']), join(place.read(_part_name(shard)) for shard in own))


def _report(count, skipped, silent) -> bytes:
  """JSON with one line for each file that is not there, and for each with silent segments left out."""
  def lines(rows):
    return ',\n'.join(['    ' + json.dumps(row) for row in rows])
  faults = lines({'file': shown(name), 'reason': skipped[name]} for name in sorted(skipped))
  quiet = lines({'file': shown(name), 'segments': silent[name]} for name in sorted(silent))
  return (f'{{\n  "files": {count},\n  "used": {count - len(skipped)},\n  "skipped": [\n{faults}\n  ],\n'
          f'  "silent_segments": [\n{quiet}\n  ]\n}}\n').encode()


def _write_metadata(place, splits):
  """What TFDS reads a directory by; written without TensorFlow."""
  with tempfile.TemporaryDirectory() as folder:
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(name=NAME, version=tfds.core.Version('1.0.0'), data_dir=folder,
                                          module_name='m2l2'),
        description='Segments of audio files, as FLAC, prepared by m2l2.', features=segments.features())
    info.set_file_format('array_record')
    info.set_splits(tfds.core.SplitDict([
        tfds.core.SplitInfo(
            name=split, shard_lengths=[shard['records'] for shard in of], num_bytes=sum(s['bytes'] for s in of),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=NAME, split=split, filetype_suffix='array_record'))
        for split, of in splits.items()]))
    info.write_to_directory(folder)
    for name in sorted(os.listdir(folder), reverse=True):  # dataset_info.json last: readers look for it
      with open(os.path.join(folder, name), 'rb') as file:
        place.write(name, file.read())


# ---- the plan: pure functions --------------------------------------------------------------------


def _blocks(names) -> Iterator[dict]:
  """Work items of some files each: enough items to share out, few enough to keep."""
  size = max(8, min(1024, len(names) // 64))
  for number, start in enumerate(range(0, len(names), size)):
    yield {'number': number, 'files': names[start:start + size]}


def _merge(results) -> tuple[dict, dict]:
  """What a stage found out: facts by name, faults by name."""
  facts, faults = {}, {}
  for result in results:
    facts |= result['facts']
    faults |= result['faults']
  return facts, faults


def _suspects(probed) -> Iterator[str]:
  """The files whose audio begins as another one's does, sorted."""
  head = lambda name: (probed[name]['head'], name)
  groups = [list(group) for _, group in itertools.groupby(sorted(probed, key=head), key=lambda n: probed[n]['head'])]
  return iter(sorted(name for group in groups if len(group) > 1 for name in group))


def _duplicates(hashed) -> dict:
  """{name: reason} of the files whose audio an earlier name (in sorted order) has, too."""
  first, found = {}, {}
  for name in sorted(hashed):
    kept = first.setdefault(hashed[name]['content'], name)
    if kept != name:
      found[name] = f'holds the same audio as {shown(kept)}'
  return found


def plan_shards(weights: dict[str, float], options: Options) -> list[dict]:
  """Files with their seconds -> work items, one a shard: files in an order by hash, cut in about equal parts."""
  shards = []
  for split in SPLITS:
    names = sorted((n for n in weights if split_of(n, options.validation_fraction) == split),
                   key=lambda n: (digest('order', n), n))
    total = sum(weights[name] for name in names)
    count = max(1, round(total / (60 * options.shard_minutes)))
    parts, passed = {}, 0.
    for name in names:
      middle = (passed + weights[name] / 2) / total if total else 0
      parts.setdefault(min(count - 1, int(middle * count)), []).append(name)
      passed += weights[name]
    for number, key in enumerate(sorted(parts)):  # a part that one long file passes over is left out
      file = f'{NAME}-{split}.array_record-{number:05d}-of-{len(parts):05d}'
      shards.append({'number': f'{split}-{number:05d}', 'split': split, 'file': file, 'files': parts[key],
                     'seconds': sum(weights[name] for name in parts[key])})
  return shards


def _fingerprint(names, sizes) -> str:
  found = hashlib.sha256()
  for name, size in zip(names, sizes):
    found.update(f'{name}\0{size}\0'.encode('utf-8', 'surrogateescape'))
  return found.hexdigest()[:16]


# ---- one work item -------------------------------------------------------------------------------


def _do(job: _Job, stage: str, item: dict, decoder: Decoder, advance: Callable):
  """Does an item and leaves its result, for good: nothing of it is visible before it is done."""
  place = Place(job.output)
  if stage == 'write':
    result = _write_shard(job, place, item, decoder, advance)
  elif stage == 'index':
    with _local(job.output, item['file']) as path:
      place.write(_part_name(item), index_shard(path, item['file']))
    result = {}
    advance(1)
  else:
    result = {'facts': {}, 'faults': {}}
    for name in item['files']:
      try:
        result['facts'][name] = (_probe if stage == 'probe' else _hash)(job, name, decoder)
      except FileFault as e:
        result['faults'][name] = str(e)
      advance(1)
  place.write_json(_result_name(stage, item), result)


def _probe(job, name, decoder) -> dict:
  if '://' in job.base:  # the beginning mostly does
    with contextlib.suppress(FileFault), _local(job.base, name, most=_HEAD_BYTES) as path:
      facts = decoder.call('probe', path)
      if facts['format'] in _SIZED:  # else the header told the whole length
        facts['seconds'] *= max(1, _remote_size(job.base, name) / _HEAD_BYTES)
      return facts
  with _local(job.base, name) as path:
    return decoder.call('probe', path)


def _hash(job, name, decoder) -> dict:
  with _local(job.base, name) as path:
    return decoder.call('content_hash', path)


def _write_shard(job, place, item, decoder, advance) -> dict:
  """Writes a shard. A file's segments go in once all of it has been decoded, or not at all."""
  options = job.options
  counts = {'records': 0, 'sources': 0, 'seconds': 0., 'bytes': 0}
  result = {'counts': counts, 'faults': {}, 'silent': {}}
  with place.new(item['file']) as path:
    # Uncompressed: FLAC does not shrink. A group of one: any record is read alone.
    writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
    try:
      for name in item['files']:
        try:
          with _local(job.base, name) as local:
            found = decoder.call('segment', local, rates=options.rates, seconds=options.segment_seconds,
                                 overlap=options.overlap_seconds)
        except FileFault as e:
          result['faults'][name] = str(e)
          continue
        if found['note']:
          absl_logging.warning('%s: %s; taken as it is', shown(name), found['note'])
        wanted = [segment for segment in found['segments'] if segment[3] >= options.silence_dbfs]
        if len(wanted) < len(found['segments']):
          result['silent'][name] = len(found['segments']) - len(wanted)
        for segment, audio in zip(found['segments'], decoder.audio([size for *_, size in found['segments']])):
          offset, starts, samples, loudness, _ = segment
          if loudness < options.silence_dbfs:
            continue
          record = segments.encode({
              'audio': audio, 'source': shown(name), 'offset': offset, 'starts': starts, 'samples': samples,
              'rate': found['rate'], 'channels': found['channels'], 'loudness': loudness,
              'source_rate': found['source_rate'], 'source_samples': found['source_samples'],
              'source_channels': found['channels']})
          writer.write(record)
          counts['bytes'] += len(record)
          counts['seconds'] += starts / found['rate']
        counts['records'] += len(wanted)
        counts['sources'] += bool(wanted)
        advance(found['source_samples'] / found['source_rate'])
      writer.close()
      place.write(_part_name(item), index_shard(path, item['file']))
    except RuntimeError as e:  # the writer's only kind of error
      raise UserError(f'{shown(place.root)}: cannot be written: {" ".join(str(e).split())}') from e
    finally:
      with contextlib.suppress(RuntimeError):
        writer.close()
  return result


def _part_name(shard) -> str:
  """The index of one shard, until all are joined."""
  return f'{WORK}/{shard["number"]}.index'


def _result_name(stage, item) -> str:
  return f'{WORK}/{stage}-{item["number"]}.json'


# ---- Beam ----------------------------------------------------------------------------------------


class _Session:
  """What the embedded runner's workers, threads of this process, share with `prepare`."""

  def __init__(self, advance: Callable):
    self.advance, self.decoders = advance, []
    self.fault = None  # what ended it, before Beam wrapped it

  def stop(self):
    for decoder in self.decoders:
      decoder.close()


_session = None  # while the embedded runner runs


def _note(error: BaseException):
  if _session and not _session.fault:
    _session.fault = error


class _Work(beam.DoFn):
  """Does the items of a bundle in a pool of threads with a decoder each; gives nothing but files."""

  def __init__(self, job: _Job, stage: str, processes: int):
    self._job, self._stage, self._processes = job, stage, processes

  def setup(self):
    folder = None if '://' in self._job.output else os.path.join(self._job.output, WORK)
    limits = self._job.limits
    made = [Decoder(timeout=limits.timeout, memory=limits.memory, folder=folder) for _ in range(self._processes)]
    self._decoders, self._free = made, queue.SimpleQueue()
    for decoder in made:
      self._free.put(decoder)
    if _session:
      _session.decoders += made
    self._threads = futures.ThreadPoolExecutor(self._processes)

  def start_bundle(self):
    self._items = []

  def process(self, item: str):
    self._items.append(json.loads(item))

  def finish_bundle(self):
    self._items.sort(key=lambda item: -item.get('seconds', 0))  # the longest first: all are done at about the same time
    try:
      for done in futures.as_completed([self._threads.submit(self._one, item) for item in self._items]):
        done.result()
    except BaseException as e:
      _note(e)  # Ctrl-C and SIGTERM come here, too
      self._stop()
      raise

  def teardown(self):
    self._stop()

  def _one(self, item):
    decoder = self._free.get()
    try:
      _do(self._job, self._stage, item, decoder, _session.advance if _session else lambda amount: None)
    except BaseException as e:
      _note(e)
      raise
    finally:
      self._free.put(decoder)

  def _stop(self):
    for decoder in self._decoders:
      decoder.close()
    self._threads.shutdown(cancel_futures=True)


def _run_stage(place, job, stage, items, *, total, unit, runner, processes, beam_arguments, quiet) -> list[dict]:
  """The results of a stage's items, in order; only items without a result are done."""
  global _session
  done = place.results(stage)
  todo = [item for item in items if _result_name(stage, item) not in done]
  if todo:
    work = _Work(job, stage, min(processes, len(todo)))
    with _progress_bar(stage, total, unit, quiet=quiet or bool(runner)) as advance:
      session = _Session(advance)
      try:
        _session = None if runner else session
        options = PipelineOptions([f'--runner={runner}', *beam_arguments] if runner else [])
        with _quiet_beam(), contextlib.ExitStack() as stack:
          pipeline = beam.Pipeline(runner=None if runner else FnApiRunner(), options=options)
          stack.callback(shutil.rmtree, pipeline.local_tempdir, ignore_errors=True)  # Beam does so only where it is run
          stack.enter_context(pipeline)
          # As JSON, for names may hold bytes that no coder of Beam's takes. Reshuffle: here runners spread them.
          keys = pipeline | beam.Create([json.dumps(item) for item in todo])
          keys | beam.Reshuffle() | beam.ParDo(work)
      except BaseException as e:  # Beam wraps what a worker raised, each runner in its own way
        if session.fault:
          raise session.fault from e
        if not isinstance(e, Exception):
          raise
        raise UserError(f'the pipeline failed: {_last_line(e)}') from e
      finally:
        _session = None
        session.stop()
  results = [place.read_json(_result_name(stage, item)) for item in items]
  if None in results:
    raise UserError(f'{shown(place.root)}: results of the {stage} stage are missing; is --output on storage that all '
                    'workers share? Run the same command again to go on')
  return results


def _last_line(error) -> str:
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  ours = [line.partition('UserError: ')[2] for line in lines if 'UserError: ' in line]
  return (ours or lines or [type(error).__name__])[-1]


@contextlib.contextmanager
def _quiet_beam():
  """What Beam logs of a failure is told by us, in one line."""
  log = logging.getLogger('apache_beam')
  level = log.level
  log.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    log.setLevel(level)


@contextlib.contextmanager
def _progress_bar(stage, total, unit, *, quiet):
  """On a terminal only. Work of an earlier run of the same job is not counted."""
  lock = threading.Lock()
  with tqdm.tqdm(total=round(total), desc=stage, unit=unit, leave=False, disable=True if quiet else None,
                 bar_format='{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} {unit}, {remaining} left') as bar:
    def advance(amount):
      with lock:
        bar.update(amount)
    yield advance


# ---- files in, local or remote -------------------------------------------------------------------


def _find(source: str) -> tuple[str, list[str], list[int]]:
  """The base, the sorted names relative to it, and the sizes (-1: unknown) of the audio files."""
  if '://' not in source:
    files = sources.find_audio_files(source)
    return files.base, list(files.names), [_size(files.path(number)) for number in range(len(files))]
  fs, path = _file_system(source)
  scheme = source.partition('://')[0]
  try:
    if glob.has_magic(path):
      base = path[:min(path.find(c) for c in '*?[' if c in path)].rpartition('/')[0]
      found = fs.glob(path, detail=True)
    elif fs.isfile(path):
      base, found = path.rpartition('/')[0], {path: fs.info(path)}
    else:
      base, found = path, fs.find(path, detail=True)
  except Exception as e:
    raise UserError(f'{shown(source)}: cannot be listed: {" ".join(str(e).split()) or type(e).__name__}') from e
  base = base.rstrip('/')
  sizes = {name[len(base):].lstrip('/'): info.get('size') or 0 for name, info in found.items()
           if info.get('type') == 'file' and name.lower().endswith(sources.EXTENSIONS)}
  sizes = {name: size for name, size in sizes.items() if not any(part.startswith('.') for part in name.split('/'))}
  if not sizes:
    raise UserError(f'{shown(source)}: no audio files there (looked for *{", *".join(sources.EXTENSIONS)})')
  names = sorted(sizes)
  return f'{scheme}://{base}', names, [sizes[name] for name in names]


def _size(path) -> int:
  try:
    return os.path.getsize(path)
  except OSError:
    return -1


def _file_system(url: str):
  """fsspec's file system of a URL, and the path in it."""
  try:
    import fsspec
    return fsspec.core.url_to_fs(url, use_listings_cache=False)  # others write there, too
  except (ImportError, ValueError) as e:
    raise UserError(f'{shown(url)}: cannot be reached ({" ".join(str(e).split())})') from e


def _remote_size(base, name) -> int:
  fs, root = _file_system(base)
  return fs.size(f'{root}/{name}') or 0


@contextlib.contextmanager
def _local(base: str, name: str, *, most: int | None = None) -> Iterator[str]:
  """A file by a local path: itself, or a temporary copy (of the first `most` bytes) of a remote one."""
  if '://' not in base:
    yield os.path.join(base, name)
    return
  fs, root = _file_system(base)
  path = f'{root}/{name}'
  with tempfile.NamedTemporaryFile(suffix=os.path.splitext(name)[1]) as copy:
    try:
      if most:
        copy.write(fs.cat_file(path, start=0, end=most))
        copy.flush()
      else:
        fs.get_file(path, copy.name)
    except (FileNotFoundError, PermissionError) as e:
      raise FileFault(f'cannot be fetched ({type(e).__name__})') from e
    except Exception as e:  # of the way there, not of the file: all others would fail as it did
      raise UserError(f'{shown(base)}/{shown(name)}: cannot be fetched: {" ".join(str(e).split())}; run the '
                      'command again to go on') from e
    yield copy.name


# ---- the output ----------------------------------------------------------------------------------


class Place:
  """The output directory, local or a URL of fsspec's. Files appear in it whole or not at all.

  Every failure is a UserError of one line.
  """

  def __init__(self, root: str):
    self.root = root.rstrip('/') or '/'
    self._fs, self._path = _file_system(root) if '://' in root else (None, os.path.expanduser(self.root))

  def make(self):
    """Makes the directory, and in it the one for work under way."""
    with self._told():
      if self._fs:
        self._fs.makedirs(self._at(WORK), exist_ok=True)
      else:
        os.makedirs(self._at(WORK), exist_ok=True)

  def _at(self, name: str) -> str:
    return f'{self._path.rstrip("/")}/{name}' if name else self._path

  @contextlib.contextmanager
  def _told(self):
    try:
      yield
    except OSError as e:
      raise UserError(f'{shown(self.root)}: cannot be written: {e.strerror or e}') from e

  def names(self, folder: str = '') -> list[str]:
    """What is in the directory, sorted; nothing where there is none."""
    found = []
    with self._told(), contextlib.suppress(FileNotFoundError):
      found = self._fs.ls(self._at(folder), detail=False) if self._fs else os.listdir(self._at(folder))
    return sorted(name.rstrip('/').rpartition('/')[2] for name in found)

  def results(self, stage: str) -> set[str]:
    return {f'{WORK}/{name}' for name in self.names(WORK) if name.startswith(f'{stage}-') and name.endswith('.json')}

  def read_json(self, name: str):
    """The contents of a JSON file; None where there is none."""
    try:
      with self._fs.open(self._at(name), 'rb') if self._fs else open(self._at(name), 'rb') as file:
        return json.loads(file.read())
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as e:
      raise UserError(f'{shown(self.root)}/{name}: cannot be read ({e})') from e

  def read(self, name: str) -> bytes:
    try:
      with self._fs.open(self._at(name), 'rb') if self._fs else open(self._at(name), 'rb') as file:
        return file.read()
    except OSError as e:
      raise UserError(f'{shown(self.root)}/{name}: cannot be read ({e})') from e

  def write_json(self, name: str, value):
    self.write(name, (json.dumps(value, indent=2) + '\n').encode())

  def write(self, name: str, data: bytes):
    with self.new(name) as path, open(path, 'wb') as file:
      file.write(data)

  @contextlib.contextmanager
  def new(self, name: str) -> Iterator[str]:
    """A local path to write to; what is there after the block gets its name in one step."""
    with self._told():
      folder = tempfile.gettempdir() if self._fs else self._at(WORK)
      part = os.path.join(folder, f'{os.path.basename(name)}.{os.getpid()}.{threading.get_ident()}.part')
      try:
        open(part, 'wb').close()
        yield part
        if self._fs:
          self._fs.put_file(part, self._at(name))
        else:
          with open(part, 'rb') as file:
            os.fsync(file.fileno())
          os.replace(part, self._at(name))
      finally:
        with contextlib.suppress(FileNotFoundError):
          os.unlink(part)

  def remove(self, name: str):
    with self._told(), contextlib.suppress(FileNotFoundError):
      self._fs.rm_file(self._at(name)) if self._fs else os.unlink(self._at(name))

  def clear_parts(self):
    """Removes what a killed run left half-written."""
    for name in self.names(WORK):
      if name.endswith('.part'):
        self.remove(f'{WORK}/{name}')

  def clear_work(self):
    with self._told(), contextlib.suppress(FileNotFoundError):
      self._fs.rm(self._at(WORK), recursive=True) if self._fs else shutil.rmtree(self._at(WORK))

  @contextlib.contextmanager
  def locked(self):
    """One run at a time in a local directory; a killed run's lock is gone with it."""
    if self._fs:
      yield
      return
    with files.locked(self._at(f'{WORK}/lock'), command='m2l2 prepare', place=shown(self.root)):
      yield
