"""One work item, decoded by a child process: probing some files, or writing one shard."""

from collections.abc import Callable
import contextlib

from absl import logging
from array_record.python import array_record_module

from m2l2.data import segments
from m2l2.data.audio_io import shown
from m2l2.data.index import index_shard
from m2l2.data.prepare.child import DecodingProcess, FileFault
from m2l2.data.prepare.inputs import fetched, remote_size
from m2l2.data.prepare.options import Preparation
from m2l2.data.prepare.place import WORK, Place
from m2l2.errors import UserError, in_one_line

_HEAD_BYTES = 2**22  # of a remote file, for its headers
_SIZED = ('WAV', 'AIFF', 'OGG', 'MP3')  # formats whose length is that of what is there of the file


def do(job: Preparation, stage: str, item: dict, decoder: DecodingProcess, advance: Callable):
  """Processes an item and writes its result atomically."""
  place = Place(job.output)
  if stage == 'write':
    result = _write_shard(job, place, item, decoder, advance)
  elif stage == 'index':
    with fetched(job.output, item['file']) as path:
      place.write(part_name(item), index_shard(path, item['file']))
    result = {}
    advance(1)
  else:
    result = {'facts': {}, 'faults': {}}
    for name in item['files']:
      try:
        result['facts'][name] = (_headers if stage == 'headers' else _hash)(job, name, decoder)
      except FileFault as e:
        result['faults'][name] = str(e)
      advance(1)
  place.write_json(result_name(stage, item), result)


def _headers(job, name, decoder) -> dict:
  if '://' in job.base:  # the beginning is usually enough
    with contextlib.suppress(FileFault), fetched(job.base, name, most=_HEAD_BYTES) as path:
      facts = decoder.call('headers', path)
      if facts['format'] in _SIZED:  # else the header states the length
        facts['seconds'] *= max(1, remote_size(job.base, name) / _HEAD_BYTES)
      return facts
  with fetched(job.base, name) as path:
    return decoder.call('headers', path)


def _hash(job, name, decoder) -> dict:
  with fetched(job.base, name) as path:
    return decoder.call('content_hash', path)


def _write_shard(job, place, item, decoder, advance) -> dict:
  """Writes a shard. The segments of a file are added when all of it is decoded, or not at all."""
  options = job.options
  counts = {'records': 0, 'sources': 0, 'seconds': 0., 'bytes': 0}
  result: dict[str, dict] = {'counts': counts, 'faults': {}, 'silent': {}}
  with place.new(item['file']) as path:
    # Uncompressed: FLAC does not shrink. Groups of one record, so that each can be read alone.
    writer = array_record_module.ArrayRecordWriter(path, 'group_size:1,uncompressed')
    try:
      for name in item['files']:
        try:
          with fetched(job.base, name) as local:
            decoded = decoder.call('segment', local, rates=options.rates, seconds=options.segment_seconds,
                                   overlap=options.overlap_seconds)
        except FileFault as e:
          result['faults'][name] = str(e)
          continue
        if decoded['note']:
          logging.warning('%s: %s; taken as it is', shown(name), decoded['note'])
        wanted = [segment for segment in decoded['segments'] if segment[3] >= options.silence_dbfs]
        if len(wanted) < len(decoded['segments']):
          result['silent'][name] = len(decoded['segments']) - len(wanted)
        for segment, audio in zip(decoded['segments'], decoder.audio([size for *_, size in decoded['segments']])):
          offset, starts, samples, loudness, _ = segment
          if loudness < options.silence_dbfs:
            continue
          record = segments.encode({
              'audio': audio, 'source': shown(name), 'offset': offset, 'starts': starts, 'samples': samples,
              'rate': decoded['rate'], 'channels': decoded['channels'], 'loudness': loudness,
              'source_rate': decoded['source_rate'], 'source_samples': decoded['source_samples'],
              'source_channels': decoded['channels']})
          writer.write(record)
          counts['bytes'] += len(record)
          counts['seconds'] += starts / decoded['rate']
        counts['records'] += len(wanted)
        counts['sources'] += bool(wanted)
        advance(decoded['source_samples'] / decoded['source_rate'])
      writer.close()
      place.write(part_name(item), index_shard(path, item['file']))
    except RuntimeError as e:  # the only type of error of the writer
      raise UserError(f'{shown(place.root)}: cannot be written: {in_one_line(e)}') from e
    finally:
      with contextlib.suppress(RuntimeError):
        writer.close()
  return result


def part_name(shard) -> str:
  """The name of the index of one shard, before all are joined."""
  return f'{WORK}/{shard["number"]}.index'


def result_name(stage, item) -> str:
  return f'{WORK}/{stage}-{item["number"]}.json'
