"""Files whole or not at all, and one process at a time in a folder.

What is written goes under a hidden name beside its target and takes the target's name once it is complete. Such a name
tells who made it, so that what a killed process left can be taken away.

A lock is a file that is locked for as long as its holder lives, and says who that is. It is the operating system's, so
that of a killed process is gone with it, on this machine and on file systems that carry locks to others (NFS). Where
there are none, what the file says decides: a process of this machine that is still alive holds it; one of another
machine is only warned of.
"""

from collections.abc import Iterator
import contextlib
import datetime
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket

from absl import logging

from m2l2.errors import UserError, unwritten

# ---- whole or not at all


@contextlib.contextmanager
def whole(target, *, durable: bool = False) -> Iterator[str]:
  """Gives a name to write a file or folder under, which becomes `target` when the block ends well; else nothing stays.

  Args:
    target: the path; of a link, what it points to is replaced.
    durable: the bytes are on the disk before the name is: after a crash of the machine it never stands for half a file.

  Raises UserError: it cannot be written.
  """
  place = os.path.realpath(target)
  aside = temporary(place)
  try:
    yield aside
    if durable:
      sync(aside)
    os.replace(aside, place)
  except OSError as error:
    raise unwritten(target, error) from error
  finally:
    _remove(aside)


def write_text(target, text: str):
  """A text file, whole or not at all. Raises UserError where it cannot be."""
  with whole(target) as aside, open(aside, 'w', encoding='utf-8', errors='backslashreplace') as file:
    file.write(text)


def write_json(target, value, *, indent: int = 2):
  """JSON, whole or not at all. Raises UserError where it cannot be."""
  write_text(target, json.dumps(value, indent=indent) + '\n')


def sync(path):
  """Waits until the bytes of a file, or the names in a folder, are on the disk."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def temporary(target: str) -> str:
  """A free name beside the target; hidden, so that no scan takes it for music. It tells who made it."""
  folder, base = os.path.split(target)
  return os.path.join(folder, f'.{_short(base)}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.part')


def remove_leftovers(target: str):
  """Takes away what killed processes of this machine left of a target that they were writing (`temporary`)."""
  folder, base = os.path.split(target)
  for path in glob.iglob(os.path.join(glob.escape(folder), f'.{glob.escape(_short(base))}.{_machine()}.*.part')):
    number = path.split('.')[-3]
    if number.isdecimal() and _began(int(number)) is None:
      with contextlib.suppress(OSError):
        _remove(path)


def _remove(path):
  if os.path.isdir(path) and not os.path.islink(path):
    shutil.rmtree(path, ignore_errors=True)
  else:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)


def _short(base: str) -> str:
  """What fits into 255 bytes with more behind it."""
  return os.fsdecode(os.fsencode(base)[:16])


def _machine() -> str:
  """A word for this machine, and this container on it: process numbers mean something there."""
  return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


# ---- one process at a time


@contextlib.contextmanager
def locked(path, *, command: str, place: str):
  """Holds the lock at `path` during the block; the file is gone afterwards.

  Args:
    path: the file, in a folder that is there.
    command: what holds it, for messages: 'm2l2 train'. place: what it guards, likewise.

  Raises UserError: another process holds it, or the file cannot be written.
  """
  file = _taken(os.fspath(path), command, place)
  with file:
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        os.unlink(path)  # while it is locked: whoever has it open finds that it is no longer this file


def check_lock(path, *, command: str, place: str):
  """Raises UserError where `locked` would find another process's lock; changes nothing."""
  if os.path.exists(path):
    try:
      with open(path, encoding='utf-8') as file:
        _lock(file, command, place)
    except OSError as error:
      raise UserError(f'{place}: cannot be read ({error.strerror})') from error


def _taken(path, command, place):
  while True:
    try:
      file = open(path, 'a+', encoding='utf-8')
    except OSError as error:
      raise UserError(f'{place}: cannot be written ({error.strerror})') from error
    ours = False
    try:
      _lock(file, command, place)
      ours = _is(file, path)
      if not ours:  # its holder went away, and the file with it, after we had opened it
        file.close()
        continue
      file.truncate(0)
      json.dump({'host': socket.gethostname(), 'pid': os.getpid(), 'began': _began(os.getpid()),
                 'since': datetime.datetime.now().astimezone().isoformat(timespec='seconds')}, file)
      file.flush()
      return file
    except BaseException as error:
      with contextlib.suppress(OSError):
        if ours:
          os.unlink(path)
      with contextlib.suppress(OSError):  # what could not be written on a full disk
        file.close()
      if isinstance(error, OSError):
        raise UserError(f'{place}: cannot be written ({error.strerror})') from error
      raise


def _lock(file, command, place):
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(_refusal(_read(file), command, place)) from error
  except OSError as error:  # some network file systems have no locks
    holder = _read(file)
    if _lives(holder):
      raise UserError(_refusal(holder, command, place)) from error
    logging.warning('%s: cannot be locked (%s): start no other %s there', place, error.strerror, command)


def _refusal(holder, command, place) -> str:
  who = f'process {holder["pid"]} on {holder["host"]}, since {holder["since"]}' if holder else 'it has just begun'
  return f'{place}: another {command} is writing there ({who}); stop it or wait for its end'


def _read(file) -> dict:
  file.seek(0)
  try:
    holder = json.load(file)
    return holder if {'host', 'pid', 'began', 'since'} <= holder.keys() else {}
  except (OSError, ValueError, AttributeError):
    return {}


def _lives(holder) -> bool:
  if not holder or holder['host'] != socket.gethostname() or holder['began'] is None:
    return False
  return _began(holder['pid']) == holder['began']


def _began(pid) -> str | None:
  """When a process began, so that a number that was given out again is not taken for it; None: there is none."""
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as file:
      return file.read().rpartition(')')[2].split()[19]
  except (OSError, IndexError):
    pass
  try:
    os.kill(pid, 0)
  except (OSError, OverflowError, TypeError) as error:
    return 'unknown' if isinstance(error, PermissionError) else None
  return 'unknown'  # no /proc here


def _is(file, path) -> bool:
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except OSError:
    return False
