"""One process at a time in a folder: a file that is locked for as long as its holder lives, and says who that is.

The lock is the operating system's, so that of a killed process is gone with it, on this machine and on file systems
that carry locks to others (NFS). Where there are none, what the file says decides: a process of this machine that is
still alive holds it; one of another machine is only warned of.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket

from absl import logging

from m2l2.errors import UserError


@contextlib.contextmanager
def held(path, *, command: str, place: str):
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


def check(path, *, command: str, place: str):
  """Raises UserError where `held` would find another process's lock; changes nothing."""
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
