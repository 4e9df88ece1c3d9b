"""Checksums as Ogg and FLAC have them: the most significant bit first, from 0 on, nothing turned around."""

_TABLES: dict[tuple[int, int], list[int]] = {}


def crc(data: bytes, width: int, polynomial: int) -> int:
  """Of `width` bits; the polynomial without its highest."""
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
