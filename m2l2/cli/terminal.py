"""What the user sees: streams, lines, bars."""

import argparse
from collections.abc import Iterator
import contextlib
import logging
import os
import sys
import time

from m2l2.errors import in_one_line, printable


def open_streams():
  """Makes sure of the three standard streams: what is opened in the place of a closed one would get what is printed."""
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
  if sys.stderr is None:  # or print() would take standard output
    sys.stderr = open(os.devnull, 'w', encoding='utf-8')
  for stream in (sys.stdout, sys.stderr):  # in a locale without these letters, names are printed all the same
    if getattr(stream, 'errors', '') == 'strict' and hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='backslashreplace')


def tell(error):
  """A mistake or a fault, in one line whatever names it holds."""
  try:
    print('m2l2:', printable(in_one_line(error)), file=sys.stderr)
  except (OSError, ValueError):  # nobody reads there any more
    settle()


def settle():
  """Where nobody reads standard error any more, the interpreter is not to find out at its end and to exit with 120."""
  with contextlib.suppress(OSError, ValueError):
    try:
      sys.stderr.flush()
    except (OSError, ValueError):
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def show(text):
  """On standard output. Raises UserError where it does not get there."""
  with to_output():
    print(text, flush=True)


def flush():
  """What is still to be printed, argparse's help for one."""
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
  """Tells a mistake in one line."""

  def error(self, message):
    self.exit(2, f'{self.prog}: {message} ({self.prog} --help shows an example)\n')

  def _print_message(self, message, file=None):
    """argparse passes over what cannot be written."""
    if file is None or file is not sys.stdout:
      return super()._print_message(message, file)
    with to_output():
      file.write(message)
      file.flush()


def say(args, line):
  """On standard output, unless that is where the result goes."""
  if args.quiet:
    return
  if getattr(args, 'target', None) in ('-', '/dev/stdout'):
    print(line, file=sys.stderr)
  else:
    show(line)


@contextlib.contextmanager
def progress(name, signal_info, *, quiet):
  """A bar in seconds of audio on stderr, on a terminal only; gives a function to advance it."""
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
  """A bar in signals, with the speed, on a terminal only; gives a function of each one's seconds of audio."""
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
  """A bar in steps on stderr, on a terminal only; gives a function to advance it."""
  import tqdm
  with tqdm.tqdm(total=steps, desc=name, leave=False, disable=True if quiet else None) as bar:
    yield bar.update


def counted(blocks, done) -> Iterator:
  for block in blocks:
    yield block
    done(block)


def quiet_libraries():
  """What jax and XLA say to developers is not for users; warnings of our own are."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # XLA's log, read when jax is imported
  logging.getLogger('jax').setLevel(logging.ERROR)
  from absl import flags
  from absl import logging as absl_logging
  flags.FLAGS.mark_as_parsed()  # there are none, but absl's log would say that nobody parsed them
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING)
  absl_logging.get_absl_handler().setFormatter(logging.Formatter('m2l2: %(message)s'))
