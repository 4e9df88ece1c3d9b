"""`m2l2 prepare`: a directory of audio files -> ArrayRecord shards of segments that TFDS reads, by Apache Beam.

Three stages, each a Beam pipeline over small work items (names of files, never audio):

  headers a block of files: what their headers say, and a hash of the first samples
  hash    a block of files whose first samples are not theirs alone: a hash of all samples
  write   one shard: decode, resample, cut, encode and store its files; its index (m2l2.data.index)

Each item ends by writing one JSON file under DIR/.prepare, so a job that was stopped at any moment continues with the
items that lack theirs, and its output has the same bytes. The plans between the stages are pure functions of the input
files and of these JSON files. manifest.json is written last: with it, DIR is complete. Data of format 1, which had no
index, get one when they are prepared again; their shards do not change.

`options`, `plan`, `inputs` and `place` define the job, its files and its output; `child` decodes, `items` processes one
item, `stages` runs all items by Beam, `command` runs the stages. Imports are lazy: the child processes that decode
import this package, too, and must stay small.
"""

from m2l2 import lazy

__all__ = ['Limits', 'Options', 'Place', 'SPLITS', 'plan_shards', 'prepare', 'split_of']

__getattr__, __dir__ = lazy(__name__, {
    'Limits': 'm2l2.data.prepare.options', 'Options': 'm2l2.data.prepare.options',
    'Place': 'm2l2.data.prepare.place', 'SPLITS': 'm2l2.data.order', 'plan_shards': 'm2l2.data.prepare.plan',
    'prepare': 'm2l2.data.prepare.command', 'split_of': 'm2l2.data.order'})
