"""Damages audio files: what a hostile or broken corpus holds. Not a test by itself."""

import random
import struct

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
