"""Sources of crops: audio files, records, and mixtures of sources.

`find_mixture` recognises a source by the files at a place. The order of a source's items depends on their names alone;
order.py and transforms.py draw from them.
"""

import dataclasses
from fractions import Fraction
import glob
import hashlib
import math
import os
import pathlib
import re
from typing import Protocol, Self

from absl import logging
import numpy as np

from m2l2.data.audio_io import AudioInfo, AudioReader, shown
from m2l2.errors import UserError

KINDS = ('auto', 'folder')
EXTENSIONS = ('.wav', '.flac', '.ogg', '.oga', '.opus', '.mp3', '.aif', '.aiff')

_SHARD = '.array_record'
_MOST_SLOTS = 10_000  # limit of the sum of a mixture's weights as whole numbers: samples per block
_PART = re.compile(r'\s*(\d+(?:\.\d+)?|\.\d+)\*')


class ItemAudio(Protocol):
  """One item's audio, a context manager.

  Attributes:
    info: its rate, channels and length.
    starts: the number of crop starts in it; None: all.
  """

  info: AudioInfo
  starts: int | None

  def read(self, *, start: int, frames: int, check_finite: bool = False) -> np.ndarray:
    """float32 [channels, frames]. Raises UserError."""
    ...

  def __enter__(self) -> Self:
    ...

  def __exit__(self, *unused) -> None:
    ...


class Source(Protocol):
  """Items from which crops are cut. It is pickled to worker processes.

  Attributes:
    fingerprint: 16 hex digits, equal for equal items.
    place: its path, for messages.
  """

  @property
  def fingerprint(self) -> str:
    ...

  @property
  def place(self) -> str:
    ...

  def __len__(self) -> int:
    ...

  def name(self, number: int) -> str:
    """The name of an item in errors, one line."""

  def open(self, number: int) -> ItemAudio:
    """The audio of an item. Raises UserError, which names it."""


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Sources with their shares of the samples.

  Attributes:
    sources: one or more.
    weights: whole numbers without a common divisor: the number of samples of each source in every block of
      sum(weights) samples.
  """

  sources: tuple[Source, ...]
  weights: tuple[int, ...] = (1,)

  @property
  def counts(self) -> tuple[int, ...]:
    return tuple(len(source) for source in self.sources)

  @property
  def fingerprint(self) -> str:
    """16 hex digits, equal if the order of training samples is equal. For one source its own."""
    if len(self.sources) == 1:
      return self.sources[0].fingerprint
    lines = [f'{weight}*{source.fingerprint}' for weight, source in zip(self.weights, self.sources, strict=True)]
    return hashlib.sha256(','.join(lines).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class AudioFiles:
  """Audio files under one place, sorted by their relative names; a `Source`.

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
  def place(self) -> str:
    return shown(self.base or '.')

  def name(self, number: int) -> str:
    return shown(self.path(number))

  def open(self, number: int) -> AudioReader:
    return AudioReader(self.path(number), whole=False)

  @property
  def fingerprint(self) -> str:
    """16 hex digits of the names, equal if the order of training samples is equal."""
    text = '\0'.join(self.names).encode('utf-8', 'surrogateescape')
    return hashlib.sha256(text).hexdigest()[:16]


def find_mixture(root, *, kind: str = 'auto', split: str = 'train') -> Mixture:
  r"""config.data.root -> Mixture.

  Args:
    root: a place, or 'W*PLACE,W*PLACE,...', two or more places with their weights (as 3 or 0.25).
      A new part begins only after a comma that is followed by a number and '*', so places may contain commas
      and digits; a comma of a name that would begin a part is written \,. If a file of the name of the whole
      text exists, it is that place.
    kind: 'auto', or 'folder' to take the whole text as one folder, glob or file of audio.
    split: of TFDS datasets.

  Raises UserError: nothing exists there, or nothing in a known format.
  """
  if kind not in KINDS:
    raise UserError(f'data.source={kind!r} is not known: it is {" or ".join(KINDS)}')
  text = os.path.expanduser(os.fsdecode(root))
  if kind == 'folder':
    return Mixture((find_audio_files(text),))
  parts = [(1, text)] if os.path.exists(text) else _parts(text)
  sources = tuple(find_source(place, split=split) for _, place in parts)
  weights = [Fraction(weight) for weight, _ in parts]
  if min(weights) <= 0:
    raise UserError(f'{shown(text)}: weights must be above 0')
  scale = math.lcm(*(weight.denominator for weight in weights))
  scaled = [int(weight * scale) for weight in weights]
  whole = tuple(weight // math.gcd(*scaled) for weight in scaled)
  if sum(whole) > _MOST_SLOTS:
    raise UserError(f'{shown(text)}: the weights are {":".join(map(str, whole))} in whole numbers; '
                    f'their sum may be at most {_MOST_SLOTS}: round them')
  return Mixture(sources, whole)


def _parts(text: str) -> list[tuple[str | int, str]]:
  """(weight, place) of each part of a mixture; a text that is no mixture is one part."""
  parts = re.split(rf'(?<!\\),(?={_PART.pattern.replace("(", "(?:", 1)})', text)
  matches = [_PART.match(part) for part in parts]
  if len(parts) < 2 or not matches[0]:
    return [(1, text)]
  return [(match[1], os.path.expanduser(part[match.end():].strip().replace('\\,', ',')))
          for match, part in zip(matches, parts, strict=True) if match]  # all: the text is cut before those that match


def find_source(place: str, *, split: str) -> Source:
  """Opens the source at a place: 'tfds:NAME', a TFDS directory, ArrayRecord shards (a directory, a glob or
  one file of them), else audio files. Raises UserError."""
  from m2l2.data import records  # here, so that listing files needs neither Grain nor TFDS

  if place.startswith('tfds:'):
    return records.open_dataset(records.named_dataset(place.removeprefix('tfds:')), split=split)
  if os.path.isdir(place):
    dataset = records.find_dataset(place)
    if dataset:
      return records.open_dataset(dataset, split=split)
    if os.path.isdir(os.path.join(place, '.prepare')):
      raise UserError(f'{shown(place)}: is not finished; run the same m2l2 prepare again')
    place_of_shards = os.path.join(glob.escape(place), f'*{_SHARD}*')
  else:
    place_of_shards = place
  if _SHARD in os.path.basename(place_of_shards):
    shards = [place] if os.path.isfile(place) else [path for path in glob.glob(place_of_shards) if os.path.isfile(path)]
    if len({os.path.basename(path).partition(_SHARD)[0] for path in shards}) > 1:  # a glob over several splits
      shards = [path for path in shards if os.path.basename(path).partition(_SHARD)[0].endswith(f'-{split}')]
      if not shards:
        raise UserError(f'{shown(place)}: holds shards of several splits, but none of {shown(split)} (data.split)')
    if shards:
      return records.open_shards(shards)
  return find_audio_files(place)


def find_audio_files(root) -> AudioFiles:
  """The audio files under a directory (at any depth), matching a glob (** allowed), or one file.

  Audio files are recognised by their extension (EXTENSIONS, in any case) and checked when they are read. Hidden files
  and directories are skipped. Links are followed (but not by **); a directory that is reached twice (a loop of links)
  is listed once, at its first place in sorted order.

  Raises UserError: nothing exists there, or no audio.
  """
  root = os.path.expanduser(os.fsdecode(root))
  if not root:
    raise UserError('the root of the data is empty: give a directory, a glob or an audio file')
  audio_files = find_files(root, EXTENSIONS)
  if not audio_files:
    raise UserError(f'{shown(root)}: there is no such directory or file')
  base, audio = audio_files
  if not audio:
    hint = "; a mixture is written 'W*PLACE,W*PLACE'" if _PART.match(root) else ''
    raise UserError(f'{shown(root)}: no audio files there (looked for *{", *".join(EXTENSIONS)}){hint}')
  return AudioFiles(base=base, names=tuple(sorted(n.replace(os.sep, '/') for n in audio)))


def find_files(place: str, extensions: tuple[str, ...]) -> tuple[str, set[str]] | None:
  """(directory, names relative to it) of the files in a directory, of a glob or of a file, with these endings; None:
  nothing of that name exists, and it is no glob. A path that exists literally is not taken for a glob."""
  if os.path.isdir(place):
    return place, set(walk(place, extensions))
  if os.path.isfile(place):
    base, paths = os.path.dirname(place), [place]
  elif glob.has_magic(place):
    base = _glob_base(place)
    paths = _glob(place, base)
  else:
    return None
  return base, {os.path.relpath(path, base or '.') for path in paths if path.lower().endswith(extensions)}


def walk(root: str, extensions: tuple[str, ...]) -> list[str]:
  """Relative names of the files under a directory with these endings. Files that are not links cost no system call.

  Hidden ones are skipped; a directory that is reached twice (a loop of links) is listed once.
  """
  names, seen, waiting = [], set(), ['']
  while waiting:
    folder = waiting.pop()
    real = os.path.realpath(os.path.join(root, folder))
    if real in seen:
      continue
    seen.add(real)
    try:
      entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
    except OSError as e:  # not readable, or deleted
      logging.warning('%s: cannot be listed (%s); passed over', shown(os.path.join(root, folder)), e.strerror)
      continue
    entries = [entry for entry in entries if not entry.name.startswith('.')]
    names += [folder + entry.name for entry in entries
              if entry.name.lower().endswith(extensions) and _is(entry.is_file)]
    waiting += [os.path.join(folder, entry.name, '') for entry in reversed(entries) if _is(entry.is_dir)]
  return names


def _glob(pattern: str, base: str) -> list[str]:
  """The files that match. By pathlib, whose ** does not follow links: glob's would not end in a loop of two."""
  inner = os.path.relpath(pattern, base or '.')
  if os.path.basename(inner) == '**':  # of files, too: to pathlib, a last ** means directories
    inner = os.path.join(inner, '*')
  try:
    paths = list(pathlib.Path(base or '.').glob(inner))
  except ValueError as e:  # ** beside other characters
    raise UserError(f'{shown(pattern)}: is not a pattern ({e})') from e
  hidden = lambda path: any(part.startswith('.') for part in os.path.relpath(path, base or '.').split(os.sep))
  return [os.fspath(path) for path in paths if _is(path.is_file) and not hidden(path)]


def _is(question) -> bool:
  try:
    return question()
  except OSError:  # a link to itself
    return False


def _glob_base(pattern: str) -> str:
  """The leading directories of a glob without wildcards, or that exist literally: 'Album [1999]'."""
  base = os.path.dirname(pattern)
  while glob.has_magic(base) and not os.path.isdir(base):
    base = os.path.dirname(base)
  return base
