"""Paths of files to be read or written, of audio or not: how they are shown, and temporary names beside them."""

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import socket


def shown(path) -> str:
  """The path as one printable line (names of files may hold any byte)."""
  text = os.fsdecode(path).encode('utf-8', 'backslashreplace').decode('utf-8')
  return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def extension(path) -> str:
  """Of a name, in lower case, with its dot."""
  return os.path.splitext(os.fsdecode(path))[1].lower()


def temporary(target: str) -> str:
  """A free name beside the target; hidden, so that no scan takes it for music. It tells who made it."""
  folder, base = os.path.split(target)
  return os.path.join(folder, f'.{_short(base)}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.part')


def _short(base: str) -> str:
  """What fits into 255 bytes with more behind it."""
  return os.fsdecode(os.fsencode(base)[:16])


def _machine() -> str:
  """A word for this machine, and this container on it: process numbers mean something there."""
  return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove_leftovers(target: str):
  """Takes away the temporary files and folders of a target (`temporary`) whose makers are no more."""
  folder, base = os.path.split(target)
  for path in glob.iglob(os.path.join(glob.escape(folder), f'.{glob.escape(_short(base))}.{_machine()}.*.part')):
    number = path.split('.')[-3]
    if number.isdecimal() and not _is_alive(int(number)):
      with contextlib.suppress(OSError):
        shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


def _is_alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:  # somebody else's
    pass
  return True
