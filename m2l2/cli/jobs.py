"""Pairs of input and output files of a command: for one file, several, a folder, a glob, or `-` for a pipe."""

import collections
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile

from m2l2.data import ffmpeg, sources
from m2l2.data.audio_io import shown
from m2l2.errors import OutputClosed, UserError

PIPE = '-'
_STDIN = ('/dev/stdin', '/dev/fd/0', '/proc/self/fd/0')
_STDOUT = ('/dev/stdout', '/dev/fd/1', '/proc/self/fd/1')
AUDIO = (*sources.EXTENSIONS, *ffmpeg.EXTENSIONS)
LATENTS = ('.safetensors',)


@dataclasses.dataclass(frozen=True)
class Job:
  """One input and one output; either may be PIPE. makes_folder: create the output's directory if it is missing."""
  source: str
  target: str
  makes_folder: bool = False

  @property
  def name(self) -> str:
    return 'standard input' if self.source == PIPE else shown(self.source)


def find_jobs(given: Sequence[str], target: str, *, inputs: Sequence[str], output: str) -> list[Job]:
  """The jobs of a command line.

  One file is written to `target`, or into it if that is a directory. Several files, a directory (with its
  subdirectories) or a glob are written into the directory `target`, which is created, under their own names with the
  extension `output`; song.wav and song.flac of one directory become song.wav.EXT and song.flac.EXT. A named pipe, as of
  `<(...)` in a shell, counts as a file.

  Args:
    given: files, directories, globs or PIPE.
    inputs: extensions of input files in directories and globs.

  Raises UserError: no input, two inputs for one output, or outputs that the next call would take for inputs.
  """
  given, target = [PIPE if place in _STDIN else place for place in given], PIPE if target in _STDOUT else target
  if given == [PIPE]:
    return [Job(PIPE, target)]
  if PIPE in given:
    raise UserError('- (standard input) is one file: give no other beside it')
  listed = [(base, name) for place in given for base, name in _find(place, inputs)]
  many = len(given) > 1 or not (os.path.isfile(given[0]) or is_pipe(given[0]))
  if not many and not os.path.isdir(target) and not target.endswith('/'):
    return [Job(given[0], target)]
  if target == PIPE:
    raise UserError(f'- (standard output) takes one file, and here are {len(listed)}: name a directory')
  if not os.path.isdir(target) and (os.path.exists(target) or os.path.splitext(target)[1] == output):
    raise UserError(f'{shown(target)}: is one file, and several are to be made of {shown(given[0])}: give a directory')
  for place in given:
    if output in inputs and os.path.isdir(place) and _is_below(target, place):
      raise UserError(f'{shown(target)}: lies in {shown(place)}, where it would be an input the next time: name a '
                      'directory elsewhere')
  jobs, taken = [], dict[str, str]()
  stems = collections.Counter(os.path.splitext(name)[0] for _, name in dict.fromkeys(listed))
  for base, name in dict.fromkeys(listed):  # without duplicates
    stem = os.path.splitext(name)[0]
    result = os.path.join(target, (stem if stems[stem] == 1 else name) + output)
    source = os.path.join(base, name)
    if result in taken:
      raise UserError(f'{shown(source)} and {shown(taken[result])} would both become {shown(result)}: rename one, or '
                      'give them directories of their own')
    taken[result] = source
    jobs.append(Job(source, result, makes_folder=True))
  return jobs


def _find(place, inputs) -> Iterator[tuple[str, str]]:
  """(directory, name relative to it) of every file that a path, directory or glob stands for."""
  if os.path.isfile(place) or is_pipe(place):  # whatever its extension
    yield os.path.split(place)
    return
  listing = sources.find_files(place, tuple(inputs))
  if not listing:
    raise UserError(f'{shown(place)}: there is no such file or directory')
  base, names = listing
  if not names:
    raise UserError(f'{shown(place)}: no files there (looked for *{", *".join(inputs)})')
  for name in sorted(names):
    yield base, name


def is_pipe(path) -> bool:
  """Whether a path is a pipe, a device or a socket, which can be read or written only once, from the beginning."""
  return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def _is_below(path, folder) -> bool:
  """Whether a path is inside a directory, at any depth. A directory is not inside itself."""
  path, folder = os.path.realpath(path), os.path.realpath(folder)
  return path != folder and os.path.commonpath([path, folder]) == folder


@contextlib.contextmanager
def reading(job: Job) -> Iterator[str]:
  """Yields the path to read: for a pipe, a temporary file with its contents; errors still name the pipe."""
  if job.source != PIPE and not is_pipe(job.source):
    yield job.source
    return
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'standard input')
    if job.source == PIPE and sys.stdin is None:
      raise UserError('standard input is closed: there is nothing to read')
    with contextlib.ExitStack() as opened:
      try:
        pipe = sys.stdin.buffer if job.source == PIPE else opened.enter_context(open(job.source, 'rb'))
      except OSError as error:
        raise UserError(f'{job.name}: cannot be read ({error.strerror})') from error
      try:
        with open(path, 'wb') as file:
          shutil.copyfileobj(pipe, file)
      except OSError as error:
        raise UserError(f'{job.name}: could not be kept in {shown(folder)} ({error.strerror}); TMPDIR names another '
                        'place') from error
    try:
      yield path
    except UserError as error:
      raise UserError(str(error).replace(shown(path), job.name)) from error


@contextlib.contextmanager
def writing(job: Job, *, output: str, check: Callable) -> Iterator[str]:
  """Yields the path to write, after `check(path)`; its directory exists.

  For a pipe it is a temporary file, which is copied to the pipe when the block ends without an error.
  """
  if job.target != PIPE and not is_pipe(job.target):
    folder = os.path.dirname(job.target)
    try:
      if job.makes_folder:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
      raise UserError(f'{shown(folder)}: cannot be made ({error.strerror})') from error
    check(job.target)
    yield job.target
    return
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, f'standard output{output}')
    if job.target == PIPE and sys.stdout is None:
      raise UserError('standard output is closed: there is nowhere to write')
    yield path
    if job.target != PIPE:
      try:
        with open(path, 'rb') as file, open(job.target, 'wb') as pipe:
          shutil.copyfileobj(file, pipe)
      except OSError as error:
        raise UserError(f'{shown(job.target)}: not all could be written ({error.strerror})') from error
      return
    with open(path, 'rb') as file:
      try:
        shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
      except (OSError, ValueError) as error:  # a pipe that its reader closed, or a full disk
        raise output_fault(error) from error


def output_fault(error: Exception) -> UserError:
  """The exception for an error of writing to standard output, to which nothing more is written."""
  with contextlib.suppress(OSError, ValueError):  # or the interpreter would try again at its end and print an error
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  reason = getattr(error, 'strerror', None) or error
  kind = OutputClosed if isinstance(error, BrokenPipeError) else UserError
  return kind(f'standard output: not all could be written ({reason})')
