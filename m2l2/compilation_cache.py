"""Where programs that XLA has compiled are kept for the next start, one place for all that m2l2 runs.

The first of these that holds:
  1. the user's own: JAX_COMPILATION_CACHE_DIR, or jax_compilation_cache_dir in JAX's config. The empty string: nothing
     is kept.
  2. WORKDIR/compiled, for training on accelerators in several processes: the workdir is what all of them and all
     restarts share. The programs of all are written by the first of them, those of one alone by that one (`share`).
  3. $XDG_CACHE_HOME/m2l2/xla-PROCESSOR, without that variable ~/.cache/m2l2/xla-PROCESSOR.

The folder may be deleted at any time.
"""

import functools
import hashlib
import os
import platform
import time
import warnings

import jax


def default_folder() -> str:
  """The user's folder for the programs of this kind of processor.

  A program for CPUs uses all instructions of the one that it was compiled on and may crash on another, so a home that
  several machines share gets a folder for each kind.
  """
  base = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      processor = next((line for line in file if line.startswith(('flags', 'Features'))), '')
  except OSError:  # not Linux
    processor = ' '.join(platform.uname())
  return os.path.join(base, 'm2l2', f'xla-{hashlib.sha256(processor.encode()).hexdigest()[:12]}')


def use(workdir: str | None = None):
  """From here on this process keeps its compiled programs, and takes those that were kept.

  Args:
    workdir: of the training run that this process belongs to, if any: a path in the file system. Then JAX's devices are
      asked for, which starts its backends.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  shared = workdir is not None and jax.process_count() > 1 and jax.default_backend() != 'cpu'
  folder = os.path.join(os.path.abspath(workdir), 'compiled') if shared else default_folder()
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError:
    return
  if not os.access(folder, os.W_OK):  # of another user, or on a disk that is read-only: JAX would warn at each program
    return
  jax.config.update('jax_compilation_cache_dir', folder)
  if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
    # Small ones too: there are dozens, to read one takes a tenth of compiling it.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.)


def share():
  """Has this process of several keep what it alone compiles; to be called before it compiles anything.

  JAX keeps only what its process 0 compiles, so that many hosts do not write one file at once. That holds for programs
  of all devices, which have one name everywhere. But what a process runs on its own devices (a checkpoint's slices,
  hundreds of them) has a name of its own, and would be compiled again at each start, and so would all on CPUs, where
  the names differ.
  """
  from jax._src import compilation_cache, compiler, distributed  # none of it has a public name; 0.10.2 to 0.12
  if not distributed.global_state.process_id or hasattr(compiler._compile_and_write_cache, '__wrapped__'):
    return

  @functools.wraps(compiler._compile_and_write_cache)
  def keep(backend, computation, devices, options, host_callbacks, name, key):
    began = time.monotonic()
    executable = keep.__wrapped__(backend, computation, devices, options, host_callbacks, name, key)
    seconds = time.monotonic() - began
    alone = devices.is_fully_addressable or backend.platform == 'cpu'
    if alone and not host_callbacks and seconds >= jax.config.jax_persistent_cache_min_compile_time_secs:
      try:
        compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
      except Exception as error:  # as JAX does: the run does not depend on it
        warnings.warn(f'the program {name} could not be kept: {type(error).__name__}: {error}')
    return executable

  compiler._compile_and_write_cache = keep
