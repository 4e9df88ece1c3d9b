"""MP3: runs of frames, and the true length if the header states none or a longer one."""

import re
import struct

from m2l2.data.containers.parts import MOST_PARTS, Contents, Part

_KBIT = {True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
         False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
_RATES = (44100, 48000, 32000)
_FRAME = re.compile(rb'\xff[\xe2\xe3\xf2\xf3\xfa\xfb]')
_PADDING = 100  # frames
_SURE = 4  # frames in a row that are no coincidence


def _frame_bytes(header: bytes) -> int:
  """The length in bytes of a Layer III frame, by its header of 4 bytes; 0: not a frame, or no stated length."""
  version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
  kbit, rate = header[2] >> 4, header[2] >> 2 & 3
  if header[0] != 0xff or header[1] < 0xe0 or version == 1 or layer != 1 or kbit in (0, 15) or rate == 3:
    return 0
  first = version == 3
  rate = _RATES[rate] >> (0 if first else 1 if version == 2 else 2)
  return (144000 if first else 72000) * _KBIT[first][kbit] // rate + (header[2] >> 1 & 1)


def _side_info(header) -> int:
  return ((17 if header[3] >> 6 == 3 else 32) if header[1] >> 3 & 3 == 3 else (9 if header[3] >> 6 == 3 else 17))


def _alike(header: bytes) -> tuple[int, int]:
  """The fields that are equal in all frames of a stream: version, layer and rate."""
  return header[1] & 0xfe, header[2] & 0x0c


def contents(buffer, at=0) -> Contents:
  """Each run of frames from the offset on; none if there is one run and its header states everything."""
  helped, unended, lacking, at = bool(at), False, 0, _next_run(buffer, at)
  parts: list[Part] = []
  while at is not None and len(parts) <= MOST_PARTS:
    stated = _xing(buffer, at)
    if stated and stated[0]:
      end = min(len(buffer), at + stated[1]) if stated[1] else len(buffer)
      frames = 0
      if at + stated[1] > len(buffer):
        frame_count, size = _run(buffer, at)[0] - 1, _frame_samples(buffer, at)
        if frame_count < stated[0]:
          frames, lacking = max(1, frame_count * size - _lead(buffer, at)), (stated[0] - frame_count) * size
      helped |= lacking > 0
      parts.append(Part(((at, end),), frames=frames))
    else:
      begin = at + _frame_bytes(buffer[at:at + 4]) if stated else at  # a Xing or VBRI header without a length
      frames, end = _run(buffer, begin)
      rest = bytes(buffer[end:end + 4])
      unended = len(buffer) < end + _frame_bytes(rest) if len(rest) == 4 else (
          rest != b'' and rest[:2] == bytes(buffer[begin:begin + len(rest[:2])]))  # of a header
      if frames:
        # mpg123 takes all frames for as long as the first, and reads no more of them than would fit: so the shortest
        # comes first, and more of them follow than rounding could take away.
        silent, size = _silent_frame(buffer[begin:begin + 4]), _frame_samples(buffer, begin)
        parts.append(Part((silent, (begin, end), _PADDING * silent), skip=size, frames=frames * size))
      helped = True
    at = _next_run(buffer, max(end, at + 1))
  if not parts or len(parts) > MOST_PARTS or len(parts) == 1 and not helped:
    return Contents()
  return Contents(tuple(parts), stated=lacking, unended=unended)


def _next_run(buffer, at) -> int | None:
  """The offset of the next run of at least _SURE frames, or of fewer until the end."""
  while buffer[at:at + 3] == b'ID3' and at + 10 <= len(buffer):
    a, b, c, d = buffer[at + 6:at + 10]
    at += 10 + (a << 21 | b << 14 | c << 7 | d)
  for match in _FRAME.finditer(buffer, at):
    begin, count = match.start(), 0
    place, kind = begin, _alike(buffer[begin:begin + 4]) if begin + 4 <= len(buffer) else None
    while count < _SURE and place + 4 <= len(buffer):
      header = buffer[place:place + 4]
      size = _frame_bytes(header)
      if not size or _alike(header) != kind or place + size > len(buffer):
        break
      place, count = place + size, count + 1
    if count == _SURE:
      return begin
  return None


def _run(buffer, at) -> tuple[int, int]:
  """(count, end) of the frames from here on without a gap, a new header or another rate."""
  sizes: dict[bytes, int] = {}
  kind, count, size = _alike(buffer[at:at + 4]) if at + 4 <= len(buffer) else (0, 0), 0, len(buffer)
  while at + 4 <= size:
    header = bytes(buffer[at:at + 4])
    length = sizes.get(header)
    if length is None:
      length = sizes[header] = _frame_bytes(header) if _alike(header) == kind else 0
    if not length or at + length > size or count and _xing(buffer, at):
      break
    at, count = at + length, count + 1
  return count, at


def _xing(buffer, at) -> tuple[int, int] | None:
  """(frames, bytes) stated by a Xing header in a frame, 0 if not stated; None: no such header."""
  header = buffer[at:at + 4]
  place = at + 4 + _side_info(header)
  if buffer[place:place + 4] in (b'Xing', b'Info'):
    flags, *fields = struct.unpack_from('>3I', buffer, place + 4)
    frames = fields[0] if flags & 1 else 0
    return frames, (fields[flags & 1] if flags & 2 else 0)
  if buffer[at + 36:at + 40] == b'VBRI':
    return 0, 0
  return None


def _frame_samples(buffer, at) -> int:
  return 1152 if buffer[at + 1] >> 3 & 3 == 3 else 576


def _lead(buffer, at) -> int:
  """The samples that a decoder drops at the beginning, by LAME's and FFmpeg's header, of which 529 are its own
  delay."""
  place = at + 4 + _side_info(buffer[at:at + 4]) + 141
  return (int.from_bytes(buffer[place:place + 3], 'big') >> 12) + 529


def _silent_frame(header: bytes) -> bytes:
  """The shortest silent frame of a stream with this header."""
  mine = bytes([header[0], header[1] | 1, 1 << 4 | header[2] & 0x0c, header[3]])
  return mine.ljust(_frame_bytes(mine), b'\0')
