"""The checksums of Ogg and FLAC: most significant bit first, initial value 0, nothing reversed."""

_TABLES: dict[tuple[int, int], list[int]] = {}


def crc(data: bytes, width: int, polynomial: int) -> int:
  """A CRC of `width` bits; `polynomial` is without its highest bit."""
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
