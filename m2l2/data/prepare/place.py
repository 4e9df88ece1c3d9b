"""The output directory, local or remote, with atomic writes."""

from collections.abc import Iterator
import contextlib
import json
import os
import shutil
import tempfile
import threading
from typing import Any

from m2l2 import files
from m2l2.data.audio_io import shown
from m2l2.data.prepare.inputs import file_system
from m2l2.errors import UserError

WORK = '.prepare'  # in it, for work in progress


class Place:
  """The output directory, a local path or a URL of fsspec, with atomic writes.

  Every failure is a UserError of one line.
  """

  def __init__(self, root: str):
    self.root = root.rstrip('/') or '/'
    self._fs: Any
    self._path: str
    self._fs, self._path = file_system(root) if '://' in root else (None, os.path.expanduser(self.root))

  def make(self):
    """Creates the directory, and in it the one for work in progress."""
    with self._told():
      if self._fs:
        self._fs.makedirs(self._at(WORK), exist_ok=True)
      else:
        os.makedirs(self._at(WORK), exist_ok=True)

  def _at(self, name: str) -> str:
    return f'{self._path.rstrip("/")}/{name}' if name else self._path

  @contextlib.contextmanager
  def _told(self):
    try:
      yield
    except OSError as e:
      raise UserError(f'{shown(self.root)}: cannot be written: {e.strerror or e}') from e

  def names(self, folder: str = '') -> list[str]:
    """The names in the directory, sorted; empty if it does not exist."""
    entries: list[str] = []
    with self._told(), contextlib.suppress(FileNotFoundError):
      entries = self._fs.ls(self._at(folder), detail=False) if self._fs else os.listdir(self._at(folder))
    return sorted(name.rstrip('/').rpartition('/')[2] for name in entries)

  def results(self, stage: str) -> set[str]:
    return {f'{WORK}/{name}' for name in self.names(WORK) if name.startswith(f'{stage}-') and name.endswith('.json')}

  def read_json(self, name: str):
    """The contents of a JSON file; None if it does not exist."""
    try:
      with self._fs.open(self._at(name), 'rb') if self._fs else open(self._at(name), 'rb') as file:
        return json.loads(file.read())
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as e:
      raise UserError(f'{shown(self.root)}/{name}: cannot be read ({e})') from e

  def read(self, name: str) -> bytes:
    try:
      with self._fs.open(self._at(name), 'rb') if self._fs else open(self._at(name), 'rb') as file:
        return file.read()
    except OSError as e:
      raise UserError(f'{shown(self.root)}/{name}: cannot be read ({e})') from e

  def write_json(self, name: str, value):
    self.write(name, (json.dumps(value, indent=2) + '\n').encode())

  def write(self, name: str, data: bytes):
    with self.new(name) as path, open(path, 'wb') as file:
      file.write(data)

  @contextlib.contextmanager
  def new(self, name: str) -> Iterator[str]:
    """Yields a local path to write to; after the block the file gets its name in one step."""
    with self._told():
      folder = tempfile.gettempdir() if self._fs else self._at(WORK)
      part = os.path.join(folder, f'{os.path.basename(name)}.{os.getpid()}.{threading.get_ident()}.part')
      try:
        open(part, 'wb').close()
        yield part
        if self._fs:
          self._fs.put_file(part, self._at(name))
        else:
          files.sync(part)
          os.replace(part, self._at(name))
      finally:
        with contextlib.suppress(FileNotFoundError):
          os.unlink(part)

  def remove(self, name: str):
    with self._told(), contextlib.suppress(FileNotFoundError):
      self._fs.rm_file(self._at(name)) if self._fs else os.unlink(self._at(name))

  def clear_parts(self):
    """Deletes half-written files of a killed run."""
    for name in self.names(WORK):
      if name.endswith('.part'):
        self.remove(f'{WORK}/{name}')

  def clear_work(self):
    with self._told(), contextlib.suppress(FileNotFoundError):
      self._fs.rm(self._at(WORK), recursive=True) if self._fs else shutil.rmtree(self._at(WORK))

  @contextlib.contextmanager
  def locked(self):
    """Allows one run at a time in a local directory; the lock of a killed run ends with it."""
    if self._fs:
      yield
      return
    with files.locked(self._at(f'{WORK}/lock'), command='m2l2 prepare', place=shown(self.root)):
      yield
