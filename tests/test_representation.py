"""The spectrogram against the vectors of the method's fact sheet, and its exact inverse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2l2.evaluation.metrics.phases import coherence
from m2l2.representation import Representation, istft, stft
from m2l2.variants.consistency import VariantConsistency
from m2l2.variants.envelope import log_magnitude

pytestmark = pytest.mark.usefixtures('strict_dtypes')


def _numpy(function, **options):
  """One program that returns numpy arrays; op by op, each op and each slice would be a program."""
  compiled = jax.jit(function, **options)
  return lambda *args, **kwargs: jax.tree.map(np.asarray, compiled(*args, **kwargs))


compress, expand, analyse, synthesise = (
  _numpy(getattr(Representation, name), static_argnums=0)
  for name in ('compress', 'expand', 'analyse', 'synthesise'))
_stft, _istft = (_numpy(function, static_argnames=('window', 'hop')) for function in (stft, istft))

SMALL = dict(window=256, hop=64, bins=128, frames=4)


def _music(rng, *shape):
  """Noise without its top fifth: the Nyquist bin, which is dropped, holds nothing of it."""
  spectrum = np.fft.rfft(rng.normal(size=shape) * .1)
  spectrum[..., int(spectrum.shape[-1] * .8):] = 0
  return np.fft.irfft(spectrum, n=shape[-1]).astype(np.float32)


def _parts(*values):
  return np.float32([[v.real, v.imag] for v in values])


@pytest.mark.parametrize('magnitude, expected', [
  (0.01, 0.017040), (1, 0.34), (10, 1.518724), (100, 6.783892), (512, 0.34 * 512**.65)])
@pytest.mark.parametrize('transform', ['polar', 'component'])
def test_amplitudes_of_the_transform(transform, magnitude, expected):
  rep = Representation(transform=transform)
  got = compress(rep, _parts(complex(magnitude), -1j * magnitude))
  np.testing.assert_allclose(got, [[expected, 0], [0, -expected]], rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize('transform, degrees', [('polar', -53.1301), ('component', -50.3266)])
def test_only_the_polar_transform_keeps_the_phase_of_3_minus_4i(transform, degrees):
  re, im = compress(Representation(transform=transform), _parts(3 - 4j))[0]
  np.testing.assert_allclose(np.degrees(np.arctan2(im, re)), degrees, atol=1e-3)
  if transform == 'polar':
    np.testing.assert_allclose(np.hypot(re, im), .34 * 5**.65, rtol=1e-6)


@pytest.mark.parametrize('transform', ['polar', 'component'])
def test_expand_inverts_compress(transform):
  rep = Representation(transform=transform)
  parts = np.float32(np.random.normal(size=(1000, 2)) * 10.**np.random.uniform(-5, 3, (1000, 1)))
  np.testing.assert_allclose(expand(rep, compress(rep, parts)), parts, rtol=2e-5, atol=1e-9)


def test_unit_sine_on_bin_64():
  sine = np.sin(2 * np.pi * 64 * np.arange(8192) / 2048).astype(np.float32)
  magnitude = np.abs(_stft(sine, window=2048, hop=512))
  assert magnitude.shape == (13, 1025)
  np.testing.assert_allclose(magnitude[:, 63:66], np.tile([256, 512, 256], (13, 1)), rtol=1e-4)
  assert magnitude[:, 67:].max() < .05


def test_power_of_white_noise():
  noise = (.1 * np.random.normal(size=2048 * 300)).astype(np.float32)
  power = np.abs(_stft(noise, window=2048, hop=1024))**2
  np.testing.assert_allclose(power[:, 1:-1].mean(), 768 * .1**2, rtol=.01)


@pytest.mark.parametrize('hop, edge', [(512, 1536), (1024, 1024)])
@pytest.mark.parametrize('transform', ['polar', 'component'])
def test_round_trip_is_exact_inside(hop, edge, transform):
  rep = Representation(hop=hop, frames=4, transform=transform)
  audio = _music(np.random, 1, rep.crop_samples(2))
  got, tail = synthesise(rep, analyse(rep, audio))
  assert rep.overlap == edge and got.shape == (1, 8 * hop) and tail.shape == (1, edge)
  got = np.concatenate([got, tail], axis=-1)
  inside = np.s_[:, edge:-edge]
  np.testing.assert_allclose(got[inside], audio[inside], atol=2e-6)
  # Outside, the samples carry the fade of the frames that are there: first one, then two ...
  square = np.sin(np.pi * np.arange(2048) / 2048)**4
  norm = square.reshape(-1, hop).sum(0)
  np.testing.assert_allclose(got[0, :hop], audio[0, :hop] * (square[:hop] / norm), atol=2e-6)
  np.testing.assert_allclose(got[0, -hop:], audio[0, -hop:] * (square[-hop:] / norm), atol=2e-6)


def test_synthesis_in_blocks_with_tails_equals_the_whole():
  rep = Representation(channels=2, **SMALL)
  spec = np.float32(np.random.normal(size=(3, 6, 128, 4, 4)))
  whole, last = synthesise(rep, spec)
  blocks, tail = [], None
  for start, stop in ((0, 2), (2, 4), (4, 6)):
    block, tail = synthesise(rep, spec[:, start:stop], tail)
    blocks.append(block)
  scale = np.abs(whole).max()
  np.testing.assert_allclose(np.concatenate(blocks, axis=-1) / scale, whole / scale, atol=1e-6)
  np.testing.assert_allclose(tail / scale, last / scale, atol=1e-6)


@pytest.mark.parametrize('samples', [1, 64, 65, 1024, 3333])
def test_padded_edges_return_every_sample(samples):
  rep = Representation(channels=2, **SMALL)
  layout = rep.layout(samples)
  assert layout.num_samples == samples and layout.lead == rep.overlap
  assert layout.chunks == -(-layout.frames // rep.frames)
  audio = _music(np.random, 2, max(samples, 256))[:, :samples]
  audio = audio * np.hanning(samples + 2)[1:-1].astype(np.float32)  # a hard edge has a Nyquist part
  total = rep.crop_samples(layout.chunks)
  padded = np.pad(audio, [(0, 0), (layout.lead, total - layout.lead - samples)])
  got, _ = synthesise(rep, analyse(rep, padded))
  np.testing.assert_allclose(got[:, layout.lead:layout.lead + samples], audio,
                             atol=1e-5 if samples > 1000 else .02)  # short: wide spectrum
  # Not a frame too many: the last one that is kept begins before the signal's end.
  assert (layout.frames - 1) * rep.hop < layout.lead + samples <= layout.frames * rep.hop


def test_frames_without_padding_as_the_ancestors_count_them():
  rep = Representation(edges='none')
  for samples, frames in ((2048, 1), (2559, 1), (2560, 2), (67072, 128), (100, 1)):
    layout = rep.layout(samples)
    assert (layout.lead, layout.frames, layout.chunks) == (0, frames, -(-frames // 64))


def test_crops_and_chunks_of_the_family():
  ours, theirs = Representation(), Representation(channels=2, hop=1024, frames=32)
  assert ours.chunk_samples == theirs.chunk_samples == 32768
  assert ours.crop_samples(2) == 67072 and theirs.crop_samples(2) == 66560
  assert ours.crop_samples(1) == 34304  # the ancestor's training crop
  assert (ours.spec_channels, theirs.spec_channels) == (2, 4)


def test_channels_are_left_re_im_then_right_re_im():
  rep = Representation(channels=2, **SMALL)
  time = np.arange(rep.crop_samples(3))
  left = np.cos(2 * np.pi * 16 * time / 256)   # frames start at whole periods: purely real
  right = np.sin(2 * np.pi * 32 * time / 256)  # purely imaginary, negative
  spec = analyse(rep, np.float32(np.stack([left, right])[None]))
  assert spec.shape == (1, 3, 128, 4, 4)
  peak = .34 * 64**.65
  np.testing.assert_allclose(spec[0, :, 16], np.broadcast_to([peak, 0, 0, 0], (3, 4, 4)), atol=1e-2)
  np.testing.assert_allclose(spec[0, :, 32], np.broadcast_to([0, 0, 0, -peak], (3, 4, 4)),
                             atol=1e-2)


def test_chunks_are_consecutive_frames():
  rep = Representation(**SMALL)
  audio = _music(np.random, 1, rep.crop_samples(3))
  whole = analyse(rep, audio)
  second = analyse(rep, audio[:, rep.chunk_samples:][:, :rep.crop_samples(1)])
  np.testing.assert_allclose(second[0], whole[1], atol=1e-5)


@pytest.mark.parametrize('transform', ['polar', 'component'])
@pytest.mark.parametrize('name', ['compress', 'expand', 'log_magnitude'])
def test_gradients_are_finite_at_zero(transform, name):
  rep = Representation(transform=transform)
  function = log_magnitude if name == 'log_magnitude' else getattr(rep, name)
  points = jnp.asarray([[0, 0], [0, 1], [1e-25, 0], [1e-12, -1e-12], [3, -4]], jnp.float32)
  grad = _numpy(jax.grad(lambda x: jnp.sum(function(x))))(points)
  assert np.all(np.isfinite(grad))
  np.testing.assert_array_equal(grad[0], 0)
  assert np.all(grad[4] != 0)


def test_gradient_reaches_the_audio_through_silence():
  rep = Representation(**SMALL)
  audio = np.zeros((1, rep.crop_samples(1)), np.float32)
  audio[0, 300] = .1
  grad = _numpy(jax.grad(lambda x: jnp.sum(jnp.square(rep.analyse(x)))))(audio)
  assert np.all(np.isfinite(grad)) and np.any(grad != 0)


def test_istft_fills_missing_bins_with_zeros():
  spec = np.array(_stft(_music(np.random, 1024), window=256, hop=128))
  short = _istft(spec[:, :128], window=256, hop=128)
  spec[:, 128:] = 0
  np.testing.assert_allclose(short, _istft(spec, window=256, hop=128), atol=1e-6)


@pytest.mark.parametrize('fields', [
  dict(transform='none'), dict(edges='both'), dict(hop=0), dict(hop=500), dict(hop=2048),
  dict(bins=0), dict(bins=1025), dict(channels=3), dict(frames=0)])
def test_bad_values_are_one_line(fields):
  with pytest.raises(ValueError) as error:
    Representation(**fields)
  assert '\n' not in str(error.value) and next(iter(fields)) in str(error.value)


def test_wrong_lengths_are_refused():
  rep = Representation(**SMALL)
  for samples in (rep.crop_samples(1) - 1, rep.crop_samples(1) + 1, rep.overlap):
    with pytest.raises(ValueError, match='whole number of chunks'):
      rep.analyse(np.zeros((1, samples), np.float32))
  with pytest.raises(ValueError, match='at least one sample'):
    rep.layout(0)


@pytest.mark.parametrize('transform, channels', [
    ('polar', 1), pytest.param('polar', 2, marks=pytest.mark.soak), ('component', 1)])
def test_noise_of_a_signal_has_unit_variance_and_is_a_spectrogram(transform, channels):
  rep = Representation(channels=channels, window=256, hop=64, bins=128, frames=32, transform=transform)
  keys = jax.random.split(jax.random.key(0), 8)
  noises = {kind: _numpy(jax.vmap(lambda key: VariantConsistency(signal_noise=kind == 'signal').unit_noise(
      key, rep, 2)))(keys) for kind in ('bins', 'signal')}
  for noise in noises.values():
    assert noise.shape == (8, 2, 128, 32, 2 * channels)
    np.testing.assert_allclose(np.mean(np.square(noise[:, :, 1:])), 1, rtol=.03)  # at DC it is real

  def kept(noise):
    """Power after synthesis and analysis, within a chunk, over that before."""
    again = analyse(rep, np.concatenate(synthesise(rep, noise), axis=-1))
    return float(np.mean(np.square(again[..., 4:-4, :])) / np.mean(np.square(noise[..., 4:-4, :])))

  assert .97 < kept(noises['signal'][:, :1]) < 1.03 and kept(noises['bins'][:, :1]) < .5


def test_coherence_is_its_definition():
  rng = np.random.default_rng(0)
  spec = rng.standard_normal((2, 5, 12, 4)).astype(np.float32)
  for item, value in zip(spec, np.asarray(coherence(jnp.asarray(spec)))):
    num = den = 0
    for channel in range(2):
      x = item[..., 2 * channel] + 1j * item[..., 2 * channel + 1]
      for f in range(5):
        terms = [x[f, t + 4] * np.conj(x[f, t]) for t in range(8)]
        num += abs(sum(terms))
        den += sum(abs(term) for term in terms)
    assert value == pytest.approx(num / den, rel=1e-5)
  assert coherence(spec) == pytest.approx(np.asarray(coherence(jnp.asarray(spec))), rel=1e-5)
  assert not np.any(coherence(np.zeros((3, 5, 12, 2))))


def test_coherence_of_a_tone_of_noise_and_of_random_phases():
  small = Representation(window=512, hop=128, bins=256, frames=64)
  samples = small.crop_samples(2)
  tone = np.sin(2 * np.pi * 0.0731 * np.arange(samples))[None]
  white = np.random.default_rng(0).standard_normal((1, samples))
  spec = np.asarray(small.analyse(jnp.float32(np.stack([tone, white]))))
  assert np.all(coherence(spec[0]) > .98) and np.all((coherence(spec[1]) > .15) & (coherence(spec[1]) < .22))
