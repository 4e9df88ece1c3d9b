"""Speed of a run between logged steps, FLOPs and MFU, profiler traces. (Goodput over restarts: goodput.py.)"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import re
import socket
import statistics
import time

from absl import logging
import jax
import jax.numpy as jnp

from m2l2 import build
from m2l2.errors import UserError
from m2l2.planning.chips import find_chip
from m2l2.planning.flops import Flops, count_flops

_STARVED = 0.1  # share of time that a process waits for its data, above which the log names it
_SILENCE = 60  # seconds between two such lines


class Throughput:
  """Speed between two logged steps.

  Args:
    samples_per_step: crops in a global batch.
    seconds_per_sample: seconds of sound in a crop.
    flops_until: n -> the FLOPs of the first n steps (`model_flops`); None leaves these rates out.
    devices: number of devices that share them.
    peak: peak FLOP/s of one device; None if unknown.
    exchange: takes a word of this process and returns the last words of all processes by number.
    clock: monotonic seconds.
  """

  def __init__(self, *, samples_per_step, seconds_per_sample, flops_until=None, devices=1, peak=None,
               exchange=lambda word: {0: word}, clock=time.perf_counter):
    self._samples, self._seconds, self._clock = samples_per_step, seconds_per_sample, clock
    self._flops_until, self._devices, self._peak = flops_until, devices, peak
    self._exchange, self._host, self._warm = exchange, socket.gethostname(), False
    self._since, self._step, self._waited = clock(), None, 0.0

  def start(self, step):
    """Begins counting, after `step` updates."""
    self._since, self._step, self._waited = self._clock(), step, 0.0

  @contextlib.contextmanager
  def waiting(self):
    """Wraps the call that fetches the next batch."""
    begin = self._clock()
    yield
    self._waited += self._clock() - begin

  def rates(self, step) -> dict:
    """Rates since the last call.

    `time/input_wait` is the share of time spent waiting for data, of several processes the largest; then
    `time/input_wait_process` is the number of that process, and the log names its host. `time/tflops_per_second` is per
    device, and `time/mfu` is that over the device's peak.
    """
    elapsed = max(self._clock() - self._since, 1e-9)
    rate = (step - self._step) / elapsed
    out = {
        'time/steps_per_second': rate,
        'time/samples_per_second': rate * self._samples,
        'time/audio_seconds_per_second': rate * self._samples * self._seconds,
        **self._input_wait(min(self._waited / elapsed, 1.0)),
    }
    if self._flops_until:
      flops = (self._flops_until(step) - self._flops_until(self._step)) / elapsed / self._devices
      out['time/tflops_per_second'] = flops / 1e12
      if self._peak:
        out['time/mfu'] = flops / self._peak
    self.start(step)
    return out

  def _input_wait(self, own) -> dict:
    told = {index: word.split(maxsplit=1) for index, word in self._exchange(f'{own!r} {self._host}').items()}
    worst = max(told, key=lambda index: float(told[index][0]))
    wait, host = float(told[worst][0]), told[worst][1]
    if len(told) == 1:
      return {'time/input_wait': wait}
    others = statistics.median(float(word[0]) for index, word in told.items() if index != worst)
    if wait - others > _STARVED and self._warm:  # every process waits for the very first batch
      logging.log_every_n_seconds(
          logging.WARNING, 'all wait for the data of process %d on %s: %.0f %% of its time', _SILENCE, worst, host,
          100 * wait)
    self._warm = True
    return {'time/input_wait': wait, 'time/input_wait_process': worst}


def plain_model(config) -> dict:
  """The config for counting FLOPs: no recomputation, no packed maps, attention as matrix products. These are the FLOPs
  that a step needs, so that MFU compares machines and settings."""
  return {**config, 'model': {**config['model'], 'remat': 'none', 'attention': 'xla', 'dtype': 'float32'},
          'variants': {**config['variants'], 'packing': {'tile': '0'}}}


def step_flops(functions, batch_size: int, *, unit: int = 128, **options) -> Flops:
  """FLOPs of one step of `build.step_functions` over all devices; `options` go to train_step."""
  # Of a few ravelled arrays the update, which has no products, is traced in no time.
  state = functions.ravel(jax.eval_shape(functions.init, jax.random.key(0)))
  shape = (batch_size, functions.channels, functions.crop_samples)
  step = lambda *args: functions.train_step(*args, **options)
  return count_flops(
      jax.make_jaxpr(step)(state, {'audio': jax.ShapeDtypeStruct(shape, jnp.float32)}).jaxpr, unit=unit)


def parameters(functions) -> int:
  """Number of parameters of `build.step_functions`."""
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(functions.init, jax.random.key(0)).params))


def model_flops(config) -> Callable[[int], float]:
  """n -> FLOPs that the first n training steps of the plain model need, over all devices; probes are not counted."""
  functions, batch = build.step_functions(plain_model(config), ravel=True), config.train.batch_size
  ends = [end for _, end in functions.phases]
  costs = [step_flops(functions, batch, phase=name).total for name, _ in functions.phases]

  def until(n):
    total, begin = 0.0, 0
    for cost, end in zip(costs, [*ends[:-1], n]):
      total += cost * max(min(n, end) - begin, 0)
      begin = end
    return total
  return until


def peak_flops(config) -> float | None:
  """Published peak FLOP/s of a device at the dtype of this run's activations; None if unknown."""
  chip = find_chip(jax.devices()[0].device_kind)
  return chip.flops(build.activation_dtype(config.model.dtype)) if chip else None


def demand(config, flops_until: Callable[[int], float]) -> float | None:
  """Crops per second that this process's devices would use at their peak; None if unknown."""
  fields, peak = config.train, peak_flops(config)
  return peak and fields.batch_size * fields.steps / flops_until(fields.steps) * peak * jax.local_device_count()


class Trace:
  """A profiler trace of some steps, for TensorBoard's profile plugin or Perfetto.

  Args:
    steps: 'FIRST:LAST', both included; '' for none.
    directory: for the trace.

  Raises:
    UserError: an invalid range.
  """

  def __init__(self, steps: str, directory):
    self._directory, self._running = directory, False
    self._first, self._last = trace_range(steps)

  def begin(self, step):
    """Before update `step` (1, 2, ...) is dispatched. A run that resumes within the range traces the rest of it."""
    if self._first <= step <= self._last and not self._running:
      jax.profiler.start_trace(self._directory)
      self._running = True

  def end(self, step, results):
    """After it, with the arrays that it computes."""
    if self._running and step >= self._last:
      jax.block_until_ready(results)
      self.close()
      logging.info('a trace of steps %d to %d is in %s', self._first, self._last, self._directory)

  def close(self):
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def trace_range(steps: str) -> tuple[int, int]:
  """'100:110' -> (100, 110); '' -> (0, 0), which contains no step. Raises UserError."""
  if not steps:
    return 0, 0
  match = re.fullmatch(r'(\d+):(\d+)', steps)
  first, last = map(int, match.groups()) if match else (0, 0)
  if not 1 <= first <= last:
    raise UserError(f'train.profile={steps!r}: it takes FIRST:LAST, two steps from 1 on, or nothing')
  return first, last
