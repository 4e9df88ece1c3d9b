"""The log of a run: JSON lines, console, TensorBoard, or any other writer; and the guard against NaN.

Scalars are flat: {'loss': .., 'loss/sigma_0.05_0.5': .., 'time/steps_per_second': ..}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import math
import os
from typing import Protocol

from absl import logging
import numpy as np

from m2l2 import files
from m2l2.errors import UserError
from m2l2.training.guard import Guard

METRICS = 'metrics.jsonl'
_MEAN, _STD = 'probe_ema/latent/mean', 'probe_ema/latent/std'
# What the console shows of them, where it is there and not 0: does it learn, does it blow up, do
# the latents differ and reach the output.
HEADLINE = (
  'loss', 'norm/gradients', 'latent/spread', 'latent/saturated', 'probe_ema/swap', 'skipped')


class Writer(Protocol):
  """A destination of scalars: `write(step, {name: number})` once per logged step, `close()` at the end."""

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    ...

  def close(self) -> None:
    ...


def as_number(value):
  """A float32 as the shortest decimal that rounds to it; NaN and infinity as None."""
  value = np.asarray(value)
  if np.issubdtype(value.dtype, np.integer) or value.dtype == bool:
    return int(value)
  return float(str(np.float32(value))) if np.isfinite(value) else None


def cut_back(path, *, step):
  """Deletes the lines of a metrics file after `step`, and any half-written one, atomically.

  A run that resumes from `step` writes those lines again. A missing file stays missing.
  """
  if not os.path.exists(path):
    return
  kept = []
  with open(path, encoding='utf-8', errors='replace') as f:
    for line in f:
      try:
        if json.loads(line)['step'] <= step and line.endswith('\n'):
          kept.append(line)
      except (ValueError, KeyError, TypeError):
        continue  # a line cut short by a kill
  files.write_text(path, ''.join(kept))


def latent_scale(workdir, *, step: int) -> dict:
  """The statistics of latents for a snapshot at `step`, from the run's last probe until then: {'latents': {'mean',
  'std'}} over all numbers of all its chunks; {} before the first. They are read from the log, so that a resumed run
  has the same."""
  latest: dict = {}
  for told in files.read_json_lines(os.path.join(workdir, METRICS), having=f'"{_MEAN}"'):
    latest = told if told['step'] <= step else latest
  moments = {'mean': latest.get(_MEAN), 'std': latest.get(_STD)}
  return {'latents': moments} if None not in moments.values() else {}


class JsonlWriter:
  """One JSON object per line, {"step": 3, "loss": 41.25, ...}, flushed; a non-finite number is null.

  Args:
    path: the file; created if missing.
    resume_step: lines after this step are deleted first.
  """

  def __init__(self, path, *, resume_step):
    cut_back(path, step=resume_step)
    self._file = open(path, 'a', encoding='utf-8')

  def write(self, step, scalars):
    line = {'step': int(step), **{name: as_number(value) for name, value in scalars.items()}}
    self._file.write(json.dumps(line, allow_nan=False) + '\n')
    self._file.flush()

  def close(self):
    self._file.close()


class ConsoleWriter:
  """One log line per logged step: the main numbers, the speed and the remaining time."""

  def __init__(self, *, total_steps):
    self._total = total_steps

  def write(self, step, scalars):
    parts = [f'step {step}/{self._total}']
    parts += [f'{name} {float(scalars[name]):.4g}' for name in HEADLINE if scalars.get(name)]
    rate = scalars.get('time/steps_per_second')
    if rate:
      parts += [f'{float(rate):.3g} steps/s', f'{_duration((self._total - step) / rate)} left']
    logging.info('  '.join(parts))

  def close(self):
    pass


def _duration(seconds) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}h{minutes:02d}m' if hours else f'{minutes}m{seconds:02d}s'


class TensorBoardWriter:
  """Scalars, sounds and pictures as TensorBoard events; needs the `tensorboard` extra."""

  def __init__(self, metric_writers, logdir):
    self._writer = metric_writers.SummaryWriter(os.fspath(logdir))

  def write(self, step, scalars):
    self._writer.write_scalars(step, {name: float(value) for name, value in scalars.items()})
    self._writer.flush()

  def write_audio(self, step, sounds, *, sample_rate):
    """sounds: {name: float32 [C, N] in [-1, 1]}."""
    self._writer.write_audios(
      step, {name: np.clip(x, -1, 1).T[None] for name, x in sounds.items()},
      sample_rate=sample_rate)

  def write_images(self, step, images):
    """images: {name: float32 [height, width] in [0, 1]}."""
    self._writer.write_images(step, {name: x[None, :, :, None] for name, x in images.items()})

  def close(self):
    self._writer.close()


def tensorboard_writer(logdir) -> TensorBoardWriter | None:
  """A TensorBoard writer, or None without the extra (clu's writers need TensorFlow)."""
  try:
    from clu import metric_writers  # pylint: disable=g-import-not-at-top
  except ImportError:
    return None
  return TensorBoardWriter(metric_writers, logdir)


class ForeignWriter:
  """A user's writer: a `Writer`, or a function of (step, {name: float}).

  An exception of it is logged once, and it is not called again: a failing writer must not end a run.
  """

  def __init__(self, writer: Writer | Callable[[int, dict], object]):
    self._write, self._close = getattr(writer, 'write', writer), getattr(writer, 'close', None)
    self._name = getattr(writer, '__name__', type(writer).__name__)

  def write(self, step, scalars):
    self._call('_write', int(step), {name: float(value) for name, value in scalars.items()})

  def close(self):
    self._call('_close')

  def _call(self, what, *args):
    function = getattr(self, what)
    if function is None:
      return
    try:
      function(*args)
    except Exception as error:  # pylint: disable=broad-except
      logging.warning('the writer %s failed and is left out from here on: %r', self._name, error)
      self._write = self._close = None


class Writers:
  """All writers of a run as one. Does nothing without any (in other processes than the first)."""

  def __init__(self, writers=()):
    self._writers = tuple(writers)

  @property
  def shows_media(self) -> bool:
    """Whether any writer takes sounds and pictures."""
    return any(hasattr(w, 'write_audio') for w in self._writers)

  def write(self, step, scalars):
    for writer in self._writers:
      writer.write(step, scalars)

  def write_audio(self, step, sounds, *, sample_rate):
    """Sounds {name: float32 [C, N]} and, under the same names, their spectrograms."""
    for writer in self._writers:
      if hasattr(writer, 'write_audio'):
        writer.write_audio(step, sounds, sample_rate=sample_rate)
        writer.write_images(step, {name: spectrogram(x) for name, x in sounds.items()})

  def close(self):
    for writer in self._writers:
      writer.close()


def make_writers(workdir, *, resume_step, total_steps, others=()) -> Writers:
  """What a run's first process writes to: metrics.jsonl, console, TensorBoard if it is there, and the others."""
  writers = [
    JsonlWriter(os.path.join(workdir, METRICS), resume_step=resume_step),
    ConsoleWriter(total_steps=total_steps),
    Guard(),
    tensorboard_writer(os.path.join(workdir, 'tensorboard')),
    *map(ForeignWriter, others),
  ]
  return Writers(w for w in writers if w is not None)


def spectrogram(audio, *, window=1024, hop=256, floor_db=-80.0):
  """A picture of a sound: [C, N] -> [window // 2 + 1, frames] in [0, 1], low frequencies below.

  Channels are averaged; 1 is the loudest point, 0 is `floor_db` below it.
  """
  x = np.asarray(audio, np.float32).mean(axis=0)
  x = np.pad(x, (0, max(0, window - x.size)))
  frames = np.lib.stride_tricks.sliding_window_view(x, window)[::hop] * np.hanning(window)
  power = np.abs(np.fft.rfft(frames, axis=-1)).T[::-1] ** 2
  db = 10 * np.log10(np.maximum(power, 1e-12) / max(power.max(), 1e-12))
  return np.clip(1 - db / floor_db, 0, 1).astype(np.float32)


def check_skipped(step, scalars, *, limit):
  """Stops the run when the last `limit` or more updates were skipped for non-finite gradients.

  Raises:
    UserError: naming the range of steps.
  """
  skipped = int(scalars['skipped_in_a_row'])
  if skipped >= limit:
    loss = float(scalars['loss'])
    raise UserError(
      f'stopped: gradients were not finite at steps {step - skipped + 1} to {step} '
      f'(loss {loss if math.isfinite(loss) else "not finite"}); those updates were skipped. Lower '
      'train.learning_rate or set train.clip_norm, and run the same command to go on from the '
      f'last checkpoint; with --replay={step - skipped + 1} it says which item and tensor it was')
