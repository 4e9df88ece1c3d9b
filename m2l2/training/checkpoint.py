"""Checkpoints for resuming: (state, data position, config) as one unit, written in the background.

A checkpoint is for resuming a run; a snapshot (m2l2/codec/snapshot.py: averaged weights only) is for using the model.
Orbax gives a step its final name only when all of it is on disk, so after a kill at any moment each checkpoint is
either complete or absent.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import threading
from typing import Any

from absl import logging
from flax.traverse_util import flatten_dict
import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp

from m2l2.codec import renamed
from m2l2.errors import UserError, first_line
from m2l2.model.parameters import by_path

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Restored:
  """`step`, `state` in the requested layout, and the data `position` and `config` that were saved with it."""
  step: int
  state: Any
  position: dict
  config: dict


def config_differences(old: dict, new: dict) -> list[str]:
  """The fields in which two nested configs differ, as 'train.steps: 100 -> 200', sorted by name."""
  old, new = (flatten_dict(json.loads(json.dumps(config)), sep='.') for config in (old, new))  # tuples become lists

  def show(fields, name):
    return json.dumps(fields[name]) if name in fields else '(absent)'

  return [f'{name}: {show(old, name)} -> {show(new, name)}'
          for name in sorted(old.keys() | new.keys()) if show(old, name) != show(new, name)]


def latest(directory, *, before: float = math.inf) -> int | None:
  """The step of the newest complete checkpoint in a directory, of those before a step; None without one. By the names
  alone."""
  if not os.path.isdir(directory):
    return None
  return max((int(name) for name in os.listdir(directory) if name.isdecimal() and int(name) < before), default=None)


def _describe(flat):
  return {name: f'{x.dtype}{list(x.shape)}' for name, x in flat.items()}


def _on_every_process(ok: bool) -> bool:
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


class Checkpoints:
  """The checkpoints of one run under `directory`; every process of the run creates this object.

  Args:
    directory: created if missing; on a file system that all processes share.
    keep_last: number of newest checkpoints that are kept.
    keep_every: checkpoints at multiples of these steps are kept for good; 0 or None: none.
  """

  def __init__(self, directory, *, keep_last, keep_every=None):
    if keep_last < 1 or (keep_every or 0) < 0:
      raise UserError(f'train.keep_last={keep_last}, train.keep_every={keep_every}: '
                      'keep at least the last one, and milestones every 1 or more steps (0: none)')
    self.directory = os.path.abspath(directory)
    kept = [ocp.checkpoint_managers.LatestN(keep_last)]
    if keep_every:
      kept.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(kept),
        cleanup_tmp_directories=True))  # half-written checkpoints of a killed run

  def steps(self) -> list[int]:
    """The steps of the complete checkpoints, oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step, state, *, position, config):
    """Copies the state to the host and returns; the files are written in the background.

    The state may be donated right after. Saving a step twice does nothing the second time.

    Args:
      step: number of updates done.
      state: tree of jax arrays.
      position, config: nested dicts of plain values, kept as JSON beside the state.
    """
    if step in self._manager.all_steps():
      return
    flat = by_path(state)  # names that are readable in error messages
    about = {'format': FORMAT, 'position': position, 'config': config, 'arrays': _describe(flat)}
    self._manager.save(step, args=ocp.args.Composite(
      state=ocp.args.StandardSave(flat), about=ocp.args.JsonSave(about)))

  def restore(self, abstract_state, *, config) -> Restored | None:
    """The newest readable checkpoint, laid out like `abstract_state`; None without any.

    An unreadable checkpoint is skipped with a warning and, once an older one has been read, renamed to broken-STEP, so
    that the run can write that step again.

    Args:
      abstract_state: tree of ShapeDtypeStruct with shardings, of any mesh.
      config: the config of this run, to name what changed if the state does not fit.

    Raises:
      UserError: the state has other arrays than this config's model, or no checkpoint can be read.
    """
    broken = []
    for step in reversed(self.steps()):
      restored, error = None, None
      try:
        restored = self._read(step, abstract_state, config)
      except UserError:
        raise
      except Exception as e:  # damage causes almost any error of Orbax, TensorStore or JSON
        error = e
      if not _on_every_process(error is None):
        logging.warning('checkpoint %d in %s cannot be read (%s): trying the one before',
                        step, self.directory, _reason(error))
        broken.append(step)
        continue
      self._set_aside(broken)
      return restored
    if broken:
      raise UserError(f'none of the checkpoints in {self.directory} can be read '
                      f'({_reason(error)}): move that directory away to start from scratch')
    return None

  def restore_at(self, step: int, abstract_state, *, config) -> Restored:
    """The checkpoint of `step`. Raises UserError: it cannot be read, or holds other arrays than this config's model."""
    try:
      return self._read(step, abstract_state, config)
    except UserError:
      raise
    except Exception as error:  # as above
      raise UserError(f'checkpoint {step} in {self.directory} cannot be read ({_reason(error)})') from error

  def _read(self, step, abstract_state, config) -> Restored:
    about = self._manager.restore(
      step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))['about']
    wanted = by_path(abstract_state)
    self._check_fit(step, about, _describe(wanted), config)
    flat = self._manager.restore(
      step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))['state']
    state = jax.tree.unflatten(jax.tree.structure(abstract_state), [flat[name] for name in wanted])
    return Restored(step=step, state=state, position=about['position'], config=renamed.current(about['config']))

  def _check_fit(self, step, about, wanted, config):
    if about['format'] != FORMAT:
      raise UserError(f'checkpoint {step} in {self.directory} has format {about["format"]}, '
                      f'this version of m2l2 reads {FORMAT}: take the version that wrote it')
    saved = about['arrays']
    differ = [n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n)]
    if differ:
      name = min(differ, key=lambda n: (not n.startswith('params'), n))  # before the moments
      there, here = saved.get(name, 'absent'), wanted.get(name, 'absent')
      fields = '; '.join(config_differences(renamed.current(about['config']), config)) or 'none'
      raise UserError(
        f'checkpoint {step} in {self.directory} does not fit this config: {len(differ)} arrays '
        f'differ, such as {name} ({there} there, {here} here); changed fields: {fields}. '
        'Undo the change or take another --workdir')

  def _set_aside(self, broken):
    if not broken:
      return
    if jax.process_index() == 0:
      for step in broken:
        aside = os.path.join(self.directory, f'broken-{step}')
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(os.path.join(self.directory, str(step)), aside)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('m2l2 broken checkpoints set aside')
    self._manager.reload()

  def reached_preemption(self, step) -> bool:
    """Whether a run of several processes is to stop: true on all of them at the same step."""
    return self._manager.reached_preemption(step)

  def wait(self):
    """Returns when everything saved so far is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    """Waits for saves, then closes the directory and the threads."""
    self._manager.wait_until_finished()
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, kind, error, unused_traceback):
    # If another process has ended, a running save would wait for it.
    if error is None or isinstance(error, UserError) or jax.process_count() == 1:
      self.close()


def _reason(error) -> str:
  """The first line of an error: those of Orbax have many."""
  return 'another process failed' if error is None else f'{type(error).__name__}: {first_line(error, most=200)}'


class StopSignal:
  """Turns SIGTERM (a preempted machine), Ctrl-C and SIGHUP (a closed terminal) into a flag that is read once per step.

  With one process, the first signal sets the flag and a second one acts as usual, except SIGHUP, which a closing
  terminal and its shell both send. Under nohup SIGHUP stays ignored. With several processes, JAX's preemption service
  handles SIGTERM and makes the processes agree on the step.

    with StopSignal(checkpoints) as stop:
      while not stop.reached(step): ...
  """

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints
    self._previous: dict = {}
    self._received = False
    self._asked = False

  def __enter__(self):
    # Python lets only the main thread set handlers.
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      hangup = getattr(signal, 'SIGHUP', None)
      for number in (signal.SIGTERM, signal.SIGINT, *([hangup] if hangup else [])):
        if number != hangup or signal.getsignal(number) is not signal.SIG_IGN:
          self._previous[number] = signal.signal(number, self._receive)
    return self

  def __exit__(self, *unused):
    self._give_back(*self._previous)

  def _receive(self, number, unused_frame):
    if not self._received:
      logging.warning('%s: saving after this step', signal.Signals(number).name)
    self._received = True
    self._give_back(signal.SIGTERM, signal.SIGINT)

  def _give_back(self, *numbers):
    for number in numbers:
      if number in self._previous:
        signal.signal(number, self._previous.pop(number))

  def reached(self, step) -> bool:
    """Whether to save and stop now, after `step` updates; to be called by every process at every step."""
    if jax.process_count() == 1:
      return self._received
    # JAX stops one step after the last step that any process has passed to it; for a SIGTERM that came
    # before the first question that is step 1, which a resumed run has long passed.
    first, self._asked = not self._asked, True
    if first and step > 1 and self._checkpoints.reached_preemption(1):
      return True
    return self._checkpoints.reached_preemption(step)
