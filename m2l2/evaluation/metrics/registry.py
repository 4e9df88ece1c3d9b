"""The metrics of a pair of signals, one entry each at the end of this file.

`evaluate`, reports, the sweep, evaluation in training, --help and error messages use these entries. Functions are
imported when they are first called, so that reading the names imports no library.
"""

from collections.abc import Callable, Iterable, Sequence
import importlib
from typing import NamedTuple

from m2l2.errors import UserError

# Which values are good.
HIGHER, LOWER = 'higher', 'lower'
ZERO = 'near 0'  # deviations to both sides are equally bad
REFERENCE = "near the reference's"  # for a figure of the estimate alone: neither high nor low values are good


class Metric(NamedTuple):  # dataclasses import inspect, which `m2l2 --help` would wait for
  """One entry.

  Fields:
    name: in lists of metrics, reports and tables.
    function: (pairs.Comparison) -> float, or its place, 'module:name'. If it raises, the pair lacks this metric only.
    better: HIGHER, LOWER, ZERO or REFERENCE. unit: of the values; '' has none.
    stereo: only for pairs of two channels each; others lack it without a warning.
    chunks: needs the model's chunk borders, `Comparison.chunks`.
    package: the package it needs beyond the eval extra; extra: the one of setup.cfg that installs it.
    default: whether it is measured if no metrics are named; never without its package.
  """
  name: str
  function: Callable | str
  better: str
  unit: str = ''
  stereo: bool = False
  chunks: bool = False
  package: str = ''
  extra: str = ''
  default: bool = True

  def __call__(self, compared) -> float:
    if callable(self.function):
      return self.function(compared)
    module, _, name = self.function.partition(':')
    return getattr(importlib.import_module(module), name)(compared)

  def require(self):
    """Raises UserError: its package is not installed."""
    if self.package:
      try:
        importlib.import_module(self.package)
      except ModuleNotFoundError as error:
        raise UserError(f"{self.name} needs the package {self.package}, which is not installed: "
                        f"pip install 'm2l2[{self.extra}]'") from error

  def is_available(self) -> bool:
    try:
      self.require()
    except UserError:
      return False
    return True

  def badness(self, value: float) -> float:
    """Grows as the value gets worse; for REFERENCE, the value itself."""
    return {HIGHER: -value, ZERO: abs(value)}.get(self.better, value)


def good_values(better: str) -> str:
  """'higher is better' for HIGHER, 'good near 0' for ZERO, and so on."""
  return f'{better} is better' if better in (HIGHER, LOWER) else f'good {better}'


METRICS: dict[str, Metric] = {}  # by name, in the order of reports


def register(name: str, function: Callable | str, **fields):
  """Adds an entry with the `fields` of Metric; an entry of the same name is replaced."""
  METRICS[name] = Metric(name, function, **fields)


def named(names: Iterable[str], *, beside: Sequence[str] = ()) -> list[Metric]:
  """The entries of the names.

  Raises UserError: an unknown name; the message lists all known names, and those in `beside`.
  """
  names = list(names)
  for name in names:
    if name not in METRICS:
      raise UserError(f'unknown metric {name!r}: pick from {", ".join((*METRICS, *beside))}')
  return [METRICS[name] for name in names]


def by_default() -> list[str]:
  """The names of the default metrics that are installed."""
  return [name for name, metric in METRICS.items() if metric.default and metric.is_available()]


def badness(name: str, value: float) -> float:
  """`Metric.badness` of a metric; for an embedding the Frechet distance itself."""
  return METRICS[name].badness(value) if name in METRICS else value


def is_ordered(name: str) -> bool:
  """Whether a value of a metric or an embedding's distance is good or bad without that of the reference."""
  return name not in METRICS or METRICS[name].better != REFERENCE


# ---- the entries ---------------------------------------------------------------------------------

_HERE = 'm2l2.evaluation.metrics'

register('si_sdr', f'{_HERE}.pairs:si_sdr_of', better=HIGHER, unit='dB')
register('mel_l1_db', f'{_HERE}.pairs:mel_l1_db_of', better=LOWER, unit='dB')
register('lsd_db', f'{_HERE}.pairs:lsd_db_of', better=LOWER, unit='dB')
register('mrstft', f'{_HERE}.pairs:mrstft_of', better=LOWER)
register('ratio', f'{_HERE}.pairs:ratio_of', better=LOWER)
register('coherence', f'{_HERE}.pairs:coherence_of_estimate', better=REFERENCE)
register('coherence_reference', f'{_HERE}.pairs:coherence_of_reference', better=REFERENCE)
register('si_sdr_left', f'{_HERE}.stereo:si_sdr_left_of', better=HIGHER, unit='dB', stereo=True)
register('si_sdr_right', f'{_HERE}.stereo:si_sdr_right_of', better=HIGHER, unit='dB', stereo=True)
register('side_mid_db', f'{_HERE}.stereo:side_mid_db_of', better=LOWER, unit='dB', stereo=True)
register('seam_db', f'{_HERE}.seams:seam_db_of', better=ZERO, unit='dB', chunks=True)
register('visqol', f'{_HERE}.visqol:visqol_of', better=HIGHER, unit='MOS-LQO', package='visqol', extra='visqol')
