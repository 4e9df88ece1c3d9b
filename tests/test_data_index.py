"""Crops by the index of the shards: the same samples as from whole records, by one short read each."""

import json
import threading
import time

import numpy as np
import pytest
from test_data_sources import write_shards

from m2l2.data import audio_io, containers, index, order, segments
from m2l2.data.pipeline import make_loader
from m2l2.data.sources import find_mixture
from m2l2.errors import UserError

CROP, LENGTH, OWN = 9000, 200_000, 180_000


def music(samples, channels, seed):
  """Louder and softer noise, so that frames are of unlike sizes."""
  noise = np.random.default_rng([seed, channels]).normal(0, 1, (channels, samples))
  return (noise * 2000 * (1.2 + np.sin(np.arange(samples) / 30_000))).astype(np.int16)


def write_prepared(folder, *, channels=(2, 1, 2, 3, 2, 2), length=LENGTH, own=OWN):
  examples = [{
      'audio': audio_io.file_bytes(music(length - 1000 * number, count, number), 44100),
      'source': f'a/{number // 2}.ogg', 'offset': own * number, 'starts': own, 'rate': 44100, 'channels': count,
      'samples': length - 1000 * number, 'loudness': -10., 'source_rate': 44100, 'source_samples': own,
      'source_channels': count}
      for number, count in enumerate(channels)]
  write_shards(folder, segments.features(), examples, name='audio', shards=2)
  return folder


def add_index(folder):
  shards = sorted(folder.glob('*.array_record*'))
  (folder / 'audio-train.index').write_bytes(index.join(index.index_shard(shard, shard.name) for shard in shards))
  return folder


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  return write_prepared(tmp_path_factory.mktemp('plain') / 'd')


@pytest.fixture(scope='module')
def indexed(tmp_path_factory):
  return add_index(write_prepared(tmp_path_factory.mktemp('indexed') / 'd'))


def loader(root, **options):
  return make_loader(**dict(root=root, sample_rate=44100, native_rates=(44100,), channels=2, crop_samples=CROP,
                            batch_size=8, seed=3) | options)


@pytest.fixture
def reads(monkeypatch):
  """(bytes, how many reads were under way) of each; each takes `reads.seconds` longer."""
  class Reads(list):
    seconds, now, lock = 0., 0, threading.Lock()
  counted, read = Reads(), index.read_shard

  def slow(path, size, begin, end):
    with counted.lock:
      counted.now += 1
      counted.append((end - begin, counted.now))
    time.sleep(counted.seconds)
    with counted.lock:
      counted.now -= 1
    return read(path, size, begin, end)

  monkeypatch.setattr(index, 'read_shard', slow)
  return counted


def test_every_part_of_a_segment_is_the_same_with_and_without_an_index(plain, indexed):
  whole, short = find_mixture(plain).sources[0], find_mixture(indexed).sources[0]
  assert len(whole) == len(short) == 6 and whole.fingerprint == short.fingerprint
  assert isinstance(short.open(0), index.Segment) and not isinstance(whole.open(0), index.Segment)
  rng = np.random.default_rng(0)
  for number in range(6):
    with whole.open(number) as a, short.open(number) as b:
      path = lambda item: item.info.path.replace(str(plain), '').replace(str(indexed), '')
      assert path(a) == path(b) and path(b).endswith('.ogg)')
      for field in ('sample_rate', 'channels', 'frames', 'format', 'subtype'):
        assert getattr(a.info, field) == getattr(b.info, field)
      assert a.starts == b.starts == OWN
      frames = a.info.frames
      parts = [(0, frames), (0, 1), (frames - 1, 1), (16384, 1), (16383, 2), (16384, 16384), (frames - 500, 500),
               *((start, rng.integers(1, frames - start + 1)) for start in rng.integers(0, frames, 10).tolist())]
      for start, count in parts:
        want, got = a.read(start=start, frames=int(count)), b.read(start=start, frames=int(count))
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, want)


def test_batches_are_the_same_with_and_without_an_index_and_any_shards_of_it(plain, indexed):
  for pattern in ('{}', '{}/audio-train.array_record-00001-of-00002'):
    batches = []
    for root in (plain, indexed):
      with loader(pattern.format(root), mix=.5) as both:
        batches.append([next(both)['audio'] for _ in range(3)])
    np.testing.assert_array_equal(*batches)


def test_a_crop_is_one_read_of_little_more_than_its_bytes_and_many_are_under_way_at_once(tmp_path, reads):
  """What that gives in crops a second on a machine of one's own, soak_slow_reads.py measures."""
  folder = add_index(write_prepared(tmp_path / 'd', channels=(1,) * 8, length=400_000, own=300_000))
  crop, count = 50_000, 30
  needed = 0.
  which, source = order.Order(counts=(8,), weights=(1,), seed=3), find_mixture(folder).sources[0]
  for number in range(8 * count):
    item = which(number)[1]
    needed += len(source.file_bytes(item)) * crop / (400_000 - 1000 * item)
  with loader(folder, crop_samples=crop, channels=1, num_threads=16, prefetch=4) as batches:
    next(batches)
    reads.seconds = .05
    for _ in range(3):  # those read before they were slow
      next(batches)
    began = time.perf_counter()
    for _ in range(count - 4):
      next(batches)
    rate = 8 * (count - 4) / (time.perf_counter() - began)
  own = reads[:8 * count]
  assert max(under_way for _, under_way in reads) == 16
  assert needed < sum(size for size, _ in own) < 1.5 * needed
  assert rate > 3 / .05  # one after the other would give less than 1 / .05


def test_frames_that_are_none_are_not_taken_for_one():
  flac = bytearray(audio_io.file_bytes(music(60_000, 2, 0), 44100))
  block, offsets = containers.flac_frames(bytes(flac), channels=2)
  assert block == 4096 and len(offsets) == 15
  for place in (offsets[3] + 2000, offsets[4] + 2000):  # before the frame whose beginning they look like, and after
    false = flac.copy()
    false[place:place + 9] = flac[offsets[4]:offsets[4] + 9]
    assert containers.flac_frames(bytes(false), channels=2)[1] == offsets
  for end in (1, 2, 3, 4):  # a frame's two bytes of synchronisation among the last of the stream
    assert containers.flac_frames(bytes(flac[:-2]) + b'\xff\xf8' + bytes(end - 1), channels=2)[1] == offsets
  for bad in (b'RIFF' + flac[4:], flac[:offsets[2]]):
    with pytest.raises(ValueError):
      index._frames(bytes(bad), samples=60_000, channels=2)


def test_damaged_segments_are_named_and_passed_over(tmp_path, caplog):
  folder = add_index(write_prepared(tmp_path / 'd'))
  shard = sorted(folder.glob('*.array_record*'))[1]
  data = bytearray(shard.read_bytes())
  at = data.index(b'fLaC') + 1000
  data[at:at + 300_000:1000] = bytes(300)  # of the first record of this shard
  shard.write_bytes(data)
  with loader(folder) as batches:
    batch_list = [next(batches) for _ in range(6)]
  assert sum(int(batch['rejected'].sum()) for batch in batch_list)
  assert all(np.isfinite(batch['audio']).all() for batch in batch_list)
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 1 and 'record 3 (a/0.ogg): is damaged' in lines[0], lines


def test_an_index_that_does_not_fit_is_told_in_one_line(tmp_path):
  folder = add_index(write_prepared(tmp_path / 'd'))
  path, shards = folder / 'audio-train.index', sorted(folder.glob('*.array_record*'))
  good = path.read_bytes()
  cases = {'is not of the shards beside it': index.index_shard(shards[0], shards[0].name), 'cannot be read': good[:500],
           'version 9': good.replace(b'version\\": 1', b'version\\": 9')}
  for says, data in cases.items():
    assert data != good
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as caught:
      find_mixture(folder)
    assert 'm2l2 prepare' in str(caught.value) and '\n' not in str(caught.value)
  path.write_bytes(good)
  with open(shards[0], 'ab') as file:
    file.write(b'more')
  item = find_mixture(folder).sources[0].open(0)
  with pytest.raises(UserError, match='another size'):
    item.read(start=0, frames=10)
  with pytest.raises(UserError, match='^x: cannot be indexed'):
    index.index_shard(path, 'x')


def test_an_index_of_no_records_joins_with_others(tmp_path, indexed):
  from array_record.python.array_record_module import ArrayRecordWriter
  ArrayRecordWriter(str(tmp_path / 'empty'), 'group_size:1,uncompressed').close()
  empty, shard = index.index_shard(tmp_path / 'empty', 'empty'), sorted(indexed.glob('*.array_record*'))[0]
  joined = index.join([empty, index.index_shard(shard, shard.name), empty.replace(b'empty', b'other')])
  assert json.dumps([shard.name, shard.stat().st_size, 3])[1:-1].replace('"', '\\"').encode() in joined
  (tmp_path / 'i').write_bytes(joined)
  assert len(index.Index(tmp_path / 'i', ['empty', str(shard), 'other'])) == 3
