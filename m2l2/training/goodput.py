"""Where a run's time has gone since it first began, cause by cause, over all its starts."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import json
import time

import jax

from m2l2 import files

UPDATES, INPUT, SAVE, EVALUATE, INIT, COMPILE = 'updates', 'input', 'save', 'evaluate', 'init', 'compile'
RESTART = 'restart'
CAUSES = (UPDATES, INIT, COMPILE, INPUT, SAVE, EVALUATE, RESTART)


class Goodput:
  """Counts starts, and what the time since the first of them went into. Its parts make the whole.

    updates   of the loop, as far as they are part of the present state: `time/goodput` is the share of these
    init      starting: places, data, what a checkpoint holds, the first state
    compile   and waiting for the others' compilers
    input     waiting for a batch, where the devices had nothing left to do when it came
    save      what the loop stands still for: the copy of a state, and the end of writing when a run stops
    evaluate  measuring held-out clips
    restart   from the save that a start goes on from until that start: updates that a killed process took with it, and
              the time in which nothing ran

  The shares of all but the first are `time/lost_CAUSE`; `time/restarts` counts starts after the first.

  Args:
    path: a JSON file, made if missing; it holds {'saved': {step: seconds by cause, and when that was}}. None: no file.
    step: the step that this start goes on from.
    began: when this start began, in seconds since the epoch.
    clock: seconds since the epoch.
  """

  def __init__(self, path, *, step: int, began: float, clock: Callable[[], float] = time.time):
    self._path, self._clock = path, clock
    told = (path and _read(path)) or {'began': began, 'starts': 0, 'saved': {}}
    self._began, self._starts = told['began'], told['starts'] + 1
    self._saved = {int(n): seconds for n, seconds in told['saved'].items() if int(n) <= step}
    last = self._saved[max(self._saved)] if self._saved else {'until': self._began}
    self._seconds = {cause: last.get(cause, 0.0) for cause in CAUSES}
    self._seconds[RESTART] += max(began - last['until'], 0.0)  # clocks of two machines may differ
    self._cause, self._since = INIT, began
    self._write()

  def enter(self, cause: str):
    """What the time from here on goes into, one of CAUSES."""
    now = self._clock()
    self._seconds[self._cause] += max(now - self._since, 0.0)
    self._cause, self._since = cause, now

  @contextlib.contextmanager
  def waiting(self, busy: Callable[[], bool]):
    """Wraps fetching the next batch. busy: whether the devices still work on what they were given before."""
    self.enter(INPUT)
    yield
    if busy():  # they did all the while
      self._cause = UPDATES
    self.enter(UPDATES)

  @contextlib.contextmanager
  def saving(self, step: int, state):
    """Wraps saving the state after `step` updates; waits for these first, since they are dispatched ahead."""
    jax.block_until_ready(state)
    self.enter(SAVE)
    yield
    self.enter(UPDATES)
    self._saved[step] = {'until': self._since, **{cause: round(s, 3) for cause, s in self._seconds.items()}}
    self._write()

  @contextlib.contextmanager
  def measuring(self, state):
    """Wraps an evaluation; waits for the updates first, too."""
    jax.block_until_ready(state)
    self.enter(EVALUATE)
    yield
    self.enter(UPDATES)

  def shares(self) -> dict[str, float]:
    """{cause: its share of all time since the run first began}."""
    self.enter(self._cause)
    total = max(sum(self._seconds.values()), 1e-9)
    return {cause: seconds / total for cause, seconds in self._seconds.items()}

  def rates(self) -> dict[str, float]:
    """For the log of a step."""
    shares = self.shares()
    return {'time/goodput': shares.pop(UPDATES), 'time/restarts': self._starts - 1,
            **{f'time/lost_{cause}': share for cause, share in shares.items()}}

  def __str__(self):
    return ', '.join(f'{cause} {share:.1%}' for cause, share in self.shares().items() if share >= 5e-4)

  def _write(self):
    if self._path:
      files.write_json(self._path, {'began': self._began, 'starts': self._starts, 'saved': self._saved})


def _read(path) -> dict | None:
  """A file of `Goodput`; None if there is none that can be read: the count is no reason to stop a run."""
  try:
    with open(path, encoding='utf-8') as f:
      told = json.load(f)
    whole = {'began', 'starts', 'saved'} <= set(told) and all(
        {'until', *CAUSES} <= set(seconds) for seconds in told['saved'].values())
    return told if whole else None
  except (OSError, ValueError, TypeError, AttributeError):
    return None
