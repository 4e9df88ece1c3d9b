"""One crop: where it lies, its channels, its rate, and which draws are rejected."""

import numpy as np
import pytest
import soundfile

from m2l2.data import audio_io, order, transforms
from m2l2.data.sources import Mixture, find_audio_files
from m2l2.errors import UserError


def spec(*, crop_samples=1000, channels=1, native_rates=(44100, 48000), rms_floor=1e-3):
  return transforms.CropSpec(
      crop_samples=crop_samples, channels=channels, native_rates=native_rates, rms_floor=rms_floor)


def noise(channels, samples):
  return np.random.default_rng(0).uniform(-.5, .5, (channels, samples)).astype(np.float32)


def read_crop(path, **options):
  with audio_io.AudioReader(path) as item:
    return transforms.read_crop(item, **options)


def test_draws_are_a_fixed_function():
  """Pinned words: a change of them changes the sample order of every run."""
  bits = order.draw_bits(seed=1, index=2, attempt=3)
  assert (bits.file, bits.offset, bits.channel) == (
      1170280437898119671, 13051159143091778299, 5120089422708784769)
  assert order.epoch_order(seed=1, epoch=2, count=8).tolist() == [3, 1, 5, 6, 0, 7, 2, 4]
  draws = {(s, g, a): order.draw_bits(seed=s, index=g, attempt=a)
           for s in (0, 1, 2**64 - 1) for g in (0, 1, 2**61) for a in (0, 1, 63)}
  assert len(set(draws.values())) == len(draws)


def test_below_is_uniform_and_in_range():
  assert order.below(0, 7) == 0 and order.below(2**64 - 1, 7) == 6
  values = [order.below(order.draw_bits(seed=0, index=g, attempt=0).offset, 5)
            for g in range(2000)]
  counts = np.bincount(values, minlength=5)
  assert counts.min() > 330 and counts.max() < 470


def test_every_epoch_holds_every_file_once():
  orders = [order.epoch_order(seed=3, epoch=e, count=50) for e in range(4)]
  for epoch in orders:
    assert sorted(epoch) == list(range(50))
  assert len({tuple(o) for o in orders}) == 4
  assert tuple(order.epoch_order(seed=4, epoch=0, count=50)) != tuple(orders[0])


def test_channel_policy():
  audio = noise(6, 50)
  picked = {transforms.pick_channels(audio, channels=1, bits=i * 2**64 // 6 + 1).tobytes()
            for i in range(6)}
  assert picked == {audio[i:i + 1].tobytes() for i in range(6)}
  np.testing.assert_array_equal(
      transforms.pick_channels(audio, channels=2, bits=5), audio[:2])
  np.testing.assert_array_equal(
      transforms.pick_channels(audio[:2], channels=2, bits=5), audio[:2])
  np.testing.assert_array_equal(
      transforms.pick_channels(audio[:1], channels=2, bits=5), audio[[0, 0]])
  np.testing.assert_array_equal(
      transforms.pick_channels(audio[:1], channels=1, bits=2**64 - 1), audio[:1])


def test_root_mean_square():
  assert transforms.root_mean_square(np.full((2, 100), -.25, np.float32)) == .25
  huge = np.full((1, 100), 1e30, np.float32)
  assert transforms.root_mean_square(huge) == pytest.approx(1e30)


@pytest.mark.parametrize('rate', [44100, 48000, 96000, 8000, 22050])
def test_windows_stay_in_the_file_and_reach_its_ends(rate):
  s = spec(crop_samples=1000)
  frames = 3000 * max(1, rate // 44100)
  to_rate = 48000 if rate == 48000 else 44100
  windows = [transforms.crop_window(frames=frames, rate=rate, spec=s, bits=b)
             for b in [0, 2**64 - 1, *np.random.Philox(0).random_raw(200).tolist()]]
  for w in windows:
    assert w.rate == to_rate and 0 <= w.start and w.start + w.frames <= frames
    given = audio_io.resampled_length(w.frames, from_rate=rate, to_rate=to_rate)
    assert w.skip + 1000 <= given
  assert windows[0].start == 0 and windows[0].skip == 0
  assert windows[1].start + windows[1].frames == frames
  needed = -(-1000 * rate // to_rate)
  exact = transforms.crop_window(frames=needed, rate=rate, spec=s, bits=2**63)
  assert (exact.start, exact.frames, exact.skip) == (0, needed, 0)
  with pytest.raises(UserError, match='shorter'):
    transforms.crop_window(frames=needed - 1, rate=rate, spec=s, bits=0)


def test_native_rates_are_cut_from_the_file_as_they_are(tmp_path):
  audio = noise(2, 5000)
  for rate in (44100, 48000):
    path = tmp_path / f'{rate}.wav'
    audio_io.write(path, audio, rate)
    full, _ = audio_io.read(path)
    bits = order.draw_bits(seed=0, index=rate, attempt=0)
    start = order.below(bits.offset, 4001)
    crop = read_crop(path, spec=spec(channels=2), bits=bits)
    np.testing.assert_array_equal(crop, full[:, start:start + 1000])
    mono = read_crop(path, spec=spec(channels=1), bits=bits)
    np.testing.assert_array_equal(mono[0], crop[order.below(bits.channel, 2)])
    assert mono.flags.c_contiguous and mono.dtype == np.float32


@pytest.mark.parametrize('rate', [48000, 96000, 8000, 22050])
def test_other_rates_arrive_at_the_right_frequency_and_level(tmp_path, rate):
  t = np.arange(2 * rate) / rate
  path = tmp_path / 'sine.wav'
  audio_io.write(path, 0.5 * np.sin(2 * np.pi * 1234 * t)[None], rate)
  s = spec(crop_samples=20000, native_rates=(44100,))
  for index in range(3):
    bits = order.draw_bits(seed=0, index=index, attempt=0)
    crop = read_crop(path, spec=s, bits=bits)[0]
    n = np.arange(20000) / 44100
    basis = np.stack([np.sin(2 * np.pi * 1234 * n), np.cos(2 * np.pi * 1234 * n)], axis=1)
    weights, residue, *_ = np.linalg.lstsq(basis, crop.astype(np.float64))
    assert np.hypot(*weights) == pytest.approx(0.5, abs=1e-4)
    assert np.sqrt(residue[0] / 20000) < 1e-4  # nothing but that sine, edges included


@pytest.mark.parametrize('rate', [32000, 96000])
def test_a_resampled_crop_equals_the_whole_file_resampled(tmp_path, rate):
  """At places where both grids of samples meet: the margin is wide enough."""
  path = tmp_path / 'noise.wav'
  audio_io.write(path, 0.5 * noise(1, 30000), rate)
  full, _ = audio_io.read(path)
  whole = audio_io.resample(full, from_rate=rate, to_rate=44100)
  period = rate // np.gcd(rate, 44100)
  s = spec(crop_samples=3000, native_rates=(44100,))
  needed = -(-3000 * rate // 44100)
  compared = 0
  for bits in range(0, 2**64, 2**64 // 2000):
    start = order.below(bits, 30000 - needed + 1)
    window = transforms.crop_window(frames=30000, rate=rate, spec=s, bits=bits)
    if start % period == 0 and window.start % period == 0 and compared < 5:
      crop = read_crop(
          path, spec=s, bits=order.DrawBits(file=0, offset=bits, channel=0))
      at = start * 44100 // rate
      np.testing.assert_allclose(crop, whole[:, at:at + 3000], atol=2e-6)
      compared += 1
  assert compared


def folder(tmp_path, **files):
  for name, audio in files.items():
    with soundfile.SoundFile(
        tmp_path / f'{name}.wav', 'w', 44100, len(audio), subtype='FLOAT') as f:
      f.write(audio.T)
  return Mixture((find_audio_files(tmp_path),))


def test_rejected_draws_are_counted_and_drawn_again(tmp_path, caplog):
  nan = noise(1, 5000)
  nan[:, ::500] = np.nan
  files = folder(
      tmp_path, good=noise(1, 5000), nan=nan, scaled=noise(1, 5000) * 32768, short=noise(1, 900),
      silent=1e-4 * noise(1, 5000), half=noise(1, 5000) * (np.arange(5000) > 2500))
  crop = transforms.RandomCrop(mixture=files, spec=spec(), seed=0)
  samples = [crop(g) for g in range(60)]
  assert all(s['audio'].shape == (1, 1000) for s in samples)
  assert all(np.abs(s['audio']).max() <= .5 for s in samples)
  rejected = np.array([s['rejected'] for s in samples])
  assert rejected.dtype == np.int32 and rejected.min() == 0 and rejected.max() > 1
  text = caplog.text
  again = transforms.RandomCrop(mixture=files, spec=spec(), seed=0)(17)
  np.testing.assert_array_equal(again['audio'], samples[17]['audio'])
  assert again['rejected'] == samples[17]['rejected']
  for name, words in dict(nan='NaN', scaled='reaches 1.6', short='shorter',
                          silent='was silent in each').items():
    lines = [line for line in text.splitlines() if f'{name}.wav' in line]
    assert len(lines) == 1 and words in lines[0], lines
  assert 'good.wav' not in text and 'half.wav' not in text


def test_a_folder_without_any_good_crop_says_why(tmp_path):
  files = folder(tmp_path, short=noise(1, 10), silent=0 * noise(1, 5000))
  with pytest.raises(UserError) as error:
    transforms.RandomCrop(mixture=files, spec=spec(), seed=0)(0)
  line = str(error.value)
  assert '64 draws' in line and 'short.wav: is shorter' in line and 'silent.wav: is silent' in line
  assert '\n' not in line
