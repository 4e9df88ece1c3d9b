"""`m2l2 prepare`: runs the stages, then writes report, index, metadata of TFDS and, last, the manifest."""

import dataclasses
import json
import os
import tempfile

from absl import logging

from m2l2.data import segments, storage
from m2l2.data.audio_io import shown
from m2l2.data.index import index_name, join
from m2l2.data.prepare.inputs import find
from m2l2.data.prepare.items import part_name
from m2l2.data.prepare.options import Limits, Options, Preparation
from m2l2.data.prepare.place import WORK, Place
from m2l2.data.prepare.plan import NAME, blocks, duplicates, fingerprint, merge, plan_shards, suspects_of
from m2l2.data.prepare.stages import run_stage
from m2l2.errors import UserError

FORMAT = 2  # 1 lacked the index
MANIFEST, REPORT, JOB = 'manifest.json', 'report.json', f'{WORK}/job.json'
_LEAST_BYTES = 500  # bytes a second, for planning: a header that states more samples is wrong


def prepare(source: str, output: str, *, options: Options = Options(), limits: Limits = Limits(),
            runner: str | None = None, processes: int | None = None, beam_arguments: tuple[str, ...] = (),
            quiet: bool = False) -> dict:
  """Prepares the audio under `source` (a directory, a glob or a file; local, or a URL of fsspec's) in `output`.

  Args:
    source, output: `output` is a new, an empty or a half-prepared directory.
    options: those of the output.
    limits: of decoding one file.
    runner: the name of a runner of Beam; by default the embedded one.
    processes: number of decoding processes in each worker of the runner; default: one per core for the embedded
      runner, else one (other runners have several workers).
    beam_arguments: further options for the runner.
    quiet: no progress bar.

  Returns:
    The manifest. A directory that was prepared from the same files with the same options is not changed, except that
    a missing index is added.

  Raises:
    UserError: nothing to prepare; `output` has other files; it cannot be written; the pipeline failed.
  """
  if processes is not None and processes < 1:
    raise UserError(f'--processes={processes}: it must be 1 or more')
  processes = processes or (1 if runner else os.cpu_count())
  output = output if '://' in output else os.path.expanduser(output)
  base, names, sizes = find(source)
  place = Place(output)
  job = Preparation(base=base, output=output, options=options, limits=limits)
  run = lambda stage, items, total, unit: run_stage(
      place, job, stage, items, total=total, unit=unit, runner=runner, processes=processes,
      beam_arguments=beam_arguments, quiet=quiet)
  identity = {'format': FORMAT, 'options': dataclasses.asdict(options) | {'rates': list(options.rates)},
              'files': len(names), 'input': fingerprint(names, sizes)}
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
    headers, skipped = merge(run('headers', list(blocks(names)), len(names), 'file'))
    suspects = list(suspects_of(headers))
    hashed, faults = merge(run('hash', list(blocks(suspects)), len(suspects), 'file'))
    skipped |= faults
    skipped |= duplicates(hashed)
    weights = {name: min(facts['seconds'], size / _LEAST_BYTES)
               for name, size in zip(names, sizes) if (facts := headers.get(name)) and name not in skipped}
    shards = plan_shards(weights, options)
    written = run('write', shards, sum(weights.values()), 's')
    return _finish(place, identity, shards, written, skipped)


def _refuse_foreign(place):
  others = [name for name in place.names() if name != WORK]
  if others and not place.read_json(JOB):
    raise UserError(f'{shown(place.root)}: is not empty and holds no prepared data ({shown(others[0])} ...); '
                    'choose another --output')


def _begin(place, identity):
  """Continues an interrupted run of this job, refuses the output of another job, or records the new job."""
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
  silent, splits = dict[str, int](), dict[str, list]()
  for shard, result in zip(shards, written):
    skipped |= result['faults']
    silent |= result['silent']
    splits.setdefault(shard['split'], []).append({'file': shard['file'], **result['counts']})
  for split in list(splits):
    if not any(shard['records'] for shard in splits[split]):  # none of it could be decoded
      for shard in splits.pop(split):
        place.remove(shard['file'])
  place.write(REPORT, _report(identity['files'], skipped, silent))
  if not splits:
    first = next(((name, skipped[name]) for name in sorted(skipped)), ('all of it', 'is silent'))
    raise UserError(f'none of the {identity["files"]} files gives audio to train on ({shown(first[0])}: {first[1]}; '
                    f'{shown(place.root)}/{REPORT} names all)')
  if 'train' not in splits:
    logging.warning('all files fell to validation; lower --validation-fraction to train on them')
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
  """Adds the index to data of format 1; returns the new manifest."""
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
    place.write(index_name(own[0]['file']), join(place.read(part_name(shard)) for shard in own))


def _report(count, skipped, silent) -> bytes:
  """JSON with one line for each file that was skipped, and for each whose silent segments were left out."""
  def lines(rows):
    return ',\n'.join(['    ' + json.dumps(row) for row in rows])
  faults = lines({'file': shown(name), 'reason': skipped[name]} for name in sorted(skipped))
  quiet = lines({'file': shown(name), 'segments': silent[name]} for name in sorted(silent))
  return (f'{{\n  "files": {count},\n  "used": {count - len(skipped)},\n  "skipped": [\n{faults}\n  ],\n'
          f'  "silent_segments": [\n{quiet}\n  ]\n}}\n').encode()


def _write_metadata(place, splits):
  """Writes the metadata that TFDS reads, without TensorFlow."""
  with tempfile.TemporaryDirectory() as folder:
    storage.write_metadata(folder, name=NAME, features=segments.features(),
                           description='Segments of audio files, as FLAC, prepared by m2l2.',
                           splits={split: [shard['records'] for shard in of] for split, of in splits.items()},
                           num_bytes={split: sum(shard['bytes'] for shard in of) for split, of in splits.items()})
    for name in ('features.json', storage.METADATA):  # in this order: readers look for the latter
      with open(os.path.join(folder, name), 'rb') as file:
        place.write(name, file.read())
