"""Atomic writes of files and folders, and locks for one process at a time in a folder.

Data are written under a hidden temporary name beside the target, which is renamed to the target once it is complete.
The temporary name contains the process that wrote it, so that a later run can delete what a killed process left.

A lock is a file that its holder keeps locked (by the operating system) while it lives, and that names the holder. The
lock of a killed process ends with it, on this machine and on file systems that share locks (NFS). On file systems
without locks the text of the file decides: a holder on this machine that is still alive keeps the lock; for a holder on
another machine there is only a warning.
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

# ---- atomic writes


@contextlib.contextmanager
def whole(target, *, durable: bool = False) -> Iterator[str]:
  """Yields a temporary path that is renamed to `target` if the block ends without an error, else deleted.

  Args:
    target: the path; if it is a link, what it points to is replaced.
    durable: the data are on the disk before the rename, so that a crash of the machine leaves no half-written file.

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


def write_text(target, text: str, *, durable: bool = False):
  """Writes a text file atomically. durable: see `whole`. Raises UserError: it cannot be written."""
  with whole(target, durable=durable) as aside, open(aside, 'w', encoding='utf-8', errors='backslashreplace') as file:
    file.write(text)


def read_json_lines(path, *, having: str = '') -> Iterator[dict]:
  """The objects of a file with one on each line, a run's log; nothing where there is no file.

  A line that is no object, as one that a crash cut short, is left out; so are those without the text `having`.
  """
  with open(path, encoding='utf-8', errors='replace') if os.path.exists(path) else contextlib.nullcontext(()) as lines:
    for line in lines:
      with contextlib.suppress(ValueError):
        if having in line and isinstance(row := json.loads(line), dict):
          yield row


def write_json(target, value, *, indent: int = 2, durable: bool = False):
  """Writes JSON atomically. durable: see `whole`. Raises UserError: it cannot be written."""
  write_text(target, json.dumps(value, indent=indent) + '\n', durable=durable)


def sync(path):
  """Waits until the data of a file, or the entries of a folder, are on the disk (fsync)."""
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def temporary(target: str) -> str:
  """A free temporary path beside the target, hidden so that no scan takes it for music; it contains this process."""
  folder, base = os.path.split(target)
  return os.path.join(folder, f'.{_short(base)}.{_machine()}.{os.getpid()}.{secrets.token_hex(4)}.part')


def remove_leftovers(target: str):
  """Deletes temporary files (of `temporary`) that killed processes of this machine left beside a target."""
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
  """A name cut so that it fits into 255 bytes with the suffix of a temporary name."""
  return os.fsdecode(os.fsencode(base)[:16])


def _machine() -> str:
  """An identifier of this machine and container: process numbers are comparable within it."""
  return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


# ---- one process at a time


@contextlib.contextmanager
def locked(path, *, command: str, place: str):
  """Holds the lock at `path` during the block, then deletes the file.

  Args:
    path: the file, in an existing folder.
    command: the name of the holder in messages: 'm2l2 train'. place: what the lock protects, in messages.

  Raises UserError: another process holds it, or the file cannot be written.
  """
  file = _taken(os.fspath(path), command, place)
  with file:
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        os.unlink(path)  # while it is locked: another process that has it open then sees that the path is another file


def check_lock(path, *, command: str, place: str):
  """Raises UserError if another process holds the lock of `locked`; changes nothing."""
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
      if not ours:  # its holder ended and deleted the file after we had opened it
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
  """When a process began, to tell it from a later process of the same number; None: there is no such process."""
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
