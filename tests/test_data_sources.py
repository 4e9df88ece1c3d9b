"""Where crops come from: prepared and foreign datasets, mixtures; one order whoever reads it."""

import io
import itertools
import json
import sys
from types import SimpleNamespace

from array_record.python.array_record_module import ArrayRecordWriter
from fuzz_audio import mutate
from number_source import Numbers
import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from m2l2.data import audio_io, order, records, segments, transforms
from m2l2.data.pipeline import make_loader
from m2l2.data.sources import AudioFiles, Mixture, find_mixture
from m2l2.errors import UserError

CROP = 500


def loader(root, **options):
  settings = dict(
      sample_rate=44100, native_rates=(44100, 48000), channels=1, crop_samples=CROP, batch_size=8,
      seed=7)
  return make_loader(root=root, **settings | options)


def take(root, count, **options):
  """`count` batches as one dict of arrays [count, B, ...]."""
  with loader(root, **options) as batches:
    taken = [next(batches) for _ in range(count)]
  return {k: np.stack([b[k] for b in taken]) for k in taken[0]}


def crop_spec(**options):
  return transforms.CropSpec(**dict(crop_samples=CROP, channels=2, native_rates=(44100,), rms_floor=0) | options)


def integers(samples, channels=2, seed=0):
  return np.random.default_rng([seed, samples]).integers(-9000, 9000, (channels, samples)).astype(np.int16)


def write_shards(folder, features, examples, *, name='music', split='train', shards=2):
  """What a TFDS dataset of these features looks like on disk; the format is TFDS's own metadata."""
  folder.mkdir(parents=True, exist_ok=True)
  template = tfds.core.ShardedFileTemplate(
      data_dir=folder, dataset_name=name, split=split, filetype_suffix='array_record')
  lengths = []
  for shard, path in enumerate(template.sharded_filepaths(shards)):
    own = examples[shard::shards]
    writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
    for example in own:
      writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    lengths.append(len(own))
  identity = tfds.core.dataset_info.DatasetIdentity(
      name=name, version=tfds.core.Version('1.0.0'), data_dir=str(folder), module_name='m2l2')
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.set_file_format('array_record')
  info.set_splits(tfds.core.splits.SplitDict([tfds.core.splits.SplitInfo(
      name=split, shard_lengths=lengths, num_bytes=0, filename_template=template)]))
  info.write_to_directory(folder)
  return folder


def write_prepared(folder, *, segment=4000, own=3000, count=7, **options):
  """Segments of which `own` samples are starts of their own."""
  examples = []
  for number in range(count):
    audio = integers(segment, seed=number)
    examples.append({
        'audio': audio_io.file_bytes(audio, 44100), 'source': f'{number}.ogg', 'offset': own * number, 'starts': own,
        'samples': segment, 'rate': 44100, 'channels': 2, 'loudness': -10., 'source_rate': 44100,
        'source_samples': own * count, 'source_channels': 2})
  return write_shards(folder, segments.features(), examples, **options)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  return write_prepared(tmp_path_factory.mktemp('prepared') / 'music')


@pytest.fixture(scope='module')
def speech(tmp_path_factory):
  """A folder whose name is as bad as names get."""
  root = tmp_path_factory.mktemp('speech') / 'live, 1999,2*3'
  root.mkdir()
  for number in range(3):
    soundfile.write(root / f'{number}.wav', integers(2000 + number).T, 44100)
  return root


# --- the order ---


NUMBERS = Mixture((Numbers(700), Numbers(90, 1000), Numbers(11, 2000)), (5, 3, 2))
BATCH = 200


def numbers(count=10_000 // BATCH, **options):
  audio = take(NUMBERS, count, crop_samples=1, batch_size=BATCH, rms_floor=-1, **options)['audio']
  return (audio * 1000).round().astype(int)[..., 0, 0]


@pytest.fixture(scope='module')
def straight():
  """Items in the global order, [50, 200], from the definition: nothing of Grain in it."""
  which = order.Order(counts=NUMBERS.counts, weights=NUMBERS.weights, seed=7)
  return np.array([1000 * s + k for s, k in map(which, range(10_000))]).reshape(-1, BATCH)


@pytest.mark.parametrize('hosts,num_workers', [  # workers take seconds to start
    (1, 0), (4, 0), *(pytest.param(hosts, num_workers, marks=pytest.mark.soak) for hosts, num_workers in (
        (2, 0), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2)))])
def test_10000_samples_in_one_order_whoever_reads_them(straight, hosts, num_workers):
  rows = np.split(straight, hosts, axis=1)
  for h in {0, hosts - 1}:  # all hosts: the next test
    own = numbers(blocks=(h,), of_blocks=hosts, num_workers=num_workers, worker_buffer=2)
    np.testing.assert_array_equal(own, rows[h])


def test_going_on_anywhere_on_any_number_of_hosts(straight):
  for step, hosts in zip(np.random.default_rng(0).integers(0, 50, 3).tolist(), (4, 1, 2), strict=True):
    count = min(50 - step, 10)
    parts = [numbers(count, start_index=step * BATCH, blocks=(h,), of_blocks=hosts) for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), straight[step:step + count])


def test_shares_are_exact_and_every_item_comes_once_an_epoch_of_its_source(straight):
  flat = straight.reshape(-1)
  for block in flat.reshape(-1, 10):
    assert np.bincount(block // 1000).tolist() == [5, 3, 2]
  for source, count in enumerate((700, 90, 11)):
    own = flat[flat // 1000 == source] % 1000
    epochs = own[:len(own) // count * count].reshape(-1, count)
    assert len(epochs) >= 7
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    assert len(np.unique(epochs, axis=0)) == len(epochs)


def test_one_source_takes_the_order_of_its_epochs_alone():
  """As before there were mixtures: a run of then goes on with the same samples."""
  which = order.Order(counts=(7,), weights=(1,), seed=5)
  assert [which(g) for g in range(14)] == [
      (0, k) for epoch in (0, 1) for k in order.epoch_order(seed=5, epoch=epoch, count=7).tolist()]


def test_orders_of_sources_with_equally_many_items_differ():
  assert order.epoch_order(seed=0, epoch=0, count=50, source=1).tolist() != order.epoch_order(
      seed=0, epoch=0, count=50).tolist()


# --- places ---


@pytest.mark.parametrize('text, weights, places', [
    ('{m}', (1,), 'm'), ('3*{m},1*{s}', (3, 1), 'ms'), ('0.25*{s}, 0.75*{m}', (1, 3), 'sm'), ('{s}', (1,), 's'),
    ('2*{m},2*{s},4*{m}', (1, 1, 2), 'msm'), ('.5*{m},1*{s}', (1, 2), 'ms')])
def test_mixtures_as_text(prepared, speech, text, weights, places):
  escaped = str(speech).replace(',2*', r'\,2*')
  mixture = find_mixture(text.format(m=prepared, s=escaped if '*{s}' in text else speech))
  assert mixture.weights == weights
  assert ['s' if isinstance(source, AudioFiles) else 'm' for source in mixture.sources] == list(places)


@pytest.mark.parametrize('text, words', [
    ('0*{m},1*{m}', 'above 0'), ('1.00001*{m},1*{m}', 'round them'), ('1*{m},1*/no/where', '/no/where'),
    ('tfds:nothing', 'no such dataset'), ('', 'empty')])
def test_bad_roots(prepared, text, words):
  with pytest.raises(UserError, match=words) as error:
    find_mixture(text.format(m=prepared))
  assert '\n' not in str(error.value)


def test_a_folder_by_word_is_never_taken_apart(tmp_path):
  folder = tmp_path / '2*a,1*b'
  folder.mkdir()
  soundfile.write(folder / 'x.wav', integers(600).T, 44100)
  for kind in ('folder', 'auto'):  # auto: for it exists
    assert find_mixture(folder, kind=kind).sources[0].names == ('x.wav',)


def test_fingerprints_tell_sources_and_weights(prepared, speech):
  texts = [f'{prepared}', f'{speech}', f'1*{prepared},1*{prepared}', f'2*{prepared},1*{prepared}']
  prints = [find_mixture(text).fingerprint for text in texts]
  assert len(set(prints)) == 4 and all(len(p) == 16 for p in prints)
  assert prints[2] == find_mixture(f'7*{prepared},7*{prepared}').fingerprint
  shards = find_mixture(f'{prepared}/*.array_record-*').fingerprint
  assert shards == prints[0]


# --- prepared data ---


def test_prepared_crops_equal_what_tfds_reads_bit_for_bit(prepared):
  """Prepared -> TFDS -> samples against prepared -> Grain -> crops, for all draws of three epochs."""
  source = tfds.builder_from_directory(prepared).as_data_source(split='train')
  whole = [segments.read_audio(record) for record in source]
  crops = take(prepared, 3, batch_size=7, channels=2)
  assert not crops['rejected'].any()
  which = order.Order(counts=(7,), weights=(1,), seed=7)
  for index, crop in enumerate(crops['audio'].reshape(21, 2, CROP)):
    _, item = which(index)
    start = order.below(order.draw_bits(seed=7, index=index, attempt=0).offset, 3000)
    np.testing.assert_array_equal(crop, whole[item][:, start:start + CROP])
  assert 'tensorflow' not in sys.modules


def test_only_a_segments_own_starts_are_drawn(prepared):
  item = find_mixture(prepared).sources[0].open(0)
  draws = [transforms.crop_window(frames=4000, rate=44100, spec=crop_spec(), bits=bits, starts=item.starts).start
           for bits in np.linspace(0, 2**64 - 2**11, 10_000).astype(np.uint64).tolist()]
  assert (min(draws), max(draws)) == (0, 2999) and len(set(draws)) == 3000
  # A last segment ends where the file does.
  last = transforms.crop_window(frames=700, rate=44100, spec=crop_spec(), bits=2**64 - 1, starts=700)
  assert last.start == 200


@pytest.mark.parametrize('root', ['{}', '{}/music-train.array_record-*', '{}/..', '{}/shards-only'])
def test_every_way_of_naming_a_dataset_gives_its_items(tmp_path, root):
  folder = write_prepared(tmp_path / 'music' / '1.0.0', count=5)
  write_prepared(tmp_path / 'music' / '0.9.0', count=1, shards=1)
  only = folder / 'shards-only'
  only.mkdir()
  for path in folder.glob('*.array_record*'):
    (only / path.name).write_bytes(path.read_bytes())
  assert find_mixture(root.format(folder)).counts == (5,)


def test_datasets_by_name(tmp_path, monkeypatch):
  write_prepared(tmp_path / 'music' / 'loud' / '1.0.0', count=4, split='dev')
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path))
  for name in ('tfds:music/loud', 'tfds:music/loud:1.0.0'):
    assert find_mixture(name, split='dev').counts == (4,)
  with pytest.raises(UserError, match="no split 'train', but 'dev': see data.split"):
    find_mixture('tfds:music/loud')


def test_hosts_workers_and_resuming_with_real_decoding(prepared, speech):
  root = f'3*{prepared},1*{speech.parent}/*/*.wav'
  whole = take(root, 6, channels=2, gain_db=6, mix=.5)
  assert len(np.unique(whole['audio'].reshape(48, -1), axis=0)) == 48
  for options, rows in ((dict(blocks=(1,), of_blocks=2), slice(4, 8)),
                        (dict(blocks=(3,), of_blocks=4, num_workers=1), slice(6, 8))):
    part = take(root, 4, channels=2, gain_db=6, mix=.5, start_index=16, **options)
    for key in whole:
      np.testing.assert_array_equal(part[key], whole[key][2:, rows])


# --- other people's datasets ---

F = tfds.features
FOREIGN = {
    'int16 stereo': ({'wave': F.Tensor(shape=(None, 2), dtype=np.int16), 'sample_rate': F.Scalar(np.int32)},
                     lambda audio: {'wave': audio.T, 'sample_rate': 44100}),
    'float32 mono': ({'audio': F.Tensor(shape=(None,), dtype=np.float32), 'rate': F.Scalar(np.int64),
                      'other': F.Tensor(shape=(None,), dtype=np.float32)},
                     lambda audio: {'audio': audio[0] / np.float32(2**15), 'rate': 44100, 'other': [1.]}),
    'fixed length': ({'audio': F.Tensor(shape=(900,), dtype=np.float32), 'sr': F.Scalar(np.int32)},
                     lambda audio: {'audio': audio[0] / np.float32(2**15), 'sr': 44100}),
    'bytes': ({'clip': F.Text(), 'tag': F.ClassLabel(num_classes=3)}, lambda audio: {'clip': wav(audio), 'tag': 1}),
}


def wav(audio):
  file = io.BytesIO()
  soundfile.write(file, audio.T, 44100, format='WAV')
  return file.getvalue()


@pytest.mark.parametrize('kind', FOREIGN)
def test_foreign_datasets(tmp_path, kind):
  features, example = FOREIGN[kind]
  audios = [integers(900, seed=seed) for seed in range(3)]
  root = write_shards(tmp_path / 'd', F.FeaturesDict(features), [example(audio) for audio in audios])
  source = find_mixture(root).sources[0]
  shuffled = [audios[k] for k in (0, 2, 1)]  # two shards, written in turn
  for number, audio in enumerate(shuffled):
    with source.open(number) as item:
      read = item.read(start=100, frames=700)
    np.testing.assert_array_equal(read * 2**15, audio[:item.info.channels, 100:800])
  assert take(root, 2, channels=2)['audio'].shape == (2, 8, 2, CROP)


def described(audio, **others):
  """features.json with these features, as TFDS writes it."""
  return {'featuresDict': {'features': {'audio': audio, **others}}}


def test_the_feature_of_tfds_audio_is_read_without_tensorflow(tmp_path):
  """It cannot even be made without TensorFlow, so its description is spelt out."""
  features = F.FeaturesDict({'audio': F.Tensor(shape=(None,), dtype=np.int64)})
  audio = integers(900)[0]
  root = write_shards(tmp_path / 'd', features, [{'audio': audio.astype(np.int64)}] * 2)
  (root / 'features.json').write_text(json.dumps(described({
      'pythonClassName': 'tensorflow_datasets.core.features.audio_feature.Audio',
      'audio': {'shape': {'dimensions': ['-1']}, 'dtype': 'int64', 'sampleRate': '16000', 'encoding': 'none'}})))
  with find_mixture(root).sources[0].open(1) as item:
    assert item.info.sample_rate == 16000
    np.testing.assert_array_equal(item.read(start=5, frames=800)[0] * 2**15, audio[5:805])


TENSOR = {'shape': {'dimensions': ['-1', '2']}, 'dtype': 'int16', 'encoding': 'none'}


@pytest.mark.parametrize('features, words', [
    (described({'tensor': TENSOR}), "states the rate of 'audio'"),
    ({'content': {'features': {'audio': {'tensor': TENSOR}}}}, "states the rate of 'audio'"),
    (described({'tensor': TENSOR | {'encoding': 'zlib'}}), 'none of the features audio is audio'),
    (described({'tensor': TENSOR | {'dtype': 'float64'}}), 'none of the features'),
    (described({'tensor': TENSOR | {'shape': {'dimensions': ['-1', '-1']}}}), 'none of the features'),
    ({'content': {'features': {'a': {'text': {}}, 'b': {'text': {}}}}}, "named 'audio' if there are several"),
    ({}, r'none of the features \(none\)'), ([], 'cannot be read as JSON')])
def test_features_that_are_not_understood(tmp_path, features, words):
  (tmp_path / 'features.json').write_text(json.dumps(features))
  with pytest.raises(UserError, match=words) as error:
    records.find_fields(str(tmp_path / 'features.json'))
  assert '\n' not in str(error.value)


def test_datasets_that_cannot_be_read(tmp_path):
  root = write_prepared(tmp_path / 'd')
  shard = root / 'music-train.array_record-00001-of-00002'
  data = shard.read_bytes()
  for change, words in ((shard.unlink, '1 of the 2 shards'), (lambda: shard.write_bytes(data[:100]), 'ArrayRecord'),
                        (lambda: shard.write_bytes(b''), 'ArrayRecord')):
    change()
    with pytest.raises(UserError, match=words) as error:
      find_mixture(root)
    assert '\n' not in str(error.value)
  info = json.loads((root / 'dataset_info.json').read_text())
  (root / 'dataset_info.json').write_text(json.dumps(info | {'fileFormat': 'tfrecord'}))
  with pytest.raises(UserError, match='is stored as tfrecord'):
    find_mixture(root)
  (root / 'dataset_info.json').write_text('{')
  with pytest.raises(UserError, match='cannot be read as JSON'):
    find_mixture(root)


def test_damaged_records_are_named_and_passed_over(tmp_path, caplog):
  root = write_prepared(tmp_path / 'd', count=8, shards=1)
  shard, = root.glob('*.array_record*')
  data = bytearray(shard.read_bytes())
  whole = find_mixture(root).sources[0]
  with whole.open(3) as item:
    assert item.info.frames == 4000
  at = data.index(b'fLaC', len(data) // 2)
  data[at + 1000:at + 1010] = bytes(10)
  shard.write_bytes(data)
  batch = take(root, 3)
  assert batch['rejected'].any() and np.isfinite(batch['audio']).all()
  named = [r.getMessage() for r in caplog.records]
  assert len(named) == 1 and 'record ' in named[0] and 'music-train.array_record' in named[0]


# --- mixing and gain ---


def sample(mixture, index, seed=3, **options):
  return transforms.RandomCrop(mixture=mixture, spec=crop_spec(**options), seed=seed)(index)['audio']


def test_gain_is_within_its_bounds_and_a_function_of_seed_and_index(prepared):
  mixture = find_mixture(prepared)
  plain = [sample(mixture, g) for g in range(40)]
  scaled = [sample(mixture, g, gain_db=6) for g in range(40)]
  db = [20 * np.log10(np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(scaled, plain, strict=True)]
  assert min(db) < -3 and max(db) > 3 and max(map(abs, db)) <= 6 and len({round(x, 5) for x in db}) == 40
  np.testing.assert_allclose(scaled[9], plain[9] * 10 ** (db[9] / 20), rtol=1e-5)
  np.testing.assert_array_equal(sample(mixture, 9, gain_db=6), scaled[9])
  assert not np.array_equal(sample(mixture, 9, seed=4, gain_db=6), scaled[9])


def test_mixing_adds_another_crop_to_the_same_one():
  """The first crop stays what it is without mixing; the second is of any source, by weight."""
  mixture = Mixture((Numbers(40), Numbers(40, 100)), (3, 1))
  plain = np.array([sample(mixture, g, crop_samples=1)[0, 0] for g in range(2000)])
  mixed = np.array([sample(mixture, g, crop_samples=1, mix=.5)[0, 0] for g in range(2000)])
  added = mixed != plain  # but for item 0 of the first source, silence
  assert .44 < added.mean() < .55
  others = ((mixed - plain)[added] * 1000).round().astype(int)
  assert set(others) == {*range(1, 40), *range(100, 140)}
  assert .2 < (others >= 100).mean() < .31
  loud = Mixture((Numbers(10, 900),))
  assert sample(loud, 0, crop_samples=1, mix=1).max() == 1  # clipped


# --- hostile files ---


def fuzzed(folder, count, seed=0):
  """`count` damaged files and four good ones in a folder; the names of the good ones."""
  audio = integers(30_000).T / 2**15
  bodies = {}
  for name, format, subtype in (('wav', 'WAV', 'PCM_16'), ('float.wav', 'WAV', 'FLOAT'), ('flac', 'FLAC', 'PCM_16'),
                                ('ogg', 'OGG', 'VORBIS'), ('mp3', 'MP3', 'MPEG_LAYER_III')):
    file = io.BytesIO()
    with soundfile.SoundFile(file, 'w', 44100, 2, subtype, format=format) as out:
      for start in range(0, len(audio), 4096):
        out.write(audio[start:start + 4096])
    bodies[name] = file.getvalue()
  for number, (name, body) in zip(range(count), itertools.cycle(bodies.items())):
    (folder / f'bad{number}.{name}').write_bytes(mutate(body, seed + number))
  for name, body in bodies.items():
    (folder / f'good.{name}').write_bytes(body)
  return [f'good.{name}' for name in bodies]


def test_100_damaged_files_are_used_or_named_and_the_good_ones_never(tmp_path, caplog):
  good = fuzzed(tmp_path, 100)
  mixture = find_mixture(tmp_path)
  crop = transforms.RandomCrop(mixture=mixture, spec=crop_spec(crop_samples=4000, rms_floor=1e-3), seed=0)
  rejected = 0
  for index in range(3 * len(mixture.sources[0])):
    result = crop(index)
    assert np.isfinite(result['audio']).all() and np.abs(result['audio']).max() <= 100
    rejected += int(result['rejected'])
  lines = [r.getMessage() for r in caplog.records]
  assert rejected and 20 < len(lines) <= 200 and all('\n' not in line for line in lines)
  assert not any(f'/{name}:' in line for name in good for line in lines)


def test_a_header_that_claims_more_than_memory_is_refused_before_reading(tmp_path):
  item = SimpleNamespace(
      info=audio_io.AudioInfo(path='x', sample_rate=4_000_000_000, channels=255, frames=2**40, format='', subtype=''),
      starts=None, read=lambda **_: pytest.fail('was read'))
  with pytest.raises(UserError, match='255 channels at 4000000000 Hz'):
    transforms.read_crop(item, spec=crop_spec(), bits=order.draw_bits(seed=0, index=0, attempt=0))


def test_files_that_vanish_are_named_and_passed_over(tmp_path, caplog):
  for number in range(4):
    soundfile.write(tmp_path / f'{number}.wav', integers(900).T, 44100)
  with loader(tmp_path, num_threads=0, prefetch=0) as batches:
    next(batches)
    (tmp_path / '2.wav').unlink()
    later = [next(batches) for _ in range(3)]
  assert sum(int(batch['rejected'].sum()) for batch in later) >= 6
  assert [r.getMessage() for r in caplog.records] == [f'training data: {tmp_path}/2.wav: there is no such file']


def test_what_is_half_prepared_or_of_several_splits_is_not_mixed(tmp_path):
  from m2l2.data.sources import find_source
  half = tmp_path / 'half'
  (half / '.prepare').mkdir(parents=True)
  (half / 'audio-train.array_record-00000-of-00001').write_bytes(b'')
  with pytest.raises(UserError, match='is not finished'):
    find_source(str(half), split='train')
  both = tmp_path / 'both'
  both.mkdir()
  for split in ('train', 'validation'):
    (both / f'audio-{split}.array_record-00000-of-00001').write_bytes(b'')
  with pytest.raises(UserError, match='none of nonsense'):
    find_source(str(both / '*.array_record*'), split='nonsense')


def test_a_glob_in_a_loop_of_links_ends(tmp_path):
  from m2l2.data.sources import find_audio_files
  folder = tmp_path / 'music'
  folder.mkdir()
  for name in ('a.wav', '.hidden.wav', 'b.txt'):
    (folder / name).write_bytes(b'')
  for name in ('one', 'two'):
    (folder / name).symlink_to(folder)
  assert find_audio_files(str(folder / '**' / '*.wav')).names == ('a.wav',)
  assert find_audio_files(str(folder / '*.wav')).names == ('a.wav',)
  with pytest.raises(UserError, match='a mixture is written'):
    find_audio_files('2*' + str(folder))
