"""Which audio files there are, in an order that depends on their names alone."""

import dataclasses
import glob
import hashlib
import os

from m2l2.data.audio_io import shown
from m2l2.errors import UserError

EXTENSIONS = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff')


@dataclasses.dataclass(frozen=True)
class AudioFiles:
  """Audio files under one place, sorted by their relative names.

  Attributes:
    base: the directory that the names are relative to.
    names: relative names with '/' between parts, sorted by code point.
  """

  base: str
  names: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.names)

  def path(self, number: int) -> str:
    return os.path.join(self.base, self.names[number])

  @property
  def fingerprint(self) -> str:
    """16 hex digits of the names: equal where the order of training samples is equal."""
    text = '\0'.join(self.names).encode('utf-8', 'surrogateescape')
    return hashlib.sha256(text).hexdigest()[:16]


def find_audio_files(root) -> AudioFiles:
  """The audio files under a directory (at any depth), matching a glob (** allowed), or one file.

  Files are known by their extension (EXTENSIONS, in any case); whether one can be read shows when
  it is read. Hidden files and directories are passed over. Links are followed; a directory that is
  reached twice (a loop of links) is taken once, where it is met first in sorted order.

  Raises UserError: nothing there, or no audio among it.
  """
  root = os.path.expanduser(os.fsdecode(root))
  name = shown(root)
  if os.path.isdir(root):
    base, paths = root, _walk(root)
  elif os.path.isfile(root):
    base, paths = os.path.dirname(root), [root]
  elif glob.has_magic(root):
    base = _glob_base(root)
    paths = [p for p in glob.glob(root, recursive=True) if os.path.isfile(p)]
  elif not root:
    raise UserError('the root of the data is empty: give a directory, a glob or an audio file')
  else:
    raise UserError(f'{name}: there is no such directory or file')
  audio = {os.path.relpath(p, base or '.') for p in paths if p.lower().endswith(EXTENSIONS)}
  if not audio:
    raise UserError(f'{name}: no audio files there (looked for *{", *".join(EXTENSIONS)})')
  return AudioFiles(base=base, names=tuple(sorted(n.replace(os.sep, '/') for n in audio)))


def _walk(root: str) -> list[str]:
  paths, seen = [], set()
  for folder, folders, files in os.walk(root, followlinks=True):
    real = os.path.realpath(folder)
    if real in seen:
      folders.clear()
      continue
    seen.add(real)
    folders[:] = sorted(f for f in folders if not f.startswith('.'))
    paths += [os.path.join(folder, f) for f in files if not f.startswith('.')]
  return [p for p in paths if os.path.isfile(p)]


def _glob_base(pattern: str) -> str:
  """The leading directories of a glob that hold no wildcard."""
  base = os.path.dirname(pattern)
  while glob.has_magic(base):
    base = os.path.dirname(base)
  return base
