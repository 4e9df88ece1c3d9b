"""Metrics of stereo pairs."""

import numpy as np

from m2l2.evaluation.metrics import pairs

# Side over mid is limited to these, so that a mono file has a finite value.
LEVEL_LIMIT_DB = 60.


def si_sdr_left_of(compared: pairs.Comparison) -> float:
  """`pairs.si_sdr` in dB of the first of two channels."""
  return pairs.si_sdr(compared.reference[0], compared.estimate[0])


def si_sdr_right_of(compared: pairs.Comparison) -> float:
  return pairs.si_sdr(compared.reference[1], compared.estimate[1])


def side_mid_db_of(compared: pairs.Comparison) -> float:
  return side_mid_error_db(compared.reference, compared.estimate)


def side_mid_error_db(reference, estimate) -> float:
  """|difference of the two `side_mid_db`|, lower is better: how much wider or narrower the stereo image became."""
  length = min(reference.shape[1], estimate.shape[1])
  return abs(side_mid_db(estimate[:, :length]) - side_mid_db(reference[:, :length]))


def side_mid_db(audio) -> float:
  """Energy of L - R over that of L + R in dB, of float [2, samples]; within +-60 dB (mono: -60)."""
  left, right = np.asarray(audio, np.float64)
  side, mid = np.sum((left - right) ** 2), np.sum((left + right) ** 2)
  floor = 10 ** (-LEVEL_LIMIT_DB / 10)
  return float(10 * np.log10(max(side, floor * mid, 1e-30) / max(mid, floor * side, 1e-30)))
