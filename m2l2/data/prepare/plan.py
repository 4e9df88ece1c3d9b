"""Plans between the stages: pure functions of the input files and of the results of earlier stages."""

from collections.abc import Iterator
import hashlib
import itertools

from m2l2.data import storage
from m2l2.data.audio_io import shown
from m2l2.data.order import SPLITS, digest, split_of
from m2l2.data.prepare.options import Options

NAME = 'audio'  # of the dataset, for TFDS


def blocks(names) -> Iterator[dict]:
  """Groups files into work items: enough to distribute, few enough to store a result of each."""
  size = max(8, min(1024, len(names) // 64))
  for number, start in enumerate(range(0, len(names), size)):
    yield {'number': number, 'files': names[start:start + size]}


def merge(results) -> tuple[dict, dict]:
  """Merges the results of a stage: facts by name, faults by name."""
  facts, faults = dict[str, dict](), dict[str, str]()
  for result in results:
    facts |= result['facts']
    faults |= result['faults']
  return facts, faults


def suspects_of(headers) -> Iterator[str]:
  """The files whose audio begins like that of another file, sorted."""
  head = lambda name: (headers[name]['head'], name)
  groups = [list(group) for _, group in itertools.groupby(sorted(headers, key=head), key=lambda n: headers[n]['head'])]
  return iter(sorted(name for group in groups if len(group) > 1 for name in group))


def duplicates(hashed) -> dict:
  """{name: reason} of the files with the same audio as one of an earlier name (in sorted order)."""
  first, copies = dict[str, str](), dict[str, str]()
  for name in sorted(hashed):
    kept = first.setdefault(hashed[name]['content'], name)
    if kept != name:
      copies[name] = f'holds the same audio as {shown(kept)}'
  return copies


def plan_shards(weights: dict[str, float], options: Options) -> list[dict]:
  """Files with their seconds -> work items, one per shard: files in an order by hash, cut into about equal parts."""
  shards = []
  for split in SPLITS:
    names = sorted((n for n in weights if split_of(n, options.validation_fraction) == split),
                   key=lambda n: (digest('order', n), n))
    total = sum(weights[name] for name in names)
    count = max(1, round(total / (60 * options.shard_minutes)))
    parts, passed = dict[int, list[str]](), 0.
    for name in names:
      middle = (passed + weights[name] / 2) / total if total else 0
      parts.setdefault(min(count - 1, int(middle * count)), []).append(name)
      passed += weights[name]
    for number, key in enumerate(sorted(parts)):  # a part that lies within one long file is left out
      file = storage.shard_name(NAME, split=split, number=number, count=len(parts))
      shards.append({'number': f'{split}-{number:05d}', 'split': split, 'file': file, 'files': parts[key],
                     'seconds': sum(weights[name] for name in parts[key])})
  return shards


def fingerprint(names, sizes) -> str:
  """The fingerprint of the input: of all names and sizes."""
  digest = hashlib.sha256()
  for name, size in zip(names, sizes):
    digest.update(f'{name}\0{size}\0'.encode('utf-8', 'surrogateescape'))
  return digest.hexdigest()[:16]
