"""Parsing of headers: the parts of a file, its true length, and positions from which decoding is exact.

libsndfile reads only the first of chained streams, estimates the length of an MP3 without a Xing header, knows no
length of a FLAC or WAV that was written to a pipe, and misses by up to a block when it seeks in Vorbis. Headers tell
all of
that without decoding: `inspect` reads them and lists the bytes to pass to libsndfile instead. All functions are pure;
offsets are in bytes of the file, positions and lengths in samples.
"""

import dataclasses
import struct

from m2l2.data.containers import chunks, flac, mp3, ogg
from m2l2.data.containers.flac import flac_frames, flac_header
from m2l2.data.containers.parts import XIPH_ORDER, Buffer, Contents, Joined, Part, Piece

__all__ = ['Buffer', 'Contents', 'Joined', 'Part', 'Piece', 'XIPH_ORDER', 'flac_frames', 'flac_header', 'inspect']


def inspect(buffer: Buffer, *, whole: bool = True) -> Contents:
  """The Contents of a file. Without `whole`, it is not searched for chained streams if that takes reading all of its
  bytes. Raises no error for the contents of a file: unknown formats are left to libsndfile."""
  contents = _inside(buffer, whole)
  return dataclasses.replace(contents, foreign=_foreign(buffer)) if whole else contents


def _foreign(buffer) -> int:
  """The offset of an appended WAV, FLAC or Ogg of another kind than the beginning; 0: there is none."""
  for magic, after, more in ((b'RIFF', 8, b'WAVE'), (b'fLaC', 4, bytes(3)), (b'OggS', 4, b'\0\2')):
    if buffer[:4] == magic:
      continue
    at = buffer.find(magic, 12)
    while at > 0:
      # FLAC inside Ogg has FLAC's magic in its first page; FLAC may keep the header of the WAV that it was made of.
      if (buffer[at + after:at + after + len(more)] == more and buffer[at - 9:at - 4] != b'\x7fFLAC'
          and buffer[at - 4:at] != b'riff'):
        return at
      at = buffer.find(magic, at + 4)
  return 0


def _inside(buffer, whole) -> Contents:
  magic = bytes(buffer[:12])
  try:
    if magic[:4] in (b'RIFF', b'FORM') and magic[8:] in (b'WAVE', b'AIFF', b'AIFC'):
      return chunks.contents(buffer, '<' if magic[:4] == b'RIFF' else '>')
    if magic[:4] == b'OggS':
      return ogg.contents(buffer)
    if magic[:4] == b'fLaC':
      return flac.contents(buffer, whole=whole)
    if magic[:3] == b'ID3' or magic[:1] == b'\xff':
      return mp3.contents(buffer)
  except (IndexError, struct.error, ZeroDivisionError):  # a truncated or false header
    pass
  return Contents()
