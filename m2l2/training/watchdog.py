"""Judges the heartbeats of several processes: which one stalls, and which one delays the others.

It has no I/O and no clock: hosts.py sends and reads the heartbeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import statistics
import time

WAITING, COMPUTING, SAVING, MEASURING = 'waiting for data', 'computing', 'saving', 'measuring'
STANDSTILL = 'no progress'  # prefix of the reason of a process that ended the run because of a stall
# excess share of time that a process waits for data, compared with the others: then it delays them
FAR = 0.2
REMIND = 10                 # windows after which the same process is named again


class Pace:
  """The activity of a process's main thread, and its time of waiting for data; written by it, read by another
  thread."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._at: tuple = (None, '', clock(), 0.0)  # replaced as a whole, so that the reader sees a consistent state

  def set(self, step: int, doing: str):
    """Begins an activity: WAITING, SAVING or MEASURING after `step` updates, or COMPUTING update `step`."""
    now = self._clock()
    self._at = (int(step), doing, now, self._waited(now))

  def told(self) -> dict:
    """For the heartbeat: step, activity, and by this process's clock the seconds now and those spent WAITING."""
    now = self._clock()
    step, doing, _, _ = self._at
    return {} if step is None else {
        'step': step, 'doing': doing, 'clock': round(now, 3), 'waited': round(self._waited(now), 3)}

  def _waited(self, now):
    _, doing, since, waited = self._at
    return waited + (now - since if doing == WAITING else 0.0)


class Watchdog:
  """Judges the heartbeats {process: `Pace.told`, with its 'host'} of the processes that are in the loop.

  In a collective program all processes wait for the slowest: if one stalls, all do. While one measures held-out clips,
  which may take any time, none is judged.

  Args:
    limit: seconds within which each must progress.
    window: seconds over which shares of time are compared.
  """

  def __init__(self, *, limit: float, window: float):
    self._limit, self._window = limit, window
    self._moved: dict = {}         # {process: (where it is, when that was first seen)}
    self._began: tuple | None = None  # (when, heartbeats then)
    self._named, self._since_named = None, 0

  def look(self, beats: Mapping[int, Mapping], now: float) -> tuple[str | None, str | None]:
    """-> (the stalled process, the process that delays the others): parts of a line, or None. now: seconds, of any one
    clock."""
    beats = {i: beat for i, beat in beats.items() if 'step' in beat}
    if any(beat['doing'] == MEASURING for beat in beats.values()):
      self._moved, self._began = {}, None
      return None, None
    for i, beat in beats.items():
      at = beat['step'], beat['doing']
      if i not in self._moved or self._moved[i][0] != at:
        self._moved[i] = at, now
    return self._still(beats, now), self._straggler(beats, now)

  def _still(self, beats, now):
    longest = max((now - self._moved[i][1] for i in beats), default=0.0)
    if longest <= self._limit:
      return None
    last = min(beats, key=lambda i: (beats[i]['step'], self._moved[i][1]))
    first = max(beats, key=lambda i: beats[i]['step'])
    text = f'{STANDSTILL} for {longest:.0f} s: {_place(last, beats[last])}'
    return text if first == last or beats[first]['step'] == beats[last]['step'] else (
        f'{text}, the furthest at step {beats[first]["step"]}, {beats[first]["doing"]}')

  def _straggler(self, beats, now):
    if self._began is None or set(self._began[1]) != set(beats):
      self._began = now, beats
    began, before = self._began
    if len(beats) < 2 or now - began < self._window:
      return None
    self._began = now, beats
    self._since_named += 1
    share = {i: (beat['waited'] - before[i]['waited']) / max(beat['clock'] - before[i]['clock'], 1e-3)
             for i, beat in beats.items()}
    worst = max(share, key=lambda i: share[i])
    others = statistics.median(value for i, value in share.items() if i != worst)
    if share[worst] - others < FAR:
      self._named = None
      return None
    if worst == self._named and self._since_named < REMIND:
      return None
    self._named, self._since_named = worst, 0
    return (f'{_place(worst, beats[worst])}, holds the others up: {share[worst]:.0%} of its last {now - began:.0f} s '
            f'went into waiting for data, of theirs {others:.0%}')


def _place(i, beat) -> str:
  return f'process {i} ({beat.get("host", "?")}), at step {beat["step"]}, {beat["doing"]}'
