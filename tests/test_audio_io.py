"""Audio files in and out: exact seeks, exact lengths, one clear line for every bad file."""

import gc
import os
import re
import struct
import subprocess

from fuzz_audio import mutate
import numpy as np
import pytest
import soundfile

from m2l2 import files
from m2l2.data import audio_io, containers
from m2l2.data.containers import checksum, ogg
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


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='Linux tells which files are open')
def test_what_is_closed_is_not_held_open(tmp_path):
  path = encode(tmp_path / 'a.ogg', tone(rate=44100, samples=4000), **dict(zip(('rate', 'format', 'subtype'),
                                                                              KINDS['a.ogg'], strict=True)))
  opened = lambda: len(os.listdir('/proc/self/fd'))
  gc.collect()
  gc.disable()  # which would close what stands in a circle, some time
  try:
    before = opened()
    for _ in range(5):
      with audio_io.AudioReader(path) as reader:
        reader.read(start=0, frames=100)
    assert opened() == before
  finally:
    gc.enable()


@pytest.mark.parametrize('name', KINDS)
def test_seek_equals_slice(tmp_path, name):
  rate, format, subtype = KINDS[name]
  audio = tone(rate=rate, samples=rate * 2)
  path = encode(tmp_path / name, audio, rate=rate, format=format, subtype=subtype)
  info = audio_io.info(path)
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
  monkeypatch.setattr('m2l2.data.reader._READ_VALUES', 300)
  np.testing.assert_array_equal(audio_io.read(path)[0], audio)
  np.testing.assert_array_equal(audio_io.read(path, start=7, frames=4321)[0], audio[:, 7:4328])
  blocks = list(audio_io.read_blocks(path, block_samples=1024))
  assert [b.shape[1] for b in blocks] == [1024] * 4 + [904]
  np.testing.assert_array_equal(np.concatenate(blocks, axis=1), audio)


def test_bad_files_are_named_in_one_line(tmp_path):
  (tmp_path / 'zero.wav').write_bytes(b'')
  (tmp_path / 'text.wav').write_text('no audio in here\n' * 20)
  (tmp_path / 'text.mp3').write_text('no audio in here\n' * 20)
  (tmp_path / 'data.raw').write_bytes(b'1234')
  (tmp_path / 'folder.wav').mkdir()
  soundfile.write(tmp_path / 'none.wav', np.zeros((0, 2)), 44100)
  os.mkfifo(tmp_path / 'pipe.wav')
  expected = {
      'missing.wav': 'no such file', 'zero.wav': 'is empty', 'text.wav': 'is not audio',
      'text.mp3': 'is not audio', 'data.raw': 'is not audio', 'folder.wav': 'is a directory',
      'none.wav': 'holds no samples', 'pipe.wav': 'not a regular file',
  }
  for name, words in expected.items():
    path = str(tmp_path / name)
    for call in (audio_io.info, audio_io.read,
                 lambda p: next(audio_io.read_blocks(p, block_samples=64))):
      with pytest.raises(UserError) as error:
        call(path)
      assert words in one_line(path, error)


def test_strange_names(tmp_path):
  audio = tone(rate=8000, samples=100)
  name = os.fsencode(tmp_path) + b'/caf\xe9 \xe2\x99\xab.wav'  # not UTF-8
  path = os.fsdecode(name)
  audio_io.write(path, audio, 8000)
  assert audio_io.info(path).frames == 100
  with pytest.raises(UserError) as error:
    audio_io.info(path.replace('.wav', '\n.wav'))
  line = str(error.value)
  assert '\n' not in line and line.encode('utf-8')


def test_truncated_files(tmp_path):
  audio = np.random.default_rng(0).uniform(-.3, .3, (2, 200000)).astype(np.float32)
  flac = encode(tmp_path / 'a.flac', audio, rate=44100, format='FLAC', subtype='PCM_16')
  bytes_ = open(flac, 'rb').read()
  half = str(tmp_path / 'half.flac')
  open(half, 'wb').write(bytes_[:len(bytes_) // 2])
  assert audio_io.info(half).frames == 200000
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
  assert audio_io.info(lying).frames > 2**35
  with pytest.raises(UserError) as error:
    audio_io.read(lying)
  assert 'truncated' in one_line(lying, error)
  assert audio_io.read(lying, start=10, frames=99)[0].shape == (2, 99)


def bursts(*, rate, samples, channels=2, every=3):
  """[channels, samples]: silence, and a burst of noise that dies away every so many seconds, at odd places."""
  rng, audio = np.random.default_rng(0), np.zeros((channels, samples), np.float32)
  half, fade = rate // 2, np.exp(-np.arange(rate // 2) / 3000)
  for start in range(rate // 3, samples - half, int(every * rate) + 77):
    audio[:, start:start + half] = rng.uniform(-.5, .5, (channels, half)) * fade
  return audio


def without_xing(data):
  """An MP3's bytes without the frame that states its length, which libsndfile's writer begins with."""
  assert b'Xing' in data[:200] or b'Info' in data[:200]
  kbit, rate = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160)[data[2] >> 4], (44100, 48000, 32000)[data[2] >> 2 & 3]
  return data[144000 * kbit // rate + (data[2] >> 1 & 1):]


def same_wherever_it_is_read(path, starts, *, tolerance=0.):
  """The samples of the whole file, after the same were read at places and in blocks."""
  with soundfile.SoundFile(path) as file:  # at once: between reads soundfile seeks
    first = file.read(dtype='float32', always_2d=True).T
  full, _ = audio_io.read(path)
  np.testing.assert_allclose(full[:, :first.shape[1]], first, atol=tolerance)
  for start in starts:
    part = audio_io.read(path, start=start, frames=3000)[0]
    np.testing.assert_allclose(part, full[:, start:start + 3000], atol=tolerance, err_msg=f'{path} at {start}')
  for size in (4096, 50001):
    np.testing.assert_allclose(np.concatenate(list(audio_io.read_blocks(path, block_samples=size)), axis=1), full,
                               atol=tolerance)
  return full


def test_an_mp3_that_is_nearly_silent_is_the_same_wherever_it_is_read(tmp_path):
  # Its frames are short, so that the bits of one lie many frames before it.
  path, audio = tmp_path / 'a.mp3', bursts(rate=44100, samples=500_000)
  with soundfile.SoundFile(path, 'w', 44100, 2, format='MP3', bitrate_mode='VARIABLE', compression_level=.5) as file:
    file.write(audio.T)
  starts = [place + shift for place in range(14700, 460_000, 132_377) for shift in (-400, 700, 2000)]
  same_wherever_it_is_read(path, starts)
  # Without a stated length: every frame, whatever the first one suggests.
  data = without_xing(path.read_bytes())
  path.write_bytes(b'ID3\4\0\0\0\0\0\7' + bytes(7) + data + b'TAG'.ljust(128, b'\0'))
  full, _ = audio_io.read(path)
  assert 500_000 <= full.shape[1] == audio_io.info(path).frames < 503_000
  lag = 1105  # of encoder and decoder
  assert np.abs(full[:, lag:lag + 499_000] - audio[:, :499_000]).mean() < .006
  for start in starts:
    np.testing.assert_array_equal(audio_io.read(path, start=start, frames=3000)[0], full[:, start:start + 3000])


def test_vbr_mp3_without_a_length_is_read_to_its_end(tmp_path, caplog):
  """Loud first: libsndfile takes all frames for as long as the first ones."""
  rng, path = np.random.default_rng(0), tmp_path / 'a.mp3'
  audio = np.concatenate([rng.uniform(-.9, .9, (1, 100_000)), np.zeros((1, 400_000))], axis=1).astype(np.float32)
  for sound in (audio, audio[:, ::-1]):
    with soundfile.SoundFile(path, 'w', 44100, 1, format='MP3', bitrate_mode='VARIABLE') as file:
      file.write(sound.T)
    path.write_bytes(without_xing(path.read_bytes()))
    full, _ = audio_io.read(path)
    assert 500_000 <= full.shape[1] == audio_io.info(path).frames < 503_000
    loud = np.flatnonzero(np.abs(full[0]) > .1)
    assert abs((loud[-1] - loud[0]) - 100_000) < 3000
  assert not caplog.text


def by_ffmpeg(path, audio, *, rate, codec):
  import av
  with av.open(str(path), 'w') as container:
    stream = container.add_stream(codec, rate=rate, layout='stereo', options={'strict': 'experimental'})
    size = stream.codec_context.frame_size or 64
    for start in range(0, audio.shape[1] - size, size):
      frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(audio[:, start:start + size]), 'fltp', 'stereo')
      frame.rate, frame.pts = rate, start
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  return str(path)


@pytest.mark.parametrize('rate, writer', [(44100, 'FFmpeg'), (16000, 'libsndfile')])
def test_vorbis_is_the_same_wherever_it_is_read(tmp_path, rate, writer):
  """FFmpeg's pages begin inside packets; libsndfile's seeks then miss by half a block."""
  audio = bursts(rate=rate, samples=8 * rate, every=.6)
  audio += np.random.default_rng(1).uniform(-.01, .01, audio.shape).astype(np.float32)
  if writer == 'FFmpeg':
    path = by_ffmpeg(tmp_path / 'a.ogg', audio, rate=rate, codec='vorbis')
  else:
    path = encode(tmp_path / 'a.ogg', audio, rate=rate, format='OGG', subtype='VORBIS')
  data = open(path, 'rb').read()
  ends = [struct.unpack_from('<q', data, page.start() + 6)[0] for page in re.finditer(b'OggS', data)]  # of pages
  starts = [end + shift for end in ends[3::9] for shift in (-500, 70, 450)]
  starts += range(8 * rate - 40_000, 8 * rate, 1500)
  same_wherever_it_is_read(path, [0, *(start for start in starts if 0 <= start < 8 * rate - 6000)])


def test_vorbis_cut_out_without_decoding_is_read_to_its_end(tmp_path):
  """`ffmpeg -ss 7 -c copy` counts from the place, and writes packets from before it, which decoders give too."""
  path = encode(tmp_path / 'a.ogg', bursts(rate=44100, samples=400_000, every=.6), rate=44100, format='OGG',
                subtype='VORBIS')
  whole, _ = audio_io.read(path)
  data = bytearray(open(path, 'rb').read())
  for page in ogg.pages_of(bytes(data)):
    if page.granule > 0:
      data[page.offset:page.body + sum(page.lacing)] = ogg.changed_page(
          bytes(data), page, granule=page.granule - 3000)
  cut = tmp_path / 'cut.ogg'
  cut.write_bytes(data)
  audio, _ = audio_io.read(cut)
  lost = whole.shape[1] - audio.shape[1]
  assert 0 <= lost <= 1024  # the last packet of the first page
  np.testing.assert_array_equal(audio[:, -100_000:], whole[:, -100_000:])
  same_wherever_it_is_read(cut, range(0, audio.shape[1] - 6000, 20_000))


def test_an_opus_that_states_more_than_its_packets_hold_is_read_to_its_end(tmp_path):
  path = encode(tmp_path / 'a.opus', tone(rate=48000, samples=150_000), rate=48000, format='OGG', subtype='OPUS')
  whole, _ = audio_io.read(path)
  data = open(path, 'rb').read()
  last = ogg.pages_of(data)[-1]
  more = tmp_path / 'more.opus'
  more.write_bytes(data[:last.offset] + ogg.changed_page(data, last, granule=last.granule + 5000))
  audio, _ = audio_io.read(more)
  assert 0 <= audio.shape[1] - whole.shape[1] < 960 and audio_io.info(more).frames == audio.shape[1]  # a packet
  np.testing.assert_array_equal(audio[:, :whole.shape[1]], whole)


def test_pages_after_the_end_mark_of_a_vorbis_are_told_and_not_read(tmp_path, caplog):
  path = encode(tmp_path / 'a.ogg', tone(rate=44100, samples=50_000), rate=44100, format='OGG', subtype='VORBIS')
  data = open(path, 'rb').read()
  pages = ogg.pages_of(data)
  assert len(pages) > 3 and pages[-1].flags & 4
  after = tmp_path / 'after.ogg'
  after.write_bytes(data + ogg.changed_page(data, pages[-1], granule=pages[-1].granule + 44100))
  np.testing.assert_array_equal(audio_io.read(after)[0], audio_io.read(path)[0])
  assert 'holds 1.1 of the 2.1 s that its header states' in caplog.text


CHAINS = {'a.ogg': ('OGG', 'VORBIS'), 'a.opus': ('OGG', 'OPUS'), 'a.flac': ('FLAC', 'PCM_16'),
          'a.mp3': ('MP3', 'MPEG_LAYER_III')}


@pytest.mark.parametrize('name', CHAINS)
@pytest.mark.parametrize('equal', [False, True])
def test_streams_one_after_the_other_are_one(tmp_path, name, equal, caplog):
  format, subtype = CHAINS[name]
  files = [encode(tmp_path / f'{i}{name}', bursts(rate=48000, samples=n, every=.5), rate=48000, format=format,
                  subtype=subtype) for i, n in enumerate((150_000, 150_000 if equal else 70_001))]
  audio = [audio_io.read(file)[0] for file in files]
  (tmp_path / name).write_bytes(b''.join(open(file, 'rb').read() for file in files))
  if equal and name != 'a.flac' or not equal:  # also for crops, which do not read all of a FLAC
    with audio_io.AudioReader(tmp_path / name, whole=False) as reader:
      assert reader.info.frames == sum(part.shape[1] for part in audio)
  full, _ = audio_io.read(tmp_path / name)
  assert full.shape[1] == sum(part.shape[1] for part in audio)
  np.testing.assert_array_equal(full, np.concatenate(audio, axis=1))
  for start in (149_000, 151_000, 80_000):
    np.testing.assert_allclose(audio_io.read(tmp_path / name, start=start, frames=5000)[0], full[:, start:start + 5000],
                               atol=1e-6)
  with audio_io.AudioReader(name, data=(tmp_path / name).read_bytes()) as reader:
    np.testing.assert_array_equal(np.concatenate(list(reader.blocks(block_samples=9999)), axis=1), full)
  assert not caplog.text


@pytest.mark.parametrize('first, second', [
    ('a.flac', 'b.ogg'), ('a.mp3', 'b.wav'), ('a.wav', 'b.flac'), ('a.ogg', 'b.wav')])
def test_a_file_of_another_kind_behind_is_told(tmp_path, caplog, first, second):
  kinds = CHAINS | {'a.wav': ('WAV', 'PCM_16')}
  front, two = (encode(tmp_path / name, tone(rate=48000, samples=20_000), rate=48000, format=kinds[f'a.{name[2:]}'][0],
                       subtype=kinds[f'a.{name[2:]}'][1]) for name in (first, second))
  alone, _ = audio_io.read(front)
  assert not caplog.text
  size = os.path.getsize(front)
  both = tmp_path / f'both{first[1:]}'
  both.write_bytes(open(front, 'rb').read() + open(two, 'rb').read())
  np.testing.assert_array_equal(audio_io.read(both)[0][:, :alone.shape[1]], alone)
  assert f'from byte {size:,} on, which is not read' in caplog.text


def test_a_flac_that_keeps_the_header_of_its_wav_holds_no_other_file(tmp_path, caplog):
  data = open(encode(tmp_path / 'a.flac', tone(rate=8000, samples=9000), rate=8000, format='FLAC', subtype='PCM_16'),
              'rb').read()
  kept = b'riff' + b'RIFF' + (18_036).to_bytes(4, 'little') + b'WAVE'
  (tmp_path / 'kept.flac').write_bytes(data[:42] + b'\x02' + len(kept).to_bytes(3, 'big') + kept + data[42:])
  assert audio_io.read(tmp_path / 'kept.flac')[0].shape == (2, 9000) and not caplog.text


def test_a_stream_of_another_kind_behind_is_told(tmp_path, caplog):
  first = encode(tmp_path / '1.flac', tone(rate=8000, samples=16000), rate=8000, format='FLAC', subtype='PCM_16')
  two = encode(tmp_path / '2.flac', tone(rate=9000, samples=9000), rate=9000, format='FLAC', subtype='PCM_16')
  (tmp_path / 'a.flac').write_bytes(open(first, 'rb').read() + open(two, 'rb').read())
  for _ in range(2):
    assert audio_io.read(tmp_path / 'a.flac')[0].shape == (2, 16000)
  assert caplog.text.count(f'{tmp_path}/a.flac: goes on after 2.0 s with 2 channels at 9000 Hz') == 1


@pytest.mark.parametrize('name', KINDS)
def test_what_is_cut_short_is_told_with_seconds(tmp_path, name, caplog):
  rate, format, subtype = KINDS[name]
  path = encode(tmp_path / name, tone(rate=rate, samples=4 * rate), rate=rate, format=format, subtype=subtype)
  data = open(path, 'rb').read()
  audio_io.read(path)
  assert not caplog.text
  open(path, 'wb').write(data[:len(data) // 2])
  if format == 'FLAC':
    with pytest.raises(UserError, match='truncated'):
      audio_io.read(path)
    return
  full, _ = audio_io.read(path)
  assert .8 * rate < full.shape[1] < 2.5 * rate
  seconds = f'{full.shape[1] / rate:.1f}'
  words = f'ends after {seconds} s without an end mark' if format == 'OGG' else (
      f'is cut short: holds {seconds} of the 4.0 s that its header states')
  assert f'{path}: {words}' in caplog.text
  with audio_io.AudioReader(path, whole=False) as reader:  # as crops are
    assert words in reader.note and reader.info.frames == full.shape[1]
    end = full.shape[1] - 2000
    np.testing.assert_allclose(reader.read(start=end, frames=2000), full[:, end:], atol=1e-6)
  assert caplog.text.count(path) == 1


def test_lengths_that_a_pipe_leaves_open_in_flac(tmp_path):
  audio = tone(rate=44100, samples=90001)
  for bits, seed in (('PCM_16', 0), ('PCM_24', 1)):
    path = encode(tmp_path / f'{seed}.flac', audio, rate=44100, format='FLAC', subtype=bits)
    data, expected = bytearray(open(path, 'rb').read()), audio_io.read(path)[0]
    data[21] &= 0xf0  # STREAMINFO's 36 bits of total samples
    data[22:26] = bytes(4)
    open(path, 'wb').write(data)
    np.testing.assert_array_equal(audio_io.read(path)[0], expected)
    np.testing.assert_array_equal(audio_io.read(path, start=70000)[0], expected[:, 70000:])


def test_lengths_that_a_pipe_leaves_open_in_wav(tmp_path):
  audio = tone(rate=44100, samples=90001)
  path = encode(tmp_path / 'a.wav', audio, rate=44100, format='WAV', subtype='PCM_16')
  data, expected = bytearray(open(path, 'rb').read()), audio_io.read(path)[0]
  for size in (0, 2**32 - 1, 2**31 - 1):
    at = data.index(b'data')
    data[4:8] = data[at + 4:at + 8] = size.to_bytes(4, 'little')
    open(path, 'wb').write(data)
    np.testing.assert_array_equal(audio_io.read(path)[0], expected)
  data[at + 4:] = bytes(4) + b'LIST' + bytes([4, 0, 0, 0]) + b'INFO'  # nothing, and something behind it
  open(path, 'wb').write(data)
  with pytest.raises(UserError, match='holds no samples'):
    audio_io.read(path)


def test_flac_inside_ogg(tmp_path, caplog):
  """Of which FFmpeg's header states no length."""
  import av
  path, pcm = tmp_path / 'a.ogg', np.round(bursts(rate=44100, samples=150_001, every=.5) * 32767).astype(np.int16)
  with av.open(str(path), 'w') as container:
    stream = container.add_stream('flac', rate=44100, layout='stereo')
    for start in range(0, 150_001, 4608):
      block = np.ascontiguousarray(pcm[:, start:start + 4608].T.reshape(1, -1))
      frame = av.AudioFrame.from_ndarray(block, 's16', 'stereo')
      frame.rate, frame.pts = 44100, start
      container.mux(stream.encode(frame))
    container.mux(stream.encode(None))
  expected, data = pcm / np.float32(32768), path.read_bytes()
  assert audio_io.info(path).frames == 150_001
  np.testing.assert_array_equal(audio_io.read(path)[0], expected)
  for start in (1, 44_100, 149_000):
    np.testing.assert_array_equal(audio_io.read(path, start=start, frames=1001)[0], expected[:, start:start + 1001])
  path.write_bytes(2 * data)
  np.testing.assert_array_equal(audio_io.read(path)[0], np.concatenate([expected, expected], axis=1))
  assert not caplog.text
  path.write_bytes(data[:len(data) * 2 // 3])
  half, _ = audio_io.read(path)
  np.testing.assert_array_equal(half, expected[:, :half.shape[1]])
  assert half.shape[1] > 40_000
  assert f'{path}: ends after {half.shape[1] / 44100:.1f} s without an end mark' in caplog.text


def test_an_mp3_that_ends_anywhere_inside_a_frame_is_told(tmp_path):
  path = encode(tmp_path / 'a.mp3', tone(rate=44100, samples=90_000), rate=44100, format='MP3',
                subtype='MPEG_LAYER_III')
  data = without_xing(open(path, 'rb').read())
  begin = data.rindex(data[:2])  # of the last frame
  for cut, unended in ((0, False), (1, True), (2, True), (3, True), (4, True), (100, True)):
    assert containers.inspect(data[:begin + cut]).unended is unended, cut
  assert not containers.inspect(data + b'\0\0').unended


def test_gsm_and_mp3_inside_wav(tmp_path):
  audio = tone(rate=8000, samples=40000, channels=1)
  path = encode(tmp_path / 'gsm.wav', audio, rate=8000, format='WAV', subtype='GSM610')
  full, _ = audio_io.read(path)
  assert full.shape == (1, 40320) and np.abs(full[:, :40000] - audio).mean() < .1  # blocks of 320
  for start in (1, 9999, 35000):
    np.testing.assert_array_equal(audio_io.read(path, start=start, frames=4000)[0], full[:, start:start + 4000])
  data = bytearray(open(path, 'rb').read())
  place = data.index(b'data') + 4
  length = struct.unpack_from('<I', data, place)[0] // 65 * 65 - 3 * 65  # an odd number of blocks
  data[place:] = struct.pack('<I', length + 1) + data[place + 4:place + 4 + length] + b'\0'  # as sox writes it
  data[4:8] = struct.pack('<I', len(data) - 8)
  (tmp_path / 'pad.wav').write_bytes(data)
  np.testing.assert_array_equal(audio_io.read(tmp_path / 'pad.wav')[0], full[:, :length // 65 * 320])
  mp3 = open(encode(tmp_path / 'a.mp3', tone(rate=44100, samples=200_000), rate=44100, format='MP3',
                    subtype='MPEG_LAYER_III'), 'rb').read()
  expected, _ = audio_io.read(tmp_path / 'a.mp3')
  chunks = b'WAVEfmt ' + struct.pack('<IHHIIHHHHIHHH', 30, 0x55, 2, 44100, 16000, 1, 0, 12, 1, 2, 417, 1, 1393)
  chunks += b'data' + struct.pack('<I', len(mp3)) + mp3
  for text in (chunks, chunks + b'LIST' + struct.pack('<I', 4) + b'INFO'):
    (tmp_path / 'mp3.wav').write_bytes(b'RIFF' + struct.pack('<I', len(text)) + text)
    np.testing.assert_array_equal(audio_io.read(tmp_path / 'mp3.wav')[0], expected)
    np.testing.assert_array_equal(audio_io.read(tmp_path / 'mp3.wav', start=99_999)[0], expected[:, 99_999:])


def test_damaged_bytes_do_not_stop_the_look_into_a_file(tmp_path):
  """Whatever a file holds, what containers cannot tell is libsndfile's affair; never another exception."""
  for name, (rate, format, subtype) in KINDS.items():
    path = encode(tmp_path / name, tone(rate=rate, samples=rate), rate=rate, format=format, subtype=subtype)
    data = open(path, 'rb').read()
    for seed in range(60):
      contents = containers.inspect(mutate(data, seed))
      assert all(part.frames >= 0 for part in contents.parts)


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


@pytest.mark.parametrize('rate, channels', [(200_001, 1), (768_000, 2), (44100, 256)])
def test_vorbis_beyond_its_limits_is_refused(tmp_path, rate, channels):
  """libsndfile crashes there."""
  with pytest.raises(UserError) as error:
    audio_io.write(tmp_path / 'a.ogg', np.zeros((channels, 8)), rate)
  assert 'name it *.wav' in one_line(tmp_path / 'a.ogg', error) and os.listdir(tmp_path) == []
  audio_io.write(tmp_path / 'b.wav', np.zeros((channels, 8)), rate)
  audio_io.write(tmp_path / 'c.ogg', np.zeros((1, 8)), 200_000)


# As the specifications of Vorbis and Opus have it: for each channel of a stream its place in a WAV (by its mask: front
# left, front right, centre, LFE, back left, back right, (back centre,) side left, side right).
ORDERS = {1: [0], 2: [0, 1], 3: [0, 2, 1], 4: [0, 1, 2, 3], 5: [0, 2, 1, 3, 4], 6: [0, 2, 1, 4, 5, 3],
          7: [0, 2, 1, 5, 6, 4, 3], 8: [0, 2, 1, 6, 7, 4, 5, 3], 9: list(range(9))}


@pytest.mark.parametrize('channels', ORDERS)
def test_channels_keep_their_places(tmp_path, channels):
  t, lfe = np.arange(12_000) / 48_000, 3 if channels in (6, 7, 8) else None
  audio = np.float32([.3 * np.sin(2 * np.pi * (60 if i == lfe else 500 + 300 * i) * t) for i in range(channels)])
  audio_io.write(tmp_path / 'a.ogg', audio, 48_000)
  raw, _ = soundfile.read(tmp_path / 'a.ogg', always_2d=True)
  middle = np.s_[3000:9000]
  for place, channel in enumerate(ORDERS[channels]):
    assert np.abs(raw[middle, place] - audio[channel][middle]).max() < .1, (place, channel)
  for start in (0, 3000):
    part, _ = audio_io.read(tmp_path / 'a.ogg', start=start)
    assert np.abs(part[:, 3000 - start:9000 - start] - audio[:, middle]).max() < .1
  if channels < 9:
    encode(tmp_path / 'a.opus', audio[ORDERS[channels]], rate=48_000, format='OGG', subtype='OPUS')
    assert np.abs(audio_io.read(tmp_path / 'a.opus')[0][:, middle] - audio[:, middle]).max() < .1


@pytest.mark.parametrize('rate', [8000, 16000, 24000])
def test_opus_is_read_at_48_khz(tmp_path, rate):
  """At which it is coded; libsndfile would decode at a lower one where the header says that the source had one."""
  audio = tone(rate=48000, samples=48000, frequency=11000.)
  path = encode(tmp_path / 'a.opus', audio, rate=48000, format='OGG', subtype='OPUS')
  expected, _ = audio_io.read(path)
  data = bytearray(open(path, 'rb').read())
  at = data.index(b'OpusHead') + 12
  data[at:at + 4] = rate.to_bytes(4, 'little')
  data[22:26] = bytes(4)
  data[22:26] = checksum.crc(bytes(data[:data.index(b'OggS', 4)]), 32, 0x04c11db7).to_bytes(4, 'little')
  open(path, 'wb').write(data)
  assert soundfile.info(path).samplerate == rate
  read, read_rate = audio_io.read(path)
  assert read_rate == audio_io.info(path).sample_rate == 48000
  np.testing.assert_array_equal(read, expected)


def test_long_texts_do_not_spoil_a_wav(tmp_path, caplog):
  tags = {'title': 'A title', 'comment': 'ö' * 35_000}
  for name in ('a.wav', 'a.flac', 'a.ogg'):
    with audio_io.AudioWriter(tmp_path / name, 44100, 1, tags=tags) as writer:
      writer.write(np.zeros((1, 1000)))
    kept = audio_io.info(tmp_path / name).tags
    assert kept == (tags if name != 'a.wav' else {**tags, 'comment': 'ö' * 1000})
    assert (f'{tmp_path / name}: the comment is cut to 2000 bytes' in caplog.text) == (name == 'a.wav')


def test_texts_of_windows_are_read(tmp_path):
  for given, text in (('Café – Götterdämmerung', 'cp1252'), ('Café \ufffd', 'utf-8')):
    with soundfile.SoundFile(tmp_path / 'a.wav', 'w', 44100, 1) as file:
      file.title, file.artist = 'T' * len(given.encode(text)), 'plain'
      file.write(np.zeros(10))
    data = (tmp_path / 'a.wav').read_bytes()
    (tmp_path / 'a.wav').write_bytes(data.replace(b'T' * len(given.encode(text)), given.encode(text)))
    assert audio_io.info(tmp_path / 'a.wav').tags == {'title': given, 'artist': 'plain'}


def test_what_a_killed_process_left_is_taken_away(tmp_path):
  with subprocess.Popen(['true']) as dead:
    pass

  def left(target, *, machine=files._machine(), pid=dead.pid):
    path = tmp_path / f'.{target}.{machine}.{pid}.0123abcd.part'
    path.write_bytes(b'half')
    return path.name
  name = f'a[1]{"ö" * 60}.wav'
  temporary = files.temporary(os.fspath(tmp_path / name))
  short = os.path.basename(temporary)[1:].split(f'.{files._machine()}.')[0]
  left(short)
  kept = [left('b.wav'), left(short, pid=os.getpid()), left(short, machine='00000000')]  # of others, at work
  audio_io.write(tmp_path / name, np.zeros((1, 8)), 8000)
  assert sorted(os.listdir(tmp_path)) == sorted([*kept, name])


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
  monkeypatch.setattr('m2l2.data.writer._WAV_LIMIT', 100)
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
  assert (tmp_path / 'link.wav').is_symlink() and audio_io.info(tmp_path / 'real.wav').frames == 8


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
      pieces.append(stream.push(audio[:, start:start + size]))
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
    audio_io.StreamResampler(from_rate=1, to_rate=2, channels=2).push(np.zeros((1, 8)))
