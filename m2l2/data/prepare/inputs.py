"""The input files, local or on a file system of fsspec: listing and fetching."""

from collections.abc import Iterator
import contextlib
import glob
import os
import tempfile

from m2l2.data import sources
from m2l2.data.audio_io import shown
from m2l2.data.prepare.child import FileFault
from m2l2.errors import UserError, in_one_line


def find(source: str) -> tuple[str, list[str], list[int]]:
  """The base, the sorted names relative to it, and the sizes (-1: unknown) of the audio files."""
  if '://' not in source:
    files = sources.find_audio_files(source)
    return files.base, list(files.names), [_size(files.path(number)) for number in range(len(files))]
  fs, path = file_system(source)
  scheme = source.partition('://')[0]
  try:
    if glob.has_magic(path):
      base = path[:min(path.find(c) for c in '*?[' if c in path)].rpartition('/')[0]
      infos = fs.glob(path, detail=True)
    elif fs.isfile(path):
      base, infos = path.rpartition('/')[0], {path: fs.info(path)}
    else:
      base, infos = path, fs.find(path, detail=True)
  except Exception as e:
    raise UserError(f'{shown(source)}: cannot be listed: {in_one_line(e)}') from e
  base = base.rstrip('/')
  sizes = {name[len(base):].lstrip('/'): info.get('size') or 0 for name, info in infos.items()
           if info.get('type') == 'file' and name.lower().endswith(sources.EXTENSIONS)}
  sizes = {name: size for name, size in sizes.items() if not any(part.startswith('.') for part in name.split('/'))}
  if not sizes:
    raise UserError(f'{shown(source)}: no audio files there (looked for *{", *".join(sources.EXTENSIONS)})')
  names = sorted(sizes)
  return f'{scheme}://{base}', names, [sizes[name] for name in names]


def _size(path) -> int:
  try:
    return os.path.getsize(path)
  except OSError:
    return -1


def file_system(url: str):
  """fsspec's file system of a URL, and the path in it."""
  try:
    import fsspec
    return fsspec.core.url_to_fs(url, use_listings_cache=False)  # no cache: other processes write there, too
  except (ImportError, ValueError) as e:
    raise UserError(f'{shown(url)}: cannot be reached ({in_one_line(e)})') from e


def remote_size(base, name) -> int:
  fs, root = file_system(base)
  return fs.size(f'{root}/{name}') or 0


@contextlib.contextmanager
def fetched(base: str, name: str, *, most: int | None = None) -> Iterator[str]:
  """Yields a local path of a file: its own, or of a temporary copy (of the first `most` bytes) of a remote one."""
  if '://' not in base:
    yield os.path.join(base, name)
    return
  fs, root = file_system(base)
  path = f'{root}/{name}'
  with tempfile.NamedTemporaryFile(suffix=os.path.splitext(name)[1]) as copy:
    try:
      if most:
        copy.write(fs.cat_file(path, start=0, end=most))
        copy.flush()
      else:
        fs.get_file(path, copy.name)
    except (FileNotFoundError, PermissionError) as e:
      raise FileFault(f'cannot be fetched ({type(e).__name__})') from e
    except Exception as e:  # an error of the connection, not of the file: all other files would fail, too
      raise UserError(f'{shown(base)}/{shown(name)}: cannot be fetched: {in_one_line(e)}; run the '
                      'command again to go on') from e
    yield copy.name
