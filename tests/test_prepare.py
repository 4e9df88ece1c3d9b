"""`m2l2 prepare`: what TFDS reads back, what is skipped and why, and that kills leave no trace."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
from soak_prepare import contents, killed_run, unaccounted, write_fuzzed, write_tones
import soundfile
import tensorflow_datasets as tfds

from m2l2 import cli
from m2l2.data import audio_io, prepare, segments
from m2l2.data.prepare import child, inputs, items
from m2l2.errors import UserError

ALL = prepare.Options(validation_fraction=0.)


def noise(seconds, *, channels=2, seed=0, rate=44100):
  return np.random.default_rng(seed).normal(0, 0.1, (round(seconds * rate), channels))


def write(path, audio, rate=44100, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  soundfile.write(path, audio, rate, **options)
  return path


def run(source, output, *, options=ALL, processes=1, **more):
  return prepare.prepare(str(source), str(output), options=options, processes=processes, quiet=True, **more)


def records(output, split='train'):
  return list(tfds.builder_from_directory(output).as_data_source()[split])


def report(output):
  return json.loads((pathlib.Path(output) / 'report.json').read_text())


def skipped(output):
  return {row['file']: row['reason'] for row in report(output)['skipped']}


@pytest.fixture(scope='module')
def music(tmp_path_factory):
  """Five sources of several kinds."""
  folder = tmp_path_factory.mktemp('music')
  write(folder / 'a' / 'stereo.wav', noise(5, seed=1), subtype='PCM_16')
  write(folder / 'a' / 'mono.flac', noise(3, channels=1, seed=2), subtype='PCM_16')
  write(folder / 'b.ogg', noise(4, seed=3, rate=48000), 48000)
  write(folder / 'high.wav', noise(2, seed=4, rate=96000), 96000)
  write(folder / 'old.wav', noise(2, channels=1, seed=5, rate=22050), 22050, subtype='PCM_U8')
  return folder


SHORT = prepare.Options(segment_seconds=1.5, overlap_seconds=0.5, validation_fraction=0.)


@pytest.fixture(scope='module')
def prepared(music, tmp_path_factory):
  output = tmp_path_factory.mktemp('prepared') / 'out'
  run(music, output, options=SHORT)
  return output


# ---- what comes back -----------------------------------------------------------------------------


def test_every_sample_comes_back_through_tfds(music, prepared):
  sources = {}
  for record in records(prepared):
    sources.setdefault(record['source'].decode(), []).append(record)
  assert sorted(sources) == ['a/mono.flac', 'a/stereo.wav', 'b.ogg', 'high.wav', 'old.wav']
  for name, parts in sources.items():
    audio, rate = audio_io.read(music / name)
    facts = parts[0]
    assert (facts['source_rate'], facts['source_channels'], facts['source_samples']) == (
        rate, audio.shape[0], audio.shape[1])
    if rate not in (44100, 48000):
      audio = audio_io.resample(audio, from_rate=rate, to_rate=44100)
    expected = np.clip(np.rint(audio * 2**15), -2**15, 2**15 - 1)
    place = 0
    for record in sorted(parts, key=lambda part: part['offset']):
      assert record['offset'] == place and record['rate'] == (rate if rate == 48000 else 44100)
      part = segments.read_audio(record)
      assert part.shape == (record['channels'], record['samples'])
      np.testing.assert_array_equal(part * 2**15, expected[:, place:place + record['samples']])
      assert record['loudness'] == pytest.approx(20 * np.log10(np.sqrt(np.mean(part ** 2.))), abs=1e-3)
      place += record['starts']
    assert place == audio.shape[1]
    if name == 'a/stereo.wav':  # 16 bits at a native rate: nothing was changed
      np.testing.assert_array_equal(expected, soundfile.read(music / name, dtype='int16')[0].T)
  assert 'tensorflow' not in sys.modules


def test_the_children_that_decode_load_neither_beam_nor_what_reads_shards():
  code = ('import sys, m2l2.data.prepare.child; '
          'print({"apache_beam", "array_record", "grain", "jax", "tensorflow_datasets"} & set(sys.modules))')
  assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == 'set()\n'


def test_the_manifest_counts(music, prepared):
  manifest = json.loads((prepared / 'manifest.json').read_text())
  read = records(prepared)
  split = manifest['splits']['train']
  assert manifest['files'] == split['sources'] == 5 and manifest['skipped'] == 0
  assert split['records'] == len(read)
  assert split['seconds'] == pytest.approx(5 + 3 + 4 + 2 + 2, abs=1e-3)
  assert split['seconds'] == pytest.approx(sum(record['starts'] / record['rate'] for record in read), abs=1e-3)
  assert sorted(path.name for path in prepared.iterdir()) == sorted(
      ['manifest.json', 'report.json', 'dataset_info.json', 'features.json', 'audio-train.index',
       *(shard['file'] for shard in split['shards'])])
  assert report(prepared) == {'files': 5, 'used': 5, 'skipped': [], 'silent_segments': []}


@pytest.mark.parametrize('samples', [1, 30, 31, 99, 100, 101, 170, 171, 1234, 99_999])
def test_segments_are_even(samples):
  length = child.even_length(samples, longest=100, overlap=30)
  assert length <= 100
  starts = [starts for _, starts, _ in child.split([np.zeros((1, samples))], length=length, overlap=30)]
  assert len(starts) == max(1, -(-(samples - 30) // 70))  # no more than they must be
  own = [*starts[:-1], starts[-1] - 30] if samples > 30 else [1]  # that a crop of the overlap's length can begin at
  assert sum(starts) == samples and max(own) - min(own) < len(own) + 1


@pytest.mark.parametrize('samples', [1, 29, 30, 31, 69, 70, 71, 100, 101, 139, 140, 141, 170, 171, 1000])
@pytest.mark.parametrize('block', [1, 7, 100, 1000])
def test_no_crop_is_lost(samples, block):
  signal = np.arange(2 * samples).reshape(2, samples)
  blocks = [signal[:, start:start + block] for start in range(0, samples, block)]
  pieces = list(child.split(blocks, length=100, overlap=30))
  owner = 0
  for number, (offset, starts, audio) in enumerate(pieces):
    np.testing.assert_array_equal(audio, signal[:, offset:offset + audio.shape[1]])
    assert offset == owner
    owner += starts
    last = number == len(pieces) - 1
    assert audio.shape[1] == starts if last else audio.shape[1] == 100
    assert not last or number == 0 or audio.shape[1] > 30
    # A crop of 30 samples from any of its own starts, if the signal has it, lies within.
    assert all(start + 30 <= offset + audio.shape[1] for start in range(offset, owner) if start + 30 <= samples)
  assert owner == samples


# ---- splits, duplicates, silence -----------------------------------------------------------------


def test_files_keep_their_split_and_their_shards_are_even():
  weights = {f'{number}.wav': 60. + number % 7 for number in range(400)}
  options = prepare.Options(validation_fraction=0.25, shard_minutes=20)
  shards = prepare.plan_shards(weights, options)
  names = [name for shard in shards for name in shard['files']]
  assert sorted(names) == sorted(weights)
  assert all(prepare.split_of(n, 0.25) == shard['split'] for shard in shards for n in shard['files'])
  assert 70 < sum(len(shard['files']) for shard in shards if shard['split'] == 'validation') < 130
  assert all(shard['file'].endswith(f'-of-{sum(s["split"] == shard["split"] for s in shards):05d}') for shard in shards)
  minutes = [sum(weights[name] for name in shard['files']) / 60 for shard in shards]
  assert all(17 < part < 23 for part in minutes), minutes
  # One that is longer than a shard, and others beside it; nothing at all.
  long = prepare.plan_shards({'a': 1e5, 'b': 1., 'c': 1.}, ALL)
  assert sorted(name for shard in long for name in shard['files']) == ['a', 'b', 'c'] and all(s['files'] for s in long)
  assert prepare.plan_shards({}, ALL) == []


def test_validation_is_split_by_file(tmp_path):
  for number in range(12):
    write(tmp_path / 'in' / f'{number}.wav', noise(1, seed=number, channels=1))
  manifest = run(tmp_path / 'in', tmp_path / 'out', options=prepare.Options(
      segment_seconds=0.5, overlap_seconds=0.1, validation_fraction=0.4, shard_minutes=0.05), processes=2)
  names = {split: {r['source'] for r in records(tmp_path / 'out', split)} for split in prepare.SPLITS}
  assert not names['train'] & names['validation'] and len(names['train'] | names['validation']) == 12
  assert all(len(split['shards']) > 1 for split in manifest['splits'].values())
  assert names['validation'] == {f'{n}.wav'.encode() for n in range(12)
                                 if prepare.split_of(f'{n}.wav', 0.4) == 'validation'}


def test_equal_audio_is_taken_once_and_silence_not_at_all(tmp_path):
  folder = tmp_path / 'in'
  integers = np.rint(noise(2) * 2**15).astype(np.int16)
  audio = integers.astype(np.float32) / 2**15
  silence = np.zeros((44100 * 3, 2))
  write(folder / 'b.wav', integers)
  write(folder / 'c.flac', integers)
  write(folder / 'd.wav', audio, subtype='FLOAT')
  write(folder / 'other.wav', np.concatenate([integers[:-1], -1 - integers[-1:]]))  # differs in its last sample
  write(folder / 'shifted.wav', np.concatenate([np.zeros((70_000, 2)), audio]))
  write(folder / 'rate.wav', integers, 48000)
  write(folder / 'silent.wav', silence)
  write(folder / 'silent too.flac', silence)
  options = prepare.Options(segment_seconds=1., overlap_seconds=0.2, validation_fraction=0.)
  manifest = run(folder, tmp_path / 'out', options=options)
  assert skipped(tmp_path / 'out') == {
      'c.flac': 'holds the same audio as b.wav', 'd.wav': 'holds the same audio as b.wav',
      'silent.wav': 'holds the same audio as silent too.flac'}
  read = records(tmp_path / 'out')
  assert {r['source'] for r in read} == {b'b.wav', b'other.wav', b'shifted.wav', b'rate.wav'}
  assert min(r['offset'] for r in read if r['source'] == b'shifted.wav') == 59_752  # two of five even segments
  assert {row['file']: row['segments'] for row in report(tmp_path / 'out')['silent_segments']} == {
      'shifted.wav': 2, 'silent too.flac': 4}
  assert manifest['silent_segments'] == 6


# ---- hostile input -------------------------------------------------------------------------------


@pytest.mark.parametrize('files', [20, pytest.param(100, marks=pytest.mark.soak)])
def test_fuzzed_files_cost_no_others(tmp_path, files):
  good = write_fuzzed(tmp_path / 'in', files=files, seed=1)
  run(tmp_path / 'in', tmp_path / 'out', processes=2, limits=prepare.Limits(timeout=20.))
  assert unaccounted(tmp_path / 'in', tmp_path / 'out', good) == []
  assert .2 * files < len(skipped(tmp_path / 'out')) < .9 * files


def header(rate=44100, channels=2, frames=2**32 - 1):
  data = 8 * b'\1\2\3\4'
  return (b'RIFF' + (0xffffffff).to_bytes(4, 'little') + b'WAVEfmt ' + (16).to_bytes(4, 'little')
          + b'\1\0' + channels.to_bytes(2, 'little') + rate.to_bytes(4, 'little')
          + (rate * 2 * channels % 2**32).to_bytes(4, 'little') + (2 * channels % 2**16).to_bytes(2, 'little')
          + b'\x10\0data' + min(frames, 2**32 - 1).to_bytes(4, 'little') + data * channels)


def test_hostile_files_are_named_and_others_used(tmp_path):
  folder = tmp_path / 'in'
  audio = noise(2)
  write(folder / 'good.wav', audio)
  write(folder / 'eight bits.wav', noise(2, seed=1), subtype='PCM_U8')
  write(folder / 'short.wav', noise(0.1, seed=2))
  write(folder / 'really mp3.wav', noise(2, seed=3), format='MP3')
  write(folder / 'new\nline.flac', noise(2, seed=4))
  raw = os.path.join(os.fsencode(folder), b'b\xffd.wav')
  pathlib.Path(os.fsdecode(raw)).write_bytes(write(tmp_path / 'x.wav', noise(2, seed=5)).read_bytes())
  for name, value in (('nan', np.nan), ('inf', np.inf), ('huge', 3e4)):
    broken = audio.copy()
    broken[30_000, 1] = value
    write(folder / f'{name}.wav', broken, subtype='FLOAT')
  (folder / 'zero.wav').write_bytes(b'')
  (folder / 'text.mp3').write_text('no audio\n' * 1000)
  (folder / 'long.wav').write_bytes(header())  # claims 4 GiB; 64 bytes are there, and are used
  (folder / 'fast.wav').write_bytes(header(rate=4_000_000_000))
  (folder / 'wide.wav').write_bytes(header(channels=255))
  (folder / 'cut.flac').write_bytes(write(tmp_path / 'x.flac', audio).read_bytes()[:50_000])
  (folder / 'loop').symlink_to(folder)
  os.mkfifo(folder / 'pipe.wav')
  (folder / 'gone.wav').symlink_to(tmp_path / 'nowhere.wav')
  run(folder, tmp_path / 'out', processes=2)
  reasons = skipped(tmp_path / 'out')
  assert set(reasons) == {'nan.wav', 'inf.wav', 'huge.wav', 'zero.wav', 'text.mp3', 'fast.wav', 'wide.wav', 'cut.flac'}
  assert all('\n' not in reason and str(tmp_path) not in reason for reason in reasons.values())
  for name, words in {'nan.wav': 'NaN or infinite', 'huge.wav': 'must be scaled', 'zero.wav': 'empty',
                      'text.mp3': 'not audio', 'cut.flac': 'truncated or damaged', 'wide.wav': '255 channels'}.items():
    assert words in reasons[name]
  used = {r['source'].decode() for r in records(tmp_path / 'out')}
  assert used == {'good.wav', 'eight bits.wav', 'short.wav', 'really mp3.wav', r'new\nline.flac', r'b\udcffd.wav',
                  'long.wav'}


def test_what_lacks_a_part_is_used_or_named(tmp_path, caplog):
  wav = write(tmp_path / 'in' / 'cut.wav', noise(4), subtype='PCM_16')
  wav.write_bytes(wav.read_bytes()[:2 * 44100 * 4 + 44])
  ogg = write(tmp_path / 'in' / 'chain.ogg', noise(2, seed=1))
  ogg.write_bytes(2 * ogg.read_bytes())
  for name, lost in (('most.ogg', 0.5), ('half.ogg', 2.5)):
    data = write(tmp_path / 'in' / name, noise(5)).read_bytes()
    pages = [place for place in range(len(data)) if data[place:place + 4] == b'OggS']
    kept = next(page for page in reversed(pages[:-1]) if page < len(data) * (1 - lost / 5))
    # The last page, which states the length, follows on a hole.
    (tmp_path / 'in' / name).write_bytes(data[:kept] + data[pages[-1]:])
  run(tmp_path / 'in', tmp_path / 'out')
  assert list(skipped(tmp_path / 'out')) == ['half.ogg']
  samples = {record['source'].decode(): int(record['source_samples']) for record in records(tmp_path / 'out')}
  assert 4 * 44100 < samples.pop('most.ogg') < 5 * 44100
  assert samples == {'cut.wav': 2 * 44100, 'chain.ogg': 4 * 44100}
  assert 'cut.wav: is cut short: holds 2.0 of the 4.0 s' in caplog.text and 'chain.ogg' not in caplog.text


CODEC = '''
import os, signal, time, soundfile
class SoundFile(soundfile.SoundFile):
  def __init__(self, name, *a, **k):
    text = os.path.basename(os.fsdecode(name)) if isinstance(name, (str, bytes)) else ''
    if 'hangs' in text: time.sleep(600)
    if 'crashes' in text: os.kill(os.getpid(), signal.SIGSEGV)
    if 'hoards' in text: self.hoard = bytearray(4 << 30)
    if 'breaks' in text: raise ZeroDivisionError('in the codec')
    super().__init__(name, *a, **k)
soundfile.SoundFile = SoundFile
'''


def test_a_codec_that_hangs_or_crashes_costs_one_file(tmp_path, monkeypatch):
  (tmp_path / 'codec').mkdir()
  (tmp_path / 'codec' / 'sitecustomize.py').write_text(CODEC)
  monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'codec'))
  for number, name in enumerate(['a', 'b breaks', 'c crashes', 'd hangs', 'e hoards', 'f']):
    write(tmp_path / 'in' / f'{name}.wav', noise(1, seed=number))
  run(tmp_path / 'in', tmp_path / 'out', limits=prepare.Limits(timeout=1., memory=2**30))
  assert skipped(tmp_path / 'out') == {
      'b breaks.wav': 'cannot be decoded (ZeroDivisionError: in the codec)',
      'c crashes.wav': 'crashes the decoder (signal 11)', 'd hangs.wav': 'hangs: no audio for 1 s',
      'e hoards.wav': 'needs more than 1024 MiB to decode'}
  assert {r['source'] for r in records(tmp_path / 'out')} == {b'a.wav', b'f.wav'}


def test_files_that_vanish_after_the_plan(tmp_path, monkeypatch):
  for number in range(3):
    write(tmp_path / 'in' / f'{number}.wav', noise(1, seed=number))
  plan = prepare.plan_shards

  def vanishing(*args):
    (tmp_path / 'in' / '1.wav').unlink()
    return plan(*args)

  monkeypatch.setattr('m2l2.data.prepare.command.plan_shards', vanishing)
  run(tmp_path / 'in', tmp_path / 'out')
  assert skipped(tmp_path / 'out') == {'1.wav': 'there is no such file'}
  assert len(records(tmp_path / 'out')) == 2


def test_nothing_usable_is_told(tmp_path):
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'a.wav').write_bytes(b'')
  for _ in range(2):
    with pytest.raises(UserError, match=r'none of the 1 files gives audio to train on \(a.wav: is empty'):
      run(tmp_path / 'in', tmp_path / 'out')
  assert skipped(tmp_path / 'out') == {'a.wav': 'is empty (0 bytes)'}
  assert not (tmp_path / 'out' / 'dataset_info.json').exists()


# ---- again, and after kills ----------------------------------------------------------------------


@pytest.mark.parametrize('kills', [1, pytest.param(3, marks=pytest.mark.soak)])
def test_kills_leave_no_trace(tmp_path, kills):
  music = write_tones(tmp_path / 'in', files=8, seconds=12)
  options = prepare.Options(shard_minutes=0.2)
  run(music, tmp_path / 'straight', options=options)
  flags = ('--shard-minutes=0.2', '--processes=1', '--quiet')
  output = tmp_path / 'killed'
  if kills == 3:
    assert killed_run(music, output, *flags, after='.prepare/headers-*.json') == -9
    assert not (output / 'manifest.json').exists()
    assert killed_run(music, output, *flags, after='.prepare/write-*0.json', number=signal.SIGTERM) == 143
  assert killed_run(music, output, *flags, after='.prepare/write-*3.json') == -9
  before = {path: path.stat().st_mtime_ns for path in output.glob('audio-*')}
  assert before and not (output / 'manifest.json').exists()
  run(music, output, options=options, processes=2)
  assert {path: path.stat().st_mtime_ns for path in before} == before  # what was done was left alone
  assert contents(output) == contents(tmp_path / 'straight')


def test_a_second_run_changes_nothing_and_another_job_is_refused(music, prepared, tmp_path):
  before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
  assert run(music, prepared, options=SHORT) == json.loads((prepared / 'manifest.json').read_text())
  with pytest.raises(UserError, match=r'with other options \(silence_dbfs -72.0 there, -50.0 here\)'):
    run(music, prepared, options=prepare.Options(
        segment_seconds=1.5, overlap_seconds=0.5, validation_fraction=0., silence_dbfs=-50.))
  with pytest.raises(UserError, match='from other input'):
    run(music / 'a', prepared, options=SHORT)
  assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thesis.txt').write_text('x')
  with pytest.raises(UserError, match='is not empty and holds no prepared data'):
    run(music, tmp_path / 'full')
  assert os.listdir(tmp_path / 'full') == ['thesis.txt']


def test_data_prepared_before_there_was_an_index_get_theirs(music, prepared, tmp_path):
  output = tmp_path / 'out'
  shutil.copytree(prepared, output)
  (output / 'audio-train.index').unlink()
  manifest = output / 'manifest.json'
  manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
  written = {path: path.stat().st_mtime_ns for path in output.glob('*.array_record*')}
  with pytest.raises(UserError, match='was prepared with other options'):
    run(music, output)
  assert run(music, output, options=SHORT)['format'] == 2
  assert contents(output) == contents(prepared)
  assert written == {path: path.stat().st_mtime_ns for path in written}


def test_two_at_once_are_refused(music, tmp_path):
  place = prepare.Place(str(tmp_path))
  place.make()
  with place.locked(), pytest.raises(UserError, match='another m2l2 prepare is writing there'):
    run(music, tmp_path)


def test_a_full_disk_is_one_line_and_can_be_gone_on_from(music, tmp_path, capfd):
  flags = ['prepare', f'--input={music}', f'--output={tmp_path / "out"}', '--validation-fraction=0', '--processes=1',
           '--segment-seconds=1.5', '--overlap-seconds=0.5']
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
  try:
    assert cli.main(flags) == 1
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  said = capfd.readouterr()
  assert len(said.err.splitlines()) == 1 and not said.out
  assert 'm2l2: ' in said.err and 'File too large' in said.err
  assert [path.name for path in (tmp_path / 'out').iterdir()] == ['.prepare']
  assert not list((tmp_path / 'out').glob('.prepare/*.part'))
  run(music, tmp_path / 'out', options=SHORT)
  assert len(records(tmp_path / 'out')) > 5


def test_a_stop_while_the_pipeline_is_put_together_leaves_no_temporary_folder(music, tmp_path, monkeypatch):
  def stopped(*unused):
    raise SystemExit(129)

  (tmp_path / 'tmp').mkdir()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'tmp'))
  monkeypatch.setattr('apache_beam.Create', stopped)
  with pytest.raises(SystemExit):
    run(music, tmp_path / 'out')
  assert not os.listdir(tmp_path / 'tmp')


# ---- elsewhere -----------------------------------------------------------------------------------


def test_remote_files_give_the_same_bytes(music, prepared, tmp_path):
  import fsspec
  memory = fsspec.filesystem('memory')
  memory.put(str(music), '/bucket/music', recursive=True)
  try:
    run('memory://bucket/music', 'memory://bucket/out', options=SHORT)
    assert memory.exists('/bucket/out/manifest.json') and not memory.exists('/bucket/out/.prepare')
    memory.get('/bucket/out', str(tmp_path / 'out'), recursive=True)
    assert contents(tmp_path / 'out') == contents(prepared)
    assert inputs.find('memory://bucket/music/**/*.wav')[1] == ['a/stereo.wav', 'high.wav', 'old.wav']
    with pytest.raises(UserError, match='no audio files there'):
      run('memory://bucket/nothing', tmp_path / 'other')
  finally:
    memory.rm('/bucket', recursive=True)


@pytest.mark.parametrize('name', ['a.wav', 'a.ogg', 'a.mp3', 'a.flac'])
def test_the_length_of_a_remote_file_is_told_by_its_beginning(name, tmp_path, monkeypatch):
  import fsspec
  audio = 0.3 * np.random.default_rng(0).standard_normal((60 * 22050, 1))
  soundfile.write(tmp_path / name, audio, 22050)
  monkeypatch.setattr(items, '_HEAD_BYTES', os.path.getsize(tmp_path / name) // 3)
  memory = fsspec.filesystem('memory')
  memory.put(str(tmp_path / name), f'/lengths/{name}')
  decoder = child.DecodingProcess(timeout=60, memory=2**32)
  try:
    facts = items._headers(types.SimpleNamespace(base='memory://lengths'), name, decoder)
  finally:
    decoder.close()
    memory.rm('/lengths', recursive=True)
  assert facts['seconds'] == pytest.approx(60, rel=0.1)


def test_by_a_named_runner_and_through_the_command(music, prepared, tmp_path, capsys):
  flags = [f'--input={music}', f'--output={tmp_path / "out"}', '--validation-fraction=0',
           '--segment-seconds=1.5', '--overlap-seconds=0.5']
  assert cli.main(['prepare', *flags, '--runner=BundleBasedDirectRunner', '--job_name=x']) == 0
  assert 'train: 5 files' in capsys.readouterr().out
  assert contents(tmp_path / 'out') == contents(prepared)
  assert cli.main(['prepare', *flags, '--no-such-option=1']) == 2
  assert 'unrecognized arguments' in capsys.readouterr().err


def test_without_beam_one_line_says_what_to_install(music, tmp_path, capsys, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  monkeypatch.delitem(sys.modules, 'm2l2.data.prepare')
  monkeypatch.delattr('m2l2.data.prepare')
  assert cli.main(['prepare', f'--input={music}', f'--output={tmp_path / "out"}']) == 1
  assert "needs apache_beam, which is not installed: pip install 'm2l2[beam]'" in capsys.readouterr().err


@pytest.mark.parametrize('options', [
    dict(segment_seconds=2., overlap_seconds=2.), dict(overlap_seconds=-1.), dict(rates=()), dict(rates=(0,)),
    dict(validation_fraction=1.5), dict(shard_minutes=0.), dict(segment_seconds=float('nan'))])
def test_wrong_options_are_told(options):
  with pytest.raises(UserError, match='^--'):
    prepare.Options(**options)
