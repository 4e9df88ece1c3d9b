"""ViSQOL: predicted listening quality of an estimate, MOS-LQO from 1 to about 4.7, by the package visqol-python.

Audio mode: mono downmix at 48 kHz, float64. It takes seconds per clip; callers distribute clips over processes.
"""

import functools

import numpy as np

from m2l2.errors import UserError
from m2l2.evaluation.metrics import pairs, registry

SAMPLE_RATE = 48000


def visqol(reference, estimate, *, sample_rate: int) -> float:
  """MOS-LQO of one pair, higher is better.

  Args:
    reference, estimate: float [channels, samples] or [samples] in [-1, 1], both at `sample_rate` (Hz).
  Raises:
    UserError: visqol-python is not installed, the pair is too short (under about .6 s), silent, empty or not finite.
  """
  r, x = (pairs.prepared(audio, sample_rate=sample_rate, to_rate=SAMPLE_RATE, what=what)
          for audio, what in ((reference, 'reference'), (estimate, 'estimate')))
  length = min(len(r), len(x))
  r, x = r[:length], x[:length]
  if np.ptp(r) == 0 or np.ptp(x) == 0:
    raise UserError('visqol is undefined: one side is silent; leave this pair out')
  try:
    return float(_measure().measure_from_arrays(r, x, SAMPLE_RATE).moslqo)
  except ValueError as error:
    raise UserError(f'visqol cannot measure this pair: {error}') from error


def visqol_of(compared: pairs.Comparison) -> float:
  return visqol(compared.reference, compared.estimate, sample_rate=compared.sample_rate)


@functools.cache
def _measure():
  """The package's measurer, its model read once a process."""
  registry.METRICS['visqol'].require()
  from visqol import VisqolApi
  measure = VisqolApi()
  measure.create(mode='audio')
  return measure
