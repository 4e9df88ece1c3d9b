"""Checks for mistakes that make metrics meaningless: a delay, inverted polarity, swapped channels, another level,
44.1 kHz taken for 48 kHz, unequal lengths, silence.

Nothing is corrected: there is a warning, and the metrics are computed from the files as they are. Checks by correlation
need an estimate that follows the waveform (coefficient of .5 or more at the best lag: an SI-SDR of about -5 dB); for
others only headers, lengths and levels are checked.
"""

import numpy as np
import scipy.fft
import scipy.signal

from m2l2.evaluation.metrics import pairs

FOLLOWS = .5  # correlation above which one signal is a version of the other
# Smaller lags are reported only for near copies: models that follow only the phase may be off by one or two samples.
MIN_LAG = 3
NEAR_COPY = .9
MAX_LAG_SECONDS = 2.
SIDE_FOLLOWS = .2  # of the side signal, which is weak in music and masked by errors first
GAIN_DB = 3.
SILENCE = 10 ** (-90 / 20)
RATE_RATIO = 48000 / 44100


def check_pair(reference, estimate, *, reference_rate: int, estimate_rate: int) -> list[str]:
  """The problems of a pair, one line each, 'name: text'; the names are silence, rate, length, channels, delay,
  polarity and gain.

  Args:
    reference, estimate: float [channels, samples] in [-1, 1].
    reference_rate, estimate_rate: as the files' headers say (Hz).
  """
  problems = []
  for audio, what in ((reference, 'reference'), (estimate, 'estimate')):
    if audio.size and np.sqrt(np.mean(np.square(audio, dtype=np.float64))) < SILENCE:
      problems.append(f'silence: the {what} is silent')
  problems += _differing_headers(reference, estimate, reference_rate, estimate_rate)
  if any(line.startswith('silence') for line in problems) or not (reference.size and estimate.size):
    return problems
  r, x = _at_44100(reference, reference_rate), _at_44100(estimate, estimate_rate)
  if len(r) != len(x):
    r, x = r.mean(axis=0, keepdims=True), x.mean(axis=0, keepdims=True)
  # By the channel with the highest correlation: the mean of two channels cancels if one is inverted.
  candidates = zip([*r, r.mean(axis=0), r[0]], [*x, x.mean(axis=0), x[-1]])
  lag, peak = max((_best_lag(a, b) for a, b in candidates), key=lambda best: abs(best[1]))
  if abs(peak) < FOLLOWS:
    problems += _wrong_rate(r, x)
  else:
    if abs(lag) >= MIN_LAG or (lag and abs(peak) >= NEAR_COPY):
      milliseconds = abs(lag) / pairs.SAMPLE_RATE * 1e3
      problems.append(f'delay: the estimate is {abs(lag)} samples at 44.1 kHz ({milliseconds:.2f} ms) '
                      f'{"late" if lag > 0 else "early"}')
    problems += _polarity_and_channels(r[:, max(-lag, 0):], x[:, max(lag, 0):])
  length = min(r.shape[1], x.shape[1])
  gain = 10 * np.log10(np.mean(x[:, :length] ** 2) / max(np.mean(r[:, :length] ** 2), 1e-30) + 1e-30)
  if abs(gain) >= GAIN_DB:
    problems.append(f'gain: the estimate is {abs(gain):.1f} dB {"louder" if gain > 0 else "softer"} than the reference')
  return problems


def _at_44100(audio, sample_rate) -> np.ndarray:
  return np.stack([pairs.prepared(channel, sample_rate=sample_rate, what='signal') for channel in audio])


def _differing_headers(reference, estimate, reference_rate, estimate_rate) -> list[str]:
  problems = []
  seconds = max(reference.shape[1], 1) / reference_rate, max(estimate.shape[1], 1) / estimate_rate
  if reference_rate != estimate_rate:
    problems.append(f'rate: the reference is at {reference_rate} Hz, the estimate at {estimate_rate} Hz; compared at '
                    '44100 Hz')
  difference = round((seconds[1] - seconds[0]) * reference_rate)
  if any(abs(seconds[1] / seconds[0] * ratio - 1) < 1e-3 for ratio in (RATE_RATIO, 1 / RATE_RATIO)):
    problems.append('rate: the lengths are as 44.1 to 48 kHz: one was taken for the other')
  elif abs(difference) > (reference_rate != estimate_rate):
    problems.append(f'length: the estimate is {abs(difference)} samples ({abs(difference) / reference_rate:.3f} s) '
                    f'{"longer" if difference > 0 else "shorter"} than the reference; compared over what both have')
  if len(reference) != len(estimate):
    problems.append(f'channels: the reference has {len(reference)} channels, the estimate {len(estimate)}; stereo '
                    'metrics are left out')
  return problems


def _wrong_rate(r, x) -> list[str]:
  """A line if the estimate follows the reference after resampling by 48/44.1 or 44.1/48."""
  r, x = r.mean(axis=0), x.mean(axis=0)
  for up, down, line in (
      (160, 147, 'rate: the estimate sounds as if samples of 44.1 kHz were played at 48 kHz (too high and too fast)'),
      (147, 160, 'rate: the estimate sounds as if samples of 48 kHz were played at 44.1 kHz (too low and too slow)')):
    if abs(_best_lag(r, scipy.signal.resample_poly(x, up, down))[1]) >= FOLLOWS:
      return [line]
  return []


def _polarity_and_channels(r, x) -> list[str]:
  """By the correlations of each channel, and of mid and side, of aligned float [channels, samples] at 44.1 kHz."""
  channels = [_correlation(a, b) for a, b in zip(r, x)]
  if len(r) == 2:
    mid, side = _correlation(r[0] + r[1], x[0] + x[1]), _correlation(r[0] - r[1], x[0] - x[1])
    crossed = [_correlation(r[0], x[1]), _correlation(r[1], x[0])]
    if side * mid < 0 and abs(side) >= SIDE_FOLLOWS and np.abs(crossed).sum() > np.abs(channels).sum():
      return [f'channels: left and right of the estimate are swapped{" and upside down" if mid < 0 else ""}']
  upside_down = [value <= -FOLLOWS for value in channels]
  if all(upside_down):
    return ['polarity: the estimate is upside down (all samples negated)']
  return [f'polarity: channel {number} of the estimate is upside down'
          for number, flipped in enumerate(upside_down, 1) if flipped]


def _correlation(a, b) -> float:
  length = min(len(a), len(b))
  a, b = a[:length], b[:length]
  energy = np.sum(a ** 2) * np.sum(b ** 2)
  return float(np.dot(a, b) / np.sqrt(energy)) if energy > 1e-20 else 0.


def _best_lag(r, x, *, max_lag=int(MAX_LAG_SECONDS * pairs.SAMPLE_RATE)) -> tuple[int, float]:
  """The delay of x in samples, and the signed correlation at it."""
  energy = np.sqrt(np.sum(r ** 2) * np.sum(x ** 2))
  if not energy > 0:
    return 0, 0.
  max_lag = min(max_lag, len(r) - 1, len(x) - 1)
  size = scipy.fft.next_fast_len(max(len(r), len(x)) + max_lag + 1, real=True)
  cross = scipy.fft.irfft(scipy.fft.rfft(x, size) * np.conj(scipy.fft.rfft(r, size)), size) / energy
  around = np.concatenate([cross[size - max_lag:], cross[:max_lag + 1]])
  best = int(np.argmax(np.abs(around)))
  return best - max_lag, float(np.clip(around[best], -1, 1))
