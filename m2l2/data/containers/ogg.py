"""Ogg: chained streams of Vorbis, Opus or FLAC, in pages; and positions in Vorbis from which decoding is exact."""

from array import array
import dataclasses
import struct

from m2l2.data.containers.checksum import crc
from m2l2.data.containers.parts import MOST_PARTS, XIPH_ORDER, Contents, Part, Piece

_APART = 2**16  # samples from one place of a Vorbis stream to the next
_OPUS_RATE = (48000).to_bytes(4, 'little')


@dataclasses.dataclass(frozen=True)
class Page:
  """The needed fields of a page's header."""
  offset: int
  body: int  # where its packets begin
  flags: int  # 1: begins inside a packet, 2: first of a stream, 4: its last
  granule: int
  serial: int
  lacing: bytes


def pages_of(buffer) -> list[Page]:
  """The complete pages, in order; other bytes are skipped."""
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
    pages.append(Page(at, body, flags, granule, serial, lacing))
    at = body + sum(lacing)
  return pages


def contents(buffer) -> Contents:
  """Each chained stream; none for interleaved streams."""
  pages = pages_of(buffer)
  streams: list[list[Page]] = []
  for number, page in enumerate(pages):
    if page.flags & 2 and (not number or not pages[number - 1].flags & 2):
      streams.append([])
    if not streams:
      return Contents()
    streams[-1].append(page)
  if not 1 <= len(streams) <= MOST_PARTS or any(len({page.serial for page in stream}) > 1 for stream in streams):
    return Contents()  # interleaved streams, as in a film
  ends = [stream[0].offset for stream in streams[1:]] + [len(buffer)]
  stated = 0
  for number, stream in enumerate(streams):
    marked = [page for page in stream[:-1] if page.flags & 4]
    if marked:  # decoders of libsndfile stop at the first end mark, and pages may follow it
      stated += max(0, stream[-1].granule - marked[0].granule)
      ends[number] = marked[0].body + sum(marked[0].lacing)
      streams[number] = stream[:stream.index(marked[0]) + 1]
  parts = tuple(_ogg_part(buffer, stream, end) for stream, end in zip(streams, ends, strict=True))
  return Contents(parts, stated=stated, unended=not pages[-1].flags & 4)


def _ogg_part(buffer, pages, end) -> Part:
  pieces: tuple[Piece, ...] = ((pages[0].offset, end),)
  head = bytes(buffer[pages[0].body:pages[0].body + 19])
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
    if head[:8] == b'OpusHead':
      pieces = _opus_pieces(buffer, pages, end)
    return Part(pieces, order=order)
  sizes = buffer[pages[0].body + 28]
  sizes, heads, position, last, first = (1 << (sizes & 15), 1 << (sizes >> 4)), 0, 0, 0, None
  modes: list[int] = []
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
      # The encoder's delay, which decoders drop, but at most as much as the last packet adds: in audio cut out
      # without decoding the rest is read, and the end would be missing.
      late = max(0, position - page.granule - step)
      position = page.granule + late
  if first is None or first >= len(pages):
    return Part(pieces, order=order)
  header = pages[0].offset, pages[first].offset
  if late and pages[-1].granule > 0:
    pieces = ((pages[0].offset, pages[-1].offset), changed_page(buffer, pages[-1], granule=pages[-1].granule + late))
  return Part(pieces, order=order, positions=positions, offsets=offsets, header=header, end=end)


def _flac_of_ogg(buffer, pages) -> Part:
  """The packets, concatenated, are a FLAC, which libsndfile reads without Ogg only. The pages state the length, which
  FFmpeg does not write into the header."""
  bodies = [(page.body, page.body + sum(page.lacing)) for page in pages]
  head = bytearray(buffer[bodies[0][0] + 9:bodies[0][1]])
  length = max(0, *(page.granule for page in pages))
  head[21:26] = (int.from_bytes(head[21:26], 'big') & ~(2**36 - 1) | length & 2**36 - 1).to_bytes(5, 'big')
  return Part((bytes(head), *bodies[1:]))


def _opus_pieces(buffer, pages, end) -> tuple[Piece, ...]:
  """An Opus stream with its first page at 48 kHz, and with no later end than its last packets have: libsndfile takes
  the length from the last page, and some encoders state more there."""
  begin = pages[0].offset
  first: tuple[Piece, ...] = ()
  last: tuple[Piece, ...] = ()
  if bytes(buffer[pages[0].body + 12:pages[0].body + 16]) != _OPUS_RATE:
    first, begin = (_opus_page(buffer, pages[0]),), pages[0].body + sum(pages[0].lacing)
  samples = _opus_samples(buffer, pages[-1]) if len(pages) > 3 else None  # two of headers, one of audio
  if samples is not None and pages[-1].granule > pages[-2].granule + samples > 0:
    last, end = (changed_page(buffer, pages[-1], granule=pages[-2].granule + samples),), pages[-1].offset
  return *first, (begin, end), *last


def _opus_samples(buffer, page) -> int | None:
  """Samples at 48 kHz of the packets of a page (RFC 6716, section 3.1); None: one of them began in an earlier page."""
  samples = 0
  for begin, length, continued in _starts(page):
    if continued:
      return None
    if not length:
      continue
    config, code = buffer[begin] >> 3, buffer[begin] & 3
    of_10_ms = (1, 2, 4, 6)[config & 3] if config < 12 else (1, 2)[config & 1] if config < 16 else 2 ** (config & 3) / 4
    frames = 1 if not code else 2 if code < 3 else buffer[begin + 1] & 63
    samples += round(480 * of_10_ms) * frames
  return samples


def _opus_page(buffer, page) -> bytes:
  """The first page of an Opus stream, changed to 48 kHz: libsndfile decodes at a rate near that of the source, such as
  24 kHz for 32 kHz, and would lose the higher frequencies."""
  body = bytearray(buffer[page.body:page.body + sum(page.lacing)])
  body[12:16] = _OPUS_RATE
  return changed_page(buffer, page, body=body)


def changed_page(buffer, page, *, granule: int | None = None, body: bytes | bytearray | None = None) -> bytes:
  """A page with another granule position, or another body of the same length."""
  data = bytearray(buffer[page.offset:page.body + sum(page.lacing)])
  if granule is not None:
    data[6:14] = granule.to_bytes(8, 'little')
  if body is not None:
    data[page.body - page.offset:] = body
  data[22:26] = bytes(4)
  data[22:26] = crc(bytes(data), 32, 0x04c11db7).to_bytes(4, 'little')
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
  """For each mode, whether its blocks are long. Modes end the setup header, so they are read from its end: a bit that
  is 1, then modes of (8 bits mapping, 16 + 16 bits zero, 1 bit size), before them 6 bits count - 1."""
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
