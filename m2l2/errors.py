"""The one error a user is meant to read, and what of others is one line too."""

import errno
import os


class UserError(ValueError):
  """A mistake that the user can mend: one line that says what, where and how to mend it.

  Commands print the line and exit with status 1; libraries see an ordinary `ValueError`.
  """


class OutputClosed(UserError):
  """Who read standard output has gone, as `head` does: commands exit with status 141, like others do."""


_FULL = 'No space left on device', 'Disk quota exceeded'


def told(error: BaseException) -> UserError | None:
  """An error of the machine (files, disks, memory, missing packages) as a UserError; None: a fault of the program."""
  if isinstance(error, UserError):
    return error
  if isinstance(error, OSError) and (error.errno or error.strerror):
    places = [place for place in (error.filename, error.filename2) if isinstance(place, (str, bytes))]
    what = error.strerror or errno.errorcode.get(error.errno or 0, 'failed')
    if what in _FULL:
      what += '; make room and run the same command again'
    return UserError(': '.join([' -> '.join(map(printable, places)), what] if places else [what]))
  if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition('.')[0] != 'm2l2':
    return UserError(f"{error.name} is not installed: pip install it, or the extra of m2l2 that has it ('m2l2[train]')")
  if isinstance(error, MemoryError):
    return UserError('there is not enough memory; close other programs, or give less at once')
  for full in _FULL:  # Orbax and array_record hide it in errors of their own
    if full in str(error):
      return UserError(f'{full}; make room and run the same command again')
  return None


def is_full(text: str) -> bool:
  """Whether a message tells of a full disk: whatever is written next would fail, too."""
  return any(full in text for full in _FULL)


def printable(text: str | bytes) -> str:
  """A path or a message as one printable line: names of files may hold any byte."""
  text = os.fsdecode(text).encode('utf-8', 'backslashreplace').decode('utf-8')
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)
