"""Several processes as one run: connecting, detecting a lost process, ending together.

When a process is lost, JAX aborts the others from C++, long after, with a stack dump; Python cannot prevent that. So
each process also increments a counter in JAX's key-value store and watches the others' counters, and a run ends with
one line and status 1

  - at once, if a collective fails because of the lost process (CPU, mostly);
  - within a few seconds, if a process ended by itself and left its reason;
  - within --peer_timeout seconds, if it was killed, or its machine is lost or hangs;
  - within STALLED times --peer_timeout, if all live and the training loop of one stands still (a loader that hangs, a
    device, a collective): the counters carry what each main thread is at. Then WORKDIR/stalled gets the stacks of all
    threads of all processes.

One case remains: when process 0 dies, which hosts the store, JAX aborts the others at once (SIGABRT, a stack dump).
For that, and for `kill -9` of a process, a shell waits for its end and then prints its last words.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from absl import logging
import jax
import orbax.checkpoint as ocp

from m2l2 import compiling
from m2l2.errors import UserError, first_line, told
from m2l2.training.watchdog import STANDSTILL, Pace, Watchdog

AGAIN = 'run the same command on all hosts to go on from the last checkpoint'
LINGER = 3.0  # seconds that process 0 waits after its last line, so that others can end by themselves
DONE = 'done'
STALLED = 6  # times --peer_timeout without progress in the loop, and the run is ended: a slow save or step is no reason
COLLECTIVE_FAILED = re.compile(
  r'gloo|nccl|rccl|peer|heartbeat|coordination|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED', re.I)

_LAST_WORDS = 'while read -r line; do last=$line; done; [ -z "$last" ] || echo "m2l2: $last" >&2'


class LastWords:
  """A line that is printed to stderr when this process has ended, for whatever reason."""

  def __init__(self):
    self._shell = subprocess.Popen(
      ['/bin/sh', '-c', _LAST_WORDS], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
      text=True, start_new_session=True)  # it must ignore Ctrl-C

  def set(self, line):
    """Replaces the line; an empty one prints nothing."""
    assert self._shell.stdin
    try:
      self._shell.stdin.write(f'{line}\n')
      self._shell.stdin.flush()
    except (OSError, ValueError):  # the shell was killed, or the line closed: the run continues without it
      pass

  def close(self):
    self.set('')
    assert self._shell.stdin
    try:
      self._shell.stdin.close()
      self._shell.wait(timeout=5)
    except (OSError, subprocess.TimeoutExpired):
      pass


def check(*, multihost, coordinator, num_processes, process_id):
  """Raises UserError for flags that exclude each other."""
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  if not multihost:
    for name, value in given.items():
      if value is not None:
        raise UserError(f'--{name} is for runs of several processes: add --multihost')
    return
  if coordinator is not None and not re.fullmatch(r'.+:\d{1,5}', coordinator):
    raise UserError(f'--coordinator={coordinator}: it must be HOST:PORT of process 0')
  if num_processes is not None and num_processes < 1:
    raise UserError(f'--num_processes={num_processes}: it must be 1 or more')
  if process_id is not None and process_id < 0:
    raise UserError(f'--process_id={process_id}: it must be 0 or more')
  if None not in (num_processes, process_id) and process_id >= num_processes:
    raise UserError(f'--process_id={process_id}: with --num_processes={num_processes} '
                    f'it is 0 to {num_processes - 1}')


def join(*, coordinator=None, num_processes=None, process_id=None, start_timeout=300,
         peer_timeout=100) -> Hosts:
  """Connects this process to the others of its run; to be called before JAX uses a device.

  Args:
    coordinator: 'HOST:PORT' of process 0; this and the next two are found by JAX on TPU pods, GKE,
      Slurm, Open MPI and Kubernetes if they are None.
    num_processes, process_id: their number, and that of this process.
    start_timeout: seconds within which all must have started.
    peer_timeout: seconds without a sign of life after which a process counts as lost.

  Raises:
    UserError: no cluster and no flags, or no coordinator at that address in time. If others do not start in time, JAX
      aborts the process; its last words say so.
  """
  words = LastWords()
  words.set(f'not all processes of this run met within --start_timeout={start_timeout} s: start as many as '
            '--num_processes says, each with another --process_id and the same --coordinator')
  try:
    if coordinator and process_id:
      _await_coordinator(coordinator, start_timeout)
    jax.distributed.initialize(
      coordinator, num_processes, process_id, initialization_timeout=start_timeout,
      heartbeat_timeout_seconds=4 * peer_timeout)  # in case our own watch fails; may act at half the time
  except UserError:
    words.close()
    raise
  except (RuntimeError, ValueError, TypeError, KeyError, OSError) as error:
    words.close()
    if 'should be defined' in str(error) or 'must be defined' in str(error):
      raise UserError('--multihost found no cluster (TPU pod, GKE, Slurm, Open MPI, Kubernetes): name '
                      'the processes with --coordinator=HOST:PORT --num_processes=N --process_id=I') from error
    raise UserError(f'--multihost: {first_line(error)}') from error
  compiling.share_cache()
  return Hosts(words, peer_timeout=peer_timeout)


@contextlib.contextmanager
def joined(args):
  """Of a command with the flags of `cli.options.hosts`: within it this process is one of several, if --multihost says
  so, and an error ends the others too. To be entered before anything touches a device. Raises UserError."""
  place = dict(coordinator=args.coordinator, num_processes=args.num_processes, process_id=args.process_id)
  check(multihost=args.multihost, **place)
  several = join(**place, start_timeout=args.start_timeout, peer_timeout=args.peer_timeout) if args.multihost else None
  try:
    yield
    if several:
      several.leave()
  except (Exception, KeyboardInterrupt, SystemExit) as error:
    if several:
      several.fail(told(error) or error)  # does not return
    raise


def _await_coordinator(address, seconds):
  """Waits until a process listens at the address: JAX would abort this process instead of raising an error."""
  host, port = address.rsplit(':', 1)
  end, error = time.monotonic() + seconds, None
  while time.monotonic() < end:
    try:
      socket.create_connection((host.strip('[]'), int(port)), timeout=min(seconds, 10)).close()
      return
    except (OSError, OverflowError) as e:
      error = e
    time.sleep(0.2)
  raise UserError(f'--coordinator={address}: no answer after --start_timeout={seconds} s ({error}); '
                  'is process 0 running, and may this machine reach that port?')


def meet(name, *, seconds=3600):
  """A barrier of all processes of the run, once for each `name`, without devices.

  Compiling takes some hosts far longer than others, and the first collective would time out.
  """
  if jax.process_count() > 1:
    ocp.multihost.get_barrier_sync_fn()(key=f'm2l2/{name}', timeout_ms=seconds * 1000)


@contextlib.contextmanager
def watched(workdir):
  """A block in which the training loop must progress. Yields `progress(step, doing)`, to be called at the beginning of
  each activity (`watchdog.Pace.set`). A run of one process is not watched.

  workdir: stalled/ is written there if the loop stalls, with the stacks of all threads.
  """
  here = Hosts.here
  if here is None:
    yield lambda step, doing: None
    return
  yield here.begin_watching(os.path.join(workdir, 'stalled'))
  here.end_watching()  # not after an error: a failing process tells those that wait for it


def exchange(topic: str, word: str) -> dict[int, str]:
  """Publishes a word of this process on a topic, without waiting and without devices.

  Returns on process 0 the newest word of each process that has published one, by its number; elsewhere its own.
  """
  from jax._src import distributed  # as below
  state = distributed.global_state
  words_by_process = {state.process_id: word}
  if state.client is not None:
    try:
      state.client.key_value_set(f'm2l2/{topic}/{state.process_id}', word, allow_overwrite=True)
      if state.process_id == 0:
        words = state.client.key_value_dir_get(f'm2l2/{topic}/')
        words_by_process |= {int(key.rsplit('/', 1)[1]): value for key, value in words}
    except Exception as error:  # no reason to end a run; a lost store is detected elsewhere
      logging.warning('could not exchange words on %s (%s)', topic, first_line(error))
  return words_by_process


class Hosts:
  """The state of this process among the others, from `join` to `leave` or `fail`."""

  here: Hosts | None = None

  def __init__(self, words, *, peer_timeout):
    from jax._src import distributed  # the store has no public name yet; Orbax uses this one too
    state = distributed.global_state
    self._store: Any = state.client
    self._id, self._count = state.process_id, state.num_processes
    self._words, self._timeout = words, peer_timeout
    self._interval = min(2.0, peer_timeout / 5)  # seconds between heartbeats
    self._ending, self._stop = threading.Lock(), threading.Event()
    self._name, self._pace, self._stacks = socket.gethostname(), None, ''
    self._watchdog = Watchdog(limit=STALLED * peer_timeout, window=peer_timeout)
    words.set(f'process {self._id} of {self._count} was ended from outside, most likely because another one '
              f'was lost: {AGAIN}')
    self._thread = threading.Thread(target=self._watch, daemon=True, name='m2l2-hosts')
    self._thread.start()
    Hosts.here = self

  def begin_watching(self, stacks):
    self._stacks, self._pace = stacks, Pace()
    return self._pace.set

  def end_watching(self):
    self._pace = None

  def _say(self, value):
    self._store.key_value_set(f'm2l2/alive/{self._id}', value, allow_overwrite=True)

  def _watch(self):
    """The thread of heartbeats. It uses only this process's clock: the time since another's value last changed."""
    seen = {i: ('', time.monotonic()) for i in range(self._count) if i != self._id}
    beat, answered = 0, time.monotonic()
    while not self._stop.wait(self._interval):
      beat += 1
      try:
        self._say(json.dumps(self._heartbeat(beat)))
        values = dict(self._store.key_value_dir_get('m2l2/alive/'))
      except Exception as error:  # usually JAX itself ends the process then, see above
        if time.monotonic() - answered > self._timeout:
          self._end(f'lost process 0 of {self._count} ({first_line(error)}): {AGAIN}', reason='lost process 0')
        continue
      now = answered = time.monotonic()
      values = {int(key.rsplit('/', 1)[1]): value for key, value in values.items()}
      beats = {i: json.loads(value) for i, value in values.items() if _is_beat(value)}
      for i, (last, since) in seen.items():
        value = values.get(i, '')
        if value != last:
          seen[i] = value, now
          if value != DONE and not _is_beat(value):
            self._end(f'process {i} of {self._count} ended ({value}): {AGAIN}', reason=value)
        elif value != DONE and now - since > self._timeout:
          self._end(f'lost process {i} of {self._count}, silent for {now - since:.0f} s: {AGAIN}',
                    reason=f'lost process {i}')
      still, straggler = self._watchdog.look(beats, now)
      if still and self._pace:
        self._end(f'{still}; the stacks of all threads are in {self._stacks}: {AGAIN}', reason=still)
      if straggler and self._id == 0:
        logging.warning('%s', straggler)

  def _heartbeat(self, beat) -> dict:
    pace = self._pace
    return {'beat': beat, 'host': self._name, **(pace.told() if pace else {})}

  def _write_stacks(self):
    try:
      os.makedirs(self._stacks, exist_ok=True)
      with open(os.path.join(self._stacks, f'process-{self._id:05d}.txt'), 'a', encoding='utf-8') as file:
        print(time.strftime('%Y-%m-%d %H:%M:%S'), json.dumps(self._heartbeat(0)), file=file, flush=True)
        faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
      logging.warning('%s: cannot be written (%s)', self._stacks, error.strerror or error)

  def _end(self, line, *, reason):
    """Prints the line and ends this process with status 1, waiting for nobody."""
    if not self._ending.acquire(blocking=False):  # another thread is ending the process
      time.sleep(60)
    threading.Timer(LINGER, os._exit, [1]).start()  # even if something below hangs
    self._words.close()
    print(f'm2l2: {line}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    try:
      self._say(reason)
    except Exception:  # the store may be lost
      pass
    if reason.startswith(STANDSTILL) and self._stacks:  # after the line, so that the others write theirs meanwhile
      self._write_stacks()
    if self._id == 0:  # JAX aborts the others as soon as the store is lost
      time.sleep(2 * LINGER)
    os._exit(1)  # atexit would wait for the others, and saves in the background for ever

  def fail(self, error):
    """Ends this process after an error that nothing caught."""
    if isinstance(error, UserError):
      self._end(str(error), reason=str(error))
    if isinstance(error, SystemExit) and isinstance(error.code, int):  # raised by the command for a signal
      name = signal.Signals(error.code - 128).name
      self._end(f'stopped by {name}: {AGAIN}', reason=f'stopped by {name}')
    if isinstance(error, KeyboardInterrupt):
      self._end(f'stopped by Ctrl-C (SIGTERM saves first): {AGAIN}', reason='stopped by Ctrl-C')
    if COLLECTIVE_FAILED.search(str(error)):
      time.sleep(2 * self._interval + 1)  # the heartbeats end this process if the other one said why it ended
      self._end(f'lost the link to another process ({first_line(error)}): {AGAIN}', reason='lost another process')
    logging.error('process %d of %d fails', self._id, self._count, exc_info=error)
    name = f'{type(error).__name__}: {first_line(error)}'
    self._end(f'process {self._id} of {self._count} failed ({name})', reason=name)

  def leave(self):
    """Ends a successful run: waits for the others to reach this point."""
    try:
      Hosts.here = None
      self._say(DONE)
      self._stop.set()
      self._thread.join(timeout=10)
      jax.distributed.shutdown()
    finally:
      self._words.close()


def _is_beat(value) -> bool:
  """Whether an entry in the store says that its process is alive; other text than DONE is the reason of its end."""
  return value.startswith('{"beat": ')
