"""What SIGTERM, SIGHUP and Ctrl-C do to a command."""

import contextlib
import os
import signal
import sys
import threading


@contextlib.contextmanager
def stopped_by_signals():
  """SIGTERM, and SIGHUP of a terminal that is closed, unwind like Ctrl-C does, so that temporary files are removed.

  All three wait where an exception would do harm or be lost: while a module is imported, of which the C code of numpy
  and JAX may crash; in what the garbage collector calls, as JAX has it do.
  """
  def stop(number, frame):
    if _is_importing(frame):
      _send_again(number)
    else:
      raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

  def lost(unraisable):
    error = unraisable.exc_value
    if isinstance(error, KeyboardInterrupt):
      _send_again(signal.SIGINT)
    elif isinstance(error, SystemExit) and error.code in [128 + number for number in before]:
      _send_again(error.code - 128)
    else:
      hook(unraisable)

  before, hook = {}, sys.unraisablehook
  try:
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, 'SIGHUP') else [])):
      usual = signal.default_int_handler if number == signal.SIGINT else signal.getsignal(number)
      if signal.getsignal(number) is usual is not signal.SIG_IGN:  # nohup; a SIGINT that somebody else sees to
        before[number] = signal.signal(number, stop)
  except ValueError:  # not the main thread: signals are somebody else's
    yield
    return
  sys.unraisablehook = lost
  try:
    yield
  finally:
    sys.unraisablehook = hook
    for number, handler in before.items():
      signal.signal(number, handler)


def leave_late_writes_untold():
  """Until the process ends: TensorStore has a traceback for each write that outlives its save, even after the last
  line. What ended the save, a full disk, ends the run too and is that line."""
  def lost(unraisable):
    if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == 'Event loop is closed'):
      hook(unraisable)

  hook, sys.unraisablehook = sys.unraisablehook, lost


def _is_importing(frame) -> bool:
  while frame is not None and not frame.f_code.co_filename.startswith('<frozen importlib'):
    frame = frame.f_back
  return frame is not None


def _send_again(number):
  again = threading.Timer(0.05, os.kill, [os.getpid(), number])
  again.daemon = True
  again.start()
