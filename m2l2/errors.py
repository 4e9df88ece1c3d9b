"""UserError, the error whose message users read, and how errors of the machine become one."""

import errno
import os


class UserError(ValueError):
  """A mistake that the user can correct: one line that says what is wrong, where, and how to correct it.

  Commands print the line and exit with status 1; libraries see an ordinary `ValueError`.
  """


class OutputClosed(UserError):
  """The reader of standard output has closed it, as `head` does: commands exit with status 141, as others do."""


_FULL = 'No space left on device', 'Disk quota exceeded'


def told(error: BaseException) -> UserError | None:
  """A UserError for an error of the machine (files, disks, memory, missing packages); None for a bug of the program."""
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
  for full in _FULL:  # Orbax and array_record wrap it in errors of their own types
    if full in str(error):
      return UserError(f'{full}; make room and run the same command again')
  return None


def unwritten(path, error: Exception) -> UserError:
  """The UserError to raise when `path` could not be written."""
  reason = in_one_line(getattr(error, 'strerror', None) or error)
  text = f'{printable(os.fspath(path))}: could not be written ({reason})'
  return UserError(text + '; make room and run the same command again' * is_full(text))


def in_one_line(error, *, most: int | None = None) -> str:
  """An error's message (or its type's name, if it has none) without line breaks, cut to `most` characters."""
  text = ' '.join(str(error).split()) or (type(error).__name__ if isinstance(error, BaseException) else '')
  return text[:most]


def first_line(error, *, most: int = 300) -> str:
  """The first line of an error's message, for errors of libraries that run over many; its type's name without one."""
  lines = str(error).strip().splitlines()
  return in_one_line(lines[0] if lines else type(error).__name__, most=most)


def is_full(text: str) -> bool:
  """Whether a message reports a full disk: then the next write fails, too."""
  return any(full in text for full in _FULL)


def printable(text: str | bytes) -> str:
  """A path or a message as one printable line. Names of files may contain any byte."""
  text = os.fsdecode(text).encode('utf-8', 'backslashreplace').decode('utf-8')
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)
