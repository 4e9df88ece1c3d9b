"""Output for the user: streams, lines, progress bars."""

import argparse
from collections.abc import Iterator
import contextlib
import logging
import os
import sys
import time

from m2l2.errors import in_one_line, printable


def open_streams():
  """Opens closed standard streams, so that no other file takes their number and receives what is printed."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
  if sys.stderr is None:  # or print() would use standard output
    sys.stderr = open(os.devnull, 'w', encoding='utf-8')
  for stream in (sys.stdout, sys.stderr):  # print names also in a locale without their letters
    if getattr(stream, 'errors', '') == 'strict' and hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')


def tell(error):
  """Prints a message to standard error, as one line."""
  try:
    print('m2l2:', printable(in_one_line(error)), file=sys.stderr)
  except (OSError, ValueError):  # its reader has closed it
    settle()


def settle():
  """Closes standard error if its reader has closed it; else the interpreter would exit with status 120."""
  with contextlib.suppress(OSError, ValueError):
    try:
      sys.stderr.flush()
    except (OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def show(text):
  """Prints to standard output. Raises UserError: it cannot be written."""
  with to_output():
    print(text, flush=True)


def flush():
  """Flushes standard output (argparse's help, for one). Raises UserError: it cannot be written."""
  if sys.stdout is not None:
    with to_output():
      sys.stdout.flush()


@contextlib.contextmanager
def to_output():
  try:
    yield
  except (OSError, ValueError) as error:
    from m2l2.cli.jobs import output_fault
    raise output_fault(error) from error


class Parser(argparse.ArgumentParser):
  """An ArgumentParser that reports mistakes in one line."""

  def error(self, message):
    self.exit(2, f'{self.prog}: {message} ({self.prog} --help shows an example)\n')

  def _print_message(self, message, file=None):
    """Unlike argparse, raises an error for a message that cannot be written."""
    if file is None or file is not sys.stdout:
      return super()._print_message(message, file)
    with to_output():
      file.write(message)
      file.flush()


def say(args, line):
  """Prints to standard output, or not at all if the result goes there."""
  if args.quiet:
    return
  if getattr(args, 'target', None) in ('-', '/dev/stdout'):
    print(line, file=sys.stderr)
  else:
    show(line)


@contextlib.contextmanager
def progress(name, signal_info, *, quiet):
  """A progress bar in seconds of audio on stderr, if that is a terminal; yields a function to advance it."""
  import tqdm
  samples = getattr(signal_info, 'num_samples', None) or signal_info.frames
  with tqdm.tqdm(
      total=round(samples / signal_info.sample_rate, 1), desc=name, unit='s', leave=False,
      disable=True if quiet else None,  # None: unless stderr is a terminal
      bar_format='{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s, {remaining} left',
  ) as bar:
    yield lambda block: bar.update(block.shape[1] / signal_info.sample_rate)


@contextlib.contextmanager
def corpus_progress(total, *, quiet):
  """A progress bar in signals, with the speed, if stderr is a terminal; yields a function of each signal's seconds."""
  import tqdm
  began, done = time.monotonic(), 0.0
  with tqdm.tqdm(total=total, desc='encode', unit='file', leave=False, disable=True if quiet else None) as bar:
    def advance(seconds):
      nonlocal done
      done += seconds
      bar.set_postfix_str(f'{done / 3600:.2f} h of audio, {done / (time.monotonic() - began):.0f}x real time',
                          refresh=False)
      bar.update()
    yield advance


@contextlib.contextmanager
def bar(name, steps, *, quiet):
  """A progress bar in steps on stderr, if that is a terminal; yields a function to advance it."""
  import tqdm
  with tqdm.tqdm(total=steps, desc=name, leave=False, disable=True if quiet else None) as bar:
    yield bar.update


def counted(blocks, done) -> Iterator:
  for block in blocks:
    yield block
    done(block)


def quiet_libraries():
  """Silences messages of JAX and XLA for developers; warnings of m2l2 stay."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # XLA's log, read when jax is imported
  logging.getLogger('jax').setLevel(logging.ERROR)
  from absl import flags
  from absl import logging as absl_logging
  flags.FLAGS.mark_as_parsed()  # there are none, but absl's log would warn that they are not parsed
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_handler().setFormatter(logging.Formatter('m2l2: %(message)s'))
