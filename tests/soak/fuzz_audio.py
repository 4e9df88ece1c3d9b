"""Damages audio files: what a hostile or broken corpus holds; as a script, makes good ones by the writers people use.

  python tests/soak/fuzz_audio.py --files=500 --seed=0

Writes random sounds by ffmpeg, sox, lame, oggenc, opusenc and flac, as far as they are installed, some of them through
pipes, chained or cut short, and holds what `audio_io` reads against what ffmpeg decodes: samples, the channels' order,
lengths; and reads at places and in blocks against the whole. Prints a line for each that differs, then the figures.
Where FFmpeg's decoder and `audio_io` differ in Vorbis or Opus, the format's own program decides (oggdec, opusdec), and
the figures count those files: FFmpeg 5.1 reads the second channel of its own Vorbis encoder unlike libvorbis and
stb_vorbis, which agree, and some of opusenc's Opus (a centre channel, sounds at 8 kHz) unlike libopus. Not a test by
itself.
"""

import argparse
import collections
import os
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import tempfile

from absl import logging
import numpy as np

_HEADER = 96  # bytes; the headers of WAV and FLAC, and the first page or frame of OGG and MP3, lie there
_EXTREMES = (0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff, 0x10000,
             44100, 4_000_000_000, 255)


def mutate(data: bytes, seed: int) -> bytes:
  """The file's bytes with one to four kinds of damage, drawn by `seed`; a pure function.

  Damage is done to the header (bits, whole numbers, the very fields that state rate, channels and length) and
  to the body (bits, holes of zeros or noise, pieces cut out, doubled or moved), or the file is cut short, to
  nothing at times. Sizes stay within twice the file's.
  """
  rng = random.Random(seed)
  result = bytearray(data)
  for _ in range(rng.choice((1, 1, 2, 4))):
    if not result:
      break
    rng.choice(_DAMAGES)(result, rng)
  return bytes(result[:2 * len(data)])


def _flip_header(data, rng):
  for _ in range(rng.randint(1, 8)):
    data[rng.randrange(min(_HEADER, len(data)))] ^= 1 << rng.randrange(8)


def _flip_body(data, rng):
  for _ in range(rng.randint(1, 200)):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _extreme_header(data, rng):
  """A whole number at some even place of the header becomes an extreme one, in either byte order."""
  number = struct.pack(rng.choice('<>') + 'I', rng.choice(_EXTREMES))[-rng.choice((1, 2, 4)):]
  at = 2 * rng.randrange(1 + min(_HEADER, len(data)) // 2)
  data[at:at + len(number)] = number


def _lie(data, rng):
  """States another rate, channel count or length where the format keeps them."""
  rate, channels = rng.choice((0, 1, 3, 655350, 4_000_000_000)), rng.choice((0, 1, 3, 8, 255, 65535))
  size = rng.choice((0, 1, 0x7fffffff, 0xffffffff))
  if data[:4] == b'RIFF':
    field, at = rng.choice(((struct.pack('<I', rate), 24), (struct.pack('<H', channels), 22),
                            (struct.pack('<I', size), max(0, data.find(b'data')) + 4),
                            (struct.pack('<H', rng.choice((0, 1, 3, 7, 24, 64, 65535))), 34)))
    data[at:at + len(field)] = field
  elif data[:4] == b'fLaC' and len(data) > 26:
    # STREAMINFO: 20 bits of rate, 3 of channels - 1, 5 of bits - 1, 36 of the number of samples.
    stated = int.from_bytes(data[18:26], 'big')
    lies = (stated & ~(0xfffff << 44) | min(rate, 655350) << 44, stated & ~(7 << 41) | (channels % 8) << 41,
            stated & ~(2**36 - 1) | rng.choice((1, 2**31, 2**36 - 1)), stated & ~(31 << 36) | rng.randrange(32) << 36)
    data[18:26] = rng.choice(lies).to_bytes(8, 'big')
  elif data[:4] == b'OggS':
    # Either the rate of Vorbis' first header, or the last page's position: the length.
    if rng.random() < .5:
      data[40:44] = struct.pack('<I', rate)
    else:
      at = data.rfind(b'OggS') + 6
      data[at:at + 8] = struct.pack('<q', rng.choice((-1, 0, 2**40, 2**62)))
  else:
    _extreme_header(data, rng)


def _cut_short(data, rng):
  del data[rng.choice((0, rng.randrange(1 + min(_HEADER, len(data))), rng.randrange(len(data)))):]


def _hole(data, rng):
  at, length = rng.randrange(len(data)), rng.choice((4, 512, 65536))
  length = min(length, len(data) - at)
  data[at:at + length] = bytes(length) if rng.random() < .5 else rng.randbytes(length)


def _not_finite(data, rng):
  """Four-byte NaN and infinities all over the body; in integer formats, mere noise."""
  for _ in range(rng.randint(1, 50)):
    at = rng.randrange(len(data)) & ~3
    data[at:at + 4] = struct.pack('<f', rng.choice((float('nan'), float('inf'), -float('inf'), 1e38)))


def _cut_out(data, rng):
  at = rng.randrange(len(data))
  del data[at:at + rng.choice((1, 7, 4096))]


def _double(data, rng):
  at = rng.randrange(len(data))
  piece = data[at:at + rng.choice((1, 16, 4096))]
  data[at:at] = piece


def _move(data, rng):
  at, length = rng.randrange(len(data)), rng.choice((4, 256, 4096))
  piece = data[at:at + length]
  del data[at:at + length]
  to = rng.randrange(1 + len(data))
  data[to:to] = piece


def _append(data, rng):
  data += rng.randbytes(rng.choice((1, 100, 10000)))


_DAMAGES = (_flip_header, _flip_header, _flip_body, _extreme_header, _extreme_header, _lie, _lie, _lie, _cut_short,
            _hole, _not_finite, _cut_out, _double, _move, _append)


# ---- good files by real writers ------------------------------------------------------------------

_LAYOUTS = {1: 'mono', 2: 'stereo', 3: '3.0', 4: 'quad', 5: '5.0', 6: '5.1', 7: '6.1', 8: '7.1'}
# extension: commands that make it, with the most channels each takes; {q} is a quality from 0 to 1.
_WRITERS = {
    'wav': (('ffmpeg -c:a pcm_s16le', 8), ('ffmpeg -c:a pcm_s24le', 8), ('ffmpeg -c:a pcm_f32le', 8), ('sox', 8),
            ('ffmpeg -c:a libmp3lame -b:a 128k', 2), ('ffmpeg -c:a pcm_mulaw', 2), ('ffmpeg -c:a adpcm_ms', 2),
            ('sox -e gsm', 1)),
    'flac': (('ffmpeg -c:a flac', 8), ('flac', 8), ('sox', 8)),
    'aiff': (('ffmpeg', 2), ('sox', 8)),
    'ogg': (('ffmpeg -c:a libvorbis -q:a {0:.1f}', 8), ('ffmpeg -c:a vorbis -strict -2', 2), ('oggenc -q {0:.1f}', 8),
            ('sox', 2), ('ffmpeg -c:a flac', 2)),
    'opus': (('ffmpeg -c:a libopus', 7), ('opusenc', 8)),
    'mp3': (('ffmpeg -c:a libmp3lame -q:a {1:.0f}', 2), ('ffmpeg -c:a libmp3lame -b:a 64k', 2), ('lame -V {1:.0f}', 2),
            ('ffmpeg -c:a libmp3lame -q:a {1:.0f} -write_xing 0', 2), ('lame -b 96', 2), ('lame --abr 80 -t', 2),
            ('sox', 2)),
    'm4a': (('ffmpeg -c:a aac', 6),),
}
_MOST_DELAY = 2400  # samples of coders that decoders keep or drop as they like
_OPUS_SEEKS = 5e-3  # in tones Opus predicts from so far back that its decoder is never quite as if it had begun before


def _sound(rng) -> tuple[np.ndarray, int]:
  """([channels, samples], rate): tones, one for each channel, with bursts and silences."""
  channels = rng.choice((1, 1, 2, 2, 2, 2, 3, 4, 5, 6, 6, 7, 8))
  rate = rng.choice((8000, 22050, 32000, 44100, 44100, 48000))
  samples = rng.choice((1, 100, 1152, rate // 3, 3 * rate, 3 * rate + 1, 7 * rate + 577, 12 * rate))
  noise, t = np.random.default_rng(rng.randrange(2**32)), np.arange(samples) / rate
  lfe = 3 if channels >= 6 else None
  audio = np.stack([.2 * np.sin(2 * np.pi * (55 if i == lfe else 330 * (i + 2) ** .8) * t) for i in range(channels)])
  for _ in range(rng.choice((0, 0, 3, 30))):
    start, length = rng.randrange(samples), rng.choice((200, 2000, rate))
    part = audio[:, start:start + length]
    part += .3 * noise.standard_normal(part.shape) * np.exp(-np.arange(part.shape[1]) / 1000)
  if rng.random() < .3:
    audio[:, samples // 4:samples // 2] = 0
  return np.clip(audio, -1, 1).astype(np.float32), rate


def _run(command, **more):
  return subprocess.run(command, check=True, capture_output=True, **more).stdout


def _write(wav, target, command, *, channels, quality, piped):
  program, *options = command.format(10 * quality, 9 * quality).split()
  kind = target.suffix[1:]
  if program == 'ffmpeg':
    layout = ['-mapping_family', '1'] if kind == 'opus' and channels > 2 else []
    forms = {'aiff': 'aiff', 'm4a': 'ipod'}
    out = ['-f', forms.get(kind, kind), '-'] if piped else [str(target)]
    data = _run(['ffmpeg', '-v', 'error', '-y', '-channel_layout', _LAYOUTS[channels], '-i', str(wav), *options,
                 *layout, *out])
    if piped:
      target.write_bytes(data)
  elif program == 'sox':
    _run(['sox', '-D', str(wav), *options, str(target)])
  elif program == 'lame':
    _run(['lame', '--quiet', *options, str(wav), str(target)])
  elif program == 'oggenc':
    _run(['oggenc', '-Q', *options, '-o', str(target), str(wav)])
  elif program == 'opusenc':
    _run(['opusenc', '--quiet', str(wav), str(target)])
  elif piped:
    target.write_bytes(_run(['flac', '-s', '-c', '-'], input=wav.read_bytes()))
  else:
    _run(['flac', '-s', '-f', '-o', str(target), str(wav)])


def _by_ffmpeg(path, channels) -> np.ndarray:
  data = subprocess.run(['ffmpeg', '-v', 'quiet', '-i', str(path), '-map', '0:a:0', '-f', 'f32le', '-'], check=False,
                        capture_output=True).stdout
  return np.frombuffer(data[:len(data) // (4 * channels) * 4 * channels], np.float32).reshape(-1, channels).T


def _by_reference(path, channels) -> np.ndarray | None:
  """What the program of a format's own library decodes; None: there is none. (FFmpeg's own GSM decoder wraps around
  where libgsm, which sox has, saturates.)"""
  import soundfile
  wav = path.with_name('reference.wav')
  commands = {'.opus': ['opusdec', '--quiet', '--rate', '48000', '--float', '--force-wav', str(path), str(wav)],
              '.ogg': ['oggdec', '-Q', '-o', str(wav), str(path)],
              '.wav': ['sox', '-D', str(path), '-e', 'float', '-b', '32', str(wav)]}
  command = commands.get(path.suffix)
  if not command or not shutil.which(command[0]):
    return None
  subprocess.run(command, check=False, capture_output=True)
  if not wav.exists():
    return None
  audio, _ = soundfile.read(wav, dtype='float32', always_2d=True)
  return audio.T if audio.shape[1] == channels else None


def _difference(audio, expected, *, chained=False) -> str | None:
  """What tells them apart: the channels' order, the length, the samples."""
  lengths = audio.shape[1], expected.shape[1]
  if abs(lengths[0] - lengths[1]) > _MOST_DELAY * (2 if chained else 1):
    return f'length {lengths[0]}, not {lengths[1]}'
  if lengths[0] != lengths[1]:
    if chained:  # each stream may begin later
      audio, expected = audio[:, :lengths[0] // 2], expected[:, :lengths[1] // 2]
    audio, expected = _aligned(audio, expected)
  if audio.shape[1] < 2000:
    return None
  audio, expected = audio.astype(np.float64), expected.astype(np.float64)
  power = np.abs(np.fft.rfft(audio)), np.abs(np.fft.rfft(expected))
  power = [p / np.maximum(np.linalg.norm(p, axis=1, keepdims=True), 1e-9) for p in power]
  likeness = power[0] @ power[1].T
  nearest = np.argmax(likeness, axis=1)
  if np.any(np.max(likeness, axis=1) > np.diagonal(likeness) + .01):  # equal channels, as of silence, have no order
    return f'channels in the order {nearest.tolist()}'
  error = np.abs(audio - expected)
  if np.quantile(error, .99) > 2e-3:
    return f'samples: 99 of 100 within {np.quantile(error, .99):.2g}, all within {error.max():.2g}'
  return None


def _aligned(audio, expected) -> tuple[np.ndarray, np.ndarray]:
  """Both without what one of them has before the other begins, or behind its end."""
  size = audio.shape[1] + expected.shape[1]
  cross = np.fft.irfft(np.sum(np.fft.rfft(audio, size) * np.fft.rfft(expected, size).conj(), axis=0), size)
  lags = np.arange(-_MOST_DELAY, _MOST_DELAY + 1)
  lag = int(lags[np.argmax(cross[lags % size])])
  audio, expected = audio[:, max(0, lag):], expected[:, max(0, -lag):]
  most = min(audio.shape[1], expected.shape[1])
  return audio[:, :most], expected[:, :most]


def _fuzz_one(rng, folder, counts) -> list[str]:
  """The faults of one random file, and counts what it was."""
  import soundfile

  from m2l2.data import audio_io
  from m2l2.errors import UserError
  audio, rate = _sound(rng)
  kind = rng.choice(list(_WRITERS))
  command, most = rng.choice([writer for writer in _WRITERS[kind] if shutil.which(writer[0].split()[0])])
  audio = audio[:most]
  soundfile.write(folder / 'in.wav', audio.T, rate, subtype='PCM_16')
  piped = kind in ('wav', 'flac') and command.split()[0] in ('ffmpeg', 'flac') and rng.random() < .3
  target, quality = folder / f'a.{kind}', rng.random()
  _write(folder / 'in.wav', target, command, channels=len(audio), quality=quality, piped=piped)
  expected = _by_ffmpeg(target, len(audio))
  treatment = rng.choice(('', '', '', 'chained', 'cut'))
  if treatment == 'chained' and kind in ('m4a', 'wav', 'aiff') or treatment == 'cut' and (
      kind in ('m4a', 'flac') or piped or expected.shape[1] < rate):
    treatment = ''
  data, alone = target.read_bytes(), target
  if treatment == 'chained':
    alone = folder / f'alone.{kind}'
    alone.write_bytes(data)
    target.write_bytes(2 * data)
    expected = np.concatenate([expected, expected], axis=1)
  elif treatment == 'cut':
    target.write_bytes(data[:len(data) * 2 // 3])
    expected = _by_ffmpeg(target, len(expected))
  what = (f'{kind} by {command}, {len(audio)} channels, {rate} Hz, {audio.shape[1]} samples '
          f'{"piped " * piped}{treatment}')
  counts[f'{kind} by {command.split()[0]}'] += 1
  counts[treatment or 'whole'] += 1
  try:
    with audio_io.AudioReader(target) as reader:
      full = np.concatenate(list(reader.blocks(block_samples=rng.choice((1000, 65536, 2**20)))), axis=1)
      note = reader.note
    faults = [_difference(full, expected, chained=treatment == 'chained')]
    if faults[0] and (reference := _by_reference(alone, len(full))) is not None:
      if treatment == 'chained':
        reference = np.concatenate([reference, reference], axis=1)
      if not _difference(full, reference, chained=treatment == 'chained'):
        faults[0] = None
        counts[f'{kind} as the format\'s own library has it, not FFmpeg'] += 1
    chained_mp3 = kind == 'mp3' and treatment == 'chained'
    if faults[0] and chained_mp3 and not _difference(full, _by_ffmpeg(target, len(full))):
      faults[0] = None  # the decoder goes on, so the first frame of the second file has some of the first file's last
      counts['chained MP3 as FFmpeg has both together'] += 1
    if treatment == 'cut' and not note:
      with audio_io.AudioReader('', data=data[:len(data) * 2 // 3 + 1]) as reader:
        note = reader.note if kind == 'mp3' else None
      if note:
        counts['cut just between two frames of an MP3 without a length, of which nothing can be said'] += 1
      else:
        faults.append('cut short, and nothing is said')
    again, _ = audio_io.read(target)
    if not np.array_equal(full, again):
      faults.append(f'blocks differ from the whole by {np.abs(full - again[:, :full.shape[1]]).max():.2g}')
    for _ in range(10):
      start = rng.randrange(full.shape[1])
      frames = min(rng.choice((1, 500, 5000)), full.shape[1] - start)
      part, _ = audio_io.read(target, start=start, frames=frames)
      error = np.abs(part - full[:, start:start + frames]).max()
      if error > (_OPUS_SEEKS if kind == 'opus' else 1e-6 if 'mp3' in kind + command else 0):
        faults.append(f'a read at {start} differs by {error:.2g}')
        break
  except UserError as error:
    if not expected.shape[1]:
      counts['refused in one line, of which FFmpeg decodes no sample'] += 1
      return []
    faults = [f'refused, of which FFmpeg decodes {expected.shape[1]} samples: {error}']
  except Exception as error:  # whatever it is, it is a fault here
    faults = [f'{type(error).__name__}: {error}']
  return [f'{what}: {fault}' for fault in faults if fault]


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--files', type=int, default=100)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--first', type=int, default=0, help='the number to begin with: goes on, or repeats one')
  parser.add_argument('--keep', help='a directory for the files that differ')
  args = parser.parse_args()
  logging.set_verbosity(logging.ERROR)
  counts, faults, refused, number = collections.Counter(), [], 0, args.first - 1
  for number in range(args.first, args.first + args.files):
    with tempfile.TemporaryDirectory() as folder:
      try:
        outcome = _fuzz_one(random.Random(args.seed * 10**6 + number), pathlib.Path(folder), counts)
      except subprocess.CalledProcessError:  # the writer does not take such a sound
        refused += 1
        continue
      except KeyboardInterrupt:  # enough: the figures so far
        number -= 1
        break
      for fault in outcome:
        print(f'{number}: {fault}', flush=True)
      faults += [fault.partition(': ')[2][:40] for fault in outcome[:1]]
      if outcome and args.keep:
        shutil.copytree(folder, os.path.join(args.keep, str(number)), dirs_exist_ok=True)
  read = number + 1 - args.first - refused
  print(f'{read} files read ({refused} not taken by their writers), {len(faults)} with faults; '
        + ', '.join(f'{name}: {count}' for name, count in sorted(counts.items())))
  return 1 if faults else 0


if __name__ == '__main__':
  sys.exit(main())
