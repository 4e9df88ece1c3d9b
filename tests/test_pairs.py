"""Pair metrics against slow float64 twins written from the definitions, and against known cases."""

import numpy as np
import pytest
import scipy.signal
import soxr

from m2l2.errors import UserError
from m2l2.evaluation.metrics import pairs

RATE = 44100
EVERY_METRIC = ['si_sdr', 'mel_l1_db', 'lsd_db', 'mrstft', 'ratio', 'coherence', 'coherence_reference']


def noise(*shape, seed=0, gain=.1):
  return (gain * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def music(seconds=1., seed=0):
  """Decaying notes over a little noise, stereo, with a silent end so that the floors matter."""
  rng = np.random.default_rng(seed)
  time = np.arange(int(seconds * RATE)) / RATE
  audio = np.zeros((2, len(time)))
  for start in np.arange(0, .8 * seconds, .15):
    age = np.maximum(time - start, 0)
    note = np.sin(2 * np.pi * rng.uniform(200, 3000) * age) * np.exp(-6 * age) * (time >= start)
    audio += .3 * rng.uniform(.2, 1, size=(2, 1)) * note
  audio[:, :int(.8 * len(time))] += 1e-3 * rng.standard_normal((2, int(.8 * len(time))))
  audio[:, int(.9 * len(time)):] = 0
  return audio.astype(np.float32)


def slow_magnitudes(mono, n_fft=2048, hop=512, window_length=2048):
  """|STFT| [frames, bins] frame by frame with an explicit Fourier matrix."""
  padded = np.concatenate([np.zeros(n_fft // 2), mono, np.zeros(n_fft // 2)])
  window = np.zeros(n_fft)
  first = (n_fft - window_length) // 2
  for i in range(window_length):
    window[first + i] = .5 - .5 * np.cos(2 * np.pi * i / window_length)
  fourier = np.exp(-2j * np.pi * np.outer(np.arange(n_fft // 2 + 1), np.arange(n_fft)) / n_fft)
  return np.stack([np.abs(fourier @ (padded[start:start + n_fft] * window))
                   for start in range(0, len(mono) + 1, hop)])


def slow_mel_filters():
  """Slaney's scale bin by bin: linear to 1 kHz, then 27 steps for a factor of 6.4; unit areas."""
  def hz(mel):
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)
  top = 15 + 27 * np.log(16) / np.log(6.4)
  edges = [hz(top * i / 129) for i in range(130)]
  filters = np.zeros((1025, 128))
  for band in range(128):
    low, centre, high = edges[band:band + 3]
    for k in range(1025):
      f = k * RATE / 2048
      weight = (f - low) / (centre - low) if f < centre else (high - f) / (high - centre)
      filters[k, band] = max(weight, 0) * 2 / (high - low)
  return filters


def slow_pair(seconds=.25):
  """A pair of unequal channels and lengths, and both as the metrics should see them."""
  reference, estimate = music(seconds), music(1.2 * seconds, seed=1)[:1] * .7
  length = reference.shape[1]
  return reference, estimate, reference.astype(float).mean(0), estimate[0, :length].astype(float)


def test_mel_filterbank_equals_its_slow_twin():
  np.testing.assert_allclose(pairs.mel_filterbank(), slow_mel_filters(), atol=1e-12)


def test_mel_filterbank_has_the_values_others_publish():
  # librosa 0.11: filters.mel(sr=44100, n_fft=2048, n_mels=128, fmin=0, fmax=16000), [bin, band].
  published = {(1, 0): 0.026338325364037962, (2, 0): 0.01727045617255782,
               (14, 10): 0.019001020593362797, (15, 10): 0.02460776094323298,
               (740, 127): 0.00030718119834426415}
  filters = pairs.mel_filterbank()
  for (k, band), value in published.items():
    assert filters[k, band] == pytest.approx(value, rel=1e-9)
  assert filters.max() == pytest.approx(0.03454091234511563, rel=1e-9)


def test_mel_bands_have_unit_area_and_end_at_16_khz():
  filters, bin_hz = pairs.mel_filterbank(), RATE / 2048
  areas = filters.sum(0) * bin_hz
  np.testing.assert_allclose(areas[64:], 1, atol=.02)
  assert areas.min() > .5
  assert not filters[int(16000 / bin_hz) + 1:].any()


def test_log_mel_equals_its_slow_twin():
  reference, _, mono, _ = slow_pair()
  slow = 20 * np.log10(np.maximum(slow_magnitudes(mono) @ slow_mel_filters(), 1e-4))
  fast = pairs.log_mel_db(reference, sample_rate=RATE)
  assert fast.shape == (128, 1 + len(mono) // 512)
  assert fast.min() == -80  # the silent end is at the floor
  np.testing.assert_allclose(fast, slow.T, atol=1e-6)


def test_mel_l1_equals_its_slow_twin():
  reference, estimate, r, x = slow_pair()
  logs = [20 * np.log10(np.maximum(slow_magnitudes(side) @ slow_mel_filters(), 1e-4))
          for side in (r, x)]
  expected = np.mean(np.abs(logs[0] - logs[1]))
  assert pairs.mel_l1_db(reference, estimate, sample_rate=RATE) == pytest.approx(expected, abs=1e-6)


def test_lsd_equals_its_slow_twin():
  reference, estimate, r, x = slow_pair()
  bins = sum(k * RATE / 2048 <= 16000 for k in range(1025))
  logs = [20 * np.log10(np.maximum(slow_magnitudes(side)[:, :bins], 1e-3)) for side in (r, x)]
  expected = np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(*logs)])
  assert pairs.lsd_db(reference, estimate, sample_rate=RATE) == pytest.approx(expected, abs=1e-6)


def test_mrstft_equals_its_slow_twin():
  reference, estimate, r, x = slow_pair(.08)
  distances = []
  for n_fft, hop, length in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
    bins = sum(k * RATE / n_fft <= 16000 for k in range(n_fft // 2 + 1))
    a, b = (slow_magnitudes(side, n_fft, hop, length)[:, :bins] for side in (r, x))
    logs = np.abs(np.log(np.maximum(a, 1e-3)) - np.log(np.maximum(b, 1e-3)))
    distances.append(np.linalg.norm(a - b) / np.linalg.norm(a) + logs.mean())
  expected = np.mean(distances)
  assert pairs.mrstft(reference, estimate, sample_rate=RATE) == pytest.approx(expected, abs=1e-9)


def test_a_tenth_of_the_level_is_20_db_everywhere():
  reference = noise(2, 20000, gain=.3)
  metrics = pairs.pair_metrics(reference, .1 * reference, sample_rate=RATE)
  assert metrics['mel_l1_db'] == pytest.approx(20, abs=1e-4)
  # A few of the noise's bins fall through the floor once they are 20 dB lower.
  assert metrics['lsd_db'] == pytest.approx(20, abs=1e-2)
  assert metrics['mrstft'] == pytest.approx(.9 + np.log(10), abs=1e-2)
  assert metrics['si_sdr'] > 130


def test_si_sdr_of_known_noise():
  rng = np.random.default_rng(0)
  r, n = rng.standard_normal((2, 50000))
  r, n = r - r.mean(), n - n.mean()
  n -= np.dot(n, r) / np.dot(r, r) * r
  n *= np.linalg.norm(r) / np.linalg.norm(n)
  for decibel in (-20, 0, 12.5):
    estimate = r + 10 ** (-decibel / 20) * n
    assert pairs.si_sdr(r, estimate) == pytest.approx(decibel, abs=1e-6)
    assert pairs.si_sdr(r + .3, -.2 * estimate - .1) == pytest.approx(decibel, abs=1e-6)
  assert pairs.si_sdr(r, r) == 150
  assert pairs.si_sdr(r, n) < -140


def test_a_perfect_estimate():
  audio = music()
  own = pairs.coherence(audio, sample_rate=RATE)
  assert pairs.pair_metrics(audio, audio, sample_rate=RATE) == {
      'si_sdr': 150, 'mel_l1_db': 0, 'lsd_db': 0, 'mrstft': 0, 'ratio': 0, 'coherence': own, 'coherence_reference': own}


def test_coherence_tells_partials_from_noise_with_their_magnitudes():
  rng = np.random.default_rng(0)
  tone = .5 * np.sin(2 * np.pi * 440.3 * np.arange(3 * RATE) / RATE)
  white = rng.standard_normal(3 * RATE)
  assert pairs.coherence(tone, sample_rate=RATE) == pytest.approx(1, abs=1e-4)
  assert .15 < pairs.coherence(white, sample_rate=RATE) < .2
  chord = .1 * np.sin(2 * np.pi * np.outer([220, 277.2, 329.6, 440], np.arange(3 * RATE)) / RATE).sum(axis=0)
  frames = scipy.signal.stft(chord, nperseg=2048, noverlap=1536)[2]
  phases = np.exp(2j * np.pi * rng.random(frames.shape))
  scrambled = scipy.signal.istft(np.abs(frames) * phases, nperseg=2048, noverlap=1536)[1]
  assert pairs.coherence(chord, sample_rate=RATE) > .95
  assert .15 < pairs.coherence(scrambled, sample_rate=RATE) < .3
  # At half the rate the frames are as long in seconds: the same music has the same figure.
  half = soxr.resample(chord, RATE, RATE // 2)
  assert pairs.coherence(half, sample_rate=RATE // 2) == pytest.approx(
      pairs.coherence(chord, sample_rate=RATE), abs=.01)


def test_coherence_leaves_silent_blocks_out():
  tone = .5 * np.sin(2 * np.pi * 440.3 * np.arange(RATE) / RATE)
  pause = np.concatenate([tone, np.zeros(2 * RATE)])
  assert pairs.coherence(pause, sample_rate=RATE) > .9
  with pytest.raises(UserError, match='shorter than 6 frames'):
    pairs.coherence(tone[:2000], sample_rate=RATE)


def test_shaped_noise_has_the_level_and_the_spectrum_of_the_music():
  audio = music(3)
  mono = audio.astype(float).mean(0)
  shaped = pairs.shaped_noise(audio, sample_rate=RATE)
  assert shaped.shape == mono.shape
  assert np.mean(shaped ** 2) == pytest.approx(np.mean(mono ** 2), rel=1e-12)

  def mean_power(signal):
    power = np.stack([np.abs(np.fft.rfft(signal[i:i + 2048] * np.hanning(2048))) ** 2
                      for i in range(0, len(signal) - 2048, 512)]).mean(0)
    return 10 * np.log10(power[:1024].reshape(64, 16).sum(1))
  np.testing.assert_allclose(mean_power(shaped), mean_power(mono), atol=1.5)


def test_shaped_noise_is_stationary_and_drawn_by_its_seed():
  audio = music(2)
  first, same, other = (pairs.shaped_noise(audio, sample_rate=RATE, seed=seed) for seed in (0, 0, 1))
  np.testing.assert_array_equal(first, same)
  assert abs(np.corrcoef(first, other)[0, 1]) < .2
  level = np.sqrt(np.mean(first[:len(first) // 8 * 8].reshape(8, -1) ** 2, axis=1))
  assert level.max() / level.min() < 1.6


def test_ratio_of_other_noise_is_one():
  audio = music(2)
  other = pairs.shaped_noise(audio, sample_rate=RATE, seed=1).astype(np.float32)
  assert pairs.ratio(audio, other, sample_rate=RATE) == pytest.approx(1, abs=.05)
  assert pairs.ratio(audio, audio * .9, sample_rate=RATE) < .1
  assert pairs.ratio(audio, other, sample_rate=RATE) == pytest.approx(
      pairs.mel_l1_db(audio, other, sample_rate=RATE)
      / pairs.shaped_noise_mel_l1_db(audio, sample_rate=RATE), rel=1e-12)


def test_noise_has_less_structure_than_music():
  assert pairs.shaped_noise_mel_l1_db(noise(2, RATE), sample_rate=RATE) < 3
  assert pairs.shaped_noise_mel_l1_db(music(2), sample_rate=RATE) > 7


def test_other_rates_are_measured_at_44100():
  reference = soxr.resample(music(2).T, RATE, 48000).T
  estimate = reference + noise(*reference.shape, gain=.01, seed=5)
  expected = pairs.pair_metrics(
      soxr.resample(reference.mean(0).astype(float), 48000, RATE),
      soxr.resample(estimate.mean(0).astype(float), 48000, RATE), sample_rate=RATE)
  measured = pairs.pair_metrics(reference, estimate, sample_rate=48000)
  assert measured == pytest.approx(expected, rel=1e-3)
  assert pairs.log_mel_db(reference, sample_rate=48000).shape == (128, 1 + 2 * RATE // 512)


def test_channels_are_averaged_and_lengths_cropped():
  reference, estimate = music(), noise(30000)
  mono = reference[:, :30000].astype(float).mean(0)
  assert pairs.pair_metrics(reference, estimate, sample_rate=RATE) == pytest.approx(
      pairs.pair_metrics(mono, estimate[None], sample_rate=RATE), rel=1e-12)


def test_blocks_of_frames_do_not_show(monkeypatch):
  reference, estimate = music(.5), noise(2, 20000)
  whole = pairs.pair_metrics(reference, estimate, sample_rate=RATE)
  monkeypatch.setattr(pairs, 'BLOCK_FRAMES', 7)
  assert pairs.pair_metrics(reference, estimate, sample_rate=RATE) == pytest.approx(whole, rel=1e-9)


def test_one_sample_is_enough_for_the_spectral_metrics():
  metrics = pairs.pair_metrics(np.float32([.5]), np.float32([.4]), sample_rate=RATE,
                               names=['mel_l1_db', 'lsd_db', 'mrstft'])
  assert np.isfinite(list(metrics.values())).all()


def test_names_pick_the_metrics_in_order():
  audio, other = music(), noise(2, RATE)
  everything = pairs.pair_metrics(audio, other, sample_rate=RATE)
  assert list(everything) == EVERY_METRIC
  assert all(isinstance(value, float) for value in everything.values())
  some = pairs.pair_metrics(audio, other, sample_rate=RATE, names=['lsd_db', 'si_sdr'])
  assert list(some) == ['lsd_db', 'si_sdr']
  assert some == pytest.approx({name: everything[name] for name in some}, rel=1e-12)
  with pytest.raises(UserError, match="'visqual'.*si_sdr, mel_l1_db"):
    pairs.pair_metrics(audio, other, sample_rate=RATE, names=['visqual'])


@pytest.mark.parametrize('audio, message', [
    (np.zeros((2, 0), np.float32), 'the estimate is empty'),
    (np.full(2000, np.nan, np.float32), 'the estimate holds NaN'),
    (np.zeros((1, 2, 2000), np.float32), r'the estimate has shape \(1, 2, 2000\)'),
    (np.zeros(2000, np.int16), 'the estimate is int16'),
])
@pytest.mark.parametrize('name', EVERY_METRIC)
def test_what_cannot_be_measured_is_refused(name, audio, message):
  with pytest.raises(UserError, match=message):
    pairs.pair_metrics(music(.1), audio, sample_rate=RATE, names=[name])


def test_a_sample_rate_of_zero_is_refused():
  with pytest.raises(UserError, match='sample rate of the reference is 0'):
    pairs.mel_l1_db(music(.1), music(.1), sample_rate=0)


@pytest.mark.parametrize('name', ['si_sdr', 'mrstft', 'ratio', 'coherence_reference'])
def test_silence_makes_a_metric_undefined(name):
  silence = np.zeros((2, 4000), np.float32)
  with pytest.raises(UserError, match='silen'):
    pairs.pair_metrics(silence, music(.1), sample_rate=RATE, names=[name])


@pytest.mark.parametrize('level', [0, .3])
def test_a_constant_estimate_has_no_si_sdr(level):
  with pytest.raises(UserError, match='the estimate is silent'):
    pairs.si_sdr(music(.1), np.full((2, 4000), level, np.float32))
