"""The loader: one order whoever reads it, every good file used, every bad one named."""

import itertools
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile

from m2l2.data.pipeline import AUTO, Ahead, CropCost, make_loader, readers
from m2l2.errors import UserError

CROP = 500


def encode(path, audio, *, rate=44100, format=None, subtype=None):
  """Through libsndfile in small pieces (its Vorbis encoder keeps a piece on the stack)."""
  with soundfile.SoundFile(
      path, 'w', rate, audio.shape[1], format=format, subtype=subtype) as file:
    for start in range(0, len(audio), 4096):
      file.write(audio[start:start + 4096])


def noise(samples, channels=2, level=.3):
  return level * np.random.default_rng(samples).standard_normal((samples, channels)).clip(-3, 3)


@pytest.fixture(scope='module')
def music(tmp_path_factory):
  root = tmp_path_factory.mktemp('music')
  for number in range(5):
    encode(root / f'{number}.wav', noise(4000 + 100 * number))
  encode(root / 'other.flac', noise(9000), rate=32000)
  encode(root / 'short.wav', noise(100))
  return root


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


def assert_equal(a, b):
  assert a.keys() == b.keys() == {'audio', 'rejected'}
  for key in a:
    np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope='module')
def straight(music):
  """The order that every other way of reading must give: no threads, no workers, one process."""
  return take(music, 6, num_threads=0, prefetch=0)


def test_what_a_batch_is(music, straight):
  assert straight['audio'].shape == (6, 8, 1, CROP) and straight['audio'].dtype == np.float32
  assert straight['rejected'].shape == (6, 8) and straight['rejected'].dtype == np.int32
  assert straight['rejected'].max() >= 1  # the short file was drawn
  assert len(np.unique(straight['audio'].reshape(48, -1), axis=0)) == 48
  stereo = take(music, 1, channels=2)
  assert stereo['audio'].shape == (1, 8, 2, CROP)
  assert not np.array_equal(take(music, 6, seed=8)['audio'], straight['audio'])


@pytest.mark.parametrize('options', [
    dict(), dict(num_threads=1), dict(num_threads=3, prefetch=2), dict(num_threads=20, prefetch=1),
    dict(num_threads=2, prefetch=0), dict(num_threads=AUTO, num_workers=AUTO, demand=1.)])
def test_threads_do_not_change_the_order(music, straight, options):
  assert_equal(take(music, 6, **options), straight)


@pytest.mark.parametrize('demand, seconds, cpu, cores, expected', [
    (200, .053, .003, 2, (16, 0)),     # 11 under way give 200 a second if none is late
    (200, .053, .003, 4, (16, 1)),     # .6 of a core is more than the run can spare
    (500, .083, .003, 100, (21, 3)),   # 42 under way
    (100, .003, .003, 8, (4, 0)),
    (None, .003, .003, 2, (4, 0)),
    (None, .053, .003, 2, (36, 0)),    # while one waits, others keep both cores busy
    (1e6, .1, .05, 2, (256, 0)),
    (1e6, .1, .05, 200, (256, 16)),
    (None, 0., 0., 1, (4, 0))])
def test_threads_and_workers_follow_the_demand(demand, seconds, cpu, cores, expected):
  assert readers(demand, CropCost(seconds, cpu), cores=cores) == expected


@pytest.mark.soak
@pytest.mark.parametrize('num_workers', [1, 2])
def test_workers_do_not_change_the_order(music, straight, num_workers):
  assert_equal(take(music, 6, num_workers=num_workers, num_threads=2, prefetch=2), straight)


@pytest.mark.parametrize('count', [2, 4])
def test_processes_do_not_change_the_order(music, straight, count):
  parts = [take(music, 6, blocks=(h,), of_blocks=count) for h in range(count)]
  assert parts[0]['audio'].shape[1] == 8 // count
  assert_equal({k: np.concatenate([p[k] for p in parts], axis=1) for k in parts[0]}, straight)


def test_rows_that_do_not_lie_together(music, straight):
  part = take(music, 4, start_index=8, blocks=(0, 3), of_blocks=4)
  assert_equal(part, {k: v[1:5, [0, 1, 6, 7]] for k, v in straight.items()})


def test_processes_with_workers(music, straight):
  """Of two workers; other numbers, and other sources' order by workers, are soak."""
  part = take(music, 3, blocks=(1,), of_blocks=2, num_workers=2)
  assert_equal(part, {k: v[:3, 4:] for k, v in straight.items()})


def test_resuming_equals_the_straight_run(music, straight):
  assert_equal(take(music, 4, start_index=16), {k: v[2:] for k, v in straight.items()})
  # On another number of processes, and with another batch size.
  part = take(music, 4, start_index=16, blocks=(1,), of_blocks=2)
  assert_equal(part, {k: v[2:, 4:] for k, v in straight.items()})
  flat = {k: v.reshape(-1, *v.shape[2:]) for k, v in straight.items()}
  assert_equal(take(music, 2, start_index=13, batch_size=12),
               {k: v[13:37].reshape(2, 12, *v.shape[1:]) for k, v in flat.items()})


def test_far_into_a_run(music):
  """Random access: a start at sample 10**12 costs what a start at 0 costs."""
  far = take(music, 1, start_index=10**12, seed=2**64 - 1)
  assert_equal(far, take(music, 1, start_index=10**12, seed=2**64 - 1, num_threads=0))


def test_the_order_does_not_depend_on_the_root(music, straight, tmp_path):
  (tmp_path / 'elsewhere').symlink_to(music)
  assert_equal(take(tmp_path / 'elsewhere', 6), straight)


def test_each_file_once_an_epoch(tmp_path):
  for number in range(7):
    encode(tmp_path / f'{number}.wav', np.full((600, 1), (number + 1) / 10))
  levels = take(tmp_path, 3, batch_size=7)['audio'].mean(axis=(2, 3)).round(1) * 10
  for epoch in levels:
    assert sorted(epoch) == [1, 2, 3, 4, 5, 6, 7]
  assert len({tuple(e) for e in levels}) == 3


def test_all_good_files_are_used_and_bad_ones_named(tmp_path, caplog):
  samples, rate = 30000, 48000
  t = np.arange(samples) / rate
  good = dict(
      wav=('a.wav', 'WAV', 'PCM_16'), flac=('b.flac', 'FLAC', 'PCM_16'),
      ogg=('c.ogg', 'OGG', 'VORBIS'), opus=('d.opus', 'OGG', 'OPUS'),
      mp3=('e.mp3', 'MP3', 'MPEG_LAYER_III'))
  pitches = {}
  for number, (name, format, subtype) in enumerate(good.values()):
    pitches[name] = 500 * (number + 1)
    audio = np.repeat(.4 * np.sin(2 * np.pi * pitches[name] * t)[:, None], 2, axis=1)
    encode(tmp_path / name, audio, rate=rate, format=format, subtype=subtype)
  (tmp_path / 'empty.wav').write_bytes(b'')
  (tmp_path / 'text.wav').write_text('these are not samples\n' * 9)
  # The start of this FLAC is quiet and the rest is missing: no draw from it can be used.
  encode(tmp_path / 'whole.flac', noise(samples, level=1e-5), rate=rate)
  data = (tmp_path / 'whole.flac').read_bytes()
  (tmp_path / 'whole.flac').unlink()
  (tmp_path / 'truncated.flac').write_bytes(data[:len(data) // 3])
  nan = noise(samples)
  nan[::1000] = np.nan
  encode(tmp_path / 'nan.wav', nan, rate=rate, subtype='FLOAT')
  encode(tmp_path / 'silent.wav', np.zeros((samples, 2)), rate=rate)
  encode(tmp_path / 'short.wav', noise(rate // 10), rate=rate)

  batch = take(tmp_path, 10, batch_size=12, crop_samples=8192, num_threads=2)
  audio = batch['audio'].reshape(120, 8192)
  assert np.isfinite(audio).all()
  spectrum = np.abs(np.fft.rfft(audio * np.hanning(8192)))
  tones = (spectrum.argmax(axis=1) * rate / 8192 / 500).round().astype(int)
  counts = np.bincount(tones, minlength=6)
  assert counts[0] == 0 and counts[1:].min() > 10 and len(counts) == 6, counts
  assert 0.3 < (batch['rejected'] > 0).mean() < 0.75  # 6 of 11 files are bad

  lines = [r.getMessage() for r in caplog.records]
  reasons = {
      'empty.wav': 'is empty', 'text.wav': 'is not audio', 'truncated.flac': 'is truncated',
      'nan.wav': 'NaN', 'silent.wav': 'silent in each', 'short.wav': 'is shorter'}
  for name, words in reasons.items():
    named = [line for line in lines if f'/{name}:' in line]
    assert any(words in line for line in named), (name, lines)
    assert len(named) == 1 or name == 'truncated.flac', named  # that one may also be silent
  assert not any(name in line for name, *_ in good.values() for line in lines)


@pytest.mark.parametrize('num_workers', [0, pytest.param(1, marks=pytest.mark.soak)])
def test_nothing_usable_ends_with_one_line(tmp_path, num_workers):
  encode(tmp_path / 'short.wav', noise(10))
  (tmp_path / 'text.wav').write_text('text')
  with loader(tmp_path, num_workers=num_workers) as batches:
    with pytest.raises(UserError) as error:
      next(batches)
  line = str(error.value)
  assert '64 draws' in line and 'short.wav: is shorter' in line and '\n' not in line


@pytest.mark.parametrize('options', [
    dict(batch_size=6, of_blocks=4), dict(batch_size=0), dict(channels=3), dict(seed=-1),
    dict(seed=2**64), dict(start_index=-8), dict(blocks=(2,), of_blocks=2),
    dict(native_rates=()), dict(native_rates=(48000, 44100)), dict(num_workers=-2),
    dict(crop_samples=0), dict(prefetch=-1), dict(num_threads=-2),
    dict(worker_buffer=0), dict(gain_db=-1), dict(gain_db=61), dict(mix=1.5), dict(mix=-.1),
    dict(source='tape')])
def test_bad_arguments(music, options):
  with pytest.raises(UserError) as error:
    loader(music, **options)
  assert '\n' not in str(error.value)


def test_no_files(tmp_path):
  with pytest.raises(UserError, match='no audio files'):
    loader(tmp_path)


def test_the_files_are_told(music):
  with loader(music) as batches:
    files, = batches.mixture.sources
    assert files.names == ('0.wav', '1.wav', '2.wav', '3.wav', '4.wav', 'other.flac', 'short.wav')
    assert files.fingerprint == batches.mixture.fingerprint and len(files.fingerprint) == 16


SCRIPT = '''
import sys
from m2l2.data.pipeline import Ahead, make_loader

if __name__ == '__main__':
  batches = make_loader(
      root=sys.argv[1], sample_rate=44100, native_rates=(44100,), channels=1, crop_samples=500,
      batch_size=16, seed=0, num_workers=int(sys.argv[2]))
  kept = [next(batches)['audio'] for _ in range(3)]
  if sys.argv[3] == 'close':
    batches.close()
    batches.close()
    assert next(batches, None) is None
  print(sum(float(audio.sum()) for audio in kept))
'''


@pytest.mark.parametrize('num_workers, end', [
    ('1', 'leave'), *(pytest.param(*case, marks=pytest.mark.soak) for case in (('0', 'leave'), ('2', 'close')))])
def test_ending_is_quiet(music, tmp_path, num_workers, end):
  """In a plain script: absl flags unparsed, workers spawned, nothing on stderr but the faults,
  whether it closes the loader or just ends, with batches still in hand."""
  script = tmp_path / 'script.py'
  script.write_text(SCRIPT)
  done = subprocess.run(
      [sys.executable, str(script), str(music), num_workers, end], text=True, timeout=120,
      capture_output=True, cwd=pathlib.Path(__file__).parents[1],
      env={'PYTHONPATH': '.', 'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) != 0
  loud = [line for line in done.stderr.splitlines() if 'short.wav: is shorter' not in line]
  assert loud == []


# --- batches prepared ahead ---


@pytest.mark.parametrize('ahead', [0, 1, 3])
def test_batches_ahead_come_in_order_and_an_error_in_its_turn(ahead):
  prepared = []

  def prepare(number):
    if number == 2:
      raise UserError('batch 2 is bad')
    prepared.append(number)
    return 10 * number

  batches = Ahead(itertools.count(), prepare, ahead=ahead)
  assert prepared == []  # nothing is read before it is asked for the first time
  assert [next(batches), next(batches)] == [0, 10]
  with pytest.raises(UserError, match='batch 2'):
    next(batches)
  assert next(batches) == 30
  batches.close()
  batches.close()
  assert prepared[:3] == [0, 1, 3] and len(prepared) <= 3 + ahead


def test_the_next_batch_is_prepared_while_this_one_is_used():
  ready = threading.Event()
  batches = Ahead(itertools.count(), lambda number: (number, number == 1 and ready.set()), ahead=1)
  assert next(batches)[0] == 0
  assert ready.wait(timeout=60)  # nobody has asked for batch 1
  batches.close()


def test_an_error_of_a_batch_that_nobody_asks_for_is_never_raised():
  def prepare(number):
    if number:
      raise UserError('no more')

  batches = Ahead(itertools.count(), prepare, ahead=2)
  next(batches)
  batches.close()


def test_a_negative_number_of_batches_ahead_is_refused():
  with pytest.raises(UserError, match='data.device_prefetch=-1'):
    Ahead(iter(()), lambda batch: batch, ahead=-1)
