"""Paths of audio files: how they are shown, what kind a name says."""

import os

from m2l2.errors import printable as shown

__all__ = ['extension', 'shown']


def extension(path) -> str:
  """Of a name, in lower case, with its dot."""
  return os.path.splitext(os.fsdecode(path))[1].lower()
