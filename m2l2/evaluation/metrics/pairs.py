"""Metrics of one pair: a reference signal and an estimate of it (a reconstruction).

All are computed on the mean of the channels, at 44.1 kHz, both sides cropped to the common length.
Waveforms are in [-1, 1]; spectra are plain sums over a Hann window, without normalisation; the floors
below refer to these. Frames are centred: `n_fft // 2` zeros before and after the signal.

`ratio` is the metric for short trainings: the log-mel distance of the estimate divided by that of
stationary noise with the reference's own mean spectrum and level. 1 means as good as such noise; music
becomes recognisable below about .85. Exact magnitudes with random phases score .4 to .8, by clip, and
silence 3 to 7.
"""

from collections.abc import Iterator
import dataclasses
import functools
from typing import Any

import numpy as np
import scipy.fft
import scipy.signal
import soxr

from m2l2.errors import UserError
from m2l2.evaluation.metrics import phases, registry

SAMPLE_RATE = 44100
MAX_HZ = 16000.
N_FFT = 2048
HOP = 512
MEL_BANDS = 128
MEL_FLOOR = 1e-4
SPECTRUM_FLOOR = 1e-3
# (n_fft, hop, window length) of the multi-resolution distance.
RESOLUTIONS = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
# A perfect estimate has no finite SI-SDR; float32 samples carry about 150 dB. Keeps means finite.
SI_SDR_LIMIT_DB = 150.
# Frames transformed at a time: bounds memory by the block, not by the file.
BLOCK_FRAMES = 256


def si_sdr(reference, estimate) -> float:
  """Scale-invariant signal-to-distortion ratio in dB, higher is better.

  With zero-mean r and x and a = <x, r> / <r, r>: 10 log10(|a r|^2 / |x - a r|^2), limited to
  +-150 dB. Takes the signals as they are: the rates of both must be the same.

  Args:
    reference: float [channels, samples] or [samples].
    estimate: the same, may differ in channels and length.
  Raises:
    UserError: nothing in common, not finite, or one side is constant (silence).
  """
  r, x = _common(_mono(reference, what='reference'), _mono(estimate, what='estimate'))
  for signal, what in ((r, 'reference'), (x, 'estimate')):
    if np.ptp(signal) == 0:
      raise UserError(f'si_sdr is undefined: the {what} is silent; leave this pair out')
  r, x = r - r.mean(), x - x.mean()
  target = np.dot(x, r) / np.dot(r, r) * r
  signal, distortion = np.sum(target ** 2), np.sum((x - target) ** 2)
  floor = 10 ** (-SI_SDR_LIMIT_DB / 10) * (signal + distortion)
  return float(10 * np.log10(max(signal, floor) / max(distortion, floor)))


def mel_l1_db(reference, estimate, *, sample_rate: int) -> float:
  """Mean absolute difference of the two `log_mel_db` in dB, lower is better.

  Args:
    reference, estimate: float [channels, samples] or [samples], both at `sample_rate` (Hz).
  Raises:
    UserError: nothing in common, or not finite.
  """
  return spectral_distances(*_prepared_pair(reference, estimate, sample_rate=sample_rate))['mel_l1_db']


def lsd_db(reference, estimate, *, sample_rate: int) -> float:
  """Log-spectral distance in dB up to 16 kHz, lower is better.

  Root mean square over frequency of the difference of 20 log10(max(|STFT|, 1e-3)), mean over
  frames. Arguments and errors as in `mel_l1_db`.
  """
  return spectral_distances(*_prepared_pair(reference, estimate, sample_rate=sample_rate))['lsd_db']


def spectral_distances(r: np.ndarray, x: np.ndarray) -> dict[str, float]:
  """`mel_l1_db` and `lsd_db` from one STFT of each of two float64 [samples] at 44.1 kHz."""
  filters, bins = mel_filterbank(), int(MAX_HZ * N_FFT / SAMPLE_RATE) + 1
  mel, lsd, frames = 0., 0., 0
  for a, b in zip(magnitudes(r, bins=N_FFT // 2 + 1), magnitudes(x, bins=N_FFT // 2 + 1)):
    mel += np.sum(np.mean(np.abs(_decibel(a @ filters, MEL_FLOOR) - _decibel(b @ filters, MEL_FLOOR)), axis=1))
    difference = _decibel(a[:, :bins], SPECTRUM_FLOOR) - _decibel(b[:, :bins], SPECTRUM_FLOOR)
    lsd += np.sum(np.sqrt(np.mean(difference ** 2, axis=1)))
    frames += len(a)
  return {'mel_l1_db': float(mel / frames), 'lsd_db': float(lsd / frames)}


def mrstft(reference, estimate, *, sample_rate: int) -> float:
  """Multi-resolution STFT distance, lower is better: the mean over `RESOLUTIONS` of
  ||A - B|| / ||A|| + mean |ln max(A, 1e-3) - ln max(B, 1e-3)|, magnitudes up to 16 kHz.

  Arguments as in `mel_l1_db`.

  Raises:
    UserError: nothing in common, not finite, or the reference is silent.
  """
  r, x = _prepared_pair(reference, estimate, sample_rate=sample_rate)
  if not r.any():
    raise UserError('mrstft is undefined: the reference is silent; leave this pair out')
  distances = []
  for n_fft, hop, window_length in RESOLUTIONS:
    framing = dict(n_fft=n_fft, hop=hop, window_length=window_length)
    error, energy, log_distance, count = 0., 0., 0., 0
    for a, b in zip(magnitudes(r, **framing), magnitudes(x, **framing)):
      error += np.sum((a - b) ** 2)
      energy += np.sum(a ** 2)
      quotient = np.maximum(a, SPECTRUM_FLOOR) / np.maximum(b, SPECTRUM_FLOOR)
      log_distance += np.sum(np.abs(np.log(quotient)))
      count += a.size
    distances.append(np.sqrt(error / energy) + log_distance / count)
  return float(np.mean(distances))


def ratio(reference, estimate, *, sample_rate: int, seed: int = 0) -> float:
  """`mel_l1_db(reference, estimate)` over `shaped_noise_mel_l1_db(reference)`: below 1, the
  estimate follows the music better than any stationary noise does.

  The noise is made from the part of the reference that both have in common. Other arguments as in
  `mel_l1_db`; `seed` draws the noise.

  Raises:
    UserError: nothing in common, not finite, or the reference is silent (or only dither).
  """
  r, x = _prepared_pair(reference, estimate, sample_rate=sample_rate)
  return _ratio(mel_l1_db(r, x, sample_rate=SAMPLE_RATE), r, seed=seed)


def _ratio(distance: float, r: np.ndarray, *, seed: int) -> float:
  """The distance divided by that of noise like r, float64 [samples] at 44.1 kHz."""
  noise = shaped_noise_mel_l1_db(r, sample_rate=SAMPLE_RATE, seed=seed)
  if not noise > 0:  # both are below the floor in every band: silence with dither
    raise UserError('ratio is undefined: the reference is nearly silent; leave this pair out')
  return distance / noise


def shaped_noise_mel_l1_db(reference, *, sample_rate: int, seed: int = 0) -> float:
  """`mel_l1_db` between a signal and its own `shaped_noise`: how much structure the signal has
  (in dB; stationary noise itself scores about 2, music with structure 7 and more). Arguments and
  errors as in `shaped_noise`.
  """
  r = prepared(reference, sample_rate=sample_rate, what='reference')
  noise = shaped_noise(r, sample_rate=SAMPLE_RATE, seed=seed)
  return mel_l1_db(r, noise, sample_rate=SAMPLE_RATE)


def shaped_noise(reference, *, sample_rate: int, seed: int = 0) -> np.ndarray:
  """Stationary Gaussian noise with the reference's mean power spectrum and its exact RMS level.

  Args:
    reference: float [channels, samples] or [samples] at `sample_rate` (Hz).
    seed: draws the noise.
  Returns:
    float64 [samples], mono at 44.1 kHz, of the reference's length.
  Raises:
    UserError: the reference is empty, not finite or silent.
  """
  r = prepared(reference, sample_rate=sample_rate, what='reference')
  if not r.any():
    raise UserError('noise with the spectrum of silence is undefined; leave this signal out')
  power = sum(np.sum(block ** 2, axis=0) for block in magnitudes(r, bins=N_FFT // 2 + 1))
  # Whiteness and colour both in the frequency domain; the longer draw is cropped to size.
  size = scipy.fft.next_fast_len(len(r), real=True)
  white = scipy.fft.rfft(np.random.default_rng(seed).standard_normal(size))
  hz, grid_hz = scipy.fft.rfftfreq(size), scipy.fft.rfftfreq(N_FFT)
  noise = scipy.fft.irfft(white * np.sqrt(np.interp(hz, grid_hz, power)), size)[:len(r)]
  return noise * np.sqrt(np.mean(r ** 2) / np.mean(noise ** 2))


def log_mel_db(audio, *, sample_rate: int) -> np.ndarray:
  """Log-mel magnitudes: |STFT| (n_fft 2048, hop 512, Hann, centred) -> 128 Slaney mel bands from
  0 to 16 kHz -> 20 log10(max(., 1e-4)).

  Args:
    audio: float [channels, samples] or [samples] at `sample_rate` (Hz).
  Returns:
    float64 [128, 1 + samples // 512] in dB, samples counted at 44.1 kHz.
  Raises:
    UserError: empty or not finite.
  """
  return _log_mel_db(prepared(audio, sample_rate=sample_rate, what='audio')).T


def coherence(audio, *, sample_rate: int) -> float:
  """How well partials keep their phase from frame to frame, 0 to 1: `phases.coherence`, mean over blocks of 64 frames.

  Of spectra with |c|^0.65 up to 11 kHz (window 2048, hop 512 at 44.1 kHz, which are 1024 and 256 at half that rate),
  blocks without sound left out. Music has .5 to .8, a steady tone 1, white noise .18, exact magnitudes with random
  phases .2 to .28. A model whose phases are noise stays there; one that sounds like music is near its source.

  Raises:
    UserError: empty, not finite, silent, or too short for one difference of phases (6 frames).
  """
  return _coherence(prepared(audio, sample_rate=sample_rate, what='audio'), what='audio')


def _whole_frames(mono: np.ndarray) -> Iterator[np.ndarray]:
  """Blocks of 64 frames [frames, bins up to 11 kHz] inside the signal; for a short signal one shorter block."""
  outside = N_FFT // HOP // 2  # frames at either end that extend beyond it
  held, short = None, True
  for frames in spectra(mono, bins=N_FFT // 4):
    held = frames[outside:] if held is None else np.concatenate([held, frames])
    while len(held) >= 64 + outside:
      yield held[:64]
      held, short = held[64:], False
  if short and held is not None:
    yield held[:-outside]


def _coherence(mono: np.ndarray, *, what: str) -> float:
  values = []
  for block in _whole_frames(mono):
    block = block * np.maximum(np.abs(block), 1e-9) ** (0.65 - 1)
    if len(block) > 5 and np.abs(block).sum() > 1e-2 * len(block):
      values.append(phases.coherence(np.stack([block.T.real, block.T.imag], axis=-1)))
  if not values:
    raise UserError(f'coherence is undefined: the {what} is silent or shorter than 6 frames; leave this pair out')
  return float(np.mean(values))


# ---- as used by registry.py -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
  """The input of a metric: two signals. Intermediate results that several metrics need are cached.

  Fields:
    reference, estimate: float [channels, samples] or [samples] in [-1, 1], both at `sample_rate` (Hz);
      channels and lengths may differ.
    chunks: a `seams.Chunks`, the model's chunk borders; None: those of the paper's model.
    seed: of random numbers of metrics.
  """
  reference: np.ndarray
  estimate: np.ndarray
  sample_rate: int
  chunks: Any = None
  seed: int = 0

  @functools.cached_property
  def mono(self) -> tuple[np.ndarray, np.ndarray]:
    """Both signals checked, mixed down, at 44.1 kHz and equally long: float64 [samples] each, read-only.

    Raises UserError: nothing in common, or not finite.
    """
    return _prepared_pair(self.reference, self.estimate, sample_rate=self.sample_rate)

  @functools.cached_property
  def distances(self) -> dict[str, float]:
    """`spectral_distances`."""
    return spectral_distances(*self.mono)


Signals = Comparison  # its name before


def pair_metrics(reference, estimate, *, sample_rate: int, names=None, seed: int = 0) -> dict[str, float]:
  """The metrics `names` of one pair; by default all that need no stereo, no chunks and no further package.

  Args:
    reference, estimate, seed: see `Comparison`; float32.
  Returns:
    name -> finite float, in the order of `names`.
  Raises:
    UserError: unknown name, nothing in common, not finite, or a metric undefined by silence.
  """
  if names is None:
    names = [name for name, entry in registry.METRICS.items() if not (entry.stereo or entry.chunks or entry.package)]
  compared = Comparison(reference, estimate, sample_rate, seed=seed)
  return {metric.name: metric(compared) for metric in registry.named(names)}


def si_sdr_of(compared: Comparison) -> float:
  return si_sdr(*compared.mono)


def mel_l1_db_of(compared: Comparison) -> float:
  return compared.distances['mel_l1_db']


def lsd_db_of(compared: Comparison) -> float:
  return compared.distances['lsd_db']


def mrstft_of(compared: Comparison) -> float:
  return mrstft(*compared.mono, sample_rate=SAMPLE_RATE)


def ratio_of(compared: Comparison) -> float:
  return _ratio(compared.distances['mel_l1_db'], compared.mono[0], seed=compared.seed)


def coherence_of_estimate(compared: Comparison) -> float:
  return _coherence(compared.mono[1], what='estimate')


def coherence_of_reference(compared: Comparison) -> float:
  return _coherence(compared.mono[0], what='reference')


# ---- spectra -------------------------------------------------------------------------------------


def mel_edges(*, bands: int = MEL_BANDS, max_hz: float = MAX_HZ) -> np.ndarray:
  """The edges of the triangles of Slaney's mel scale: float64 [bands + 2] in Hz.

  The scale (Auditory Toolbox, 1998) is linear below 1 kHz, 200/3 Hz a mel, and logarithmic above, 27 mels for a factor
  of 6.4.
  """
  log_step = np.log(6.4) / 27
  top_mel = (max_hz / (200 / 3) if max_hz < 1000 else 15 + np.log(max_hz / 1000) / log_step)
  mel = np.linspace(0, top_mel, bands + 2)
  return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * log_step))


@functools.cache
def mel_filterbank(*, sample_rate: int = SAMPLE_RATE, n_fft: int = N_FFT, bands: int = MEL_BANDS,
                   max_hz: float = MAX_HZ) -> np.ndarray:
  """Triangles on Slaney's mel scale, each of unit area over Hz: float64 [n_fft // 2 + 1, bands].

  The array is shared and read-only.
  """
  edge = mel_edges(bands=bands, max_hz=max_hz)
  hz = np.linspace(0, sample_rate / 2, n_fft // 2 + 1)[:, None]
  rising = (hz - edge[:-2]) / (edge[1:-1] - edge[:-2])
  falling = (edge[2:] - hz) / (edge[2:] - edge[1:-1])
  filters = np.maximum(0, np.minimum(rising, falling)) * 2 / (edge[2:] - edge[:-2])
  filters.setflags(write=False)
  return filters


def _log_mel_db(mono: np.ndarray) -> np.ndarray:
  """float64 [samples] at 44.1 kHz -> [frames, bands] in dB."""
  filters = mel_filterbank()
  blocks = magnitudes(mono, bins=N_FFT // 2 + 1)
  return np.concatenate([_decibel(block @ filters, MEL_FLOOR) for block in blocks])


def _decibel(magnitude: np.ndarray, floor: float) -> np.ndarray:
  return 20 * np.log10(np.maximum(magnitude, floor))


def magnitudes(mono: np.ndarray, **framing) -> Iterator[np.ndarray]:
  """The absolute values of `spectra`, block by block."""
  return map(np.abs, spectra(mono, **framing))


def spectra(mono: np.ndarray, *, n_fft: int = N_FFT, hop: int = HOP, window_length: int | None = None,
            bins: int | None = None) -> Iterator[np.ndarray]:
  """Blocks [frames, bins] of the STFT, the first `bins` (by default those up to 16 kHz at 44.1 kHz); a shorter window
  is centred."""
  window_length = window_length or n_fft
  bins = bins or int(MAX_HZ * n_fft / SAMPLE_RATE) + 1
  # Outside of its window a frame is zero, and magnitudes do not see the shift: only the window's
  # own samples are framed, starting where the centred window starts.
  window = scipy.signal.get_window('hann', window_length, fftbins=True)
  offset = (n_fft - window_length) // 2
  padded = np.pad(mono, (n_fft // 2, n_fft // 2))[offset:]
  frames = 1 + len(mono) // hop
  views = np.lib.stride_tricks.sliding_window_view(padded, window_length)[::hop][:frames]
  for start in range(0, frames, BLOCK_FRAMES):
    framed = views[start:start + BLOCK_FRAMES] * window
    yield scipy.fft.rfft(framed, n_fft, axis=1)[:, :bins]


def _prepared_pair(reference, estimate, *, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
  return _common(prepared(reference, sample_rate=sample_rate, what='reference'),
                 prepared(estimate, sample_rate=sample_rate, what='estimate'))


def _common(r: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  length = min(len(r), len(x))
  return r[:length], x[:length]


def prepared(audio, *, sample_rate: int, what: str, to_rate: int = SAMPLE_RATE) -> np.ndarray:
  """A signal checked, mixed down, at `to_rate` (Hz): float64 [samples]."""
  mono = _mono(audio, what=what)
  if not sample_rate > 0:
    raise UserError(f'sample rate of the {what} is {sample_rate}: it must be a positive number')
  if sample_rate == to_rate:
    return mono
  mono = soxr.resample(mono, sample_rate, to_rate, quality='HQ')
  if not len(mono):
    raise UserError(f'the {what} is too short to be compared at {to_rate} Hz')
  return mono


def _mono(audio, *, what: str) -> np.ndarray:
  audio = np.asarray(audio)
  if not np.issubdtype(audio.dtype, np.floating):
    raise UserError(f'the {what} is {audio.dtype}: give floating-point samples in [-1, 1]')
  if audio.ndim not in (1, 2):
    raise UserError(f'the {what} has shape {audio.shape}: give [channels, samples] or [samples]')
  if not audio.size:
    raise UserError(f'the {what} is empty: there is nothing to compare')
  mono = audio.astype(np.float64)
  mono = mono.mean(axis=0) if mono.ndim == 2 else mono
  if not np.isfinite(mono).all():
    raise UserError(f'the {what} holds NaN or infinite samples: it cannot be measured')
  return mono
