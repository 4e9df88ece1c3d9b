"""WAV and AIFF: files of chunks, whose headers may state a wrong length."""

import struct

from m2l2.data.containers import mp3
from m2l2.data.containers.parts import Contents, Part

_GSM_BYTES, _GSM_SAMPLES = 65, 320  # of a block


def contents(buffer, order) -> Contents:
  """Corrects a length that is 0 although samples follow, or that is longer than the file."""
  at, size, width, name = 12, len(buffer), 0, b'data' if order == '<' else b'SSND'
  is_gsm = False
  while at + 8 <= size:
    kind, length = struct.unpack_from(f'{order}4sI', buffer, at)
    if kind == b'fmt ':
      width, = struct.unpack_from('<H', buffer, at + 20)
      codec, = struct.unpack_from('<H', buffer, at + 8)
      is_gsm = codec == 0x31
      if codec == 0x55:  # MP3, whose length libsndfile estimates here
        place = buffer.find(b'data', at)
        return mp3.contents(buffer, place + 8) if place > 0 else Contents()
    elif kind == b'COMM':
      channels, _, bits = struct.unpack_from('>HIH', buffer, at + 8)
      width = channels * -(-bits // 8)
    elif kind == name:
      there = size - at - 8
      if not length and there >= max(1, width) and not _ends_well(buffer, at + 8, order):
        patch = bytes(buffer[12:at + 4]) + struct.pack(f'{order}I', there)
        return Contents((Part((bytes(buffer[:4]) + struct.pack(f'{order}I', size - 8) + bytes(buffer[8:12]) + patch,
                               (at + 8, size))),))
      # A writer to a pipe does not know the length and states 2^31 or 2^32 less some bytes.
      if there < length < 2**31 - 2**16 and width:
        return Contents(stated=(length - there) // width)
      # sox counts the pad byte, libsndfile plays it as a block
      if is_gsm and 0 < length % _GSM_BYTES < length <= there:
        return Contents((Part(((0, size),), frames=length // _GSM_BYTES * _GSM_SAMPLES),))
      return Contents()
    at += 8 + length + length % 2
  return Contents()


def _ends_well(buffer, at, order) -> bool:
  """Whether the rest of the file consists of further chunks."""
  while at + 8 <= len(buffer):
    kind, length = struct.unpack_from(f'{order}4sI', buffer, at)
    if not kind.isascii() or not kind.decode().isprintable():
      return False
    at += 8 + length + length % 2
  return len(buffer) <= at <= len(buffer) + 1
