"""Paths of audio files: how they are printed, and their extensions."""

import os

from m2l2.errors import printable as shown

__all__ = ['extension', 'shown']


def extension(path) -> str:
  """The extension of a name, in lower case, with its dot."""
  return os.path.splitext(os.fsdecode(path))[1].lower()
