"""Bulk encoding: the same latents as file by file, the same bytes however the work is cut, and reading them back."""

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time

import grain
import jax
import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds
from test_codec import load_once, make_snapshot, music
from test_layering import ROOT

from m2l2 import cli, files
from m2l2.cli import info
from m2l2.codec import bulk
from m2l2.codec import codec as codec_lib
from m2l2.data import audio_io, latents, segments, storage
from m2l2.errors import UserError

# (name, samples, channels, rate)
SONGS = [('a.wav', 5000, 1, 44100), ('b/c.flac', 100, 2, 44100), ('b/d.wav', 30000, 2, 48000),
         ('e.wav', 9000, 1, 22050), ('f.wav', 1, 1, 44100), ('g.wav', 1024 * 8 - 768, 1, 44100),
         ('h.wav', 70000, 2, 44100), ('i.wav', 20000, 1, 44100)]


@pytest.fixture(scope='module', autouse=True)
def compiled_once():
  """A model is compiled for once in a session."""
  patch = pytest.MonkeyPatch()
  patch.setattr(codec_lib, 'load', load_once)
  yield
  patch.undo()


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  root = tmp_path_factory.mktemp('models')
  make_snapshot(root / 'mono')
  make_snapshot(root / 'stereo', 'debug,stereo')
  make_snapshot(root / 'fsq', variants={'fsq.on': True}, latent_dim=4)
  return root


@pytest.fixture(scope='module')
def songs(tmp_path_factory):
  root = tmp_path_factory.mktemp('songs')
  for i, (name, samples, channels, rate) in enumerate(SONGS):
    (root / name).parent.mkdir(exist_ok=True)
    audio = music(samples, channels=channels, sample_rate=rate, seed=i)
    soundfile.write(root / name, audio.T, rate, subtype='PCM_16' if name.endswith('flac') else 'FLOAT')
  return root


@pytest.fixture(scope='module')
def straight(models, songs, tmp_path_factory):
  """The corpus by the mono model, undisturbed, on eight devices."""
  output = tmp_path_factory.mktemp('straight') / 'out'
  bulk.encode_dataset(codec_lib.load(models / 'mono'), source=songs, output=output, batch=2, shards=4)
  return output


def test_info_of_a_corpus(straight):
  told = info.facts(straight)
  assert told['kind'] == 'corpus of latents' and told['chunks'] > 0 and told['hours'] > 0


@pytest.fixture
def m2l2(capsys):
  def run(*argv):
    status = cli.main([str(arg) for arg in argv])
    return status, *capsys.readouterr()
  return run


def rows(directory, split='train'):
  source = latents.latent_source(directory, split=split)
  return [source[i] for i in range(len(source))]


def contents(directory):
  """{name: bytes} of everything in a directory."""
  return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob('*') if path.is_file()}


# ---- equal to encoding file by file --------------------------------------------------------------


@pytest.mark.parametrize('model,place,dtype,options', [
    ('mono', '', 'float32', {}), ('stereo', '', 'bfloat16', {}), ('fsq', 'b', 'int32', {'discrete': True})])
def test_equal_to_encode_and_compiled_once(models, songs, tmp_path, monkeypatch, straight, model, place, dtype,
                                             options):
  codec, encoders, songs = codec_lib.load(models / model), [], songs / place

  class CountedEncoder(bulk.GroupEncoder):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      encoders.append(self)

  monkeypatch.setattr(bulk, 'GroupEncoder', CountedEncoder)
  out = tmp_path / 'out'
  report = bulk.encode_dataset(
      codec, source=songs, output=out, batch=3 if options else 2, shards=2, **(options or {'dtype': dtype}))
  assert [encoder.compiled._cache_size() for encoder in encoders] == [1]
  used = {os.path.relpath(name, place or '.'): samples / rate
          for name, samples, _, rate in SONGS if name.startswith(place)}
  assert (report['signals'], report['encoded'], report['skipped']) == (len(used), len(used), [])
  assert report['seconds'] == pytest.approx(sum(used.values()))
  written = rows(out)
  assert [row['source'] for row in written] == sorted(used)
  # What rounding to the stored type may cost on top of float32's rounding, for numbers in [-1, 1].
  tolerance = {'float32': 1e-5, 'bfloat16': 4e-3, 'int32': 0}[dtype]
  for row in written:
    audio, rate = audio_io.read(songs / row['source'])
    expected = codec.encode(audio, rate, **options)
    assert row['z'].dtype == expected.z.dtype and row['z'].shape == expected.z.shape
    np.testing.assert_allclose(row['z'], expected.z, rtol=0, atol=tolerance)
    facts = dict(
        rate=expected.sample_rate, num_samples=expected.num_samples, channels=expected.channels,
        streams=expected.z.shape[0], chunks=expected.z.shape[1], offset=0, starts=expected.num_samples)
    assert {name: int(row[name]) for name in facts} == facts
  assert latents.latent_source(out).model == codec.fingerprint
  if model == 'mono':
    assert {row['z'].shape[0] for row in written} == {1, 2}
    for row, half in zip(written, rows(straight), strict=True):  # float16
      np.testing.assert_allclose(half['z'], row['z'], rtol=0, atol=5e-4)


def test_segments_of_prepared_data(models, tmp_path):
  codec, folder = codec_lib.load(models / 'stereo'), tmp_path / 'prepared'
  folder.mkdir()
  spans = {'train': [('x.wav', 0, 3000), ('x.wav', 3000, 2500), ('y.wav', 0, 4000)],
           'validation': [('v.wav', 0, 900)]}
  for split, parts in spans.items():
    with storage.ShardWriter(folder / storage.shard_name('music', split=split, number=0, count=1)) as shard:
      for source, offset, samples in parts:
        audio = np.round(2 ** 15 * music(samples, channels=2, seed=offset)).astype(np.int16)
        shard.write(storage.serialise(segments.features(), dict(
            audio=audio_io.file_bytes(audio, 48000), source=source, offset=offset, starts=samples - 1, samples=samples,
            rate=48000, channels=2, loudness=-20., source_rate=96000, source_samples=1, source_channels=2)))
  storage.write_metadata(folder, name='music', features=segments.features(), description='made here',
                         splits={split: [len(parts)] for split, parts in spans.items()},
                         num_bytes=dict.fromkeys(spans, 1))
  out = tmp_path / 'out'
  report = bulk.encode_dataset(codec, source=folder, output=out, batch=2, dtype='float32', shards=2)
  assert report['encoded'] == 4
  for split, parts in spans.items():
    audio = tfds.builder_from_directory(folder).as_data_source(split=split)
    written = rows(out, split)
    assert [(row['source'], row['offset'], row['starts'], row['num_samples'], row['rate']) for row in written] == [
        (source, offset, samples - 1, samples, 48000) for source, offset, samples in parts]
    for row, record in zip(written, audio, strict=True):
      np.testing.assert_allclose(row['z'], codec.encode(segments.read_audio(record), 48000).z, rtol=0, atol=1e-5)


# ---- equal bytes ---------------------------------------------------------------------------------


def test_hosts_devices_and_threads_do_not_show(models, songs, straight, tmp_path):
  codec, out = codec_lib.load(models / 'mono'), tmp_path / 'out'
  share = dict(source=songs, output=out, batch=2, shards=4, process_count=2)
  assert bulk.encode_dataset(codec, process_index=1, threads=1, **share) == {}
  with pytest.raises(UserError, match='not finished'):
    latents.latent_source(out)
  assert bulk.encode_dataset(codec, process_index=0, devices=jax.devices()[4:5], **share)['encoded'] == len(SONGS)
  assert contents(out) == contents(straight)


def test_killed_and_gone_on_with(models, songs, straight, tmp_path):
  out = tmp_path / 'out'
  command = [sys.executable, '-m', 'm2l2', 'encode-dataset', f'--source={songs}', f'--checkpoint={models / "mono"}',
             f'--output={out}', '--batch=2', '--shards=4']
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '8',
                 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  popen = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE)
  while not (out / 'shards').is_dir() or not list((out / 'shards').glob('*.json')):
    assert popen.poll() is None, popen.stderr.read()
    time.sleep(0.001)
  popen.kill()
  popen.communicate()
  assert popen.returncode == -signal.SIGKILL
  (out / f'.{storage.shard_name("latents", split="train", number=3, count=4)}.0.part').write_text('half a shard')
  done = {path: path.stat().st_mtime_ns for path in out.glob('latents-*') if (
      out / 'shards' / f'train-{path.name[-14:]}.json').exists()}
  assert 1 <= len(done) < 4 and not (out / 'dataset_info.json').exists()
  bulk.encode_dataset(codec_lib.load(models / 'mono'), source=songs, output=out)  # batch and shards as begun
  assert contents(out) == contents(straight)
  assert {path: path.stat().st_mtime_ns for path in done} == done  # not encoded again


# ---- what goes wrong -----------------------------------------------------------------------------


def test_hostile_files_are_named_and_the_others_used(m2l2, models, tmp_path, caplog):
  folder, out = tmp_path / 'music', tmp_path / 'out'
  folder.mkdir()

  def song(name, audio, rate=44100, subtype='PCM_16'):
    soundfile.write(os.path.join(os.fsencode(folder), name), audio.T, rate, subtype=subtype, format='WAV')

  good = music(3000)
  for name in (b'good.wav', b'new\nline.wav', b'no-\xff-utf8.wav', b'short.wav'):
    song(name, good[:, :10] if name == b'short.wav' else good)
  song(b'eight.wav', good, subtype='PCM_U8')
  song(b'fast.wav', good, rate=96000)
  song(b'many.wav', np.tile(good, (65, 1)))
  song(b'nan.wav', np.where(np.arange(3000) == 2000, np.nan, good), subtype='FLOAT')
  song(b'loud.wav', 3e38 * good, subtype='FLOAT')
  (folder / 'empty.flac').touch()
  (folder / 'text.mp3').write_text('this is not music')
  (folder / 'loop').symlink_to(folder)
  soundfile.write(folder / 'cut.flac', music(600000)[0], 44100)
  whole = (folder / 'cut.flac').read_bytes()
  (folder / 'cut.flac').write_bytes(whole[:-1000])  # its first 12 s are well
  (folder / 'head.flac').write_bytes(whole[:80])
  liar = bytearray((folder / 'good.wav').read_bytes())
  liar[24:28] = (4 * 10 ** 9).to_bytes(4, 'little')
  (folder / 'liar.wav').write_bytes(liar)
  status, said, errors = m2l2('encode-dataset', f'--source={folder}', f'--checkpoint={models / "mono"}',
                              f'--output={out}', '--batch=2')
  assert status == 0 and 'Traceback' not in errors
  by_source = {row['source']: row for row in rows(out)}
  report = json.loads((out / 'report.json').read_text())
  skipped = {entry['source']: entry['reason'] for entry in report['skipped']}
  assert {'good.wav', r'new\nline.wav', r'no-\udcff-utf8.wav', 'short.wav', 'eight.wav', 'fast.wav'} <= set(by_source)
  assert {'many.wav', 'nan.wav', 'loud.wav', 'empty.flac', 'text.mp3', 'cut.flac', 'head.flac'} <= set(skipped)
  assert set(by_source) | set(skipped) == {audio_io.shown(name) for name in os.listdir(folder) if name != 'loop'}
  assert not set(by_source) & set(skipped) and f'{len(skipped)} skipped' in said
  for source, reason in skipped.items():
    assert source in reason and '\n' not in reason and f'skipped: {reason}' in caplog.text
  assert 'truncated' in skipped['cut.flac'] and '65 channels' in skipped['many.wav'] and 'NaN' in skipped['loud.wav']
  # One that failed half way left nothing in its neighbours.
  codec = codec_lib.load(models / 'mono')
  audio, rate = audio_io.read(folder / 'good.wav')
  np.testing.assert_allclose(by_source['good.wav']['z'], codec.encode(audio, rate).z, rtol=0, atol=5e-4)


def test_a_file_that_vanishes_costs_itself(models, tmp_path):
  folder = tmp_path / 'music'
  folder.mkdir()
  for i in range(6):
    soundfile.write(folder / f'{i}.wav', music(2000)[0], 44100)

  def progress(total):
    assert total == 6
    (folder / '4.wav').unlink()  # after it was found, before it is read
    return lambda seconds: None

  report = bulk.encode_dataset(codec_lib.load(models / 'mono'), source=folder, output=tmp_path / 'out', batch=2,
                               threads=1, progress=progress)
  assert report['encoded'] == 5 and [entry['source'] for entry in report['skipped']] == ['4.wav']
  assert 'there is no such file' in report['skipped'][0]['reason']


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(m2l2, models, songs, straight, tmp_path):
  out = tmp_path / 'out'
  command = ['encode-dataset', f'--source={songs}', f'--checkpoint={models / "mono"}', f'--output={out}', '--batch=2',
             '--shards=4']
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
  try:
    status, said, errors = m2l2(*command)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert (status, said) == (1, '') and errors.count('\n') == 1
  assert errors.startswith('m2l2: ') and 'File too large' in errors and str(out) in errors
  assert not [name for name in contents(out) if name.endswith('.part') or name.startswith('latents-')]
  assert m2l2(*command)[0] == 0 and contents(out) == contents(straight)


def test_mistakes_are_one_line(m2l2, models, songs, straight, tmp_path):
  def fails(*flags, says, **changed):
    options = {'source': songs, 'checkpoint': models / 'mono', 'output': tmp_path / 'out', **changed}
    status, _, errors = m2l2('encode-dataset', *(f'--{name}={value}' for name, value in options.items()), *flags)
    assert status == 1 and says in errors and errors.count('\n') == 1, errors

  fails('--shards=3', output=straight, says="was begun with splits")
  fails('--dtype=float32', output=straight, says='was begun with dtype float16, now it is float32')
  fails(checkpoint=models / 'fsq', output=straight, says='was begun with model')
  fails(source=songs / 'b', output=straight, says='was begun with names')
  fails(output=songs, says='holds other things')
  fails(source=tmp_path / 'none', says='there is no such directory')
  fails(source=straight, says='not one that m2l2 prepare made')
  fails('--discrete', says='has no tokens')
  fails('--discrete', '--dtype=float16', says='leave --dtype out')
  fails('--batch=0', says='must be 1 or more')
  fails('--threads=0', says='must be 1 or more')
  fails('--process_id=0', says='add --multihost')
  with files.locked(straight / '.lock-0', command='m2l2 encode-dataset', place='there'):  # by another process
    fails(output=straight, says=f'another m2l2 encode-dataset is writing there (process {os.getpid()} on ')
  (tmp_path / 'bad').mkdir()
  (tmp_path / 'bad' / 'a.wav').write_text('no')
  status, _, errors = m2l2('encode-dataset', f'--source={tmp_path / "bad"}', f'--checkpoint={models / "mono"}',
                           f'--output={tmp_path / "none"}')
  assert status == 1 and 'nothing could be encoded' in errors.splitlines()[-1]


def test_an_error_of_ours_is_not_taken_for_a_files_and_ends_the_threads(models, songs, tmp_path, monkeypatch):
  monkeypatch.setattr(bulk.encoding, 'to_streams', lambda audio, channels: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    bulk.encode_dataset(codec_lib.load(models / 'mono'), source=songs, output=tmp_path / 'out')
  assert [name for name in contents(tmp_path / 'out')] == ['manifest.json']


# ---- reading back --------------------------------------------------------------------------------


def test_windows_cover_every_chunk_of_every_stream(straight):
  whole = rows(straight)
  for window, hop in ((4, None), (4, 1), (3, 5)):
    source = latents.latent_source(straight, window=window, hop=hop)
    seen = {}
    for i in range(len(source)):
      row = source[i]
      number = [other['source'] for other in whole].index(row['source'])
      stream, start = int(row['stream']), int(row['start'])
      np.testing.assert_array_equal(row['z'], whole[number]['z'][stream, start:start + window])
      seen.setdefault((number, stream), []).append(start)
    for number, row in enumerate(whole):
      chunks = row['z'].shape[1]
      for stream in range(row['z'].shape[0]):
        starts = seen.pop((number, stream), [])
        assert (starts == []) == (chunks < window)
        if starts:
          assert starts[0] == 0 and starts[-1] == chunks - window and starts == sorted(set(starts))
          assert max(np.diff(starts), default=0) <= (hop or window)
    assert not seen
  with pytest.raises(IndexError):
    source[len(source)]


def test_records_are_kept_as_far_as_there_is_room(straight):
  whole, plain = latents.latent_source(straight), latents.latent_source(straight, window=1)
  most = max(whole[i]['z'].nbytes for i in range(len(whole))) // 2  # float16 is what is kept
  source, read = latents.latent_source(straight, window=1, memory=most), []
  source._records = type('Counted', (), {
      '__getitem__': lambda _, number: read.append(number) or whole._records[number]})()
  for _ in range(2):
    for i in range(len(source)):
      np.testing.assert_array_equal(source[i]['z'], plain[i]['z'])
    assert 0 <= source._room <= most
  assert len(whole) < len(read) <= 2 * len(whole)  # one after the other: each once a round, but for the last kept
  source = latents.latent_source(straight, window=1)
  source._records = type('Counted', (), {
      '__getitem__': lambda _, number: read.append(number) or whole._records[number]})()
  read.clear()
  rows = [source[i] for _ in range(2) for i in range(len(source))]
  assert sorted(read) == list(range(len(whole)))
  rows[0]['z'][:] = 9
  assert not np.any(source[0]['z'] == 9)


def test_grain_shuffles_and_batches_windows(straight):
  source = pickle.loads(pickle.dumps(latents.latent_source(straight, window=4)))  # as Grain's workers get it
  batches = grain.MapDataset.source(source).seed(0).shuffle().repeat(2).batch(5, drop_remainder=True)
  assert len(batches) == 2 * len(source) // 5
  batch = batches[0]
  assert batch['z'].shape == (5, 4, 8, 8) and batch['z'].dtype == np.float32 and batch['source'].shape == (5,)
  once = grain.MapDataset.source(source).shuffle(0)
  assert len({(row['source'], int(row['start']), int(row['stream'])) for row in once}) == len(source)


def test_tfds_reads_it_without_tensorflow(straight):
  code = f'''
import sys
import tensorflow_datasets as tfds
from m2l2.data import latents
import grain
source = tfds.builder_from_directory({str(straight)!r}).as_data_source('train')
ours = latents.latent_source({str(straight)!r})
assert len(source) == len(ours) == {len(SONGS)}
assert all((source[i]['z'] == ours[i]['z']).all() and source[i]['z'].dtype == 'float16' for i in range(len(source)))
assert len(list(grain.MapDataset.source(source).shuffle(0))) == {len(SONGS)}
assert not {{'tensorflow', 'flax'}} & set(sys.modules), 'too much was imported'
'''
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_what_is_no_latents_is_one_line(straight, songs, tmp_path):
  for directory, options, says in [
      (songs, {}, 'there are no latents there'), (straight, {'split': 'test'}, "no split 'test', but train"),
      (straight, {'window': 10 ** 6}, 'no record is as long'), (straight, {'window': 0}, '1 or more'),
      (straight, {'hop': 3}, 'a hop needs a window')]:
    with pytest.raises(UserError, match=says):
      latents.latent_source(directory, **options)
