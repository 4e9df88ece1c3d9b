"""Says so before a long wait for the compiler, and about how long it is: in the log "m2l2.compiling", as a warning.

How long is told by the time that it takes to lower the program, which comes first and goes with its size and with the
machine as compiling does. What the cache on disk has comes within `_PATIENCE` and is passed over in silence.
"""

import contextlib
import functools
import logging
import threading

import jax

_log = logging.getLogger(__name__)
_SHORT = 3.0  # seconds that nobody minds
_PATIENCE = 1.0
_PER_LOWERING = 20  # seconds of compiling for one of lowering: 17 to 28 in the programs of the codec, on CPUs
_LOWERED, _COMPILED = (f'/jax/core/compile/{name}_duration' for name in ('jaxpr_to_mlir_module', 'backend_compile'))
_here = threading.local()


@contextlib.contextmanager
def told():
  """Around calls that may compile."""
  if getattr(_here, 'timers', None) is not None:
    yield
    return
  _here.timers = []
  try:
    yield
  finally:
    _stop()
    _here.timers = None


class Told:
  """A function made by jax.jit whose calls are `told`; its attributes are the function's."""

  def __init__(self, program):
    functools.update_wrapper(self, program)
    self._program = program

  def __call__(self, *args, **options):
    with told():
      return self._program(*args, **options)

  def __getattr__(self, name):
    return getattr(self._program, name)


def _stop():
  while _here.timers:
    _here.timers.pop().cancel()


def _listen(event, seconds, **_):
  """JAX tells in the thread that compiles: that a program is lowered, so now comes the compiler; that it is done."""
  if getattr(_here, 'timers', None) is None or event not in (_LOWERED, _COMPILED):
    return
  _stop()
  if event == _LOWERED and seconds * _PER_LOWERING > _SHORT:
    timer = threading.Timer(_PATIENCE, _tell, [seconds * _PER_LOWERING])
    timer.daemon = True
    _here.timers.append(timer)
    timer.start()


def _tell(seconds):
  kept = ' (kept for the next start)' if jax.config.jax_compilation_cache_dir else ''
  _log.warning('compiling, about %.0f s%s', seconds, kept)


jax.monitoring.register_event_duration_secs_listener(_listen)
