"""How commands handle SIGTERM, SIGHUP and Ctrl-C."""

import contextlib
import os
import signal
import sys
import threading


@contextlib.contextmanager
def stopped_by_signals():
  """Makes SIGTERM and SIGHUP raise an exception as Ctrl-C does, so that temporary files are removed.

  All three are delayed where an exception would do harm or be lost: while a module is imported (the C code of numpy and
  JAX may crash then), and in functions that the garbage collector calls.
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
      if signal.getsignal(number) is usual is not signal.SIG_IGN:  # ignored by nohup, or handled by another library
        before[number] = signal.signal(number, stop)
  except ValueError:  # not the main thread, which handles signals
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
  """Silences TensorStore's tracebacks for writes that end after their save failed, until the process ends.

  They would come even after the last line. The cause, such as a full disk, ends the run and is reported in that
  line."""
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
