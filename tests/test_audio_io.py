"""Audio files in and out: exact seeks, exact lengths, one clear line for every bad file."""

import os

import numpy as np
import pytest
import soundfile

from m2l2.data import audio_io
from m2l2.errors import UserError

KINDS = {
    'a.wav': (44100, 'WAV', 'PCM_16'),
    'a.flac': (44100, 'FLAC', 'PCM_16'),
    'a.ogg': (44100, 'OGG', 'VORBIS'),
    'a.opus': (48000, 'OGG', 'OPUS'),
    'a.mp3': (44100, 'MP3', 'MPEG_LAYER_III'),
    'a.aiff': (44100, 'AIFF', 'PCM_16'),
}


def tone(*, rate, samples, channels=2, frequency=440., level=0.3):
  """[channels, samples] float32: a sine with a little noise, other noise on each channel."""
  t = np.arange(samples) / rate
  noise = 0.01 * np.random.default_rng(0).standard_normal((channels, samples))
  return (level * np.sin(2 * np.pi * frequency * t) + noise).astype(np.float32)


def encode(path, audio, *, rate, format, subtype):
  """Writes by libsndfile directly, so that the reader is not tested against our own writer."""
  with soundfile.SoundFile(path, 'w', rate, len(audio), format=format, subtype=subtype) as f:
    for start in range(0, audio.shape[1], 4096):
      f.write(audio[:, start:start + 4096].T)
  return str(path)


def one_line(path, error):
  line = str(error.value)
  assert '\n' not in line and line.startswith(str(path)), line
  return line


@pytest.mark.parametrize('name', KINDS)
def test_seek_equals_slice(tmp_path, name):
  rate, format, subtype = KINDS[name]
  audio = tone(rate=rate, samples=rate * 2)
  path = encode(tmp_path / name, audio, rate=rate, format=format, subtype=subtype)
  info = audio_io.probe(path)
  assert (info.sample_rate, info.channels, info.frames) == (rate, 2, rate * 2)
  assert info.seconds == 2
  full, full_rate = audio_io.read(path)
  assert full_rate == rate and full.dtype == np.float32 and full.shape == audio.shape
  inner = np.s_[:, :-2000]  # an Opus encoder lets the very end go
  assert np.abs(full - audio)[inner].max() < (1e-4 if subtype == 'PCM_16' else 0.1)
  for start in (0, 1, 1153, 20011, 50000):
    part, _ = audio_io.read(path, start=start, frames=10007)
    expected = full[:, start:start + 10007]
    if subtype == 'OPUS':
      np.testing.assert_allclose(part, expected, atol=1e-6)
    else:
      np.testing.assert_array_equal(part, expected)
  rest, _ = audio_io.read(path, start=60000)
  np.testing.assert_allclose(rest, full[:, 60000:], atol=1e-6)
  blocks = list(audio_io.read_blocks(path, block_samples=9999))
  assert {b.shape[1] for b in blocks[:-1]} == {9999}
  np.testing.assert_array_equal(np.concatenate(blocks, axis=1), full)


def test_reads_in_bounded_pieces(tmp_path, monkeypatch):
  audio = tone(rate=8000, samples=5000, channels=3)
  path = encode(tmp_path / 'a.wav', audio, rate=8000, format='WAV', subtype='FLOAT')
  monkeypatch.setattr(audio_io, '_READ_VALUES', 300)
  np.testing.assert_array_equal(audio_io.read(path)[0], audio)
  np.testing.assert_array_equal(audio_io.read(path, start=7, frames=4321)[0], audio[:, 7:4328])
  blocks = list(audio_io.read_blocks(path, block_samples=1024))
  assert [b.shape[1] for b in blocks] == [1024] * 4 + [904]
  np.testing.assert_array_equal(np.concatenate(blocks, axis=1), audio)


def test_bad_files_are_named_in_one_line(tmp_path):
  flac = encode(tmp_path / 'good.flac', tone(rate=44100, samples=90000), rate=44100, format='FLAC',
                subtype='PCM_16')
  bytes_ = open(flac, 'rb').read()
  (tmp_path / 'zero.wav').write_bytes(b'')
  (tmp_path / 'text.wav').write_text('no audio in here\n' * 20)
  (tmp_path / 'text.mp3').write_text('no audio in here\n' * 20)
  (tmp_path / 'data.raw').write_bytes(b'1234')
  (tmp_path / 'folder.wav').mkdir()
  soundfile.write(tmp_path / 'none.wav', np.zeros((0, 2)), 44100)
  os.mkfifo(tmp_path / 'pipe.wav')
  unstated = bytearray(bytes_)
  unstated[21] &= 0xf0  # STREAMINFO's 36 bits of total samples
  unstated[22:26] = bytes(4)
  (tmp_path / 'unstated.flac').write_bytes(unstated)
  expected = {
      'missing.wav': 'no such file', 'zero.wav': 'is empty', 'text.wav': 'is not audio',
      'text.mp3': 'is not audio', 'data.raw': 'is not audio', 'folder.wav': 'is a directory',
      'none.wav': 'holds no samples', 'pipe.wav': 'not a regular file',
      'unstated.flac': 'does not state its length',
  }
  for name, words in expected.items():
    path = str(tmp_path / name)
    for call in (audio_io.probe, audio_io.read,
                 lambda p: next(audio_io.read_blocks(p, block_samples=64))):
      with pytest.raises(UserError) as error:
        call(path)
      assert words in one_line(path, error)


def test_strange_names(tmp_path):
  audio = tone(rate=8000, samples=100)
  name = os.fsencode(tmp_path) + b'/caf\xe9 \xe2\x99\xab.wav'  # not UTF-8
  path = os.fsdecode(name)
  audio_io.write(path, audio, 8000)
  assert audio_io.probe(path).frames == 100
  with pytest.raises(UserError) as error:
    audio_io.probe(path.replace('.wav', '\n.wav'))
  line = str(error.value)
  assert '\n' not in line and line.encode('utf-8')


def test_truncated_files(tmp_path):
  audio = np.random.default_rng(0).uniform(-.3, .3, (2, 200000)).astype(np.float32)
  flac = encode(tmp_path / 'a.flac', audio, rate=44100, format='FLAC', subtype='PCM_16')
  bytes_ = open(flac, 'rb').read()
  half = str(tmp_path / 'half.flac')
  open(half, 'wb').write(bytes_[:len(bytes_) // 2])
  assert audio_io.probe(half).frames == 200000
  assert audio_io.read(half, start=1000, frames=5000)[0].shape == (2, 5000)  # the good half reads
  for call in (lambda: audio_io.read(half), lambda: audio_io.read(half, start=150000, frames=100),
               lambda: list(audio_io.read_blocks(half, block_samples=30000))):
    with pytest.raises(UserError) as error:
      call()
    assert 'truncated' in one_line(half, error)
  # A header that claims 2**36 samples must not be believed when memory is taken.
  lie = bytearray(bytes_)
  lie[21] |= 0x0f
  lying = str(tmp_path / 'lie.flac')
  open(lying, 'wb').write(lie)
  assert audio_io.probe(lying).frames > 2**35
  with pytest.raises(UserError) as error:
    audio_io.read(lying)
  assert 'truncated' in one_line(lying, error)
  assert audio_io.read(lying, start=10, frames=99)[0].shape == (2, 99)


def test_mp3_shorter_than_stated_is_taken_as_it_is(tmp_path, caplog):
  audio = np.random.default_rng(0).uniform(-.3, .3, (1, 100000)).astype(np.float32)
  path = encode(tmp_path / 'a.mp3', audio, rate=44100, format='MP3', subtype='MPEG_LAYER_III')
  bytes_ = open(path, 'rb').read()
  half = str(tmp_path / 'half.mp3')
  open(half, 'wb').write(bytes_[:len(bytes_) // 2])
  blocks = list(audio_io.read_blocks(half, block_samples=20000))
  taken = sum(b.shape[1] for b in blocks)
  assert 30000 < taken < 70000 and audio_io.probe(half).frames == 100000
  assert f'ends after {taken} of 100000' in caplog.text


def test_check_finite(tmp_path):
  audio = tone(rate=8000, samples=3000)
  audio[1, 2345] = np.nan
  path = encode(tmp_path / 'a.wav', audio, rate=8000, format='WAV', subtype='FLOAT')
  assert np.isnan(audio_io.read(path)[0]).sum() == 1
  for call in (lambda: audio_io.read(path, check_finite=True),
               lambda: audio_io.read(path, start=2000, frames=500, check_finite=True),
               lambda: list(audio_io.read_blocks(path, block_samples=700, check_finite=True))):
    with pytest.raises(UserError) as error:
      call()
    assert 'NaN' in one_line(path, error) and error.value.args[0].endswith('sample 2345')
  assert audio_io.read(path, start=2346, check_finite=True)[0].shape == (2, 654)


def test_read_beyond_the_end(tmp_path):
  path = encode(tmp_path / 'a.wav', tone(rate=8000, samples=100), rate=8000, format='WAV',
                subtype='PCM_16')
  for kw in (dict(start=101), dict(start=50, frames=51), dict(start=-1), dict(frames=-5)):
    with pytest.raises(UserError) as error:
      audio_io.read(path, **kw)
    one_line(path, error)
  assert audio_io.read(path, start=100)[0].shape == (2, 0)
  with pytest.raises(UserError):
    next(audio_io.read_blocks(path, block_samples=0))


@pytest.mark.parametrize('name, error', [('a.wav', 2**-22), ('a.flac', 2**-22), ('a.OGG', 0.1)])
@pytest.mark.parametrize('channels', [1, 2, 3])
def test_write_and_read_back(tmp_path, name, error, channels):
  audio = tone(rate=44100, samples=70001, channels=channels)
  path = tmp_path / name
  assert audio_io.write(path, audio, 44100) == 0
  back, rate = audio_io.read(path)
  assert rate == 44100 and back.shape == audio.shape
  assert np.abs(back - audio).max() < error
  pieces = tmp_path / f'pieces_{name}'
  with audio_io.AudioWriter(pieces, 44100, channels) as writer:
    for start in range(0, 70001, 30000):
      writer.write(audio[:, start:start + 30000])
    assert not pieces.exists()  # it appears when it is whole
  np.testing.assert_array_equal(audio_io.read(pieces)[0], back)
  assert sorted(os.listdir(tmp_path)) == sorted([name, pieces.name])
  umask = os.umask(0)
  os.umask(umask)
  assert os.stat(path).st_mode & 0o777 == 0o666 & ~umask


def test_clipping_is_counted(tmp_path, caplog):
  audio = np.array([[0.5, 1.5, -2., 1.]], np.float32)
  assert audio_io.write(tmp_path / 'a.wav', audio, 8000) == 2
  assert '2 samples beyond [-1, 1] were clipped' in caplog.text
  back, _ = audio_io.read(tmp_path / 'a.wav')
  np.testing.assert_allclose(back, [[0.5, 1, -1, 1]], atol=1e-6)


def test_failed_writing_leaves_nothing(tmp_path):
  path = tmp_path / 'a.wav'
  audio_io.write(path, tone(rate=8000, samples=50), 8000)
  before = path.read_bytes()
  with pytest.raises(KeyError):
    with audio_io.AudioWriter(path, 8000, 1) as writer:
      writer.write(np.zeros((1, 10), np.float32))
      raise KeyError('stopped')
  bad = [
      (path, np.full((1, 4), np.nan), 8000), (path, np.zeros(4), 8000), (path, np.zeros((0, 4)), 1),
      (path, np.zeros((1, 4)), 0), (path, np.zeros((1, 4)), 2**40),
      (tmp_path / 'b.flac', np.zeros((9, 4)), 8000),
  ]
  for target, audio, rate in bad:
    with pytest.raises(UserError) as error:
      audio_io.write(target, audio, rate)
    one_line(target, error)
  assert os.listdir(tmp_path) == ['a.wav'] and path.read_bytes() == before


def test_disk_full_is_one_line(tmp_path, monkeypatch):
  def full(self, data):
    raise soundfile.LibsndfileError(2)
  monkeypatch.setattr(soundfile.SoundFile, 'write', full)
  with pytest.raises(UserError) as error:
    audio_io.write(tmp_path / 'a.wav', np.zeros((1, 4)), 8000)
  assert 'could not be written' in one_line(tmp_path / 'a.wav', error)
  assert os.listdir(tmp_path) == []


def test_wav_stops_at_4_gib(tmp_path, monkeypatch):
  monkeypatch.setattr(audio_io, '_WAV_LIMIT', 100)
  with pytest.raises(UserError, match='4 GiB'):
    audio_io.write(tmp_path / 'a.wav', np.zeros((1, 40)), 8000)
  audio_io.write(tmp_path / 'a.flac', np.zeros((1, 40)), 8000)


def test_check_writable(tmp_path):
  (tmp_path / 'dir.wav').mkdir()
  (tmp_path / 'file').write_text('x')
  os.mkfifo(tmp_path / 'pipe.wav')
  locked = tmp_path / 'locked.wav'
  locked.write_text('x')
  locked.chmod(0o444)
  closed = tmp_path / 'closed'
  closed.mkdir()
  closed.chmod(0o555)
  bad = ['a.m4a', 'a', 'dir.wav', 'nowhere/a.wav', 'file/a.wav', 'locked.wav', 'closed/a.wav',
         'pipe.wav', f'{252 * "x"}.wav', f'{126 * "ö"}.wav']
  for name in bad:
    with pytest.raises(UserError) as error:
      audio_io.check_writable(tmp_path / name)
    one_line(tmp_path / name, error)
  audio_io.check_writable(tmp_path / 'new.wav')
  audio_io.check_writable(tmp_path / f'{62 * chr(0x1f3b5)}.wav')  # 252 bytes
  audio_io.check_writable(tmp_path / 'z.safetensors', extensions=('.safetensors',))
  audio_io.check_writable(tmp_path / 'anything', extensions=None)
  with pytest.raises(UserError, match='safetensors'):
    audio_io.check_writable(tmp_path / 'z.wav', extensions=('.safetensors',))
  assert len(os.listdir(tmp_path)) == 5
  closed.chmod(0o755)


def test_writing_follows_a_link(tmp_path):
  (tmp_path / 'link.wav').symlink_to(tmp_path / 'real.wav')
  audio_io.write(tmp_path / 'link.wav', np.zeros((1, 8)), 8000)
  assert (tmp_path / 'link.wav').is_symlink() and audio_io.probe(tmp_path / 'real.wav').frames == 8


@pytest.mark.parametrize('from_rate, to_rate', [
    (48000, 44100), (44100, 48000), (96000, 44100), (8000, 44100), (22050, 44100), (44100, 8000),
    (37801, 44100), (44100, 44100)])
def test_streaming_resampler(from_rate, to_rate):
  rng = np.random.default_rng(0)
  for samples in (0, 1, 2, 3, 1000, 20011):
    audio = rng.standard_normal((2, samples)).astype(np.float32)
    whole = audio_io.resample(audio, from_rate=from_rate, to_rate=to_rate)
    expected = -(-samples * to_rate // from_rate)
    assert whole.shape == (2, expected) and whole.dtype == np.float32
    assert audio_io.resampled_length(samples, from_rate=from_rate, to_rate=to_rate) == expected
    stream = audio_io.StreamResampler(from_rate=from_rate, to_rate=to_rate, channels=2)
    pieces, start = [], 0
    for size in [1, 0, 7, 4096, 333, 2, 8000, 20011]:
      pieces.append(stream.process(audio[:, start:start + size]))
      start += size
    pieces.append(stream.finish())
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    back = audio_io.resample(whole, from_rate=to_rate, to_rate=from_rate)
    assert back.shape[1] >= samples


@pytest.mark.parametrize('rate', [48000, 96000])
def test_there_and_back_keeps_the_sound(rate):
  t = np.arange(rate) / rate
  audio = 0.5 * np.sin(2 * np.pi * 1000 * t)[None].astype(np.float32)
  there = audio_io.resample(audio, from_rate=rate, to_rate=44100)
  expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(44100) / 44100)
  np.testing.assert_allclose(there[0, 500:-500], expected[500:-500], atol=1e-4)
  back = audio_io.resample(there, from_rate=44100, to_rate=rate)[:, :rate]
  np.testing.assert_allclose(back[0, 1000:-1000], audio[0, 1000:-1000], atol=1e-4)


def test_resampling_refuses_nonsense():
  for kw in (dict(from_rate=0, to_rate=44100), dict(from_rate=44100, to_rate=-1),
             dict(from_rate=2**40, to_rate=44100)):
    with pytest.raises(UserError, match='cannot resample'):
      audio_io.resample(np.zeros((1, 8)), **kw)
  with pytest.raises(UserError, match='channels'):
    audio_io.resample(np.zeros(8), from_rate=1, to_rate=2)
  with pytest.raises(UserError, match='channels'):
    audio_io.StreamResampler(from_rate=1, to_rate=2, channels=2).process(np.zeros((1, 8)))
