"""The error at chunk borders less that in the middle of chunks."""

import dataclasses

import numpy as np

from m2l2.errors import UserError
from m2l2.evaluation.metrics import pairs

REACH = 2  # frames of 512 samples on either side of a border or a centre


@dataclasses.dataclass(frozen=True)
class Chunks:
  """The chunk borders of a model: border k at sample `first + k * period` of the signal, k = 1, 2, ..., at the rate
  that the model works at: the signal's own if it is one of `rates` (Hz), else the first of them."""
  period: float = 32768
  first: float = 0.
  rates: tuple[int, ...] = (44100,)

  def in_seconds(self, sample_rate: int) -> tuple[float, float]:
    """(period, first) for a signal of that rate."""
    rate = sample_rate if sample_rate in self.rates else self.rates[0]
    return self.period / rate, self.first / rate


def of_model(representation, *, rates: tuple[int, ...]) -> Chunks:
  """The `Chunks` of an m2l2 model: a border is midway between the centres of the two frames that it separates.

  Args:
    representation: m2l2.representation.Representation. rates: the model's native rates (Hz).
  """
  hop = representation.hop
  lead = representation.window - hop if representation.edges == 'pad' else 0
  return Chunks(period=hop * representation.frames, first=representation.window / 2 - lead - hop / 2,
                rates=tuple(rates))


def seam_db(reference, estimate, *, sample_rate: int, chunks: Chunks = Chunks()) -> float:
  """Mean |log-mel difference| (dB, as in `pairs.mel_l1_db`) of the frames within 2 of a chunk border, less that of
  those within 2 of a chunk's centre: 0 if borders are no worse.

  Args:
    reference, estimate: float [channels, samples] or [samples], both at `sample_rate` (Hz).
  Raises:
    UserError: not a whole border and centre in common, or not finite.
  """
  logs = [pairs.log_mel_db(audio, sample_rate=sample_rate) for audio in (reference, estimate)]
  frames = min(log.shape[1] for log in logs)
  error = np.mean(np.abs(logs[0][:, :frames] - logs[1][:, :frames]), axis=0)
  border, centre = (_near(frames, *chunks.in_seconds(sample_rate), shift) for shift in (0., .5))
  if not border.any() or not centre.any():
    raise UserError('seam_db is undefined: the pair holds no chunk border; give longer clips')
  return float(error[border].mean() - error[centre].mean())


def seam_db_of(compared: pairs.Comparison) -> float:
  return seam_db(compared.reference, compared.estimate, sample_rate=compared.sample_rate,
                 chunks=compared.chunks or Chunks())


def _near(frames: int, period: float, first: float, shift: float) -> np.ndarray:
  """bool [frames]: within REACH of k + shift chunks, of the borders and centres inside the signal (k >= 1)."""
  seconds = np.arange(frames) * pairs.HOP / pairs.SAMPLE_RATE
  places = (seconds - first) / period - shift
  nearest = np.maximum(np.round(places), 1)
  reach = REACH * pairs.HOP / pairs.SAMPLE_RATE
  inside = (nearest + shift) * period + first <= seconds[-1] - reach
  return (np.abs(places - nearest) * period <= reach + 1e-9) & inside
