"""What the heartbeats of several processes tell together: who stands still, and who holds the others up.

No I/O and no clock of its own: hosts.py sends and reads the heartbeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import statistics
import time

WAITING, COMPUTING, SAVING, MEASURING = 'waiting for data', 'computing', 'saving', 'measuring'
STANDSTILL = 'no progress'  # how the reason of a process begins that ended the run for that
FAR = 0.2                   # of its time more than the others' is spent waiting for data: that one holds them up
REMIND = 10                 # the same process is named again after so many windows


class Pace:
  """Where the main thread of a process is, and how long it has waited for data: set by it, read by another."""

  def __init__(self, clock: Callable[[], float] = time.monotonic):
    self._clock = clock
    self._at: tuple = (None, '', clock(), 0.0)  # replaced as a whole, so that the reader sees one moment

  def set(self, step: int, doing: str):
    """It begins with something: WAITING, SAVING or MEASURING after `step` updates, or COMPUTING number `step`."""
    now = self._clock()
    self._at = (int(step), doing, now, self._waited(now))

  def told(self) -> dict:
    """For the heartbeat: step, doing, and of this process's own clock the seconds now and those spent WAITING."""
    now = self._clock()
    step, doing, _, _ = self._at
    return {} if step is None else {
        'step': step, 'doing': doing, 'clock': round(now, 3), 'waited': round(self._waited(now), 3)}

  def _waited(self, now):
    _, doing, since, waited = self._at
    return waited + (now - since if doing == WAITING else 0.0)


class Watchdog:
  """Judges the heartbeats {process: what `Pace.told` gives, and its 'host'} of the processes that are in the loop.

  In a collective program all wait for the slowest: where one stands still, all do. While one measures held-out clips,
  which lasts as long as it lasts, nobody is judged.

  Args:
    limit: seconds within which each must move.
    window: seconds over which shares of time are compared.
  """

  def __init__(self, *, limit: float, window: float):
    self._limit, self._window = limit, window
    self._moved: dict = {}         # {process: (where it is, when that was first seen)}
    self._began: tuple | None = None  # (when, heartbeats then)
    self._named, self._since_named = None, 0

  def look(self, beats: Mapping[int, Mapping], now: float) -> tuple[str | None, str | None]:
    """-> (who stands still, who holds the others up): parts of a line, or None. now: seconds, of any one clock."""
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
