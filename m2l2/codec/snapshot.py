"""Snapshots: a trained model as one directory with weights and config.

  model.safetensors   float32 arrays by flat name, 'encoder/transformer/...'; bfloat16 ones are read as float32. Or
                      several such files, model-00001-of-00003.safetensors
  config.json         {"format": 1, "config": {...}, "step": n, "fingerprint": hex, "extra": {...}}

A snapshot needs no other file and contains no code and no pickle. Replacing one is atomic: after a
crash at any moment there is either the old snapshot or the new one.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import hashlib
import json
import os
from pathlib import Path
import re
import shutil
import threading
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from m2l2.codec import renamed
from m2l2.errors import UserError
from m2l2.files import sync

FORMAT = 1
CONFIG = 'config.json'
WEIGHTS = 'model.safetensors'
_SHARD = re.compile(r'model-\d{5}-of-(\d{5})\.safetensors')
_DTYPES = {'F16': '<f2', 'F32': '<f4', 'F64': '<f8', 'I8': 'i1', 'I16': '<i2', 'I32': '<i4', 'I64': '<i8', 'U8': 'u1',
           'U16': '<u2', 'U32': '<u4', 'U64': '<u8', 'BOOL': '?'}


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """The contents of a snapshot; `params` is a nested dict of numpy arrays, `config` has the names of today."""

  params: dict
  config: dict
  step: int
  fingerprint: str
  extra: dict


def save_snapshot(path, *, params, config: Mapping, step: int, extra: Mapping | None = None,
                  shard_bytes: int | None = None) -> str:
  """Writes a snapshot, replacing an older one.

  Args:
    path: the directory to write. An existing directory is replaced only if it is empty or a
      snapshot; other files in an old snapshot are kept.
    params: nested dict of arrays (numpy, or anything `np.asarray` takes); bfloat16 ones stay so in the file.
    config: the resolved config that rebuilds the model; JSON types only.
    step: the training step of these weights.
    extra: anything else worth keeping (statistics, data names); JSON types only.
    shard_bytes: the weights go into several files of about this size at most; None: into one.

  Returns:
    The fingerprint of the weights as they will be read.

  Raises:
    UserError: the path cannot be written, or is something else than a snapshot.
  """
  arrays = dict(_flatten(params))
  mark = _fingerprint(arrays)
  record = {'format': FORMAT, 'config': config, 'step': int(step), 'fingerprint': mark,
            'extra': extra or {}}
  text = json.dumps(record, indent=2) + '\n'
  path = Path(os.path.realpath(path))  # if it is a link, what it points to is replaced
  try:
    _refuse_to_replace(path)
    _write(path, _shards(arrays, shard_bytes), text)
  except (OSError, safetensors.SafetensorError) as error:  # a full disk raises the latter
    raise UserError(f'cannot write the snapshot {path}: {getattr(error, "strerror", None) or error}') from error
  return mark


def check_place(path) -> None:
  """Raises UserError if `save_snapshot` would refuse to write; to be called before long work."""
  try:
    _refuse_to_replace(Path(os.path.realpath(path)))
  except OSError as error:
    raise UserError(f'cannot write the snapshot {path}: {error.strerror or error}') from error


def load_snapshot(path) -> Snapshot:
  """Reads a snapshot, or the snapshot inside a workdir, and checks it against its fingerprint.

  Raises:
    UserError: no snapshot, or its files are missing, damaged, of an unknown format or of different saves.
  """
  try:
    place = _find(Path(path))
  except PermissionError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  record = _read_config(place / CONFIG)
  arrays: dict[str, np.ndarray] = {}
  for file in _weight_files(place):
    arrays |= _read_weights(place / file)
  if _fingerprint(arrays) != record['fingerprint']:
    raise UserError(f'{WEIGHTS} and {CONFIG} in {place} are not of one save (the fingerprints '
                    'differ); copy the whole snapshot again')
  return Snapshot(params=_nest(arrays), config=renamed.current(record['config']), step=record['step'],
                  fingerprint=record['fingerprint'], extra=record['extra'])


def snapshot_place(path) -> Path:
  """The directory of the snapshot that `load_snapshot(path)` reads. Raises UserError: there is none."""
  place = _find(Path(path))
  if place.name.endswith('.old'):
    raise UserError(f'the snapshot {path} stands aside as {place.name} since a crash: rename it back first')
  return place


def fingerprint(params) -> str:
  """The first 16 hex digits of the sha256 over sorted names, shapes, dtypes and bytes."""
  return _fingerprint(dict(_flatten(params)))


def _fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name in sorted(arrays):
    array = arrays[name]
    array = array.astype(np.float32) if array.dtype.name == 'bfloat16' else array
    digest.update(f'{name} {array.shape} {array.dtype.name}\n'.encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()[:16]


# ---- in the background ---------------------------------------------------------------------------


class Background:
  """Saves in a background thread, one save at a time, while the caller continues.

  A save that is still waiting when the next one is requested is dropped: only the newest is needed, and at most two
  copies of the weights are in memory. An exception of a save is raised by the next call here.

    with Background() as background:
      background.save(lambda: save_snapshot(...))
  """

  _one = threading.Lock()  # for the whole process: a save that `drop` abandoned ends before one of another run begins

  def __init__(self):
    self._change = threading.Condition()
    self._next: Callable | None = None
    self._error: BaseException | None = None
    self._running = self._dropped = False

  def save(self, write: Callable[[], object]):
    """Calls `write` in the background. The data it uses must not change until then."""
    with self._change:
      self._raise()
      self._next = write
      if not self._running:
        self._running = True
        # A daemon, so that the interpreter can end without waiting for it; replacing a snapshot is atomic.
        threading.Thread(target=self._run, daemon=True, name='m2l2-snapshot').start()

  def wait(self):
    """Waits until everything is written."""
    with self._change:
      self._change.wait_for(lambda: not self._running)
      self._raise()

  def drop(self):
    """For a quick end: drops the waiting save, and does not wait for the running one."""
    with self._change:
      self._next, self._dropped = None, True

  def _run(self):
    with self._one:
      while True:
        with self._change:
          write, self._next = self._next, None
          if write is None:
            self._running = False
            self._change.notify_all()
            return
        try:
          write()
        except BaseException as error:  # raised in the thread that requested it
          self._error = error

  def _raise(self):
    error, self._error = self._error, None
    if error:
      raise error

  def __enter__(self):
    return self

  def __exit__(self, kind, error, unused_traceback):
    if self._dropped or error is not None and not isinstance(error, UserError):
      return
    try:
      self.wait()
    except Exception:
      if error is None:  # else the first error is kept
        raise


# ---- nested dicts and flat names ----------------------------------------------------------------


def _flatten(tree: Mapping, prefix: str = '') -> Iterator[tuple[str, np.ndarray]]:
  """Flat names; the int keys of module lists become digits, and ints again in `_nest`."""
  for key, value in tree.items():
    if not isinstance(key, int) and (not key or '/' in key or key.isdecimal()):
      raise ValueError(f'a parameter cannot be named {key!r} (under {prefix!r})')
    name = f'{prefix}{key}'
    if isinstance(value, Mapping):
      yield from _flatten(value, f'{name}/')
    else:
      # safetensors writes memory as it lies, so it must lie in C order.
      yield name, np.asarray(value, order='C')


def _nest(arrays: Mapping[str, np.ndarray]) -> dict:
  tree: dict = {}
  for name, array in arrays.items():
    *parents, leaf = [int(key) if key.isdecimal() else key for key in name.split('/')]
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[leaf] = array
  return tree


# ---- atomic writes ---------------------------------------------------------------


def _aside(path: Path) -> Path:
  path = Path(os.path.realpath(path))
  return path.with_name(f'.{path.name}.old')


def _refuse_to_replace(path: Path) -> None:
  if not path.exists() or _is_snapshot(path):
    return
  if not path.is_dir():
    raise UserError(f'cannot write the snapshot {path}: a file of that name is there')
  if any(path.iterdir()):
    raise UserError(f'cannot write the snapshot {path}: the directory holds other things; '
                    'name a new one')


def _shards(arrays: dict[str, np.ndarray], shard_bytes: int | None) -> dict[str, dict]:
  """{file: its arrays}, in the order of the arrays."""
  most: float = shard_bytes or float('inf')
  groups: list[dict[str, np.ndarray]] = [{}]
  room = most
  for name, array in arrays.items():
    if groups[-1] and array.nbytes > room:
      groups.append({})
      room = most
    groups[-1][name] = array
    room -= array.nbytes
  if len(groups) == 1:
    return {WEIGHTS: arrays}
  return {f'model-{n:05d}-of-{len(groups):05d}.safetensors': group for n, group in enumerate(groups, 1)}


def _write(path: Path, shards: dict[str, dict], config: str) -> None:
  new, old = path.with_name(f'.{path.name}.new'), _aside(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  _remove(new)
  new.mkdir()
  try:
    for file, arrays in shards.items():
      safetensors.numpy.save_file(arrays, new / file)
      sync(new / file)
    (new / CONFIG).write_text(config, encoding='utf-8')
    sync(new / CONFIG)
    before = path if path.exists() else old  # aside, after a save that ended between the two renames below
    if before.exists():
      _copy_foreign_files(before, new)
    sync(new)
  except BaseException:
    _remove(new)
    raise
  # A directory cannot be renamed onto a non-empty one. Between the two renames the old snapshot is
  # aside, complete, where `_find` looks for it; at every other moment `path` itself is complete.
  if path.exists():
    _remove(old)
    os.rename(path, old)
  os.rename(new, path)
  sync(path.parent)
  _remove(old)


def _copy_foreign_files(source: Path, target: Path) -> None:
  for entry in source.iterdir():
    if entry.name == CONFIG or _SHARD.fullmatch(entry.name) or entry.name == WEIGHTS:
      continue
    if entry.is_dir():
      shutil.copytree(entry, target / entry.name, symlinks=True)
    else:
      shutil.copy2(entry, target / entry.name, follow_symlinks=False)


def _remove(directory: Path) -> None:
  if directory.exists():
    shutil.rmtree(directory)


# ---- reading ------------------------------------------------------------------------------------


def _weight_files(path: Path) -> list[str]:
  """The single file of weights or, if there is none, all shards that the name of the first one implies."""
  if not (path / WEIGHTS).exists() and path.is_dir():
    for name in sorted(os.listdir(path)):
      if match := _SHARD.fullmatch(name):
        return [f'model-{n:05d}-of-{match[1]}.safetensors' for n in range(1, int(match[1]) + 1)]
  return [WEIGHTS]


def _is_snapshot(path: Path) -> bool:
  return all((path / name).is_file() for name in (CONFIG, *_weight_files(path)))


def _find(path: Path) -> Path:
  """The snapshot's directory: `path`, `path/snapshot`, or the old one that a crash left aside of either."""
  for place in (path, path / 'snapshot'):
    if _is_snapshot(place):
      return place
    if not place.exists() and _is_snapshot(_aside(place)):
      return _aside(place)
  if not path.exists():
    raise UserError(f'no such snapshot or workdir: {path}')
  if not path.is_dir():
    raise UserError(f'{path} is a file; name the directory that holds {WEIGHTS} and {CONFIG}')
  for place in (path / 'snapshot', path):
    files = _weight_files(place)
    has_weights, has_config = (any((place / name).exists() for name in names) for names in (files, [CONFIG]))
    # A workdir has a config.json of its own, so that alone says nothing about `path` itself.
    if has_weights or has_config and place.name == 'snapshot':
      missing = next(name for name in (CONFIG, *files) if not (place / name).exists())
      raise UserError(f'the snapshot {place} lacks {missing}; copy it again')
  raise UserError(f'no snapshot in {path}: neither {WEIGHTS} nor a directory snapshot/ is there '
                  '(training writes one when it saves)')


def _read_config(path: Path) -> dict[str, Any]:
  try:
    record = json.loads(path.read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror or error}') from error
  except ValueError as error:  # bad JSON, bad UTF-8
    raise UserError(f'{path} is not JSON ({error}); copy the snapshot again') from error
  version = record.get('format') if isinstance(record, dict) else None
  if version is None:
    raise UserError(f'{path} is not the {CONFIG} of a snapshot (it has no "format")')
  if version != FORMAT:
    raise UserError(f'{path} is of format {version}, and this m2l2 reads format {FORMAT}; '
                    'update m2l2 or export the snapshot again')
  record.setdefault('extra', {})
  wanted = {'config': dict, 'step': int, 'fingerprint': str, 'extra': dict}
  for key, kind in wanted.items():
    if not isinstance(record.get(key), kind):
      raise UserError(f'{path} is damaged: "{key}" is missing or not of type {kind.__name__}')
  return record


def _array(*, shape, dtype: str, data) -> np.ndarray:
  if dtype == 'BF16':  # the upper half of a float32
    return (np.frombuffer(data, '<u2').astype(np.uint32) << 16).view(np.float32).reshape(shape)
  return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _read_weights(path: Path) -> dict[str, np.ndarray]:
  try:
    return {name: _array(**tensor) for name, tensor in safetensors.deserialize(path.read_bytes())}
  except PermissionError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path} is damaged or cut short ({error}); copy the snapshot again') from error
