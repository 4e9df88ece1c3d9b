"""What the bytes of a file say where libsndfile does not look: its parts, its true length, safe places to decode from.

libsndfile reads the first of chained streams, believes an estimate of the length of an MP3 without a Xing header, knows
no length of a FLAC or WAV that went through a pipe, and misses by up to a block where it seeks in Vorbis. All of that
can be told from headers, without decoding. `inspect` does, and says which bytes to hand to libsndfile instead. All
functions are pure; offsets are in bytes of the file, positions and lengths in samples.
"""

from array import array
import bisect
from collections.abc import Sequence
import dataclasses
import io
import mmap
import re
import struct

Buffer = bytes | mmap.mmap
Piece = bytes | tuple[int, int]  # bytes of our own, or [begin, end) of the file

_MOST_PARTS = 1000  # beyond them a file is damaged, not chained
_APART = 2**16  # samples from one place of a Vorbis stream to the next
_FLAC_TAIL = 2**17  # bytes at the end of a FLAC in which its last frame begins


@dataclasses.dataclass(frozen=True)
class Part:
  """One stream of a file.

  Attributes:
    pieces: what to hand to libsndfile for it, in order.
    order: where the channels of WAV's order are among the stream's; empty: they are in that order.
    skip: samples at the beginning that are not the file's.
    frames: samples after them that are, 0: as libsndfile finds.
    positions, offsets: of Vorbis: pages; who decodes from the one at the offset on gets the sample at the position
      first. Ascending.
    header: of Vorbis: the piece that must stand before such a page.
    end: of Vorbis: where the part ends.
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
    """(position of its first sample, pieces) of a short way to a sample."""
    number = bisect.bisect_right(self.positions, position) - 1
    if number < 0:
      return 0, self.pieces
    return self.positions[number], (self.header, (self.offsets[number], self.end))


@dataclasses.dataclass(frozen=True)
class Contents:
  """Attributes: parts, in order, none where libsndfile needs no help; stated: samples that the header of a file
  promises beyond those that are there; unended: whether the last stream lacks its end mark, or ends inside a frame;
  foreign: where a file of another kind begins behind this one, which nobody reads; 0: none does."""
  parts: tuple[Part, ...] = ()
  stated: int = 0
  unended: bool = False
  foreign: int = 0


# Vorbis and Opus have an order of channels of their own: of 5.1 left, centre, right, back left, back right, LFE.
# By the number of channels: which of WAV's channels each of the stream's is.
XIPH_ORDER = {3: (0, 2, 1), 5: (0, 2, 1, 3, 4), 6: (0, 2, 1, 4, 5, 3), 7: (0, 2, 1, 5, 6, 4, 3),
              8: (0, 2, 1, 6, 7, 4, 5, 3)}


class Joined(io.RawIOBase):
  """Pieces of a file as one file, to be read only. The buffer must outlive it."""

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


def inspect(buffer: Buffer, *, whole: bool = True) -> Contents:
  """What is in a file. Without `whole` it is not searched for a second one behind it where that takes all of its
  bytes. Never raises for what a file holds: what is not understood is libsndfile's affair."""
  contents = _inside(buffer, whole)
  return dataclasses.replace(contents, foreign=_foreign(buffer)) if whole else contents


def _foreign(buffer) -> int:
  """Where a WAV, FLAC or Ogg begins that is of another kind than the beginning; 0: nowhere."""
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
      return _chunks(buffer, '<' if magic[:4] == b'RIFF' else '>')
    if magic[:4] == b'OggS':
      return _ogg(buffer)
    if magic[:4] == b'fLaC':
      return _flac(buffer, whole=whole)
    if magic[:3] == b'ID3' or magic[:1] == b'\xff':
      return _mp3(buffer)
  except (IndexError, struct.error, ZeroDivisionError):  # a header cut short, or a lie in it
    pass
  return Contents()


# ---- WAV and AIFF ----------------------------------------------------------------------------------


def _chunks(buffer, order) -> Contents:
  """A length that is 0 though samples follow, or one that promises more than there is."""
  at, size, width, name = 12, len(buffer), 0, b'data' if order == '<' else b'SSND'
  while at + 8 <= size:
    kind, length = struct.unpack_from(f'{order}4sI', buffer, at)
    if kind == b'fmt ':
      width, = struct.unpack_from('<H', buffer, at + 20)
      if struct.unpack_from('<H', buffer, at + 8)[0] == 0x55:  # MP3, of which libsndfile guesses the length here
        place = buffer.find(b'data', at)
        return _mp3(buffer, place + 8) if place > 0 else Contents()
    elif kind == b'COMM':
      channels, _, bits = struct.unpack_from('>HIH', buffer, at + 8)
      width = channels * -(-bits // 8)
    elif kind == name:
      there = size - at - 8
      if not length and there >= max(1, width) and not _ends_well(buffer, at + 8, order):
        patch = bytes(buffer[12:at + 4]) + struct.pack(f'{order}I', there)
        return Contents((Part((bytes(buffer[:4]) + struct.pack(f'{order}I', size - 8) + bytes(buffer[8:12]) + patch,
                               (at + 8, size))),))
      # What a writer to a pipe states, who cannot know: 2^31 or 2^32 less some bytes.
      if there < length < 2**31 - 2**16 and width:
        return Contents(stated=(length - there) // width)
      return Contents()
    at += 8 + length + length % 2
  return Contents()


def _ends_well(buffer, at, order) -> bool:
  """Whether further chunks, and nothing else, go from here to the end."""
  while at + 8 <= len(buffer):
    kind, length = struct.unpack_from(f'{order}4sI', buffer, at)
    if not kind.isascii() or not kind.decode().isprintable():
      return False
    at += 8 + length + length % 2
  return len(buffer) <= at <= len(buffer) + 1


# ---- Ogg -------------------------------------------------------------------------------------------

_OPUS_RATE = (48000).to_bytes(4, 'little')


@dataclasses.dataclass(frozen=True)
class _Page:
  offset: int
  body: int  # where its packets begin
  flags: int  # 1: begins inside a packet, 2: first of a stream, 4: its last
  granule: int
  serial: int
  lacing: bytes


def _pages(buffer) -> list[_Page]:
  at, pages = 0, []
  while at >= 0 and at + 27 <= len(buffer):
    magic, _, flags, granule, serial, _, _, count = struct.unpack_from('<4sBBqIIIB', buffer, at)
    if magic != b'OggS':
      at = buffer.find(b'OggS', at + 1)
      continue
    lacing = bytes(buffer[at + 27:at + 27 + count])
    body = at + 27 + count
    if body + sum(lacing) > len(buffer):
      break
    pages.append(_Page(at, body, flags, granule, serial, lacing))
    at = body + sum(lacing)
  return pages


def _ogg(buffer) -> Contents:
  pages, streams = _pages(buffer), []
  for number, page in enumerate(pages):
    if page.flags & 2 and (not number or not pages[number - 1].flags & 2):
      streams.append([])
    if not streams:
      return Contents()
    streams[-1].append(page)
  if not 1 <= len(streams) <= _MOST_PARTS or any(len({page.serial for page in stream}) > 1 for stream in streams):
    return Contents()  # streams beside each other, as in a film
  ends = [stream[0].offset for stream in streams[1:]] + [len(buffer)]
  parts = tuple(_ogg_part(buffer, stream, end) for stream, end in zip(streams, ends, strict=True))
  return Contents(parts, unended=not pages[-1].flags & 4)


def _ogg_part(buffer, pages, end) -> Part:
  pieces, head = ((pages[0].offset, end),), bytes(buffer[pages[0].body:pages[0].body + 19])
  vorbis, channels = head[:7] == b'\x01vorbis', 0
  if head[:5] == b'\x7fFLAC' and head[9:13] == b'fLaC':
    return _flac_of_ogg(buffer, pages)
  if vorbis:
    channels = head[11]
  elif head[:8] == b'OpusHead' and head[18] == 1:
    channels = head[9]
  of_wav = XIPH_ORDER.get(channels, ())
  order = tuple(of_wav.index(channel) for channel in range(len(of_wav)))
  if not vorbis:
    if head[:8] == b'OpusHead' and head[12:16] != _OPUS_RATE:
      pieces = (_opus_page(buffer, pages[0]), (pages[0].body + sum(pages[0].lacing), end))
    return Part(pieces, order=order)
  sizes = buffer[pages[0].body + 28]
  sizes, modes, heads, position, last, first = (1 << (sizes & 15), 1 << (sizes >> 4)), [], 0, 0, 0, None
  positions, offsets, late, step = array('q'), array('q'), 0, 0
  whole = bytearray()  # the headers' packets
  for number, page in enumerate(pages):
    if heads < 3:
      packets = _packets(page)
      for begin, length, ended in packets:
        whole += buffer[begin:begin + length]
        if ended:
          heads += 1
          modes = _modes(bytes(whole)) if heads == 3 else modes
          whole = bytearray()
      if heads >= 3:
        first = number + 1
        if heads > 3 or not modes:
          return Part(pieces, order=order)
      continue
    start = None
    for begin, length, continued in _starts(page):
      if continued or not length or buffer[begin] & 1:
        continue
      block = sizes[modes[buffer[begin] >> 1 & (1 << (len(modes) - 1).bit_length()) - 1]]
      step, last = (last + block) // 4 if last else 0, block
      position += step
      start = position if start is None else start
    if start is not None and start >= (positions[-1] if positions else 0) + _APART:
      positions.append(start)
      offsets.append(page.offset)
    whole = page.lacing and page.lacing[-1] < 255
    if number == first and 0 <= page.granule < position and not page.flags & 4 and whole:
      # The encoder's lead, which decoders drop, but no more of it than the last packet gives: of what was cut out
      # without decoding the rest is read, and the end would be missing.
      late = max(0, position - page.granule - step)
      position = page.granule + late
  if first is None or first >= len(pages):
    return Part(pieces, order=order)
  header = pages[0].offset, pages[first].offset
  if late and pages[-1].granule > 0:
    pieces = ((pages[0].offset, pages[-1].offset), _ogg_page(buffer, pages[-1], granule=pages[-1].granule + late))
  return Part(pieces, order=order, positions=positions, offsets=offsets, header=header, end=end)


def _flac_of_ogg(buffer, pages) -> Part:
  """Its packets one after the other are a FLAC, which soundfile's library reads without Ogg alone. The pages know the
  length, which FFmpeg does not write into the header."""
  bodies = [(page.body, page.body + sum(page.lacing)) for page in pages]
  head = bytearray(buffer[bodies[0][0] + 9:bodies[0][1]])
  length = max(0, *(page.granule for page in pages))
  head[21:26] = (int.from_bytes(head[21:26], 'big') & ~(2**36 - 1) | length & 2**36 - 1).to_bytes(5, 'big')
  return Part((bytes(head), *bodies[1:]))


def _opus_page(buffer, page) -> bytes:
  """The first page of an Opus stream, at 48 kHz: libsndfile decodes at a rate near the one that was encoded, as 24 kHz
  of what was at 32 kHz, and with it half of the sound."""
  body = bytearray(buffer[page.body:page.body + sum(page.lacing)])
  body[12:16] = _OPUS_RATE
  return _ogg_page(buffer, page, body=body)


def _ogg_page(buffer, page, *, granule: int | None = None, body: bytes | None = None) -> bytes:
  """A page with another granule or another body of the same length."""
  data = bytearray(buffer[page.offset:page.body + sum(page.lacing)])
  if granule is not None:
    data[6:14] = granule.to_bytes(8, 'little')
  if body is not None:
    data[page.body - page.offset:] = body
  data[22:26] = bytes(4)
  data[22:26] = _crc(bytes(data), 32, 0x04c11db7).to_bytes(4, 'little')
  return bytes(data)


def _packets(page) -> list[tuple[int, int, bool]]:
  """(offset, length in this page, whether it ends here) of every packet or piece of one."""
  packets, at, length = [], page.body, 0
  for lace in page.lacing:
    length += lace
    if lace < 255:
      packets.append((at, length, True))
      at, length = at + length, 0
  return packets + [(at, length, False)] * (length > 0)


def _starts(page) -> list[tuple[int, int, bool]]:
  """(offset, length in this page, whether it began in an earlier one) of every packet."""
  return [(at, length, not number and bool(page.flags & 1)) for number, (at, length, _) in enumerate(_packets(page))]


def _modes(setup: bytes) -> list[int]:
  """Of each mode whether its blocks are long. They are the last of the setup header, so they are read from its end:
  a bit that is 1, then modes of (8 bits mapping, 16 + 16 bits zero, 1 bit size), before them 6 bits count - 1."""
  bits = int.from_bytes(setup, 'little')
  at = bits.bit_length() - 1
  modes: list[int] = []
  best: list[int] = []
  while at - 41 - 6 > 0 and len(modes) < 64:
    mode = bits >> at - 41 & (1 << 41) - 1
    if mode >> 1 & 0xffffffff or mode >> 33 > 63:
      break
    at -= 41
    modes.insert(0, mode & 1)
    if bits >> at - 6 & 63 == len(modes) - 1:
      best = list(modes)
  return best


# ---- FLAC ------------------------------------------------------------------------------------------

_FLAC_START = re.compile(rb'fLaC[\x00\x80]\x00\x00\x22')
_FLAC_FRAME = re.compile(rb'\xff[\xf8\xf9]')


def _flac(buffer, *, whole) -> Contents:
  stated = int.from_bytes(buffer[21:26], 'big') & 2**36 - 1
  if stated and not whole and next(_flac_ends(buffer, 0, len(buffer)), 0) == stated:
    return Contents()
  starts = [match.start() for match in _FLAC_START.finditer(buffer)]
  if not starts or starts[0] or len(starts) > _MOST_PARTS or stated and len(starts) == 1:
    return Contents()
  return Contents(tuple(_flac_part(buffer, begin, end)
                        for begin, end in zip(starts, [*starts[1:], len(buffer)], strict=True)))


def _flac_part(buffer, begin, end) -> Part:
  """One stream; where it states no length, with the one that its last frame gives away."""
  head = bytearray(buffer[begin:begin + 26])
  if not int.from_bytes(head[21:], 'big') & 2**36 - 1:
    length = next(_flac_ends(buffer, begin, end, sure=True), 0)
    head[21:] = (int.from_bytes(head[21:], 'big') | length).to_bytes(5, 'big')
  return Part((bytes(head), (begin + 26, end)))


def _flac_ends(buffer, begin, end, *, sure=False):
  """Where frames at the end of a stream end, in samples: the last first. With `sure`, only frames that are whole."""
  low = max(begin + 42, end - _FLAC_TAIL)
  tail = bytes(buffer[low:end])
  block, channels = int.from_bytes(buffer[begin + 8:begin + 10], 'big'), (buffer[begin + 20] >> 1 & 7) + 1
  for match in reversed(list(_FLAC_FRAME.finditer(tail))):
    at = match.start()
    found = _flac_frame(tail[at:at + 17], block, channels)
    if found and not (sure and _crc(tail[at:], 16, 0x8005)):
      yield found


def _flac_frame(head, block, channels) -> int | None:
  """The sample after a frame, by its header; None: it is none."""
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
  if at >= len(head) or _crc(head[:at + 1], 8, 0x07):
    return None
  return (number if head[1] & 1 else number * block) + size


def flac_frames(data: bytes, *, channels: int) -> tuple[int, list[int]]:
  """(samples of each frame but the last, where in the bytes each begins) of a FLAC with frames of one length.

  Raises ValueError: it is none, or its frames are not found.
  """
  if not _FLAC_START.match(data):
    raise ValueError('it is no FLAC')
  block, at, last = int.from_bytes(data[8:10], 'big'), 4, False
  while not last:
    last, at = data[at] >= 0x80, at + 4 + int.from_bytes(data[at + 1:at + 4], 'big')
  offsets = [at]
  for match in _FLAC_FRAME.finditer(data, at + 1):
    place = match.start()
    end = _flac_frame(data[place:place + 17], block, channels) or 0
    number = (end - 1) // block
    if number == len(offsets):
      offsets.append(place)
    elif number == len(offsets) - 1 and number:  # bytes that look like the same frame's beginning: one of the two is
      offsets[-1:] = [place if _crc(data[offsets[-2]:offsets[-1]], 16, 0x8005) else offsets[-1]]
  return block, offsets


def flac_header(*, block: int, rate: int, channels: int, samples: int) -> bytes:
  """What must stand before frames of 16 bits for them to be a FLAC."""
  facts = rate << 44 | channels - 1 << 41 | 15 << 36 | samples
  return b'fLaC\x80\0\0\x22' + 2 * block.to_bytes(2, 'big') + bytes(6) + facts.to_bytes(8, 'big') + bytes(16)


def _crc(data: bytes, width: int, polynomial: int) -> int:
  value, top, mask = 0, 1 << width - 1, (1 << width) - 1
  table = _TABLES.get((width, polynomial))
  if not table:
    table = []
    for byte in range(256):
      entry = byte << width - 8
      for _ in range(8):
        entry = (entry << 1 ^ polynomial if entry & top else entry << 1) & mask
      table.append(entry)
    _TABLES[width, polynomial] = table
  for byte in data:
    value = (value << 8 & mask) ^ table[value >> width - 8 ^ byte]
  return value


_TABLES: dict[tuple[int, int], list[int]] = {}


# ---- MP3 -------------------------------------------------------------------------------------------

_KBIT = {True: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
         False: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
_MP3_RATES = (44100, 48000, 32000)
_FRAME = re.compile(rb'\xff[\xe2\xe3\xf2\xf3\xfa\xfb]')
_PADDING = 100  # frames
_SURE = 4  # frames in a row that are no accident


def _frame_bytes(header: bytes) -> int:
  """The length of a Layer III frame by its 4 bytes of header; 0: it is none, or its length is not stated."""
  version, layer = header[1] >> 3 & 3, header[1] >> 1 & 3
  kbit, rate = header[2] >> 4, header[2] >> 2 & 3
  if header[0] != 0xff or header[1] < 0xe0 or version == 1 or layer != 1 or kbit in (0, 15) or rate == 3:
    return 0
  first = version == 3
  rate = _MP3_RATES[rate] >> (0 if first else 1 if version == 2 else 2)
  return (144000 if first else 72000) * _KBIT[first][kbit] // rate + (header[2] >> 1 & 1)


def _side_info(header) -> int:
  return ((17 if header[3] >> 6 == 3 else 32) if header[1] >> 3 & 3 == 3 else (9 if header[3] >> 6 == 3 else 17))


def _alike(header: bytes) -> tuple[int, int]:
  """What frames of one stream have in common: version, layer and rate."""
  return header[1] & 0xfe, header[2] & 0x0c


def _mp3(buffer, at=0) -> Contents:
  helped, unended, parts, lacking, at = bool(at), False, [], 0, _next_run(buffer, at)
  while at is not None and len(parts) <= _MOST_PARTS:
    stated = _xing(buffer, at)
    if stated and stated[0]:
      end = min(len(buffer), at + stated[1]) if stated[1] else len(buffer)
      frames = 0
      if at + stated[1] > len(buffer):
        found, size = _run(buffer, at)[0] - 1, _frame_samples(buffer, at)
        if found < stated[0]:
          frames, lacking = max(1, found * size - _lead(buffer, at)), (stated[0] - found) * size
      helped |= lacking > 0
      parts.append(Part(((at, end),), frames=frames))
    else:
      begin = at + _frame_bytes(buffer[at:at + 4]) if stated else at  # a Xing or VBRI header without what is needed
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
  if not parts or len(parts) > _MOST_PARTS or len(parts) == 1 and not helped:
    return Contents()
  return Contents(tuple(parts), stated=lacking, unended=unended)


def _next_run(buffer, at) -> int | None:
  """Where the next frames begin, _SURE of them or all until the end."""
  while buffer[at:at + 3] == b'ID3' and at + 10 <= len(buffer):
    size = bytes(buffer[at + 6:at + 10])
    at += 10 + (size[0] << 21 | size[1] << 14 | size[2] << 7 | size[3])
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
  """(frames, bytes) by the header in a frame, 0 where it does not say; None: there is none."""
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
  """The samples that a decoder drops at the beginning, by LAME's and FFmpeg's header; 529 are the decoder's own."""
  place = at + 4 + _side_info(buffer[at:at + 4]) + 141
  return (int.from_bytes(buffer[place:place + 3], 'big') >> 12) + 529


def _silent_frame(header: bytes) -> bytes:
  """The shortest frame of a stream like that of `header`, of silence."""
  mine = bytes([header[0], header[1] | 1, 1 << 4 | header[2] & 0x0c, header[3]])
  return mine.ljust(_frame_bytes(mine), b'\0')
