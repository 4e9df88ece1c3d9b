"""Fixed excerpts of a folder of music, for repeated measurements."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from m2l2.data import audio_io, sources
from m2l2.errors import UserError


@dataclasses.dataclass(frozen=True)
class Excerpt:
  """audio float32 [channels, samples] at `sample_rate` (Hz); `name` is the file's, relative to its folder."""
  name: str
  audio: np.ndarray
  sample_rate: int


def take_excerpts(root, *, seconds: float, most: int | None = None) -> tuple[list[Excerpt], list[str]]:
  """The middle `seconds` (all, of shorter files) of up to `most` files of a folder, glob or file, evenly over the
  sorted names.

  Returns (excerpts, one warning for each file that cannot be read).
  Raises UserError: no audio, none that can be read, or invalid sizes.
  """
  if not seconds > 0 or (most is not None and most < 1):
    raise UserError(f'excerpts of {seconds} s of {most} files: both must be positive')
  audio_files, excerpts, warnings = sources.find_audio_files(root), [], []
  for number in evenly(range(len(audio_files)), most):
    try:
      excerpts.append(take_excerpt(audio_files.path(number), seconds=seconds, name=audio_files.names[number]))
    except UserError as error:
      warnings.append(f'{audio_files.names[number]}: unreadable: {error}; left out')
  if not excerpts:
    raise UserError(f'no excerpt can be had; the first: {warnings[0]}')
  return excerpts, warnings


def evenly(items: Sequence, most: int | None) -> list:
  """Up to `most` of the items, evenly spaced."""
  if most is None or len(items) <= most:
    return list(items)
  return [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]


def take_excerpt(path, *, seconds: float, name: str = '') -> Excerpt:
  """The middle `seconds` of a file. Raises UserError: it cannot be read, or is empty or not finite."""
  with audio_io.AudioReader(path) as reader:
    info = reader.info
    frames = min(info.frames, round(seconds * info.sample_rate))
    if not frames:
      raise UserError('it holds no samples')
    audio = reader.read(start=(info.frames - frames) // 2, frames=frames, check_finite=True)
    return Excerpt(name or str(path), np.ascontiguousarray(audio), info.sample_rate)
