"""`m2l2 prepare`: a directory of audio files -> ArrayRecord shards of segments that TFDS reads, by Apache Beam.

Three stages, each a Beam pipeline over small work items (names of files, never audio):

  probe   a block of files: what their headers say, and a hash of the first samples
  hash    a block of files whose first samples are not theirs alone: a hash of all samples
  write   one shard: decode, resample, cut, encode and store its files; its index (m2l2.data.index)

An item ends by writing one JSON file under DIR/.prepare, so a job that was stopped at any moment goes on
with the items that lack theirs, and its output is the same bytes. What is planned between the stages is a
pure function of the files found and of these JSON files. manifest.json comes last: with it, DIR is done.
Data of format 1, which had no index, get one when they are prepared again; their shards stay as they are.

`options`, `plan`, `inputs` and `place` say what is to be made of which files and where; `child` decodes, `items` does
one item, `stages` has Beam do them all, `command` goes from stage to stage. Nothing is imported before it is asked
for: the children that decode live in this package, too, and have no room for Beam.
"""

from m2l2 import lazy

__all__ = ['Limits', 'Options', 'Place', 'SPLITS', 'plan_shards', 'prepare', 'split_of']

__getattr__, __dir__ = lazy(__name__, {
    'Limits': 'm2l2.data.prepare.options', 'Options': 'm2l2.data.prepare.options',
    'Place': 'm2l2.data.prepare.place', 'SPLITS': 'm2l2.data.order', 'plan_shards': 'm2l2.data.prepare.plan',
    'prepare': 'm2l2.data.prepare.command', 'split_of': 'm2l2.data.order'})
