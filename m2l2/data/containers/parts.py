"""The contents of a file: its parts, each as pieces of the file that libsndfile can read."""

import bisect
from collections.abc import Sequence
import dataclasses
import io
import mmap

Buffer = bytes | mmap.mmap
Piece = bytes | tuple[int, int]  # bytes of our own, or [begin, end) of the file

MOST_PARTS = 1000  # a file of more is damaged, not chained


@dataclasses.dataclass(frozen=True)
class Part:
  """One stream of a file.

  Attributes:
    pieces: the bytes to pass to libsndfile, in order.
    order: for each channel of WAV's order its index in the stream; empty: the stream has that order.
    skip: samples at the beginning to drop.
    frames: samples after them; 0: as many as libsndfile decodes.
    positions, offsets: of Vorbis: decoding from the page at the offset begins with the sample at the position.
      Ascending.
    header: of Vorbis: the piece to put before such a page.
    end: of Vorbis: the end of the part.
  """
  pieces: tuple[Piece, ...]
  order: Sequence[int] = ()
  skip: int = 0
  frames: int = 0
  positions: Sequence[int] = ()
  offsets: Sequence[int] = ()
  header: tuple[int, int] = (0, 0)
  end: int = 0

  @property
  def is_indexed(self) -> bool:
    return bool(self.end)

  def before(self, position: int) -> tuple[int, tuple[Piece, ...]]:
    """(position of the first sample, pieces) of a short part of the stream that leads to a sample."""
    number = bisect.bisect_right(self.positions, position) - 1
    if number < 0:
      return 0, self.pieces
    return self.positions[number], (self.header, (self.offsets[number], self.end))


@dataclasses.dataclass(frozen=True)
class Contents:
  """Attributes: parts, in order, empty if libsndfile reads the file correctly; stated: samples that the header states
  beyond those that exist; unended: whether the last stream lacks its end mark, or ends inside a frame; foreign: the
  offset of an appended file of another kind, which is not read; 0: none."""
  parts: tuple[Part, ...] = ()
  stated: int = 0
  unended: bool = False
  foreign: int = 0


# Vorbis and Opus have an order of channels of their own: of 5.1 left, centre, right, back left, back right, LFE.
# By the number of channels: which of WAV's channels each of the stream's is.
XIPH_ORDER = {3: (0, 2, 1), 5: (0, 2, 1, 3, 4), 6: (0, 2, 1, 4, 5, 3), 7: (0, 2, 1, 5, 6, 4, 3),
              8: (0, 2, 1, 6, 7, 4, 5, 3)}


class Joined(io.RawIOBase):
  """Pieces of a file as one read-only file object. The buffer must outlive it."""

  def __init__(self, buffer: Buffer, pieces: Sequence[Piece]):
    self._views = [memoryview(piece) if isinstance(piece, bytes) else memoryview(buffer)[piece[0]:piece[1]]
                   for piece in pieces]
    self._starts = [0]
    for view in self._views:
      self._starts.append(self._starts[-1] + len(view))
    self._position = 0

  def readable(self):
    return True

  def seekable(self):
    return True

  def tell(self):
    return self._position

  def seek(self, offset, whence=io.SEEK_SET):
    self._position = max(0, offset + (0, self._position, self._starts[-1])[whence])
    return self._position

  def readinto(self, out):
    out, done = memoryview(out).cast('B'), 0
    while done < len(out) and self._position < self._starts[-1]:
      number = bisect.bisect_right(self._starts, self._position) - 1
      part = self._views[number][self._position - self._starts[number]:][:len(out) - done]
      out[done:done + len(part)] = part
      done += len(part)
      self._position += len(part)
    return done

  def close(self):
    for view in self._views:
      view.release()
    super().close()
