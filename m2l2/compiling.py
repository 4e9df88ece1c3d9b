"""Compiling: the cache of compiled programs, and a message before a long wait.

All compiled programs are in one folder, the first of these that applies:
  1. the user's own: JAX_COMPILATION_CACHE_DIR, or jax_compilation_cache_dir in JAX's config. The empty string: nothing
     is kept.
  2. WORKDIR/compiled, for training on accelerators in several processes: they share the workdir, also after restarts.
     Process 0 writes the programs of all processes; each process writes those that it alone runs (`share_cache`).
  3. $XDG_CACHE_HOME/m2l2/xla-PROCESSOR, without that variable ~/.cache/m2l2/xla-PROCESSOR.
The folder may be deleted at any time.

The log "m2l2.compiling" warns how long a wait will be, estimated from the time that lowering took: lowering comes first
and depends on the size of the program and on the machine as compiling does. Programs that take less than `_PATIENCE`,
such as those in the cache, are not mentioned.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import threading
import time
from typing import Any
import warnings

import jax

from m2l2 import no_collection

_log = logging.getLogger(__name__)
_config: Any = jax.config  # its fields are made when it is imported
_JAX_MIN_SECONDS = 1.0  # JAX's default: programs that compile faster are not kept
_SHORT = 3.0  # seconds of waiting without a message
_PATIENCE = 1.0
_PER_LOWERING = 20  # seconds of compiling for one of lowering: 17 to 28 in the programs of the codec, on CPUs
_LOWERED, _COMPILED = (f'/jax/core/compile/{name}_duration' for name in ('jaxpr_to_mlir_module', 'backend_compile'))
_here = threading.local()


# ---- the cache


def cache_folder() -> str:
  """The user's cache folder for this kind of processor.

  A program for CPUs uses all instructions of the processor it was compiled on and may crash on another, so a home
  directory that several machines share has a folder for each kind.
  """
  base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      processor = next((line for line in file if line.startswith(('flags', 'Features'))), '')
  except OSError:  # not Linux
    processor = ' '.join(platform.uname())
  return os.path.join(base, 'm2l2', f'xla-{hashlib.sha256(processor.encode()).hexdigest()[:12]}')


def use_cache(workdir: str | None = None):
  """From here on this process reads compiled programs from the cache and adds its own.

  Args:
    workdir: of the training run that this process belongs to, if any: a path in the file system. Then JAX's devices are
      asked for, which starts its backends.
  """
  set_by_user = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' in os.environ
  if not set_by_user and _config.jax_persistent_cache_min_compile_time_secs == _JAX_MIN_SECONDS:
    # Small programs too: there are dozens, and reading one takes a tenth of the time of compiling it.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.)
  if _config.jax_compilation_cache_dir is not None:
    return
  folder = cache_folder()
  if workdir is not None and jax.process_count() > 1 and jax.default_backend() != 'cpu':
    folder = os.path.join(os.path.abspath(workdir), 'compiled')
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError:
    return
  if not os.access(folder, os.W_OK):  # not writable: JAX would warn at each program
    return
  jax.config.update('jax_compilation_cache_dir', folder)


def share_cache():
  """Makes this process, one of several, write to the cache what it alone compiles. Call it before anything is compiled.

  JAX writes only what process 0 compiles, so that many hosts do not write the same file at once. That suits programs
  that run on all devices: they have the same cache key in every process. Programs that a process runs on its own
  devices (the slices of a checkpoint, hundreds of them) have keys of their own and would be compiled again at each
  start; so would all programs on CPUs, where the keys differ.
  """
  from jax._src import compilation_cache, compiler, distributed  # none of it has a public name; 0.10.2 to 0.12
  if not distributed.global_state.process_id or hasattr(compiler._compile_and_write_cache, '__wrapped__'):
    return

  jax_compiler: Any = compiler
  compile_and_write = jax_compiler._compile_and_write_cache

  @functools.wraps(compile_and_write)
  def keep(backend, computation, devices, options, host_callbacks, name, key):
    began = time.monotonic()
    executable = compile_and_write(backend, computation, devices, options, host_callbacks, name, key)
    seconds = time.monotonic() - began
    alone = devices.is_fully_addressable or backend.platform == 'cpu'
    if alone and not host_callbacks and seconds >= _config.jax_persistent_cache_min_compile_time_secs:
      try:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
      except Exception as error:  # as JAX does: the run works without a cache
        warnings.warn(f'the program {name} could not be kept: {type(error).__name__}: {error}')
    return executable

  jax_compiler._compile_and_write_cache = keep


# ---- what XLA is told


def optimised(level: int) -> dict:
  """XLA's options for a program that should compile sooner on CPUs; elsewhere none. Its older loops compile in half the
  time of the newer, and at these levels are as fast.

  level: 1 compiles in half the time, for what spends its time in calls of libraries (products, convolutions); 0 in a
    third, to run at half the speed, for what runs a few times.
  """
  if jax.default_backend() != 'cpu':
    return {}
  return {'xla_backend_optimization_level': level, 'xla_cpu_use_fusion_emitters': False}


# ---- the message before a wait


@contextlib.contextmanager
def told():
  """Context for calls that may compile: logs a message before a long wait."""
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
  """A jitted function, called within `told` and without garbage collection; it has the same attributes."""

  def __init__(self, program):
    functools.update_wrapper(self, program)
    self._program = program

  def __call__(self, *args, **options):
    with told(), no_collection():
      return self._program(*args, **options)

  def __getattr__(self, name):
    return getattr(self._program, name)


def _stop():
  while _here.timers:
    _here.timers.pop().cancel()


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
  """A listener of JAX's events, in the thread that compiles: a program is lowered (compiling starts), or compiled."""
  if getattr(_here, 'timers', None) is None or event not in (_LOWERED, _COMPILED):
    return
  _stop()
  if event == _LOWERED and duration_secs * _PER_LOWERING > _SHORT:
    timer = threading.Timer(_PATIENCE, _tell, [duration_secs * _PER_LOWERING])
    timer.daemon = True
    _here.timers.append(timer)
    timer.start()


def _tell(seconds):
  kept = ' (kept for the next start)' if _config.jax_compilation_cache_dir else ''
  _log.warning('compiling, about %.0f s%s', seconds, kept)


jax.monitoring.register_event_duration_secs_listener(_listen)
