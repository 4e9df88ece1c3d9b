"""Codec: exact shape of what comes back, independence of the cutting, the paper's decoding.

Models are `nano:debug` of one level and one layer, as tracing and compiling are what these tests cost; weights are
seeded noise with nothing zero, so that each input counts.
"""

import copy
import dataclasses
import functools
import importlib
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_layering import ROOT

from m2l2 import assets, build
from m2l2.codec import codec as codec_lib
from m2l2.codec import loading, programs
from m2l2.codec.codec import Codec
from m2l2.codec.latents import Latents, spoken_seconds
from m2l2.codec.sampler import FIRST, REFINE, Sampler
from m2l2.codec.snapshot import load_snapshot, save_snapshot
from m2l2.data import audio_io
from m2l2.errors import UserError
from m2l2.variants import envelope

CODICODEC_LIKE = dict(
    latent_dim=4, transform='component', edges='none',
    variants={'fsq.on': True, 'denoiser.latents': True, 'variance_renoise.on': True, 'local_scale.on': False,
              'flow_skip.on': False})


ONE_LEVEL = dict(widths=(16,), blocks=(1,), strides=(), layers=1, head_dim=8)


def make_config(words='debug', *, variants=(), **changes):
  """The resolved config of nano, in one level, as plain JSON types, with fields of its model and variants changed."""
  config = importlib.import_module('m2l2.configs.nano').get_config(words)
  config.model.update(ONE_LEVEL | changes)
  config.variants.shortcut.width = 2
  config.variants.update_from_flattened_dict(dict(variants))
  return json.loads(json.dumps(config.to_dict()))


def make_params(config, *, seed=0):
  """Random weights by numpy: kernels scaled to their inputs, gains near 1, nothing zero."""
  net = build.network(config)
  rng = np.random.default_rng(seed)

  def draw(abstract, name):
    noise = rng.standard_normal(abstract.shape, np.float32)
    if name in ('ones', 'zeros'):
      return np.float32(name == 'ones') + np.float32(0.02) * noise
    if name == 'normal(1)':  # scaled in use
      return noise
    return noise * np.float32(np.prod(abstract.shape[:-1]) ** -0.5)

  params = jax.tree.map(draw, net.shapes, net.init_names)
  if 'shortcut' in params['encoder']:
    params['encoder']['shortcut']['bias'] *= 0  # else most of the latents
  heads = [params['denoiser']['output'], params['decoder'].get('envelope', {}).get('head')]
  for head in filter(None, heads):  # small enough that no sound is clipped
    head['conv_out']['kernel'] *= np.float32(0.3)
  return params


def make_snapshot(path, words='debug', *, seed=0, **changes):
  """Writes a snapshot of a small model with random weights; returns its path."""
  config = make_config(words, **changes)
  save_snapshot(path, params=make_params(config, seed=seed), config=config, step=7)
  return path


@functools.cache
def _loaded(fingerprint, text):
  snapshot = _SNAPSHOTS[fingerprint, text]
  return Codec(config=snapshot.config, params=snapshot.params, fingerprint=fingerprint)


_SNAPSHOTS = {}


def load_once(path):
  """As codec.load, but whoever asks for the same model gets what is compiled already."""
  snapshot = load_snapshot(loading.locate(path))
  key = snapshot.fingerprint, json.dumps(snapshot.config)
  _SNAPSHOTS[key] = snapshot
  return _loaded(*key)


@pytest.fixture(scope='module')
def mono(tmp_path_factory):
  return load_once(make_snapshot(tmp_path_factory.mktemp('mono') / 'snapshot'))


@pytest.fixture(scope='module')
def stereo(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('stereo')
  make_snapshot(workdir / 'snapshot', 'debug,stereo')
  return load_once(workdir)  # a workdir does too


@pytest.fixture(scope='module')
def ancestor():
  """Nearest of the config space to CoDiCodec: FSQ, component transform, no padded edges."""
  config = make_config('debug,stereo', **CODICODEC_LIKE)
  return Codec(config=config, params=make_params(config), fingerprint='ancestor')


def music(samples, *, channels=1, sample_rate=44100, seed=0):
  """A few partials and a little noise, [channels, samples]; channels differ."""
  rng = np.random.default_rng(seed)
  time = np.arange(samples) / sample_rate
  pitches = 110.0 * np.arange(1, 7) * 1.25 ** np.arange(channels)[:, None]
  tones = np.sin(2 * np.pi * pitches[..., None] * time + rng.uniform(0, 6, (channels, 6, 1)))
  audio = 0.1 * tones.sum(axis=1) + 0.01 * rng.standard_normal((channels, samples))
  return audio.astype(np.float32)


def latents_for(codec, *, chunks, seed=0, streams=1, channels=1):
  """Random latents of just so many chunks."""
  arch, rep = codec.network.arch, codec.representation
  shape = (streams, chunks, arch.num_latents, arch.latent_dim)
  z = np.random.default_rng(seed).uniform(-1, 1, shape)
  samples = chunks * rep.chunk_samples - (rep.overlap if rep.edges == 'pad' else 0)
  return Latents(z=z.astype(np.float32), sample_rate=44100, num_samples=samples, channels=channels,
                 model=codec.fingerprint)


# ---- what comes back has the source's shape ------------------------------------------------------


@pytest.mark.parametrize('sample_rate', [44100, 48000, 8000, 22050, 96000, 44101])
@pytest.mark.parametrize('samples', [1, 63, 64, 831, 832, 833, 1024, 5000])
def test_length_and_rate_are_the_sources(mono, samples, sample_rate):
  audio = music(samples, sample_rate=sample_rate)
  latents = mono.encode(audio, sample_rate)
  decoded = mono.decode(latents)
  assert decoded.shape == (1, samples) and decoded.dtype == np.float32
  assert np.isfinite(decoded).all() and np.abs(decoded).max() <= 1
  assert (latents.sample_rate, latents.num_samples, latents.channels) == (sample_rate, samples, 1)
  assert latents.z.dtype == np.float32 and np.abs(latents.z).max() <= 1
  at_model = samples if sample_rate in (44100, 48000) else -(-samples * 44100 // sample_rate)
  assert latents.z.shape == (1, mono.representation.layout(at_model).chunks, 8, 8)


def test_what_is_compiled_serves_other_lengths(mono):
  """Another part of a block, one block, several: whatever the length, the programs are those."""
  def run(samples):
    mono.decode(mono.encode(music(samples), 44100))
    return sum(program._cache_size() for program in vars(mono._programs).values())

  compiled = [run(samples) for samples in (500, 5000, 20_000)][-1]
  assert {run(samples) for samples in (1, 900, 2048, 8192, 9999, 30_000)} == {compiled}


@pytest.mark.soak
def test_200_lengths_at_8_rates(mono):
  """Log-uniform from one sample to ten seconds: what comes back is as long, at that rate, with as many channels."""
  rng = np.random.default_rng(0)
  rates = (8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000)
  for number, fraction in enumerate(rng.permutation(np.linspace(0, 1, 200))):
    rate, channels = rates[number % 8], 1 + number // 8 % 2
    samples = round((10 * rate) ** fraction)
    latents = mono.encode(music(samples, channels=channels, sample_rate=rate), rate)
    assert mono.decode(latents).shape == (channels, samples) == (latents.channels, latents.num_samples)
    assert latents.sample_rate == rate


@pytest.mark.parametrize('minutes', [.3, pytest.param(5, marks=pytest.mark.soak)])
def test_minutes(minutes):
  config = make_config(native_rates=(8000,))  # fewer chunks, the same programs
  codec = Codec(config=config, params=make_params(config), fingerprint='slow')
  audio = music(round(minutes * 60 * 11025) + 7, sample_rate=11025)
  decoded = codec.decode(codec.encode(audio, 11025))
  assert decoded.shape == audio.shape and np.all(np.isfinite(decoded))


@pytest.mark.parametrize('samples', [1, 255, 1279, 1280, *(
    pytest.param(samples, marks=pytest.mark.soak) for samples in (256, 1024, 1216, 3000, 3327, 3328))])
def test_length_is_the_sources_without_padded_edges(ancestor, samples):
  """Up to hop - 1 samples lie past the last frame: they too come back."""
  decoded = ancestor.decode(ancestor.encode(music(samples, channels=2), 44100))
  assert decoded.shape == (2, samples)


def test_native_rates_are_not_resampled(mono):
  audio = music(3000)
  at_44100, at_48000 = (mono.encode(audio, rate) for rate in (44100, 48000))
  np.testing.assert_array_equal(at_44100.z, at_48000.z)
  assert mono.encode(audio, 32000).z.shape[1] > at_44100.z.shape[1]


def test_channels_through_a_mono_model(mono):
  """Each channel is a stream of its own; equal channels stay equal, noise included."""
  first, other = music(3000), music(3000, seed=1)
  latents = mono.encode(np.concatenate([first, other]), 44100)
  assert latents.z.shape[0] == latents.channels == 2
  decoded = mono.decode(latents)
  assert np.abs(decoded[0] - decoded[1]).max() > 1e-3
  np.testing.assert_allclose(decoded[:1], mono.decode(mono.encode(first, 44100)), atol=1e-5)
  left, right = mono.decode(mono.encode(np.concatenate([first, first]), 44100))
  np.testing.assert_allclose(left, right, atol=1e-6)  # not to the bit: places in a batch are rounded apart
  np.testing.assert_array_equal(mono.encode(first[0], 44100).z, mono.encode(first, 44100).z)


def test_channels_through_a_stereo_model(ancestor):
  stereo = ancestor  # the one of the stereo models of which decoding is compiled
  two = stereo.encode(music(3000, channels=2), 44100)
  assert two.z.shape[0] == 1 and stereo.decode(two).shape == (2, 3000)
  mono = stereo.encode(music(3000), 44100)
  assert mono.z.shape[0] == 1 and mono.channels == 1 and stereo.decode(mono).shape == (1, 3000)
  doubled = stereo.encode(np.repeat(music(3000), 2, axis=0), 44100)
  np.testing.assert_array_equal(mono.z, doubled.z)
  np.testing.assert_allclose(stereo.decode(mono)[0], stereo.decode(doubled).mean(axis=0), atol=1e-6)


def test_models_that_differ_in_their_weights_share_what_is_compiled(mono, tmp_path):
  audio = music(3 * 1024)
  mono.decode(mono.encode(audio, 44100))
  other = codec_lib.load(make_snapshot(tmp_path / 'other', seed=1))
  compiled = lambda: sum(program._cache_size() for program in vars(other._programs).values())
  before = compiled()
  decoded = other.decode(other.encode(audio, 44100))
  assert compiled() == before > 0
  assert np.linalg.norm(decoded - mono.decode(mono.encode(audio, 44100))) > .1 * np.linalg.norm(decoded)


# ---- how the work is cut does not matter ---------------------------------------------------------


@pytest.mark.parametrize('size', [1, *(pytest.param(size, marks=pytest.mark.soak) for size in (3, 5))])
def test_block_size_does_not_matter(ancestor, monkeypatch, size):
  audio = music(11 * 1024 + 77, channels=2)
  encoded = ancestor.encode(audio, 44100)
  decoded = ancestor.decode(encoded, seed=3, steps=2, refine=True)
  monkeypatch.setattr(programs, 'block_chunks', lambda: size)
  again = ancestor.encode(audio, 44100)
  assert again.z.shape == encoded.z.shape and again.z.shape[1] == ancestor.layout(audio.shape[1], 44100).chunks > 10
  np.testing.assert_allclose(again.z, encoded.z, atol=1e-5)
  np.testing.assert_allclose(ancestor.decode(encoded, seed=3, steps=2, refine=True), decoded, atol=1e-5)


@pytest.mark.parametrize('sizes', [[1, 700, 5, 9294], [10000], [2500] * 4])
@pytest.mark.parametrize('sample_rate', [44100, 32000])
def test_cutting_of_the_source_does_not_matter(stereo, sizes, sample_rate):
  audio = music(10000, channels=2)
  blocks = np.split(audio, np.cumsum(sizes)[:-1], axis=1)
  cut = stereo.encode_blocks(iter(blocks), sample_rate=sample_rate, channels=2)
  whole = stereo.encode(audio, sample_rate)
  np.testing.assert_allclose(cut.z, whole.z, atol=1e-6)
  assert dataclasses.replace(cut, z=0) == dataclasses.replace(whole, z=0)


def test_blocks_put_together_are_the_whole(mono):
  latents = mono.encode(music(20 * 1024, sample_rate=32000), 32000)
  blocks = list(mono.decode_blocks(latents, 5))
  assert len(blocks) > 2
  np.testing.assert_array_equal(np.concatenate(blocks, axis=1), mono.decode(latents, 5))


def test_the_end_of_a_signal_does_not_reach_its_beginning(mono):
  """Latents of a chunk are of that chunk alone, and decoding never looks ahead by more than one."""
  audio = music(9 * 1024)
  whole, part = mono.encode(audio, 44100), mono.encode(audio[:, :5 * 1024], 44100)
  np.testing.assert_allclose(part.z[:, :5], whole.z[:, :5], atol=1e-5)
  cut = dataclasses.replace(latents_for(mono, chunks=5), z=whole.z[:, :5])
  sure = 4 * 1024 - mono.representation.overlap
  np.testing.assert_allclose(mono.decode(cut)[:, :sure], mono.decode(whole)[:, :sure], atol=1e-5)


# ---- noise ---------------------------------------------------------------------------------------


def test_the_seed_decides(mono):
  latents = latents_for(mono, chunks=3)
  np.testing.assert_array_equal(mono.decode(latents, seed=1), mono.decode(latents, seed=1))
  assert np.abs(mono.decode(latents, seed=1) - mono.decode(latents, seed=2)).max() > 1e-3


def test_any_prefix_of_nested_embeddings_decodes(mono):
  config = {**mono.config, 'variants': {**mono.config['variants'], 'nested': {'chance': .5}}}
  nested = Codec(config=config, params=mono.params, fingerprint=mono.fingerprint)
  latents = latents_for(mono, chunks=2)
  short = nested.first(latents, 3)
  assert short.z.shape == (1, 2, 3, latents.z.shape[3])
  zeroed = dataclasses.replace(latents, z=latents.z * (np.arange(latents.z.shape[2]) < 3)[:, None])
  np.testing.assert_array_equal(nested.decode(short, seed=1), mono.decode(zeroed, seed=1))
  assert np.abs(nested.decode(short, seed=1) - mono.decode(latents, seed=1)).max() > 1e-3
  for mistake in (lambda: mono.first(latents, 3), lambda: nested.first(latents, 0), lambda: mono.decode(short),
                  lambda: nested.first(latents, latents.z.shape[2] + 1)):
    with pytest.raises(UserError, match='embeddings'):
      mistake()


@pytest.mark.parametrize('seed', [-1, 2 ** 32])
def test_a_seed_out_of_range_is_refused(mono, seed):
  with pytest.raises(UserError, match='seed'):
    mono.decode(latents_for(mono, chunks=1), seed)


def drawn(codec, *, chunks, seed, steps=1):
  """The noise of a seed, by the definition: fold_in(fold_in(seed, chunk), role)."""
  noise = _one_noise(codec)
  return np.stack([[noise(seed, chunk, role) for role in range(steps + 1)] for chunk in range(chunks)])


@functools.cache
def _one_noise(codec):
  @jax.jit
  def noise(seed, chunk, role):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), chunk), role)
    return codec.consistency.unit_noise(key, codec.representation, 1)[0]
  return noise


@functools.cache
def synthesiser(codec):
  """`synthesise(spec)`: [B, S, F, T, C] -> audio [B, channels, samples], by one program for all S up to 12."""
  compiled = jax.jit(codec.representation.synthesise)

  def synthesise(spec):
    spec = np.pad(spec, ((0, 0), (0, 12 - spec.shape[1]), *3 * [(0, 0)]))  # silence behind the end changes nothing
    return np.concatenate([np.asarray(part) for part in compiled(spec)], axis=-1)
  return synthesise


@pytest.mark.parametrize('chunks', [1, 2, 11])
def test_injected_noise(mono, chunks):
  latents = latents_for(mono, chunks=chunks)
  noise = drawn(mono, chunks=chunks, seed=4)
  assert np.unique(noise).size > 0.99 * noise.size  # fresh for every chunk and role
  np.testing.assert_allclose(
      mono.decode(latents, noise=noise), mono.decode(latents, seed=4), atol=1e-6)
  for place in ((0, FIRST), (chunks - 1, FIRST), (0, REFINE), (chunks - 1, REFINE)):
    other = noise.copy()
    other[place] *= -1
    change = mono.decode(latents, noise=other) - mono.decode(latents, noise=noise)
    assert np.abs(change).max() > 1e-4, place


def test_noise_of_a_wrong_shape_is_refused(mono):
  with pytest.raises(UserError, match=r'noise must have shape \[2, 2, 128, 16, 2\]'):
    mono.decode(latents_for(mono, chunks=2), noise=np.zeros((1, 2, 128, 16, 2), np.float32))


# ---- two-step decoding as in figures/decoding.png ------------------------------------------------


def pair_up(x, sigmas, z):
  """A chunk alone, as the left one of a pair: one never sees the right one (test_model.py), and pairs are compiled."""
  if x.shape[1] == 2:
    return x, sigmas, z
  return np.repeat(x, 2, axis=1), np.repeat(sigmas, 2), np.repeat(z, 2, axis=1)


@functools.cache
def plain_decoder(codec):
  """The figure, chunk by chunk, with a whole spectrogram in memory."""
  consistency, net, rep = codec.consistency, codec.network, codec.representation
  synthesise = synthesiser(codec)

  @jax.jit
  def call(params, x, sigmas, z):
    """One network call: x [B, S, F, T, C], sigmas [S], z [B, S, K, d]."""
    features = net.decode(params, z)
    data = (envelope.deviation(features['log_magnitude'])
            if consistency.local_scale else None)
    return consistency.denoise(
        lambda x, sigma: net.denoise(params, x, sigma, features), x,
        jnp.broadcast_to(sigmas[None], x.shape[:2]), sigma_data=data)

  def denoise(x, sigmas, z):
    x, sigmas, z = pair_up(np.stack(x, axis=1), np.float32(sigmas), z)
    return np.asarray(call(codec.params, x, sigmas, z))

  def decode(latents, *, noise, sigma_cond, refine):
    """Latents -> audio [channels, samples], unclipped."""
    z = latents.z
    streams, chunks = z.shape[:2]
    eps = np.broadcast_to(noise, (streams, *noise.shape))
    level = np.float32(sigma_cond)
    if consistency.variance_renoise:
      level = np.float32((sigma_cond ** 2 - consistency.sigma_min ** 2) ** 0.5)
    first = [denoise([np.float32(80) * eps[:, 0, FIRST]], [80.0], z[:, :1])[:, 0]]
    done = []
    for t in range(1, chunks):
      left = first[t - 1] + level * eps[:, t - 1, REFINE]
      out = denoise([left, np.float32(80) * eps[:, t, FIRST]], [sigma_cond, 80.0], z[:, t - 1:t + 1])
      done.append(out[:, 0])
      first.append(out[:, 1])
    left = first[-1] + level * eps[:, -1, REFINE]
    done.append(denoise([left], [sigma_cond], z[:, -1:])[:, 0])
    audio = synthesise(np.stack(done if refine else first, axis=1))
    lead = rep.layout(latents.num_samples).lead
    audio = audio[:, :, lead:lead + latents.num_samples]
    return audio[:, 0] if rep.channels == 1 else audio[0]

  return decode


@pytest.mark.parametrize('which,channels,sigma_cond', [
    ('mono', 2, 0.965), pytest.param('mono', 2, 0.3, marks=pytest.mark.soak),
    pytest.param('ancestor', 2, 0.965, marks=pytest.mark.soak)])
def test_decoding_is_the_figures(request, which, channels, sigma_cond):
  codec = request.getfixturevalue(which)
  decode = plain_decoder(codec)
  for chunks in (1, 2, 3, 10):
    latents = latents_for(codec, chunks=chunks, channels=channels,
                          streams=channels if codec.representation.channels == 1 else 1)
    noise = drawn(codec, chunks=chunks, seed=2)
    for refine in (True, False):
      expected = decode(latents, noise=noise, sigma_cond=sigma_cond, refine=refine)
      decoded = codec.decode(latents, seed=2, sigma_cond=sigma_cond, refine=refine)
      assert 1e-2 < np.abs(expected).max() < 1  # neither silent nor clipped
      np.testing.assert_allclose(decoded, expected, atol=1e-5)
      if sigma_cond == codec.consistency.sigma_cond:
        np.testing.assert_array_equal(codec.decode(latents, seed=2, refine=refine), decoded)


# ---- CoDiCodec's decoders, and live decoding -----------------------------------------------------


def pairs_of(step, chunks):
  """The pairs of a step of parallel decoding; a chunk without a neighbour stands alone."""
  alone, rest = ([[0]], range(1, chunks)) if step % 2 else ([], range(chunks))
  return alone + [list(rest[i:i + 2]) for i in range(0, len(rest), 2)]


@functools.cache
def plain_decoders(codec):
  """CoDiCodec's two decoders (music2latent2.md, 4.2 and 4.3), whole spectrograms in memory."""
  consistency, net, synthesise = codec.consistency, codec.network, synthesiser(codec)

  @jax.jit
  def call(params, x, sigmas, z):
    return consistency.denoise(
        lambda x, sigma: net.denoise(params, x, sigma, net.decode(params, z)), x, sigmas[None])

  def denoise(x, sigmas, z):
    return np.asarray(call(codec.params, *pair_up(np.stack(x)[None], np.float32(sigmas), z)))[0, :len(x)]

  def again(x, sigma, eps):
    return x + np.float32((sigma ** 2 - consistency.sigma_min ** 2) ** 0.5) * eps

  def sigma(index):
    low, high = consistency.sigma_min ** (1 / 7), consistency.sigma_max ** (1 / 7)
    return (low + index * (high - low)) ** 7

  def autoregressive(z, noise, steps):
    done = []
    for i in range(z.shape[1]):
      x, level = np.float32(80) * noise[i, 0], 80.0
      left = [again(done[-1], consistency.sigma_cond, noise[i - 1, 1])] if i else []
      for k in range(steps):
        out = denoise([*left, x], [consistency.sigma_cond] * len(left) + [level], z[:, i - len(left):i + 1])[-1]
        level = sigma(1 - (k + 1) / steps)
        if k + 1 < steps:
          x = again(out, level, noise[i, 2 + k])
      done.append(out)
    return done

  def parallel(z, noise, steps):
    chunks = z.shape[1]
    x, level = [np.float32(80) * noise[i, 0] for i in range(chunks)], 80.0
    for k in range(steps):
      done = [None] * chunks
      for pair in pairs_of(k, chunks):
        out = denoise([x[i] for i in pair], [level] * len(pair), z[:, pair[0]:pair[-1] + 1])
        for i, chunk in zip(pair, out):
          done[i] = chunk
      level = sigma(1 - (k + 1) / steps)
      if k + 1 < steps:
        x = [again(chunk, level, noise[i, 2 + k]) for i, chunk in enumerate(done)]
    return done

  def audio(done, samples):
    return synthesise(np.stack(done)[None])[0, :, :samples]

  return {'autoregressive': autoregressive, 'parallel': parallel}, denoise, audio


@pytest.mark.parametrize('mode,steps', [
    ('autoregressive', 2), ('parallel', 3),
    *(pytest.param(*case, marks=pytest.mark.soak) for case in (
        ('autoregressive', 3), ('parallel', 1), ('parallel', 2)))])
def test_decoding_is_codicodecs(ancestor, mode, steps):
  """The whole path against the plain loops, for every way in which the blocks can fall."""
  decoders, _, audio = plain_decoders(ancestor)
  noise = drawn(ancestor, chunks=12, seed=2, steps=steps)
  latents = latents_for(ancestor, chunks=12, channels=2)
  for chunks in (1, 2, 5, 12):
    part = dataclasses.replace(
        latents, z=latents.z[:, :chunks], num_samples=ancestor.representation.crop_samples(chunks))
    expected = audio(decoders[mode](part.z, noise[:chunks], steps), part.num_samples)
    refine = None if mode == 'parallel' else False
    decoded = ancestor.decode(part, seed=2, mode=mode, steps=steps, refine=refine)
    assert 1e-2 < np.abs(expected).max() < 1
    np.testing.assert_allclose(decoded, expected, atol=2e-5)
    if chunks == 5 and steps == 3:
      injected = ancestor.decode(part, noise=noise[:5], mode=mode, steps=steps, refine=refine)
      np.testing.assert_allclose(injected, decoded, atol=1e-5)


@pytest.mark.soak  # a small version: test_consistency.py, of the sampler
@pytest.mark.parametrize('size', [2, 4, 6])
def test_block_size_does_not_matter_to_parallel_decoding(mono, monkeypatch, size):
  latents = latents_for(mono, chunks=11, streams=2, channels=2)
  expected = mono.decode(latents, mode='parallel', steps=2)
  monkeypatch.setattr(programs, 'block_chunks', lambda: size)
  np.testing.assert_allclose(mono.decode(latents, mode='parallel', steps=2), expected, atol=1e-5)


def test_two_channels_through_a_mono_model_in_parallel(mono):
  """A channel sounds the same in the other's place, beside another."""
  latents = latents_for(mono, chunks=3, streams=3, channels=3)
  beside = lambda *streams: mono.decode(
      dataclasses.replace(latents, z=latents.z[list(streams)], channels=2), mode='parallel', steps=2)
  first, second = beside(0, 1), beside(1, 2)
  np.testing.assert_allclose(second[0], first[1], atol=1e-5)
  assert np.abs(first[0] - first[1]).max() > 1e-3


def test_the_config_decides_unless_told(ancestor):
  """Steps and refinement of both modes."""
  latents = latents_for(ancestor, chunks=3, channels=2)
  changed = copy.copy(ancestor)
  changed.consistency = dataclasses.replace(
      ancestor.consistency, steps=2, refine=False, staggered_steps=3)
  np.testing.assert_array_equal(changed.decode(latents), ancestor.decode(latents, steps=2, refine=False))
  for refine in (None, True, False):  # parallel decoding has none
    np.testing.assert_array_equal(changed.decode(latents, mode='parallel', refine=refine),
                                  ancestor.decode(latents, mode='parallel', steps=3))
  refined = changed.decode(latents, refine=True)
  assert np.abs(changed.decode(latents) - refined).max() > 1e-4
  assert np.abs(refined - changed.decode(latents, steps=1, refine=True)).max() > 1e-4


@pytest.mark.parametrize('which,streams,steps,refine', [
    ('ancestor', 1, 2, True), ('ancestor', 1, 2, False), *(pytest.param(*case, marks=pytest.mark.soak) for case in (
        ('mono', 1, 1, True), ('mono', 2, 1, False)))])
def test_streaming_is_decoding(request, which, streams, steps, refine):
  codec = request.getfixturevalue(which)
  rep = codec.representation
  channels = streams if rep.channels == 1 else 2
  latents = latents_for(codec, chunks=4, streams=streams, channels=channels)
  latents = dataclasses.replace(  # all that the chunks hold
      latents, num_samples=rep.crop_samples(4) - (2 if rep.edges == 'pad' else 0) * rep.overlap)
  came = []

  def chunks():
    for i in range(4):
      came.append(i)
      yield latents.z[:, i] if streams > 1 else latents.z[0, i]

  pieces, lag = [], []
  for piece in codec.stream(chunks(), seed=3, steps=steps, refine=refine):
    pieces.append(piece)
    lag.append(len(came))
  assert lag[:3] == ([2, 3, 4] if refine else [1, 2, 3])  # out as soon as it can be
  streamed = np.concatenate(pieces, axis=1)
  decoded = codec.decode(latents, seed=3, steps=steps, refine=refine)
  assert streamed.shape[0] == channels and streamed.shape[1] >= latents.num_samples
  np.testing.assert_allclose(streamed[:, :latents.num_samples], decoded, atol=1e-5)


@pytest.mark.parametrize('which,channels,rate,samples', [
    ('mono', 2, 44100, 12345), ('ancestor', 2, 48000, 9000), ('mono', 2, 32000, 5000),
    pytest.param('stereo', 1, 44100, 7000, marks=pytest.mark.soak)])
def test_streaming_encode_is_encoding_and_waits_for_no_more_than_a_chunk(request, which, channels, rate, samples):
  codec = request.getfixturevalue(which)
  rep = codec.representation
  audio = music(samples, channels=channels, sample_rate=rate)
  given = 0

  def blocks():
    nonlocal given
    while given < samples:
      given += 100
      yield audio[:, given - 100:given]

  came, pieces = [], []
  for z in codec.stream_encode(blocks(), rate, channels=channels):
    pieces.append(z)
    came.append(given)
  whole = codec.encode(audio, rate)
  np.testing.assert_allclose(np.stack(pieces, axis=1), whole.z, atol=2e-6)
  if rate in codec.native_rates:
    wait = rep.overlap if rep.edges == 'none' else 0
    for i, at in enumerate(came[:-1]):
      assert at < (i + 1) * rep.chunk_samples + wait + 100


def test_latents_cut_and_joined(mono, ancestor):
  for codec, channels, rate in ((mono, 1, 44100), (ancestor, 2, 22050)):
    latents = codec.encode(music(9000, channels=channels, sample_rate=rate), rate)
    chunks = latents.z.shape[1]
    parts = [codec.cut(latents, i, i + 1) for i in range(chunks)]
    whole = codec.join(parts)
    assert whole.num_samples == latents.num_samples
    np.testing.assert_array_equal(whole.z, latents.z)
    part = codec.cut(latents, 1, chunks)
    assert codec.decode(part).shape == (channels, part.num_samples)
    vectors = codec.features(latents)
    assert vectors.shape == (chunks, latents.z[0, 0].size)
    np.testing.assert_allclose(codec.features(latents, per='file'), latents.z.mean(axis=(0, 1)).reshape(-1), atol=1e-6)
  with pytest.raises(UserError, match='there are no chunks 3 to 3'):
    mono.cut(latents, 3, 3)
  with pytest.raises(UserError, match='of one model'):
    mono.join([latents, dataclasses.replace(latents, sample_rate=48000)])
  with pytest.raises(UserError, match='per is'):
    ancestor.features(latents, per='song')


def test_joining_is_the_inverse_of_cutting_at_any_length(mono, ancestor):
  """Also where the last chunk holds but the end of a frame (the first lengths), and where rates round."""
  for codec, rate in ((mono, 44100), (mono, 48000), (mono, 22050), (mono, 8000), (ancestor, 44101)):
    longest = [codec.most_samples(chunks, rate) for chunks in (1, 2, 3)]
    lengths = [longest[0] + 1, longest[0] + 2, longest[1] + 1, longest[1] + 7, *range(longest[1] - 1, longest[2], 83),
               longest[1], longest[2] - 1, longest[2]]
    for samples in lengths:
      chunks = codec.layout(samples, rate).chunks
      whole = dataclasses.replace(latents_for(codec, chunks=chunks), sample_rate=rate, num_samples=samples)
      for at in range(1, chunks):
        parts = [codec.cut(whole, 0, at), codec.cut(whole, at, chunks)]
        for part in parts:
          codec.check_latents(part)
        again = codec.join(parts)
        assert (again.num_samples, again.padding) == (samples, 0), (rate, samples, at)
        np.testing.assert_array_equal(again.z, whole.z)
      tail = codec.join([codec.cut(codec.cut(whole, 1, chunks), chunks - 2, chunks - 1)])
      assert codec.join([codec.cut(whole, 0, chunks - 1), tail]).num_samples == samples


def test_a_part_of_nothing_but_padding_keeps_its_length_in_a_file(mono, tmp_path):
  samples = mono.most_samples(1, 44100) + 1
  whole = dataclasses.replace(latents_for(mono, chunks=2), num_samples=samples)
  for name, part in zip('ab', (mono.cut(whole, 0, 1), mono.cut(whole, 1, 2))):
    part.save(tmp_path / name)
  parts = [Latents.load(tmp_path / name) for name in 'ab']
  assert parts[1].num_samples == 1 and parts[1].padding > 0
  assert mono.join(parts).num_samples == samples


def test_streaming_of_tokens_of_nothing_and_of_what_does_not_fit(ancestor, mono):
  tokens = np.arange(8, dtype=np.int32) * 1000
  (first, rest) = ancestor.stream([tokens], steps=2, refine=False)
  assert first.shape == (2, 1024) and rest.shape == (2, ancestor.representation.overlap)
  assert list(ancestor.stream([])) == []
  with pytest.raises(UserError, match='do not fit'):
    next(ancestor.stream([np.zeros((8, 5), np.float32)]))
  with pytest.raises(UserError, match='do not fit'):
    list(mono.stream([np.zeros((2, 8, 8), np.float32), np.zeros((8, 8), np.float32)]))
  with pytest.raises(UserError, match='seed'):  # at the call
    ancestor.stream([tokens], seed=-1)
  noise = np.zeros((1, 3, 128, 16, 4), np.float32)
  with pytest.raises(UserError, match='noise for 1 chunks, and more have come'):
    list(ancestor.stream([tokens, tokens], noise=noise, steps=2))
  for noise in (1.0, [1.0], np.zeros((1, 2, 128, 16, 4))):
    with pytest.raises(UserError, match=r"noise must have shape \['chunks', 3"):
      ancestor.stream([tokens], noise=noise, steps=2)


def test_latents_of_another_scale_are_refused(mono):
  latents = latents_for(mono, chunks=1)
  mono.decode(dataclasses.replace(latents, z=np.clip(10 * latents.z, -1, 1)))
  with pytest.raises(UserError, match=r'the latents reach .*, but lie in \[-1, 1\]: clip them'):
    mono.decode(dataclasses.replace(latents, z=3 * latents.z))


def test_refinement_after_several_steps(ancestor):
  """Each chunk's left output beside the next one, the last one's alone."""
  consistency = ancestor.consistency
  decoders, denoise, audio = plain_decoders(ancestor)
  latents = latents_for(ancestor, chunks=3, channels=2)
  latents = dataclasses.replace(latents, num_samples=ancestor.representation.crop_samples(3))
  noise, z = drawn(ancestor, chunks=3, seed=2, steps=2), latents.z
  spread = np.float32((consistency.sigma_cond ** 2 - consistency.sigma_min ** 2) ** 0.5)
  done = [denoise([x + spread * noise[i, REFINE]], [consistency.sigma_cond], z[:, i:i + 1])[0]
          for i, x in enumerate(decoders['autoregressive'](z, noise, 2))]
  decoded = ancestor.decode(latents, seed=2, steps=2, refine=True)
  np.testing.assert_allclose(decoded, audio(done, latents.num_samples), atol=2e-5)


@pytest.mark.parametrize('options,told', [
    (dict(steps=0), r'steps is 0; it must lie in 1..16'), (dict(steps=17), 'steps is 17'),
    (dict(mode='parallel', sigma_cond=0.5), 'parallel decoding has no sigma_cond')])
def test_options_that_mean_nothing_are_refused(mono, options, told):
  with pytest.raises(UserError, match=told):
    mono.decode(latents_for(mono, chunks=1), **options)
  with pytest.raises(UserError, match=told):
    mono.check_decoding(**options)


def test_refinement_changes_the_sound(mono):
  latents = latents_for(mono, chunks=3, streams=2, channels=2)
  change = mono.decode(latents) - mono.decode(latents, refine=False)
  assert np.abs(change).max() > 1e-4


def test_sigma_cond_matters_and_is_checked(mono):
  latents = latents_for(mono, chunks=3)
  assert np.abs(mono.decode(latents, sigma_cond=0.3) - mono.decode(latents)).max() > 1e-4
  for wrong in (0.0, 81.0, float('nan')):
    with pytest.raises(UserError, match='sigma_cond'):
      mono.decode(latents, sigma_cond=wrong)
  with pytest.raises(UserError, match="'sideways' is not known"):
    mono.decode(latents, mode='sideways')


# ---- the signal path alone: what a perfect network would give ------------------------------------


def perfect(words='debug', **changes):
  """A Codec whose latents are the spectrogram, scaled into [-1, 1], and whose denoiser returns it."""
  config = make_config(words, **changes)
  codec = Codec(config=config, params=make_params(config), fingerprint='perfect')
  rep = codec.representation
  arch = dataclasses.replace(
      codec.network.arch, num_latents=rep.bins * rep.frames, latent_dim=rep.spec_channels)
  codec.network = dataclasses.replace(
      codec.network, arch=arch,
      encode=lambda params, spec: spec.reshape(*spec.shape[:2], -1, rep.spec_channels) / 64,
      decode=lambda params, z: 64 * z.reshape(*z.shape[:2], rep.bins, rep.frames, rep.spec_channels))
  codec._bottleneck = lambda pre: pre
  codec.sampler = Perfect(representation=rep, network=codec.network, consistency=codec.consistency)
  codec._programs = programs.compiled_programs(codec.sampler, codec._bottleneck)
  return codec


class Perfect(Sampler):

  def denoiser(self, params, features):
    return lambda x, sigma: features


@pytest.fixture(scope='module')
def perfect_mono():
  return perfect()


@pytest.mark.parametrize('sample_rate,tolerance', [(44100, 2e-3), (48000, 2e-3), (32000, 2e-2)])
@pytest.mark.parametrize('samples', [100, 1024, 4000, 12345])
def test_no_delay_and_no_faded_edges(perfect_mono, samples, sample_rate, tolerance):
  """Just the Nyquist bin is lost: at a full-scale start 0.5 / 512 of it."""
  audio = 0.5 * np.cos(np.arange(samples)[None] * 0.05).astype(np.float32)  # full scale at sample 0
  out = perfect_mono.decode(perfect_mono.encode(audio, sample_rate))
  inside = slice(None) if sample_rate in (44100, 48000) else slice(40, -40)  # soxr rings at a jump
  np.testing.assert_allclose(out[:, inside], audio[:, inside], atol=tolerance)


def test_a_click_stays_where_it_is(perfect_mono):
  for place in (0, 1023, 1024, 2999):
    audio = np.zeros((1, 3000), np.float32)
    audio[0, place] = 0.5
    out = perfect_mono.decode(perfect_mono.encode(audio, 44100))
    assert np.argmax(np.abs(out[0])) == place and out[0, place] > 0.49


def test_channels_stay_in_order():
  codec = perfect('debug,stereo')
  audio = np.stack([0.5 * np.cos(np.arange(4000) * w) for w in (0.05, 0.11)]).astype(np.float32)
  np.testing.assert_allclose(codec.decode(codec.encode(audio, 44100)), audio, atol=2e-3)


def test_without_padded_edges_only_the_edges_fade():
  codec = perfect('debug', transform='component', edges='none')
  audio = 0.5 * np.cos(np.arange(256 + 64 * 40)[None] * 0.05).astype(np.float32)
  out = codec.decode(codec.encode(audio, 44100))
  overlap = codec.representation.overlap
  np.testing.assert_allclose(out[:, overlap:-overlap], audio[:, overlap:-overlap], atol=2e-4)
  assert np.abs(out[0, 0]) < 0.1  # faded, as in the ancestors


# ---- tokens --------------------------------------------------------------------------------------


def test_tokens_there_and_back(ancestor):
  audio = music(5000, channels=2)
  continuous, tokens = ancestor.encode(audio, 44100), ancestor.encode(audio, 44100, discrete=True)
  assert tokens.z.dtype == np.int32 and tokens.z.shape == continuous.z.shape[:3]
  assert 0 <= tokens.z.min() and tokens.z.max() < 11 ** 4 and np.unique(tokens.z).size > 3
  rounded = dataclasses.replace(
      continuous, z=np.asarray(ancestor.network.arch.make_bottleneck().quantise(continuous.z)))
  np.testing.assert_allclose(ancestor.decode(tokens), ancestor.decode(rounded), atol=1e-6)
  assert np.abs(ancestor.decode(tokens) - ancestor.decode(continuous)).max() > 1e-5


def test_tokens_of_a_model_without_are_refused(mono):
  with pytest.raises(UserError, match='no tokens'):
    mono.encode(music(100), 44100, discrete=True)
  tokens = dataclasses.replace(latents_for(mono, chunks=1), z=np.zeros((1, 1, 8), np.int32))
  with pytest.raises(UserError, match='only continuous'):
    mono.decode(tokens)


def test_tokens_too_wide_for_int32_are_refused():
  config = make_config(variants={'fsq.on': True}, latent_dim=10)
  codec = Codec(config=config, params=make_params(config), fingerprint='wide')
  with pytest.raises(UserError, match='no tokens'):
    codec.encode(music(100), 44100, discrete=True)


@pytest.mark.parametrize('token', [-1, 11 ** 4])
def test_tokens_out_of_range_are_refused(ancestor, token):
  latents = ancestor.encode(music(1000, channels=2), 44100, discrete=True)
  z = latents.z.copy()
  z[0, 0, 0] = token
  with pytest.raises(UserError, match='tokens beyond 0..14640'):
    ancestor.decode(dataclasses.replace(latents, z=z))


# ---- files of latents ----------------------------------------------------------------------------


def some_latents(**changes):
  fields = dict(z=np.linspace(-1, 1, 128, dtype=np.float32).reshape(1, 2, 8, 8), sample_rate=44100,
                num_samples=1500, channels=1, model='0123456789abcdef')
  return Latents(**{**fields, **changes})


@pytest.mark.parametrize('latents', [
    some_latents(), some_latents(z=np.arange(16, dtype=np.int32).reshape(1, 2, 8))])
def test_latents_round_trip(tmp_path, latents):
  path = tmp_path / 'song.safetensors'
  latents.save(path)
  back = Latents.load(path)
  np.testing.assert_array_equal(back.z, latents.z)
  assert back.z.dtype == latents.z.dtype
  assert dataclasses.replace(back, z=0) == dataclasses.replace(latents, z=0)
  assert os.listdir(tmp_path) == ['song.safetensors']
  latents.save(path)  # replaces


def test_decoding_from_a_file_is_decoding(mono, tmp_path):
  latents = mono.encode(music(3000), 44100)
  latents.save(tmp_path / 'song.safetensors')
  again = Latents.load(tmp_path / 'song.safetensors')
  np.testing.assert_array_equal(mono.decode(again), mono.decode(latents))


@pytest.mark.parametrize('dtype, kept', [
    (np.float16, np.float32), (np.float64, np.float32), (jnp.bfloat16, np.float32), (np.int64, np.int32),
    (np.uint8, np.int32)])
def test_what_is_saved_can_be_loaded(tmp_path, dtype, kept):
  z = np.arange(16).reshape(1, 2, 8) if np.dtype(kept).kind == 'i' else some_latents().z
  latents = some_latents(z=z.astype(dtype), sample_rate=np.float64(44100), num_samples=np.int64(1500),
                         channels=np.int32(1))
  latents.save(tmp_path / 'a')
  back = Latents.load(tmp_path / 'a')
  assert back.z.dtype == kept
  np.testing.assert_array_equal(back.z, z.astype(dtype).astype(kept))
  assert (back.sample_rate, back.num_samples, back.channels) == (44100, 1500, 1)


@pytest.mark.parametrize('changes', [
    dict(z=np.zeros((2, 8), np.float32)), dict(z=np.zeros((1, 0, 8, 8), np.float32)), dict(sample_rate=44100.5),
    dict(z=np.full((1, 1, 8), 2 ** 40)), dict(z=np.zeros((1, 1, 8), bool)), dict(num_samples=0), dict(channels='1'),
    dict(model=None), dict(tags={'title': 3}), dict(version=2), dict(padding=-1)])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, changes):
  with pytest.raises(UserError, match='make no sense'):
    some_latents(**changes).save(tmp_path / 'a.safetensors')
  assert not os.listdir(tmp_path)


def test_the_same_latents_are_the_same_bytes_also_through_a_link(tmp_path):
  first, second = {'title': 'a', 'artist': 'b'}, {'artist': 'b', 'title': 'a'}
  (tmp_path / 'link').symlink_to('target')
  for i, tags in enumerate([first, second] * 4):
    some_latents(tags=tags).save(tmp_path / str(i))
  some_latents(tags=first).save(tmp_path / 'link')
  assert (tmp_path / 'link').is_symlink()
  assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
  assert safetensors.numpy.load_file(tmp_path / '0')['z'].shape == (1, 2, 8, 8)


def rewrite(path, *, z=None, **changes):
  """A file like `some_latents` makes, but with other metadata (None drops an entry)."""
  some_latents().save(path)
  fields = {'sample_rate': 44100, 'num_samples': 1500, 'channels': 1, 'model': 'm'}
  metadata = {'format': 'm2l2-latents', 'version': '1', 'latents': fields, **changes}
  metadata = {name: value if isinstance(value, str) else json.dumps(value)
              for name, value in metadata.items() if value is not None}
  z = some_latents().z if z is None else z
  path.write_bytes(safetensors.numpy.save({'z': z}, metadata))


@pytest.mark.parametrize('changes,told', [
    (dict(version='2'), 'version 2, this m2l2 reads version 1'),
    (dict(version=None), 'version None'),
    (dict(format=None), 'not of m2l2 latents'),
    (dict(format='pt'), 'not of m2l2 latents'),
    (dict(latents=None), 'damaged'),
    (dict(latents='{'), 'damaged'),
    (dict(latents='[]'), 'damaged'),
    (dict(latents='{"sample_rate": 44100}'), 'damaged'),
    (dict(latents={'sample_rate': '44100', 'num_samples': 9, 'channels': 1, 'model': 'm'}),
     'make no sense'),
    (dict(latents={'sample_rate': 44100, 'num_samples': 0, 'channels': 1, 'model': 'm'}),
     'make no sense'),
    (dict(z=np.zeros((1, 0, 8, 8), np.float32)), 'make no sense'),
    (dict(z=np.zeros((2, 8), np.float32)), 'make no sense'),
    (dict(z=np.zeros((1, 1, 8, 8), np.float64)), 'make no sense'),
])
def test_a_wrong_file_of_latents_is_told(tmp_path, changes, told):
  path = tmp_path / 'song.safetensors'
  rewrite(path, **changes)
  with pytest.raises(UserError, match=told) as error:
    Latents.load(path)
  assert str(error.value).startswith(str(path)) and '\n' not in str(error.value)


def test_latents_missing_or_damaged(tmp_path):
  path = tmp_path / 'song.safetensors'
  for load in (path, tmp_path):
    with pytest.raises(UserError, match='no such file'):
      Latents.load(load)
  some_latents().save(path)
  whole = path.read_bytes()
  for damaged in (b'', b'RIFF', whole[:40], whole[:-5], b'\xff' * 200, whole + b'x'):
    path.write_bytes(damaged)
    with pytest.raises(UserError, match='damaged'):
      Latents.load(path)


def test_latents_where_nothing_can_be_written(tmp_path):
  with pytest.raises(UserError, match='no directory'):
    some_latents().save(tmp_path / 'missing' / 'song.safetensors')
  with pytest.raises(UserError, match='is a directory'):
    some_latents().save(tmp_path)


# ---- what does not fit is refused ----------------------------------------------------------------


def test_latents_of_another_model_are_refused(mono, stereo):
  latents = mono.encode(music(1000), 44100)
  with pytest.raises(UserError, match=f'of model {mono.fingerprint}.*is {stereo.fingerprint}'):
    stereo.decode(latents)


@pytest.mark.parametrize('change', [
    dict(z=np.zeros((1, 3, 8, 8), np.float32)), dict(z=np.zeros((1, 2, 8, 4), np.float32)),
    dict(z=np.zeros((2, 2, 8, 8), np.float32)), dict(channels=2), dict(num_samples=90_000),
    dict(sample_rate=8000)])
def test_latents_of_a_wrong_shape_are_refused(mono, change):
  latents = dataclasses.replace(latents_for(mono, chunks=2), **change)
  with pytest.raises(UserError, match='do not fit'):
    mono.decode(latents)


def test_more_channels_than_a_stereo_model_has_are_refused(stereo):
  with pytest.raises(UserError, match='3 channels, this model takes at most 2'):
    stereo.encode(music(100, channels=3), 44100)
  with pytest.raises(UserError, match='do not fit'):
    stereo.decode(latents_for(stereo, chunks=1, channels=3))


@pytest.mark.parametrize('wrong', [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(mono, wrong):
  audio = music(3000)
  audio[0, 1500] = wrong
  for rate in (44100, 32000):
    with pytest.raises(UserError, match='NaN or infinite samples'):
      mono.encode(audio, rate)
  latents = latents_for(mono, chunks=2)
  latents.z[0, 1, 2, 3] = wrong
  with pytest.raises(UserError, match='latents hold NaN'):
    mono.decode(latents)


@pytest.mark.parametrize('audio', [
    np.zeros((1, 0)), np.zeros((0, 10)), np.zeros((1, 1, 10)), np.float32(1)])
def test_no_audio_is_refused(mono, audio):
  with pytest.raises(UserError, match=r'audio must be \[channels, samples\]'):
    mono.encode(audio, 44100)


def test_encoding_a_file_is_encoding_its_samples(mono, stereo, tmp_path):
  audio = music(900, channels=2)
  path = tmp_path / 'song.wav'
  with audio_io.AudioWriter(path, 44100, 2, tags={'title': 'a song'}) as writer:
    writer.write(audio)
  expected = stereo.encode(*audio_io.read(path))
  for got in (stereo.encode(path), stereo.encode(str(path), 44100)):
    np.testing.assert_array_equal(got.z, expected.z)
    assert got.tags == {'title': 'a song'}
    assert dataclasses.replace(got, z=0, tags={}) == dataclasses.replace(expected, z=0)
  with pytest.raises(UserError, match='is at 44100 Hz, not 48000'):
    stereo.encode(path, 48000)
  with pytest.raises(UserError, match='no such file'):
    stereo.encode(tmp_path / 'none.wav')
  with pytest.raises(UserError, match='say the sample rate'):
    stereo.encode(audio)


def test_the_readmes_snippet_runs_in_any_folder(mono, tmp_path, monkeypatch, capsys):
  snippet = (ROOT / 'README.md').read_text().partition('```python\n')[2].partition('```')[0]
  audio_io.write(tmp_path / 'original.wav', music(3000, channels=2), 44100)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(assets, 'TRAINING', tmp_path / 'original.wav')
  monkeypatch.setattr('m2l2.load', {'tiny': mono}.__getitem__)
  exec(snippet, {})
  assert sorted(os.listdir()) == ['clip.safetensors', 'clip.wav', 'original.wav']
  assert audio_io.read('clip.wav')[0].shape == (2, 3000) and '0.07 s, 2 channels' in capsys.readouterr().out


def test_what_people_read_of_a_codec_and_of_latents(mono, stereo):
  assert repr(mono).startswith(f'<Codec {mono.fingerprint}: mono, 44,100 Hz, 0.0')
  assert '8 x 8 numbers for 0.0232 s: 2,756 a second and channel>' in repr(mono)
  assert 'stereo, ' in repr(stereo) and repr(stereo).endswith(' a second>')
  latents = some_latents(num_samples=44100, channels=2, z=np.zeros((2, 43, 8, 8), np.float32))
  assert repr(latents) == ('<Latents: 1.00 s, 2 channels: 5,504 numbers, 5,504 a second (176 kbit/s), 16x fewer than '
                           'samples; model 0123456789abcdef>')
  assert (latents.seconds, latents.kbit_per_second) == (1.0, 5504 * 32 / 1000)
  assert '1 channel: 16 tokens, ' in repr(some_latents(z=np.zeros((1, 2, 8), np.int32)))
  assert repr(some_latents(sample_rate=None)).startswith('<m2l2.codec.latents.Latents object')
  for seconds, words in ((0.5, '0.50 s'), (59.99, '59.99 s'), (59.996, '1:00 min'), (188.4, '3:08 min'),
                         (3599.7, '1:00:00 h'), (3723, '1:02:03 h')):
    assert spoken_seconds(seconds) == words


def test_latents_as_a_plain_array_and_back():
  latents = some_latents(z=np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5)).astype(np.float32))
  array = latents.to_array()
  assert array.shape == (3, 40)
  np.testing.assert_array_equal(array[1], latents.z[:, 1].reshape(-1))
  np.testing.assert_array_equal(latents.with_array(array).z, latents.z)
  assert latents.with_array(array.astype(np.float64)).z.dtype == np.float32
  tokens = some_latents(z=np.arange(16, dtype=np.int32).reshape(1, 2, 8))
  np.testing.assert_array_equal(tokens.with_array(tokens.to_array()).z, tokens.z)
  with pytest.raises(UserError, match=r'must be \[3, 40\], as to_array gives it, not \[40, 3\]'):
    latents.with_array(array.T)


@pytest.mark.parametrize('audio', [
    np.zeros((1, 900), np.int16), np.zeros((1, 900), bool), np.zeros((1, 900), np.complex64), [[1, 2, 3]]])
def test_audio_that_is_not_of_floating_numbers_is_refused(mono, audio):
  for encode in (lambda: mono.encode(audio, 44100),
                 lambda: mono.encode_blocks([audio], sample_rate=44100, channels=1),
                 lambda: list(mono.stream_encode([audio], 44100, channels=1))):
    with pytest.raises(UserError, match=r'audio is .*: give float32 in \[-1, 1\]'):
      encode()


def test_blocks_of_any_floating_type_are_as_float32_and_others_are_told(mono):
  audio = music(900).astype(np.float16)
  for dtype in (np.float16, np.float64, jnp.bfloat16):
    blocks = [audio[0].astype(dtype), audio[:, :300].astype(dtype)]  # a signal of one channel may come as [samples]
    got = mono.encode_blocks(iter(blocks), sample_rate=44100, channels=1)
    expected = mono.encode(np.concatenate([audio, audio[:, :300]], axis=1).astype(dtype).astype(np.float32), 44100)
    np.testing.assert_array_equal(got.z, expected.z)
  for block in (music(900).T, music(900)[None], np.float32(0)):
    with pytest.raises(UserError, match=r'must be \[1 channels, samples\], not of shape'):
      mono.encode_blocks([block], sample_rate=44100, channels=1)


def test_a_rate_may_be_of_any_type_of_number_if_it_is_whole(mono):
  audio = music(900)
  expected = mono.encode(audio, 44100)
  for rate in (44100.0, np.int64(44100), np.float32(44100)):
    for latents in (mono.encode(audio, rate), mono.encode_blocks([audio], sample_rate=rate, channels=1)):
      assert type(latents.sample_rate) is int and latents.sample_rate == 44100
      np.testing.assert_array_equal(latents.z, expected.z)
    z = next(mono.stream_encode([np.repeat(audio, 2, axis=0)], rate, channels=2))
    np.testing.assert_allclose(z[:1], expected.z[:, 0], atol=2e-6)
    assert mono.layout(900, rate) == mono.layout(900, 44100)
    np.testing.assert_array_equal(mono.decode(dataclasses.replace(expected, sample_rate=rate)), mono.decode(expected))
  for rate in (44100.5, '44100', b'44100', np.nan, [44100, 44100]):
    for encode in (mono.encode, lambda audio, rate: mono.encode_blocks([audio], sample_rate=rate, channels=1),
                   lambda audio, rate: mono.stream_encode([audio], rate, channels=1)):
      with pytest.raises(UserError, match='sample_rate is .*: give a whole number of Hz'):
        encode(audio, rate)


@pytest.mark.parametrize('rate', [0, -44100])
def test_a_rate_that_is_none_is_refused(mono, rate):
  with pytest.raises(UserError, match='resample'):
    mono.encode(music(100), rate)


def test_broken_weights_are_told(mono):
  broken = copy.copy(mono)
  broken.params = jax.tree.map(lambda p: np.full(p.shape, np.nan, np.float32), mono.params)
  with pytest.raises(UserError, match='the weights are broken'):
    broken.encode(music(1000), 44100)


def test_weights_that_do_not_fit_are_refused():
  config = make_config()
  params = make_params(config)
  with pytest.raises(UserError, match='weights do not fit their config: .* is .*, should be'):
    Codec(config=make_config(num_latents=4), params=params, fingerprint='x')
  del params['encoder']
  with pytest.raises(UserError, match='encoder/.* is missing'):
    Codec(config=config, params=params, fingerprint='x')
  with pytest.raises(UserError, match='"model"'):
    Codec(config={'consistency': {}}, params=params, fingerprint='x')


def test_loading_what_is_not_there(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('grand', 'no/such/place', tmp_path / 'nowhere'):
    with pytest.raises(UserError, match='no such snapshot or workdir, nor a model in the box'):
      codec_lib.load(name)
  with pytest.raises(UserError, match='no snapshot in'):
    codec_lib.load(tmp_path)


def test_a_snapshot_is_found_by_path_and_by_workdir(stereo, tmp_path):
  make_snapshot(tmp_path / 'snapshot', 'debug,stereo')
  for path in (tmp_path, str(tmp_path / 'snapshot')):
    assert codec_lib.load(path).fingerprint == stereo.fingerprint


def test_resampling_is_that_of_audio_io(mono):
  """Encoding at a foreign rate = encoding what audio_io resamples to the first native rate."""
  audio = music(4000, sample_rate=22050)
  at_model = audio_io.resample(audio, from_rate=22050, to_rate=44100)
  np.testing.assert_allclose(
      mono.encode(audio, 22050).z, mono.encode(at_model, 44100).z, atol=1e-6)


def test_latents_of_unit_variance(mono, tmp_path):
  with pytest.raises(UserError, match='does not tell the scale'):
    mono.to_unit(np.zeros(3))
  config = make_config()
  save_snapshot(tmp_path / 'scaled', params=make_params(config), config=config, step=1,
                extra={'latents': {'mean': 0.25, 'std': 0.5}})
  codec = codec_lib.load(tmp_path / 'scaled')
  np.testing.assert_array_equal(codec.to_unit(np.float32([0.25, 0.75, -0.25])), [0, 1, -1])
  np.testing.assert_array_equal(codec.from_unit(np.float32([0, 1, -1, 9])), [0.25, 0.75, -0.25, 1])
