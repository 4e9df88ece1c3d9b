"""FLAC: chained streams, the length of a stream that states none, and positions of frames."""

import re

from m2l2.data.containers.checksum import crc
from m2l2.data.containers.parts import MOST_PARTS, Contents, Part

_TAIL = 2**17  # bytes at the end of a FLAC in which its last frame begins
_START = re.compile(rb'fLaC[\x00\x80]\x00\x00\x22')
_FRAME = re.compile(rb'\xff[\xf8\xf9]')


def contents(buffer, *, whole) -> Contents:
  """Each stream with its length; none if the first states its length and no other is seen."""
  stated = int.from_bytes(buffer[21:26], 'big') & 2**36 - 1
  if stated and not whole and next(_ends(buffer, 0, len(buffer)), 0) == stated:
    return Contents()
  starts = [match.start() for match in _START.finditer(buffer)]
  if not starts or starts[0] or len(starts) > MOST_PARTS or stated and len(starts) == 1:
    return Contents()
  return Contents(tuple(_part(buffer, begin, end)
                        for begin, end in zip(starts, [*starts[1:], len(buffer)], strict=True)))


def _part(buffer, begin, end) -> Part:
  """One stream; if it states no length, with that of its last frame."""
  head = bytearray(buffer[begin:begin + 26])
  if not int.from_bytes(head[21:], 'big') & 2**36 - 1:
    length = next(_ends(buffer, begin, end, sure=True), 0)
    head[21:] = (int.from_bytes(head[21:], 'big') | length).to_bytes(5, 'big')
  return Part((bytes(head), (begin + 26, end)))


def _ends(buffer, begin, end, *, sure=False):
  """The ends of frames at the end of a stream, in samples, the last first. With `sure`, only of complete frames."""
  low = max(begin + 42, end - _TAIL)
  tail = bytes(buffer[low:end])
  block, channels = int.from_bytes(buffer[begin + 8:begin + 10], 'big'), (buffer[begin + 20] >> 1 & 7) + 1
  for match in reversed(list(_FRAME.finditer(tail))):
    at = match.start()
    frame_end = _frame_end(tail[at:at + 17], block, channels)
    if frame_end and not (sure and crc(tail[at:], 16, 0x8005)):
      yield frame_end


def _frame_end(head, block, channels) -> int | None:
  """The sample after a frame, by its header; None: not a frame."""
  if len(head) < 6:  # the last bytes of a stream, a checksum that looks like a frame's beginning
    return None
  code, layout = head[2] >> 4, head[3] >> 4
  if not code or layout > 10 or head[3] & 1 or head[2] & 15 == 15 or (layout + 1 if layout < 8 else 2) != channels:
    return None
  extra = 0 if head[4] < 0x80 else 7 - (head[4] ^ 0xff).bit_length()
  at = 5 + extra
  number = head[4] & (0x7f >> extra + 1 if extra else 0x7f)
  for byte in head[5:at]:
    number = number << 6 | byte & 63
  if code in (6, 7):
    size, at = int.from_bytes(head[at:at + code - 5], 'big') + 1, at + code - 5
  else:
    size = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
  at += {12: 1, 13: 2, 14: 2}.get(head[2] & 15, 0)
  if at >= len(head) or crc(head[:at + 1], 8, 0x07):
    return None
  return (number if head[1] & 1 else number * block) + size


def flac_frames(data: bytes, *, channels: int) -> tuple[int, list[int]]:
  """(samples per frame, offset of each frame) of a FLAC whose frames, but the last, have equal lengths.

  Raises ValueError: not such a FLAC.
  """
  if not _START.match(data):
    raise ValueError('it is no FLAC')
  block, at, last = int.from_bytes(data[8:10], 'big'), 4, False
  while not last:
    last, at = data[at] >= 0x80, at + 4 + int.from_bytes(data[at + 1:at + 4], 'big')
  offsets = [at]
  for match in _FRAME.finditer(data, at + 1):
    place = match.start()
    end = _frame_end(data[place:place + 17], block, channels) or 0
    number = (end - 1) // block
    if number == len(offsets):
      offsets.append(place)
    elif number == len(offsets) - 1 and number:  # two places look like the start of the same frame: one of them is
      offsets[-1:] = [place if crc(data[offsets[-2]:offsets[-1]], 16, 0x8005) else offsets[-1]]
  return block, offsets


def flac_header(*, block: int, rate: int, channels: int, samples: int) -> bytes:
  """The header that makes a FLAC of frames of 16 bits."""
  facts = rate << 44 | channels - 1 << 41 | 15 << 36 | samples
  return b'fLaC\x80\0\0\x22' + 2 * block.to_bytes(2, 'big') + bytes(6) + facts.to_bytes(8, 'big') + bytes(16)
